"""FM and one-step from images to chunks, beside a composition written out step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy
from small_policy import INSTRUCTIONS, observation, observations, options

from rdt2_jax.action_expert.flow import Prefix, Schedule
from rdt2_jax.action_expert.model import Condition, unstacked, velocity
from rdt2_jax.actions.types import ActionChunk, Observation, Policy
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.layers.compute import Compute
from rdt2_jax.policy import FmPolicy, NetworkOutputError, OneStepPolicy, StageClock
from rdt2_jax.policy.clock import STAGES
from rdt2_jax.qwen2_5_vl import model
from rdt2_jax.qwen2_5_vl.grid import token_positions
from rdt2_jax.qwen2_5_vl.processor import process
from rdt2_jax.qwen2_5_vl.prompt import action_prompt

_velocity = jax.jit(velocity, static_argnums=(1, 6))
_prefill = jax.jit(model.prefill, static_argnums=(1, 3))


def make(kind: type[FmPolicy] = FmPolicy, layers: tuple[int, ...] = (), **choices: Any) -> FmPolicy:
    parts = small_policy.backbone(), small_policy.expert(layers), small_policy.normalizer()
    return kind(*parts, options=options(batch_sizes=(1, 2), **choices))


@pytest.fixture(scope="module")
def policy() -> FmPolicy:
    return make()


def draw(seed: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, 5]).standard_normal((count, 24, 20)).astype(np.float32)


def conditioned(seen: Observation) -> model.ModelInputs:
    """One prompt, without padding."""
    backbone = small_policy.backbone()
    config, words = backbone.config, backbone.preprocessor.tokenizer
    picture = np.concatenate([seen.images["left_wrist"], seen.images["right_wrist"]], axis=1)
    patches = process(picture, backbone.preprocessor.processor)
    ids = np.array([action_prompt(words, seen.instruction, len(patches.values) // 4)], np.int32)
    valid = np.ones_like(ids, bool)
    positions, following = token_positions(config, ids, valid, [[patches.grid]])
    return model.ModelInputs(ids, valid, positions, following, patches.values[None, None], patches.grid)


def by_hand(seen: Observation, noise: np.ndarray, steps: int, layers: tuple[int, ...]) -> np.ndarray:
    """All layers of the backbone, stacked, without padding; then Euler's steps, one call of the network each."""
    backbone, expert = small_policy.backbone(), small_policy.expert(layers)
    inputs = conditioned(seen)
    done = _prefill(small_policy.stacked_params(backbone.config), backbone.config, inputs, Compute())
    read = list(expert.config.condition_layers)
    condition = Condition(jax.tree.map(lambda x: x[np.array(read)], done.keys_values), inputs.valid)
    state = np.zeros((1, 20), np.float32) if seen.state is None else seen.state[None]
    x = noise
    for i in range(steps):
        t = jnp.full((1,), i / steps, jnp.float32)
        x = x + np.asarray(_velocity(expert.params, expert.config, x, t, condition, state, Compute())) / steps
    field = small_policy.normalizer().fields["action"]
    return (x[0] - field.offset) / field.scale


@pytest.mark.parametrize(
    ("kind", "steps", "layers"), [(FmPolicy, 5, ()), (OneStepPolicy, 1, ()), (FmPolicy, 5, (2, 0))], ids=str
)
def test_a_chunk_is_the_composition_of_its_stages(kind: type[FmPolicy], steps: int, layers: tuple[int, ...]) -> None:
    policy, noise = make(kind, layers), draw(1)
    seen = observation(3, state=True)
    (chunk,) = policy.infer_batch([seen], noise=noise)
    expected = by_hand(seen, noise, steps, layers)
    scale = small_policy.normalizer().fields["action"].scale
    np.testing.assert_allclose(chunk.actions * scale, expected * scale, rtol=0, atol=1e-5)
    assert np.abs((chunk.actions - by_hand(observation(4, state=True), noise, steps, layers)) * scale).max() > 1e-2
    assert np.abs((chunk.actions - by_hand(observation(3), noise, steps, layers)) * scale).max() > 1e-3


def test_only_the_layers_that_are_read_have_to_be_there() -> None:
    backbone, noise = small_policy.backbone(), draw(1)
    first = dataclasses.replace(
        backbone,
        config=backbone.config.with_layers(3),
        params=model.unstacked(model.with_first_layers(small_policy.stacked_params(backbone.config), 3)),
    )
    policy = FmPolicy(first, small_policy.expert((2, 0)), small_policy.normalizer(), options=options(batch_sizes=(1,)))
    (expected,) = make(layers=(2, 0)).infer_batch([observation()], noise=noise)
    (found,) = policy.infer_batch([observation()], noise=noise)
    np.testing.assert_array_equal(found.actions, expected.actions)
    with pytest.raises(ConfigError, match="reads 4 layers, the backbone has 3"):
        FmPolicy(first, small_policy.expert(), small_policy.normalizer(), options=options())


def test_a_batch_is_its_observations_one_by_one(policy: FmPolicy) -> None:
    """Five observations: two batches of two, and one."""
    seen, noise = observations(5), draw(2, 5)
    together = policy.infer_batch(seen, noise=noise)
    singles = [policy.infer_batch([one], noise=noise[i : i + 1])[0] for i, one in enumerate(seen)]
    for one, other in zip(together, singles, strict=True):
        assert isinstance(one, ActionChunk)
        np.testing.assert_allclose(one.actions, other.actions, rtol=1e-4, atol=1e-5)
        assert one.observation_id == other.observation_id
    assert len({chunk.actions.tobytes() for chunk in together}) == 5
    assert policy.infer_batch([]) == []
    once = policy.infer_batch((one for one in seen), noise=noise)
    np.testing.assert_array_equal([chunk.actions for chunk in once], [chunk.actions for chunk in together])


@pytest.mark.parametrize("nothing", [None, 3])
def test_what_are_no_observations(policy: FmPolicy, nothing: Any) -> None:
    with pytest.raises(DataError, match="not observations"):
        policy.infer_batch(nothing)


def test_a_batch_draws_the_noise_of_its_observations_one_by_one(policy: FmPolicy) -> None:
    seen = [observation(0)] * 3
    policy.reset()
    singles = [policy.infer(one).actions for one in seen]
    policy.reset()
    together = [chunk.actions for chunk in policy.infer_batch(seen)]
    np.testing.assert_allclose(together, singles, rtol=1e-4, atol=1e-5)
    assert np.abs(singles[0] - singles[1]).max() > 0.1, "every observation has noise of its own"
    other = make(seed=1)
    assert np.abs(other.infer(seen[0]).actions - singles[0]).max() > 0.1, "and every seed"
    noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (24, 20)))
    (given,) = policy.infer_batch([seen[1]], noise=noise[None])
    np.testing.assert_allclose(given.actions, singles[1], rtol=1e-4, atol=1e-5)


def test_only_answers_from_drawn_noise_count(policy: FmPolicy) -> None:
    """A call that fails, or that was given noise, leaves to the next ones the noise that they would have had."""
    seen, weights = observation(0), np.ones((1, 24), np.float32)
    policy.reset()
    first, second = (policy.infer(seen).actions for _ in range(2))
    policy.reset()
    policy.infer_batch([seen], noise=draw(8))
    for bad in (Prefix(draw(0, 2), weights), Prefix(draw(0), 2 * weights)):
        with pytest.raises(DataError):
            policy.infer_batch([seen], prefix=bad)
    with pytest.raises(NetworkOutputError):
        policy.infer_batch([seen, changed(state=np.full(20, 3e38, np.float32))])
    np.testing.assert_array_equal(policy.infer(seen).actions, first)
    with pytest.raises(DataError):
        policy.infer(observation(1, "Pick up the red apple. " * 10))
    np.testing.assert_array_equal(policy.infer(seen).actions, second)


def test_the_prompt_length_does_not_matter(policy: FmPolicy) -> None:
    noise = draw(3)
    long = make(prompt_lengths=(80,))
    (expected,), (found,) = (p.infer_batch([observation(1)], noise=noise) for p in (policy, long))
    np.testing.assert_allclose(found.actions, expected.actions, rtol=1e-4, atol=1e-4)
    seen = observations(4)
    lengths = policy._prompts.lengths(seen)
    np.testing.assert_array_equal(policy._prompts.inputs(seen, lengths, 4).valid.sum(axis=1), lengths)
    assert policy._prompts.inputs([observation(1)], [45], 1).input_ids.shape == (1, 64)
    assert policy._prompts.inputs([observation(1)], [45, 65], 1).input_ids.shape == (1, 80)


def test_a_batch_is_filled_with_its_last_observation(policy: FmPolicy) -> None:
    seen = observations(2)
    lengths = policy._prompts.lengths(seen)
    filled, plain = (policy._prompts.inputs(seen, lengths, size) for size in (4, 2))
    assert filled.grid == plain.grid
    for name in ("input_ids", "valid", "following", "patches", "positions"):
        found, expected = getattr(filled, name), getattr(plain, name)
        axis = 1 if name == "positions" else 0
        np.testing.assert_array_equal(found, np.take(expected, [0, 1, 1, 1], axis=axis), err_msg=name)
        assert not np.array_equal(np.take(expected, 0, axis=axis), np.take(expected, 1, axis=axis)), name


def test_an_answer_says_what_it_answers(policy: FmPolicy) -> None:
    seen = observation(7)
    chunk = policy.infer(seen)
    assert isinstance(policy, Policy)
    assert chunk.observation_id == "observation 7"
    assert chunk.capture_time_s == {"left_wrist": 17.0, "right_wrist": 17.015}
    assert chunk.anchor_time_s == {"left": 17.0, "right": 17.015}


def test_a_prefix_is_in_physical_units(policy: FmPolicy) -> None:
    """With one step from noise, a prefix of full weight pulls the chunk to it; one of no weight changes nothing."""
    noise = draw(4)
    (free,) = policy.infer_batch([observation()], noise=noise)
    target = (free.actions + np.float32(0.05))[None]
    pulled = policy.infer_batch([observation()], noise=noise, prefix=Prefix(target, np.ones((1, 24), np.float32)))[0]
    untouched = policy.infer_batch([observation()], noise=noise, prefix=Prefix(target, np.zeros((1, 24), np.float32)))[
        0
    ]
    scale = small_policy.normalizer().fields["action"].scale

    def distance(chunk: Any) -> float:
        return float(np.abs((chunk.actions - target[0]) * scale).mean())

    assert distance(pulled) < 0.2 * distance(free)
    np.testing.assert_allclose(untouched.actions, free.actions, rtol=1e-4, atol=1e-5)


def test_the_schedule_is_a_choice() -> None:
    parts = small_policy.backbone(), small_policy.expert(), small_policy.normalizer()
    one, noise = FmPolicy(*parts, options=options(), schedule=Schedule(num_steps=1)), draw(5)
    (found,), (expected,) = (p.infer_batch([observation()], noise=noise) for p in (one, make(OneStepPolicy)))
    np.testing.assert_array_equal(found.actions, expected.actions)


def test_stages_are_timed(policy: FmPolicy) -> None:
    clock = StageClock()
    policy.infer_batch(observations(3), clock=clock)
    assert list(clock.milliseconds) == [stage for stage in STAGES if stage != "decode"]
    assert all(milliseconds > 0 for milliseconds in clock.milliseconds.values())
    assert clock.total_ms == pytest.approx(sum(clock.milliseconds.values()))


def test_nothing_compiles_after_the_start(compilations: Any) -> None:
    parts = small_policy.backbone(), small_policy.expert(), small_policy.normalizer()
    ready = options(compile_at_start=True, prompt_lengths=(60, 76), batch_sizes=(2,))
    policy = FmPolicy(*parts, options=ready)
    started = compilations.count
    assert started >= 2 * 2, "prefill and expert for two lengths, whoever made others before"
    policy.infer(observation())
    policy.infer_batch(observations(3), clock=StageClock())  # two batches
    policy.infer_batch(observations(2), noise=draw(6, 2))
    policy.infer_batch([observation(2, INSTRUCTIONS[2] + " Then wipe the table with a towel.")])  # a longer prompt
    policy.reset()
    policy.infer(observation(5, state=True))
    assert compilations.count == started
    policy.infer_batch([observation()], prefix=Prefix(draw(1), np.zeros((1, 24), np.float32)))
    assert compilations.count > started, "the counter counts: a prefix was not compiled for"


def test_nothing_compiles_for_a_prefix_after_the_start(compilations: Any) -> None:
    """At a prompt length that nothing else here uses: what another policy compiled would do for this one."""
    parts = small_policy.backbone(), small_policy.expert(), small_policy.normalizer()
    policy = FmPolicy(*parts, options=options(compile_at_start=True, prompt_lengths=(61,), with_prefix=True))
    prepared = compilations.count
    policy.infer_batch([observation()], prefix=Prefix(draw(2), np.ones((1, 24), np.float32)))
    assert compilations.count == prepared


@pytest.mark.parametrize(
    ("part", "leaf", "stage"),
    [
        ("backbone", "vision.merger.norm", "vision"),
        ("backbone", "text.layers.2.mlp_norm", "prefill"),
        ("expert", "head.norm", "expert"),
    ],
)
def test_damaged_weights_give_no_chunk(part: str, leaf: str, stage: str) -> None:
    backbone, expert = small_policy.backbone(), small_policy.expert()
    if part == "backbone":
        backbone = small_policy.with_params(backbone, small_policy.with_nan(backbone.params, leaf))
    else:
        expert = small_policy.with_params(expert, small_policy.with_nan(expert.params, leaf))
    policy = FmPolicy(backbone, expert, small_policy.normalizer(), options=options())
    with pytest.raises(NetworkOutputError, match=f"policy fm, stage {stage}\n(.|\n)*observation 'observation 4'"):
        policy.infer(observation(4))
    with pytest.raises(NetworkOutputError, match=f"stage {stage}"):
        FmPolicy(backbone, expert, small_policy.normalizer(), options=options(compile_at_start=True))


def through() -> FmPolicy:
    """An expert without any velocity: its chunks are the noise."""
    expert = small_policy.expert()
    head = dataclasses.replace(expert.params.head, down=jax.tree.map(jnp.zeros_like, expert.params.head.down))
    still = small_policy.with_params(expert, dataclasses.replace(expert.params, head=head))
    return FmPolicy(small_policy.backbone(), still, small_policy.normalizer(), options=options())


def test_a_rotation_that_is_none_is_the_fault_of_the_network() -> None:
    """Not of the observation; and the message says which one had no answer."""
    noise = draw(9, 3)
    noise[1, 5, 13:19] = 0
    policy = through()
    with pytest.raises(NetworkOutputError, match=r"policy fm, stage expert\n(.|\n)*rotation of the left arm") as caught:
        policy.infer_batch(observations(3), noise=noise)
    assert "'observation 1'" in str(caught.value)
    assert "'observation 0'" not in str(caught.value)
    noise[1] = noise[0]
    assert len(policy.infer_batch(observations(3), noise=noise)) == 3


def test_numbers_that_are_too_large_are_named(policy: FmPolicy) -> None:
    """Where they still are numbers; the weights need not be the reason then."""
    huge = np.full((1, 24, 20), 3e38, np.float32)
    for found, message in (
        (lambda: policy.infer(changed(state=np.full(20, -3e38, np.float32))), r"state of observation .* 3e\+38"),
        (lambda: policy.infer_batch([observation()], noise=huge), r"noise of observation .* 3e\+38"),
        # finite in the network's units, and not in metres
        (lambda: through().infer_batch([observation()], noise=huge), r"noise of observation .* 3e\+38"),
    ):
        with pytest.raises(NetworkOutputError, match=f"stage expert\n(.|\n)*fix: the {message}"):
            found()
    with pytest.raises(DataError, match="noise must be finite"):
        policy.infer_batch([observation()], noise=np.full((1, 24, 20), 1e300))
    prefix = Prefix(huge, np.ones((1, 24), np.float32))
    with pytest.raises(DataError, match=r"prefix\.actions must be finite"):
        policy.infer_batch([observation()], prefix=prefix)


def test_parameters_of_another_shape_than_their_configuration() -> None:
    """Both layouts; one error with every difference."""
    backbone, expert, normalizer = small_policy.backbone(), small_policy.expert(), small_policy.normalizer()
    two = jax.tree.map(lambda leaf: leaf[:2], expert.params.layers)
    fewer = dataclasses.replace(expert.params, layers=two)
    for params, message in (
        (fewer, r"layers\.mlp\.down\.weight: \(2, .*the configuration says \(4, "),
        (unstacked(fewer), r"layers\.3\.mlp\.down\.weight: missing, the configuration says"),
    ):
        with pytest.raises(ConfigError, match=rf"action expert do not fit its configuration(.|\n)*{message}"):
            FmPolicy(backbone, small_policy.with_params(expert, params), normalizer, options=options())
    more = dataclasses.replace(expert.params, layers=(*unstacked(expert.params).layers, unstacked(fewer).layers[0]))
    with pytest.raises(ConfigError, match=r"layers\.4\.mlp\.down\.weight: .*not in the configuration"):
        FmPolicy(backbone, small_policy.with_params(expert, more), normalizer, options=options())
    config = expert.config.model_copy(update={"num_registers": expert.config.num_registers + 1})
    other = dataclasses.replace(expert, config=config)
    with pytest.raises(ConfigError, match=r"\(2 problems\)(.|\n)*registers: (.|\n)*positions: "):
        FmPolicy(backbone, other, normalizer, options=options())
    without = dataclasses.replace(expert.params, state_position=None)
    with pytest.raises(ConfigError, match="state_position"):
        FmPolicy(backbone, small_policy.with_params(expert, without), normalizer, options=options())
    exact = small_policy.with_params(expert, unstacked(expert.params))
    FmPolicy(backbone, exact, normalizer, options=options())


def changed(**fields: Any) -> Observation:
    whole = {name: getattr(observation(), name) for name in ("images", "capture_time_s", "instruction", "id", "state")}
    return Observation(**{**whole, **fields})


def _images(**changes: Any) -> dict[str, Any]:
    images = {**observation().images, **changes}
    return {name: image for name, image in images.items() if image is not None}


BAD_OBSERVATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "numbered cameras": (
        lambda: changed(images=dict(zip(("camera0_rgb", "camera1_rgb"), observation().images.values(), strict=True))),
        "images has the wrong keys",
    ),
    "arms for cameras": (
        lambda: changed(images=dict(zip(("left", "right"), observation().images.values(), strict=True))),
        "images has the wrong keys",
    ),
    "one camera": (lambda: changed(images=_images(right_wrist=None)), "images has the wrong keys"),
    "size": (lambda: changed(images=_images(left_wrist=np.zeros((480, 640, 3), np.uint8))), r"images\['left_wrist'\]"),
    "floats": (
        lambda: changed(images=_images(right_wrist=np.zeros((384, 384, 3), np.float32))),
        r"images\['right_wrist'\]",
    ),
    "state": (lambda: changed(state=np.full(20, np.nan, np.float32)), "state must be finite"),
    "state size": (lambda: changed(state=np.zeros(14, np.float32)), "state has the wrong shape"),
    "no words": (lambda: changed(instruction=" "), "instruction must be text"),
    "no observation": (lambda: {"images": {}}, "not an observation"),
}


@pytest.mark.parametrize("case", BAD_OBSERVATIONS)
def test_bad_observations(policy: FmPolicy, case: str) -> None:
    build, message = BAD_OBSERVATIONS[case]
    with pytest.raises(DataError, match=message):
        policy.infer(build())


def test_left_and_right_are_told_apart_by_name_alone(policy: FmPolicy) -> None:
    """The order in which images are given does not matter; which image has which name does."""
    seen, noise = observation(), draw(7)
    turned = changed(images=dict(reversed(seen.images.items())))
    swapped = changed(images={"left_wrist": seen.images["right_wrist"], "right_wrist": seen.images["left_wrist"]})
    first, same, other = (policy.infer_batch([one], noise=noise)[0].actions for one in (seen, turned, swapped))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-2


def test_prompts_that_are_too_long(policy: FmPolicy) -> None:
    too_long = [observation(0), observation(1, "Pick up the red apple. " * 10), observation(2, "Go on and on. " * 20)]
    with pytest.raises(DataError, match="at most 80 tokens, the largest of prompt_lengths: 40 for") as caught:
        policy.infer_batch(too_long)
    assert "'observation 1': " in str(caught.value)
    assert "'observation 2': " in str(caught.value)
    assert "'observation 0'" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"no instruction has room(.|\n)*found: 20"):
        make(prompt_lengths=(20, 64))


def test_bad_noise_and_prefixes(policy: FmPolicy) -> None:
    one, weights = [observation()], np.ones((1, 24), np.float32)
    for noise in (draw(0, 2), draw(0)[0], np.zeros((1, 24, 20), int)):
        with pytest.raises(DataError, match="noise has another shape or type"):
            policy.infer_batch(one, noise=noise)
    with pytest.raises(DataError, match="noise must be finite"):
        policy.infer_batch(one, noise=np.full((1, 24, 20), np.inf, np.float32))
    for prefix, message in (
        (Prefix(draw(0, 2), weights), "prefix.actions has another shape"),
        (Prefix(draw(0), weights[:, :3]), "prefix.weights has another shape"),
        (Prefix(draw(0), 2 * weights), "outside"),
        (Prefix(draw(0) * np.float32(np.nan), weights), "prefix.actions must be finite"),
    ):
        with pytest.raises(DataError, match=message):
            policy.infer_batch(one, prefix=prefix)
    for bare in (draw(0), (draw(0), weights), {"actions": draw(0), "weights": weights}):
        with pytest.raises(DataError, match="not a prefix"):
            policy.infer_batch(one, prefix=bare)  # pyright: ignore[reportArgumentType]
    for bound in (np.nan, np.inf, -1.0, "5", True):
        with pytest.raises(DataError, match="max_guidance"):
            policy.infer_batch(one, prefix=Prefix(draw(0), weights, bound))  # pyright: ignore[reportArgumentType]
    (free,) = policy.infer_batch(one, noise=draw(0))
    (unguided,) = policy.infer_batch(one, noise=draw(0), prefix=Prefix(draw(0), weights, np.float32(0)))
    np.testing.assert_allclose(unguided.actions, free.actions, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="call infer"):
        policy.infer_batch(observation())  # pyright: ignore[reportArgumentType]
