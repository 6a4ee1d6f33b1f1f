"""VQ from images through tokens to chunks, beside brute force; generations that are no chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy
from small_policy import observation, observations, options

from rdt2_jax.action_expert.flow import Prefix
from rdt2_jax.action_tokenizer import tokenizer as action_tokenizer
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import ActionChunk, Policy
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.policy import (
    InvalidGeneration,
    InvalidGenerationError,
    NetworkOutputError,
    StageClock,
    VqPolicy,
    VqTokens,
)
from rdt2_jax.policy import vq as vq_module
from rdt2_jax.policy.backbone import Backbone
from rdt2_jax.policy.clock import STAGES
from rdt2_jax.policy.prompts import through_jpeg
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl import text as text_model
from rdt2_jax.qwen2_5_vl.generate import Generated
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.int8 import quantize_decoder
from rdt2_jax.qwen2_5_vl.processor import process
from rdt2_jax.qwen2_5_vl.prompt import action_prompt, left_pad

LAST, QUAD_END, IM_END, NUM_TOKENS = 151642, 151651, 151645, 27
ACTION_IDS = LAST - np.arange(1024)
LENGTH = 96
"""Of brute force: prompt and tokens, padded on the left, so that one compilation serves all steps."""


def make(backbone: Backbone | None = None, **choices: Any) -> VqPolicy:
    backbone = small_policy.backbone() if backbone is None else backbone
    choices = {"batch_sizes": (1, 2), "prompt_lengths": (64,), "jpeg_quality": None, **choices}
    return VqPolicy(backbone, small_policy.codec(), small_policy.normalizer(), options=options(**choices))


@pytest.fixture(scope="module")
def policy() -> VqPolicy:
    return make()


@pytest.fixture(scope="module")
def int8_backbone() -> Backbone:
    backbone = small_policy.backbone()
    params, _ = quantize_decoder(small_policy.stacked_params(backbone.config), head=True)
    return small_policy.with_params(backbone, model.unstacked(params))


@jax.jit
def _all_logits(params: Any, inputs: Any) -> jax.Array:
    """float32 (1, vocab) of the token that comes next: the whole head, nothing kept from one call to the next."""
    config = small_policy.backbone().config
    hidden = model.prefill(params, config, inputs, Compute()).hidden[:, -1:]
    return text_model.logits(params.text, config.text, hidden)[:, 0]


def next_logits(backbone: Backbone, ids: list[int], patches: Any) -> np.ndarray:
    batch = left_pad([ids], 151643, length=LENGTH)
    positions, following = token_positions(backbone.config, batch.input_ids, batch.mask, [[patches.grid]])
    inputs = model.ModelInputs(
        batch.input_ids, batch.mask, positions, following, patches.values[None, None], patches.grid
    )
    return np.asarray(_all_logits(backbone.params, inputs), np.float64)[0]


def brute_force(backbone: Backbone, seen: Any, picture: np.ndarray | None = None) -> tuple[list[int], Any, Any]:
    """Codes, their probabilities, and those of the stop tokens: everything anew for every token."""
    if picture is None:
        picture = np.concatenate([seen.images["left_wrist"], seen.images["right_wrist"]], axis=1)
    patches = process(picture, backbone.preprocessor.processor)
    ids = action_prompt(backbone.preprocessor.tokenizer, seen.instruction, len(patches.values) // 4)
    codes, probabilities, stops = [], [], []
    for _ in range(NUM_TOKENS):
        logits = next_logits(backbone, ids, patches)
        weights = np.exp(logits - logits.max())
        total = weights[ACTION_IDS].sum() + weights[[QUAD_END, IM_END]].sum()
        masked = np.full_like(logits, -np.inf)
        masked[ACTION_IDS] = logits[ACTION_IDS]
        chosen = int(np.argmax(masked))
        codes.append(LAST - chosen)
        probabilities.append(weights[chosen] / total)
        stops.append(weights[[QUAD_END, IM_END]].sum() / total)
        ids = [*ids, chosen]
    return codes, probabilities, stops


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_tokens_are_those_of_brute_force(weights: str, policy: VqPolicy, int8_backbone: Backbone) -> None:
    backbone = small_policy.backbone() if weights == "float32" else int8_backbone
    chooser = policy if weights == "float32" else make(int8_backbone)
    seen = observations(3)
    found = chooser.tokens(seen)
    assert found.observation_ids == ("observation 0", "observation 1", "observation 2")
    assert (found.tokens.dtype, found.probabilities.dtype, found.stop_mass.dtype) == (np.int32, np.float32, np.float32)
    assert found.tokens.shape == found.probabilities.shape == found.stop_mass.shape == (3, NUM_TOKENS)
    rows = range(3) if weights == "float32" else (1,)
    for row in rows:
        codes, probabilities, stops = brute_force(backbone, seen[row])
        assert len(set(codes)) > 3, "a model that always says the same shows little"
        np.testing.assert_array_equal(found.tokens[row], codes)
        np.testing.assert_allclose(found.probabilities[row], probabilities, rtol=1e-4)
        np.testing.assert_allclose(found.stop_mass[row], stops, rtol=1e-4)
    np.testing.assert_array_equal(found.token_ids, LAST - found.tokens)


def test_stop_tokens_cannot_be_chosen_but_are_counted() -> None:
    """A head that would rather stop than act: tokens all the same, and probabilities that say so."""
    backbone = small_policy.backbone()
    params = backbone.params
    # the final norm leaves one number; with rows of both signs, one of the stop tokens is the likeliest unless it is 0
    norm = jnp.zeros_like(params.text.norm).at[0].set(1.0)
    stop = params.text.head.at[QUAD_END, 0].set(50.0).at[IM_END, 0].set(-50.0)
    for head, low, high in ((params.text.head, 0.0, 0.05), (stop, 0.95, 1.0)):
        text = dataclasses.replace(params.text, head=head, norm=norm)
        found = make(small_policy.with_params(backbone, dataclasses.replace(params, text=text))).tokens([observation()])
        assert low <= np.median(found.stop_mass) <= high
        assert ((found.tokens >= 0) & (found.tokens < 1024)).all()


def test_a_chunk_is_what_the_tokenizer_makes_of_the_tokens(policy: VqPolicy) -> None:
    seen, codec = observations(3), small_policy.codec()
    tokens = policy.tokens(seen)
    decoded = np.asarray(action_tokenizer.decode(codec.params, codec.config, jnp.asarray(tokens.tokens)))
    field = small_policy.normalizer().fields["action"]
    expected = (decoded - field.offset) / field.scale
    chunks = policy.infer_batch(seen)
    for row, (chunk, again) in enumerate(zip(chunks, policy.chunks(seen, tokens), strict=True)):
        assert isinstance(chunk, ActionChunk)
        np.testing.assert_allclose(chunk.actions * field.scale, expected[row] * field.scale, rtol=0, atol=1e-5)
        np.testing.assert_allclose(again.actions, chunk.actions, rtol=1e-5, atol=1e-6)
        assert chunk.observation_id == seen[row].id == again.observation_id
        assert chunk.anchor_time_s == {"left": 10.0 + row, "right": 10.015 + row}
        np.testing.assert_allclose(policy.infer(seen[row]).actions, chunk.actions, rtol=1e-4, atol=1e-5)
    assert isinstance(policy, Policy)
    with pytest.raises(DataError, match="tokens of other observations"):
        policy.chunks(seen[1:], tokens)


def test_tokens_that_cannot_be_decoded(policy: VqPolicy) -> None:
    """What someone changed on the way is checked: compiled, an index out of range would be some other code."""
    seen = observations(2)
    tokens = policy.tokens(seen)
    for strange in (99999, 1024, -1):
        codes = tokens.tokens.copy()
        codes[1, 4] = strange
        with pytest.raises(DataError, match=rf"1 tokens out of range(.|\n)*\[1, 4\](.|\n)*found: {strange}\b"):
            policy.chunks(seen, dataclasses.replace(tokens, tokens=codes))
    for codes in (tokens.tokens[:, :26], tokens.tokens.astype(np.float32)):
        with pytest.raises(DataError, match="not a token array"):
            policy.chunks(seen, dataclasses.replace(tokens, tokens=codes))
    with pytest.raises(DataError, match=r"one row per observation(.|\n)*found: 1\b"):
        policy.chunks(seen, dataclasses.replace(tokens, tokens=tokens.tokens[:1]))
    config = tokens.config.model_copy(update={"num_codes": 2048})
    with pytest.raises(DataError, match=r"tokens of another action tokenizer(.|\n)*num_codes"):
        policy.chunks(seen, dataclasses.replace(tokens, config=config))


def test_observations_may_come_from_a_generator(policy: VqPolicy) -> None:
    seen = observations(3)
    tokens = policy.tokens(one for one in seen)  # pyright: ignore[reportArgumentType]
    assert tokens.observation_ids == ("observation 0", "observation 1", "observation 2")
    chunks = policy.chunks((one for one in seen), tokens)  # pyright: ignore[reportArgumentType]
    assert [chunk.observation_id for chunk in chunks] == list(tokens.observation_ids)


def test_the_head_is_not_kept_where_a_few_rows_will_do(policy: VqPolicy) -> None:
    params = small_policy.backbone().params.text
    assert params.head is not None
    assert policy.backbone.params.text.head is None
    assert policy.backbone.params.text.norm is params.norm
    assert make(constrained=False).backbone.params.text.head is params.head


def test_tied_embeddings_are_head_enough() -> None:
    """The same tokens as of a model whose head is a copy of its embedding."""
    backbone, seen = small_policy.backbone(), [observation()]
    params, config = backbone.params, backbone.config
    copied = dataclasses.replace(params, text=dataclasses.replace(params.text, head=params.text.embedding))
    tied = dataclasses.replace(
        backbone,
        config=config.model_copy(update={"text": config.text.model_copy(update={"tie_embeddings": True})}),
        params=dataclasses.replace(params, text=dataclasses.replace(params.text, head=None)),
    )
    found, expected = make(tied).tokens(seen), make(small_policy.with_params(backbone, copied)).tokens(seen)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert not np.array_equal(found.tokens, make().tokens(seen).tokens)


def test_the_normalizer_has_to_be_that_of_the_action_tokenizer() -> None:
    backbone, codec, normalizer = small_policy.backbone(), small_policy.codec(), small_policy.normalizer()
    field = normalizer.fields["action"]
    for changes in ({"scale": field.scale * np.float32(1.1)}, {"offset": field.offset + np.float32(0.1)}):
        own = LinearNormalizer({"action": dataclasses.replace(field, **changes)})
        with pytest.raises(ConfigError, match=f"another normalizer(.|\n)*{next(iter(changes))} differs"):
            VqPolicy(backbone, dataclasses.replace(codec, normalizer=own), normalizer, options=options())
    pose = LinearNormalizer({"pose": field})
    with pytest.raises(ConfigError, match="another normalizer"):
        VqPolicy(backbone, dataclasses.replace(codec, normalizer=pose), normalizer, options=options())
    rounded = LinearNormalizer({"action": dataclasses.replace(field, scale=field.scale * np.float32(1 + 1e-6))})
    VqPolicy(backbone, dataclasses.replace(codec, normalizer=rounded), normalizer, options=options())


def test_tokens_by_group_and_level() -> None:
    config = small_policy.codec().config
    one = np.arange(NUM_TOKENS)[None]
    entries = list(VqTokens(config, ("a",), one.astype(np.int32), LAST - one, one / 100, one / 1000).entries())
    assert [entry.token for entry in entries] == list(range(27))
    assert [entry.group for entry in entries] == ["pos"] * 18 + ["rot"] * 6 + ["grip"] * 3
    assert [(entry.latent, entry.level) for entry in entries[:8]] == [*((0, i) for i in range(6)), (1, 0), (1, 1)]
    assert [(entry.latent, entry.level) for entry in entries[18:]] == [
        *[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)],
        *[(0, 0), (1, 0), (2, 0)],
    ]
    assert (entries[26].token_id, entries[26].probability, entries[26].stop_probability) == (LAST - 26, 0.26, 0.026)


def test_the_decoder_does_not_run_for_tokens_that_are_known(policy: VqPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """27 tokens are the prompt's and 26 steps: the compiled loop has 26 turns, and the cache no room for more."""
    inputs = policy._prompts.inputs([observation()], [45], 1)
    prompt = policy._read(jax.device_put(inputs), None)[1]
    arguments = (policy._decoder, prompt, policy._rows, policy._action_ids)

    def run(params: Any, prompt: Any, rows: Any, ids: Any) -> Any:
        return vq_module.decode_actions(params, policy.backbone.config.text, prompt, rows, ids, Compute(), NUM_TOKENS)

    loops = [e for e in jax.make_jaxpr(run)(*arguments).jaxpr.eqns if e.primitive.name == "scan"]
    assert [loop.params["length"] for loop in loops] == [26]
    shapes = [leaf.aval.shape for leaf in loops[0].invars if leaf.aval.ndim == 4]
    assert set(shapes) == {(1, 2, 64 + 26, 16)}
    heads = [leaf.aval.shape for leaf in loops[0].invars if leaf.aval.shape[-1:] == (64,) and leaf.aval.ndim == 2]
    assert (1024 + 2, 64) in heads


def test_jpeg_is_a_step_of_its_own() -> None:
    """As published, VQ sees images that went through JPEG: the same as tokens of that picture by brute force."""
    seen, backbone = observation(), small_policy.backbone()
    picture = np.concatenate([seen.images["left_wrist"], seen.images["right_wrist"]], axis=1)
    (codes, probabilities, _) = brute_force(backbone, seen, through_jpeg(picture, 95))
    found = make(jpeg_quality="published").tokens([seen])
    np.testing.assert_array_equal(found.tokens[0], codes)
    np.testing.assert_allclose(found.probabilities[0], probabilities, rtol=1e-4)
    plain = make(jpeg_quality=None).tokens([seen])
    assert np.abs(plain.probabilities / found.probabilities - 1).max() > 1e-3


def test_jpeg_at_half_the_resolution_of_colours() -> None:
    """Grey survives; colours that alternate from pixel to pixel do not."""
    rows = np.arange(64)
    smooth = np.repeat((2 * rows + rows[:, None])[..., None], 3, axis=2).astype(np.uint8)
    assert np.abs(through_jpeg(smooth, 95).astype(int) - smooth).max() <= 3
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = (200, 40, 40)
    stripes[:, 1::2] = (40, 92, 200)
    blurred = through_jpeg(stripes, 95).astype(int)
    assert np.abs(blurred - stripes).max() > 60
    assert through_jpeg(stripes, 10).shape == stripes.shape


def test_stages_are_timed(policy: VqPolicy) -> None:
    clock = StageClock()
    policy.infer_batch([observation()], clock=clock)
    assert list(clock.milliseconds) == [stage for stage in STAGES if stage != "expert"]


@pytest.mark.parametrize("constrained", [True, False])
def test_nothing_compiles_after_the_start(compilations: Any, constrained: bool) -> None:
    start = {"compile_at_start": True, "batch_sizes": (2,), "prompt_lengths": (56,)}
    policy = make(constrained=constrained, **start)
    started = compilations.count
    assert started >= 1, "decoding at the least"
    policy.infer_batch(observations(3, instructions=["Pick up the apple.", "Wipe."]))
    if constrained:
        policy.infer(observation())
        policy.chunks(observations(1), policy.tokens(observations(1)))
    assert compilations.count == started
    policy.infer_batch(observations(1), clock=StageClock())
    assert compilations.count == started
    jax.jit(lambda x: x + 1)(np.zeros(2))
    assert compilations.count > started, "the counter counts"


def test_free_generation_of_words_is_invalid() -> None:
    """A random model among 152064 words does not write a chunk."""
    free, seen = make(constrained=False), observations(2)
    results = free.infer_batch(seen)
    for result, one in zip(results, seen, strict=True):
        assert isinstance(result, InvalidGeneration)
        assert result.observation_id == one.id
        assert len(result.tokens) <= NUM_TOKENS + 1
        assert result.foreign_ids
        assert "no action tokens" in result.reason
    with pytest.raises(InvalidGenerationError, match="answer to observation 'observation 0'") as caught:
        free.infer(seen[0])
    assert caught.value.result == results[0]
    with pytest.raises(ConfigError, match="without constraints there need not be action tokens"):
        free.tokens(seen)


def test_free_generations_are_judged_one_by_one(monkeypatch: pytest.MonkeyPatch, policy: VqPolicy) -> None:
    """A chunk beside generations that end too soon, with the wrong word, never, or contain a word."""
    free = make(constrained=False, batch_sizes=(6,))
    seen = observations(5)
    codes = policy.tokens(seen[:1]).tokens[0]
    chunk, word = (LAST - codes).tolist(), 17
    rows = [
        [*chunk, QUAD_END],
        [*chunk[:20], QUAD_END],
        [*chunk, IM_END],
        [*chunk, chunk[0]],
        [*chunk[:5], word, *chunk[6:], QUAD_END],
        [*chunk[:3], QUAD_END],  # padding of the batch
    ]
    lengths = np.array([len(row) for row in rows])
    stopped = np.array([row[-1] in (QUAD_END, IM_END) for row in rows])
    ids = np.array([row + [151643] * (28 - len(row)) for row in rows], np.int32)
    said = Generated(jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(stopped), jnp.ones(6, bool))
    monkeypatch.setattr(vq_module, "_generate", lambda *_, **__: said)
    good, *bad = free.infer_batch(seen)
    assert isinstance(good, ActionChunk)
    np.testing.assert_allclose(good.actions, policy.infer(seen[0]).actions, rtol=1e-4, atol=1e-5)
    assert [result.reason for result in bad] == [
        "20 tokens before the end, a chunk has 27",
        "it ends with token 151645, not with <|quad_end|>",
        "no end after 28 tokens; 28 tokens before the end, a chunk has 27",
        "1 of them are no action tokens",
    ]
    assert [result.num_tokens_before_end for result in bad] == [20, 27, 28, 27]
    assert [result.foreign_ids for result in bad] == [(), (), (), (word,)]
    assert [result.tokens for result in bad] == [tuple(row) for row in rows[1:5]]
    assert [result.observation_id for result in bad] == [one.id for one in seen[1:]]


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("leaf", "stage"),
    [("vision.merger.norm", "vision"), ("text.layers.2.mlp.down.weight", "prefill"), ("text.norm", "decode")],
)
def test_damaged_weights_give_no_chunk(leaf: str, stage: str, constrained: bool) -> None:
    """Also without constraints, where a choice among NaN would look like some word."""
    backbone = small_policy.backbone()
    damaged = small_policy.with_params(backbone, small_policy.with_nan(backbone.params, leaf))
    with pytest.raises(NetworkOutputError, match=f"policy vq, stage {stage}\n"):
        make(damaged, constrained=constrained).infer(observation())


def test_a_damaged_action_tokenizer_gives_no_chunk() -> None:
    codec = small_policy.codec()
    leaf = "networks.pos.decoder.conv_out.bias"
    damaged = small_policy.with_params(codec, small_policy.with_nan(codec.params, leaf))
    damaged_policy = VqPolicy(
        small_policy.backbone(),
        damaged,
        small_policy.normalizer(),
        options=options(batch_sizes=(1, 2), prompt_lengths=(64,)),
    )
    with pytest.raises(NetworkOutputError, match="policy vq, stage detokenise\n"):
        damaged_policy.infer(observation())


def test_parts_and_arguments_that_do_not_fit(policy: VqPolicy) -> None:
    backbone, codec, normalizer = small_policy.backbone(), small_policy.codec(), small_policy.normalizer()
    without_head = model.unstacked(model.with_first_layers(small_policy.stacked_params(backbone.config), 4))
    with pytest.raises(ConfigError, match="this backbone has no head"):
        VqPolicy(small_policy.with_params(backbone, without_head), codec, normalizer, options=options())
    with pytest.raises(ConfigError, match="512 codes, but the vocabulary has 256 pieces"):
        VqPolicy(small_policy.byte_backbone(), small_policy.codec(512), normalizer, options=options())
    config = codec.config.model_copy(update={"chunk_length": 32})
    with pytest.raises(ConfigError, match="the tokenizer has 32, a chunk 24 frames"):
        VqPolicy(backbone, dataclasses.replace(codec, config=config), normalizer, options=options())
    wider = small_policy.with_params(codec, small_policy.codec(512).params)
    with pytest.raises(ConfigError, match=r"do not fit its configuration(.|\n)*codebooks\.pos"):
        VqPolicy(backbone, wider, normalizer, options=options())
    with pytest.raises(DataError, match=r"not a normalizer(.|\n)*found: NoneType"):
        VqPolicy(backbone, codec, None, options=options())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="VQ takes no prefix"):
        make(with_prefix=True)
    with pytest.raises(ConfigError, match="takes no noise and no prefix"):
        policy.infer_batch([observation()], noise=np.zeros((1, 24, 20), np.float32))
    zeros = np.zeros((1, 24, 20), np.float32)
    with pytest.raises(ConfigError, match="takes no noise and no prefix"):
        policy.infer_batch([observation()], prefix=Prefix(zeros, zeros[:, :, 0]))
    with pytest.raises(DataError, match="nothing to answer"):
        policy.tokens([])
