"""RDT2-VQ: the language model writes action tokens, and the action tokenizer makes a chunk of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.action_tokenizer.tokenizer import check_tokens, decode, param_specs
from rdt2_jax.action_tokenizer.vocabulary import ids_to_tokens, parse_generation, tokens_to_ids
from rdt2_jax.actions.layout import ACTION_DIM, CHUNK_LENGTH
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import ActionChunk, Observation
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.policy.backbone import Backbone, read_prompt, without_images
from rdt2_jax.policy.base import BackbonePolicy, Result, batches, check_normalizer, check_params, checked_observations
from rdt2_jax.policy.clock import StageClock, timed
from rdt2_jax.policy.constrained import Decoded, decode_actions
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.results import InvalidGeneration, VqTokens
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.config import TextConfig
from rdt2_jax.qwen2_5_vl.generate import Generated, Prompt, continue_prompt
from rdt2_jax.qwen2_5_vl.model import ModelInputs
from rdt2_jax.qwen2_5_vl.text import output_rows
from rdt2_jax.qwen2_5_vl.tokenizer import Tokenizer

_decode_actions = jax.jit(decode_actions, static_argnums=(1, 5, 6))

_generate = jax.jit(
    continue_prompt, static_argnums=(1, 3), static_argnames=("max_new_tokens", "stop_ids", "pad_id", "sampling")
)


Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, eq=False)
class _Run(Generic[Answer]):
    """One batch on the device: what every stage gave."""

    embeddings: jax.Array
    prompt: Prompt
    answer: Answer


class VqPolicy(BackbonePolicy):
    """RDT2-VQ. It reads no proprioceptive state: `Observation.state` changes nothing.

    Attributes:
        backbone: with constrained decoding, without its head: the rows that are needed were taken out of it.
        tokenizer: the action tokenizer; its own normalizer, where it has one, is the same as the policy's.
    """

    kind: ClassVar[str] = "vq"
    published_jpeg_quality: ClassVar[int | None] = 95

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: LoadedTokenizer,
        normalizer: LinearNormalizer,
        *,
        options: PolicyOptions | None = None,
    ) -> None:
        """Takes parts in memory; see `load_policy` for files.

        Args:
            backbone: all layers, with final norm and head.
            tokenizer: the action tokenizer that the backbone was trained with, on the same device.
            normalizer: what the tokenizer was trained with.
            options: None: the defaults.

        Raises:
            ConfigError: parts that do not fit each other, parameters of the tokenizer that do not fit its
                configuration, or a backbone without head.
            DataError: the normalizer is not one of action chunks.
        """
        options = PolicyOptions() if options is None else options
        words = backbone.preprocessor.tokenizer
        check_tokenizer(tokenizer.config, words, backbone.config.text)
        check_params("the action tokenizer", tokenizer.params, param_specs(tokenizer.config))
        check_normalizer(normalizer)
        if tokenizer.normalizer is not None:
            check_same_normalizer(tokenizer.normalizer, normalizer)
        options.check(self.kind)
        if backbone.params.text.norm is None:
            raise ConfigError("this backbone has no head", where="text.norm", fix="load it with all its layers")
        # constrained decoding needs some rows of the head, which is too large to be kept for nothing (1 GB of 7B)
        decoder = backbone.decoder() if options.constrained else backbone.params.text
        kept = dataclasses.replace(backbone, params=dataclasses.replace(backbone.params, text=decoder))
        super().__init__(kept, normalizer, options)
        self.tokenizer, self._decoder = tokenizer, decoder
        self._codec = jax.device_put(tokenizer.params, self._device)
        self._stop_ids = (words.control.quad_end, words.control.im_end)
        ids = tokens_to_ids(np.arange(tokenizer.config.num_codes), words.num_pieces).astype(np.int32)
        self._action_ids = jax.device_put(ids, self._device)
        self._rows = output_rows(backbone.params.text, jnp.asarray([*ids, *self._stop_ids], jnp.int32))
        self._compile()

    def reset(self) -> None:
        """A new episode begins: nothing is kept between observations."""

    def tokens(self, observations: Sequence[Observation], *, clock: StageClock | None = None) -> VqTokens:
        """The tokens that the model chooses, and how sure it is; `chunks` makes chunks of them.

        Raises:
            ConfigError: the policy decodes without constraints.
            DataError: no observations, or an instruction that is too long.
            NetworkOutputError: a network gave NaN or infinity.
        """
        if not self.options.constrained:
            raise ConfigError(
                "without constraints there need not be action tokens",
                where="constrained",
                fix="make the policy with constrained=True",
            )
        names: list[str] = []
        found: list[tuple[np.ndarray, ...]] = []
        for part, inputs, _ in self._parts(observations, None, None, clock):
            run = self._decode(inputs, clock)
            answer = jax.device_get((run.answer.codes, run.answer.probabilities, run.answer.stop_mass))
            self._require_decoded(part, inputs, run, answer[1])
            names += [observation.id for observation in part]
            found.append(tuple(array[: len(part)] for array in answer))
        if not names:
            raise DataError("nothing to answer", where="observations", expected="one observation or more")
        codes, probabilities, stop_mass = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        ids = np.asarray(tokens_to_ids(codes, self.backbone.preprocessor.tokenizer.num_pieces), np.int32)
        return VqTokens(self.tokenizer.config, tuple(names), codes, ids, probabilities, stop_mass)

    def chunks(self, observations: Sequence[Observation], tokens: VqTokens) -> list[ActionChunk]:
        """Chunks of the tokens that `tokens` gave for these observations.

        Raises:
            DataError: tokens of other observations or of another action tokenizer, or that are none.
            NetworkOutputError: the action tokenizer gave NaN or infinity, or a rotation that is none.
        """
        observations, config = checked_observations(observations), self.tokenizer.config
        names = tuple(observation.id for observation in observations)
        if names != tokens.observation_ids:
            raise DataError("tokens of other observations", expected=names, found=tokens.observation_ids)
        if tokens.config != config:
            raise DataError("tokens of another action tokenizer", expected=config, found=tokens.config)
        checked = check_tokens(tokens.tokens, config)
        if len(checked) != len(names):
            raise DataError(
                "not as many tokens as observations",
                where="tokens",
                expected=f"{len(names)}, one row per observation",
                found=len(checked),
            )
        results: list[ActionChunk] = []
        for start, count, size in batches(len(names), self.options.batch_sizes):
            codes = checked[start + np.minimum(np.arange(size), count - 1)]
            normalized = self._normalized(jax.device_put(codes, self._device))
            results += self._chunks(observations[start : start + count], jax.device_get(normalized), "detokenise")
        return results

    def _answer(
        self,
        observations: Sequence[Observation],
        inputs: ModelInputs,
        extras: Mapping[str, Any],
        clock: StageClock | None,
    ) -> list[Result]:
        if self.options.constrained:
            run = self._decode(inputs, clock)
            return [*timed(clock, "detokenise", self._detokenized, observations, inputs, run)]
        run = self._generate(inputs, clock)
        return timed(clock, "detokenise", self._parsed, observations, inputs, run)

    def _read(self, inputs: ModelInputs, clock: StageClock | None) -> tuple[jax.Array, Prompt]:
        embeddings = self._embed(inputs, clock)
        text, compute = self.backbone.config.text, self.backbone.compute
        batch = without_images(inputs)
        return embeddings, timed(clock, "prefill", read_prompt, self._decoder, text, embeddings, batch, compute)

    def _decode(self, inputs: ModelInputs, clock: StageClock | None) -> _Run[Decoded]:
        embeddings, prompt = self._read(inputs, clock)
        text, compute, count = self.backbone.config.text, self.backbone.compute, self.tokenizer.config.num_tokens
        head = self._rows, self._action_ids
        decoded = timed(clock, "decode", _decode_actions, self._decoder, text, prompt, *head, compute, count)
        return _Run(embeddings, prompt, decoded)

    def _generate(self, inputs: ModelInputs, clock: StageClock | None) -> _Run[Generated]:
        """Any tokens at all, until one of the stop tokens, or one more than a chunk has."""
        embeddings, prompt = self._read(inputs, clock)
        generated = timed(
            clock,
            "decode",
            _generate,
            self._decoder,
            self.backbone.config.text,
            prompt,
            self.backbone.compute,
            max_new_tokens=self.tokenizer.config.num_tokens + 1,
            stop_ids=self._stop_ids,
            pad_id=self.backbone.preprocessor.tokenizer.control.endoftext,
        )
        return _Run(embeddings, prompt, generated)

    def _normalized(self, codes: jax.Array) -> jax.Array:
        return decode(self._codec, self.tokenizer.config, codes)

    def _detokenized(
        self, observations: Sequence[Observation], inputs: ModelInputs, run: _Run[Decoded]
    ) -> list[ActionChunk]:
        normalized, probabilities = jax.device_get((self._normalized(run.answer.codes), run.answer.probabilities))
        self._require_decoded(observations, inputs, run, probabilities)
        return self._chunks(observations, normalized, "detokenise")

    def _parsed(self, observations: Sequence[Observation], inputs: ModelInputs, run: _Run[Generated]) -> list[Result]:
        generated: Generated = jax.tree.map(np.asarray, jax.device_get(run.answer))
        # a choice by numbers that are none is no choice, but would look like any other token
        self._require_decoded(observations, inputs, run, np.where(np.asarray(generated.finite), 0.0, np.nan))
        words, config = self.backbone.preprocessor.tokenizer, self.tokenizer.config
        parsed = parse_generation(
            np.asarray(generated.tokens),
            config.num_tokens,
            config.num_codes,
            vocabulary_size=words.num_pieces,
            chunk_end_id=words.control.quad_end,
        )
        results: list[Result] = [
            invalid_generation(observation, generated, i, config, words) for i, observation in enumerate(observations)
        ]
        good = [i for i in range(len(observations)) if parsed.valid[i]]
        normalized = jax.device_get(self._normalized(jax.device_put(parsed.tokens, self._device)))
        # rows that are no chunks were clamped into range, and decode to something: none of it is used
        chunks = self._chunks([observations[i] for i in good], normalized[good], "detokenise")
        for i, chunk in zip(good, chunks, strict=True):
            results[i] = chunk
        return results

    def _require_decoded(
        self, observations: Sequence[Observation], inputs: ModelInputs, run: _Run[Any], values: np.ndarray
    ) -> None:
        """Raises NetworkOutputError if `values`, one row per observation, are not finite."""
        if not np.isfinite(values).all():
            self._require_finite_backbone(observations, inputs, run.embeddings, run.prompt.keys_values)
            self._require_finite(observations, {"decode": values})

    def _compile_for(self, inputs: ModelInputs, size: int) -> None:
        self._answer([], inputs, {}, None)


def invalid_generation(
    observation: Observation, generated: Generated, row: int, config: ActionTokenizerConfig, words: Tokenizer
) -> InvalidGeneration:
    """What is wrong with a generation that `parse_generation` does not call valid.

    Args:
        observation: that was to be answered.
        generated: on the host.
        row: of the batch.
        config: of the action tokenizer.
        words: tokenizer of the language model.
    """
    length, stopped = int(generated.lengths[row]), bool(generated.stopped[row])
    tokens = tuple(int(token) for token in generated.tokens[row][:length])
    before = tokens[:-1] if stopped else tokens
    _, is_foreign = ids_to_tokens(np.asarray(before, np.int64), config.num_codes, words.num_pieces)
    foreign = tuple(token for token, strange in zip(before, is_foreign, strict=True) if strange)
    reasons = []
    if not stopped:
        reasons.append(f"no end after {length} tokens")
    elif tokens[-1] != words.control.quad_end:
        reasons.append(f"it ends with token {tokens[-1]}, not with <|quad_end|>")
    if len(before) != config.num_tokens:
        reasons.append(f"{len(before)} tokens before the end, a chunk has {config.num_tokens}")
    if foreign:
        reasons.append(f"{len(foreign)} of them are no action tokens")
    return InvalidGeneration(observation.id, tokens, len(before), foreign, "; ".join(reasons))


def check_tokenizer(config: ActionTokenizerConfig, words: Tokenizer, text: TextConfig) -> None:
    """Verifies that an action tokenizer makes RDT2's chunks, and that the language model has words for its codes.

    Raises:
        ConfigError: names everything that does not fit.
    """
    problems = Problems()
    if config.chunk_length != CHUNK_LENGTH:
        problems.add(f"chunk_length: the tokenizer has {config.chunk_length}, a chunk {CHUNK_LENGTH} frames")
    ids = tokens_to_ids(np.arange(config.num_codes), words.num_pieces)
    if config.num_codes > words.num_pieces:
        problems.add(f"num_codes: {config.num_codes} codes, but the vocabulary has {words.num_pieces} pieces")
    elif not all(words.is_piece(int(token_id)) for token_id in ids):
        strange = [int(token_id) for token_id in ids if not words.is_piece(int(token_id))]
        problems.add(f"ids of {len(strange)} action tokens are no pieces of the vocabulary: {strange[:5]}")
    if max(int(ids.max()), words.control.quad_end, words.control.im_end) >= text.vocab_size:
        problems.add(f"the head has {text.vocab_size} rows, fewer than the action and stop tokens need")
    problems.raise_if_any(ConfigError, "the action tokenizer does not fit the language model")


def check_same_normalizer(own: LinearNormalizer, given: LinearNormalizer) -> None:
    """Verifies that the normalizer that came with an action tokenizer maps actions as the given one does.

    Files of several formats may have rounded it: a ten-thousandth is no difference.

    Args:
        own: that came with the action tokenizer.
        given: of the policy; one of action chunks.

    Raises:
        ConfigError: it maps actions in another way, or no actions.
    """
    field, other, problems = own.fields.get("action"), given.field("action"), Problems()
    if field is None or field.scale.shape not in ((ACTION_DIM,), (CHUNK_LENGTH, ACTION_DIM)):
        problems.add(f"the tokenizer's own is not one of action chunks: {own}")
    else:
        for name, tolerance in (("scale", 0.0), ("offset", 1e-4)):
            expected, found = np.broadcast_arrays(getattr(field, name), getattr(other, name))
            wrong = ~np.isclose(found, expected, rtol=1e-4, atol=tolerance)
            channels = np.flatnonzero(wrong.reshape(-1, ACTION_DIM).any(axis=0))
            if len(channels):
                at = tuple(np.argwhere(wrong)[0])
                problems.add(
                    f"{name} differs in {len(channels)} of {ACTION_DIM} channels, first in channel {at[-1]}: "
                    f"{expected[at]:g} beside the tokenizer, {found[at]:g} given"
                )
    problems.raise_if_any(
        ConfigError,
        "the action tokenizer was trained with another normalizer",
        where="normalizer",
        fix="give the normalizer that came with the tokenizer",
    )
