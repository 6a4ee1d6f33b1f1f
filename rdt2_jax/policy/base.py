"""What all policies over a backbone share: observations in, batches of compiled sizes, chunks out."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.action_expert.flow import Prefix
from rdt2_jax.actions.layout import ACTION_DIM, ARM_NAMES, CHUNK_LENGTH
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import ActionChunk, Observation
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.params import PyTree, named_leaves
from rdt2_jax.policy.backbone import Backbone, embed
from rdt2_jax.policy.clock import StageClock, timed
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.policy.prompts import Prompts, blank_observation
from rdt2_jax.policy.results import InvalidGeneration, InvalidGenerationError, NetworkOutputError
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.model import ModelInputs

Result = ActionChunk | InvalidGeneration

T = TypeVar("T")

CHUNK_SHAPE = (CHUNK_LENGTH, ACTION_DIM)

_EXTREME = 1e4
"""Noise, normalised actions and states in any sensible unit stay far below. Our choice."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class BackbonePolicy(abc.ABC):
    """Observations to action chunks, on one device. Implements the protocol `actions.types.Policy`.

    Attributes:
        kind: name, as `load_policy` takes it.
        published_jpeg_quality: what `PolicyOptions.jpeg_quality` "published" means.
        backbone: the vision-language model.
        normalizer: its field "action" is that of the chunks.
        options: choices.
    """

    kind: ClassVar[str]
    published_jpeg_quality: ClassVar[int | None] = None

    def __init__(self, backbone: Backbone, normalizer: LinearNormalizer, options: PolicyOptions) -> None:
        check_normalizer(normalizer)
        self.backbone, self.normalizer, self.options = backbone, normalizer, options
        quality = options.jpeg_quality
        jpeg_quality = self.published_jpeg_quality if quality == "published" else quality
        self._prompts = Prompts(backbone.preprocessor, options.prompt_lengths, jpeg_quality)
        self._device = backbone.device
        self._embedders = backbone.embedders

    def infer(self, observation: Observation) -> ActionChunk:
        """The chunk that answers an observation; carries its id and capture times back unchanged.

        Raises:
            DataError: no observation, or an instruction that is too long.
            InvalidGenerationError: what was generated is no chunk (VQ without constraints alone).
            NetworkOutputError: a network gave NaN or infinity, or a rotation that is none.
        """
        (result,) = self.infer_batch([observation])
        if isinstance(result, InvalidGeneration):
            raise InvalidGenerationError(result)
        return result

    def infer_batch(
        self,
        observations: Sequence[Observation],
        *,
        noise: Any = None,
        prefix: Prefix | None = None,
        clock: StageClock | None = None,
    ) -> list[Result]:
        """One answer per observation, in their order.

        Args:
            observations: any number; run in batches of `options.batch_sizes`.
            noise: flow policies alone: (B, 24, 20) to start from; None: drawn from the seed and a counter of the
                observations that were answered since `reset` without given noise.
            prefix: flow policies alone: actions (B, 24, 20) that the chunks are to agree with, in physical units and
                in the frames of the new chunks: relative to each arm's pose, in the policy frame, when the image of
                that arm in the NEW observation was taken. The rest of a chunk that is being executed is relative to
                older poses: express it anew first, see "Prefix" in docs/policies.md.
            clock: times the stages; the policy then waits for the device after each.

        Raises:
            DataError: as `infer`; what are no observations; noise or a prefix of another type or shape, or that float32
                cannot hold, also not after normalising.
            ConfigError: noise or prefix for a policy that takes none.
            NetworkOutputError: as `infer`, for the first observation of which it is true; none has an answer then.
        """
        results: list[Result] = []
        for part, inputs, extras in self._parts(observations, noise, prefix, clock):
            results += self._answer(part, inputs, extras, clock)
        return results

    @abc.abstractmethod
    def reset(self) -> None:
        """A new episode begins."""

    @abc.abstractmethod
    def _answer(
        self,
        observations: Sequence[Observation],
        inputs: ModelInputs,
        extras: Mapping[str, Any],
        clock: StageClock | None,
    ) -> list[Result]:
        """Runs one batch, on the device already. There may be more rows than observations; the rest is padding."""

    def _parts(
        self, observations: Sequence[Observation], noise: Any, prefix: Prefix | None, clock: StageClock | None
    ) -> Iterator[tuple[list[Observation], ModelInputs, dict[str, Any]]]:
        """Batches of compiled sizes: observations, what the backbone takes, and what else goes with them."""
        checked = checked_observations(observations)
        lengths = timed(clock, "processor", self._prompts.lengths, checked)
        extras = self._extras(checked, noise, prefix)
        for start, count, size in batches(len(checked), self.options.batch_sizes):
            rows = slice(start, start + count)
            inputs = timed(clock, "processor", self._inputs, checked[rows], lengths[rows], size)
            chosen = start + np.minimum(np.arange(size), count - 1)
            yield checked[rows], inputs, jax.tree.map(lambda x, chosen=chosen: x[chosen], extras)

    def _extras(self, observations: Sequence[Observation], noise: Any, prefix: Prefix | None) -> dict[str, Any]:
        """What goes with each observation beside images and words: arrays with as many rows."""
        if noise is not None or prefix is not None:
            raise ConfigError(
                f"the policy {self.kind} takes no noise and no prefix",
                where="noise" if noise is not None else "prefix",
                fix="leave them out, or use a flow policy (fm, one-step)",
            )
        return {}

    def _inputs(self, observations: Sequence[Observation], lengths: Sequence[int], size: int) -> ModelInputs:
        return jax.device_put(self._prompts.inputs(observations, lengths, size), self._device)

    def _embed(self, inputs: ModelInputs, clock: StageClock | None) -> jax.Array:
        return timed(clock, "vision", embed, self._embedders, self.backbone.config, inputs, self.backbone.compute)

    def _compile(self) -> None:
        """Runs zeros through every prompt length and batch size, on the way that observations take."""
        if not self.options.compile_at_start:
            return
        for size in self.options.batch_sizes:
            for length in self.options.prompt_lengths:
                inputs = self._prompts.inputs_of_length([blank_observation()], length, size)
                self._compile_for(jax.device_put(inputs, self._device), size)

    @abc.abstractmethod
    def _compile_for(self, inputs: ModelInputs, size: int) -> None:
        """Runs a batch through all stages; answers are thrown away."""

    def _require_finite_backbone(
        self, observations: Sequence[Observation], inputs: ModelInputs, embeddings: jax.Array, keys_values: Any
    ) -> None:
        """`_require_finite` of the stages "vision" and "prefill": asked when an answer is not finite, to say why."""
        valid = inputs.valid  # what attention gives for padding is never read
        stages = {
            "vision": jnp.where(valid[:, :, None], embeddings, 0),
            "prefill": jax.tree.map(lambda x: jnp.where(valid[:, None, :, None], x, 0), keys_values),
        }
        self._require_finite(observations, stages)

    def _chunks(
        self,
        observations: Sequence[Observation],
        normalized: np.ndarray,
        stage: str,
        extras: Mapping[str, Any] = _NOTHING,
    ) -> list[ActionChunk]:
        """Chunks in physical units from normalised ones (rows, 24, 20); rows behind the observations are padding.

        Raises:
            NetworkOutputError: what the stage gave is not finite, or not once it is unnormalised, or has rotations
                that are none; names the first observation. `extras` are searched for numbers that explain it.
        """
        self._require_finite(observations, {stage: normalized}, extras)
        with np.errstate(over="ignore"):  # an action that becomes infinite is refused below
            actions = np.asarray(self.normalizer.unnormalize(normalized[: len(observations)]), np.float32)
        chunks = []
        for observation, row in zip(observations, actions, strict=True):
            try:
                chunks.append(chunk_of(observation, row))
            except DataError as error:
                raise NetworkOutputError(
                    "a network gave numbers that are no chunk",
                    where=f"policy {self.kind}, stage {stage}",
                    expected=error.expected,
                    found=f"for observation {observation.id!r}: {error.what}: {error.found}",
                    fix=f"{_extremes(observations, extras)}the weights are damaged or untrained, or do not belong to "
                    "this backbone or normalizer: check the files",
                ) from error
        return chunks

    def _require_finite(
        self, observations: Sequence[Observation], stages: Mapping[str, Any], extras: Mapping[str, Any] = _NOTHING
    ) -> None:
        """Raises for the first stage whose values, a tree of arrays with a row per observation, are not finite.

        `extras`: what else the stage read, see `_extras`.

        Raises:
            NetworkOutputError: names policy, stage and the first observation.
        """
        for stage, tree in stages.items():
            for leaf in jax.tree.leaves(tree):
                xp = np if isinstance(leaf, np.ndarray) else jnp  # what is on the host already stays there
                finite = np.asarray(xp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))))
                if finite.all():
                    continue
                first = int(np.argmin(finite))
                name = repr(observations[first].id) if first < len(observations) else "of zeros, at the start"
                raise NetworkOutputError(
                    "a network gave NaN or infinity",
                    where=f"policy {self.kind}, stage {stage}",
                    expected="finite numbers",
                    found=f"not finite in {(~finite).sum()} of {len(finite)} rows, the first for observation {name}",
                    fix=f"{_extremes(observations, extras)}the weights of this stage are damaged, or too large for "
                    "the dtype: check the files, or try dtype=float32",
                )


def check_normalizer(normalizer: LinearNormalizer) -> None:
    """Verifies that a normalizer is one of action chunks.

    Raises:
        DataError: something else, no field "action", or one of another shape.
    """
    if not isinstance(normalizer, LinearNormalizer):
        raise DataError(
            "not a normalizer", where="normalizer", expected="LinearNormalizer", found=type(normalizer).__name__
        )
    shape = normalizer.field("action").scale.shape
    if shape not in ((ACTION_DIM,), CHUNK_SHAPE):
        raise DataError(
            "the normalizer is not one of action chunks",
            where="field action",
            expected=f"scale and offset of shape {(ACTION_DIM,)} or {CHUNK_SHAPE}",
            found=shape,
        )


def check_params(what: str, params: PyTree, specs: PyTree) -> None:
    """Verifies that parameters have the leaves and shapes that their configuration declares.

    Args:
        what: whose they are, for the message.
        params: tree of arrays.
        specs: tree of leaves with a shape, in the layout of `params`.

    Raises:
        ConfigError: lists every leaf that differs.
    """
    declared, problems = named_leaves(specs), Problems()
    found = {name: getattr(leaf, "shape", type(leaf).__name__) for name, leaf in named_leaves(params).items()}
    for name, spec in declared.items():
        if found.get(name) != spec.shape:
            problems.add(f"{name}: {found.get(name, 'missing')}, the configuration says {spec.shape}")
    for name in sorted(found.keys() - declared.keys()):
        problems.add(f"{name}: {found[name]}, not in the configuration")
    problems.raise_if_any(ConfigError, f"the parameters of {what} do not fit its configuration")


def batches(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """How `count` rows are run in batches of given sizes, ascending: (first row, rows, size of the batch)."""
    start = 0
    while start < count:
        rest = count - start
        size = next((size for size in sizes if size >= rest), sizes[-1])
        yield start, min(rest, size), size
        start += size


def chunk_of(observation: Observation, actions: np.ndarray) -> ActionChunk:
    """The answer to an observation: each arm's actions are relative to where it was when its own image was taken."""
    times = observation.capture_time_s
    return ActionChunk(
        actions=actions,
        anchor_time_s={arm: times[f"{arm}_wrist"] for arm in ARM_NAMES},
        observation_id=observation.id,
        capture_time_s=times,
    )


def checked_observations(observations: Iterable[Observation]) -> list[Observation]:
    """Observations as a list, also out of a generator.

    Raises:
        DataError: one observation alone, something that is no collection, or one in it that is no observation.
    """
    if isinstance(observations, Observation):
        raise DataError(
            "one observation where a list is needed", where="observations", fix="call infer(), or pass a list"
        )
    if not isinstance(observations, Iterable):
        raise DataError(
            "not observations",
            where="observations",
            expected="a list of rdt2_jax.Observation",
            found=type(observations).__name__,
        )
    listed = list(observations)
    for i, observation in enumerate(listed):
        if not isinstance(observation, Observation):
            raise DataError(
                "not an observation",
                where=f"observations[{i}]",
                expected="rdt2_jax.Observation",
                found=type(observation).__name__,
            )
    return listed


def _extremes(observations: Sequence[Observation], extras: Mapping[str, Any]) -> str:
    """Names numbers with which networks overflow whatever their weights are; empty where there are none."""
    lines = []
    for name, tree in extras.items():
        floats = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype.kind == "f"]
        if not floats or not observations:
            continue
        largest = np.max([np.abs(leaf.reshape(len(leaf), -1)).max(axis=1) for leaf in floats], axis=0)
        row = int(np.argmax(largest))
        if largest[row] > _EXTREME:
            # rows behind the observations repeat the last one
            owner = observations[min(row, len(observations) - 1)].id
            lines.append(f"the {name} of observation {owner!r} reaches {largest[row]:.3g}")
    return f"{', '.join(lines)}: look there first; otherwise " if lines else ""
