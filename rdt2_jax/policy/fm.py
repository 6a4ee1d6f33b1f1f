"""RDT2-FM: one pass of the backbone's first layers, then a few steps of the action expert from noise to actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rdt2_jax.action_expert import flow
from rdt2_jax.action_expert.config import ActionExpertConfig
from rdt2_jax.action_expert.flow import Prefix, Schedule
from rdt2_jax.action_expert.model import ActionExpertParams, Condition, param_specs, unstacked
from rdt2_jax.actions.layout import ACTION_DIM, STATE_DIM
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import ActionChunk, Observation
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.params import is_spec
from rdt2_jax.policy.backbone import Backbone, read_keys_values, without_images
from rdt2_jax.policy.base import CHUNK_SHAPE, BackbonePolicy, Result, check_params
from rdt2_jax.policy.clock import StageClock, timed
from rdt2_jax.policy.options import PolicyOptions
from rdt2_jax.problems import Problems
from rdt2_jax.qwen2_5_vl.config import TextConfig
from rdt2_jax.qwen2_5_vl.model import ModelInputs

_sample = jax.jit(flow.sample, static_argnums=(1, 5), static_argnames="schedule")


@jax.jit
def _draw_noise(key: jax.Array, counters: jax.Array) -> jax.Array:
    """Standard normal (rows, 24, 20), of which each depends on its own counter alone."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, counters)
    return jax.vmap(lambda row_key: jax.random.normal(row_key, CHUNK_SHAPE, jnp.float32))(keys)


class Expert(Protocol):
    """An action expert in memory, such as `action_expert.checkpoint.LoadedExpert`."""

    @property
    def config(self) -> ActionExpertConfig:
        """Its shape."""
        ...

    @property
    def params(self) -> ActionExpertParams:
        """Parameters, stacked or with a tree per layer."""
        ...


class FmPolicy(BackbonePolicy):
    """RDT2-FM.

    Attributes:
        schedule: how the flow is integrated.
    """

    kind: ClassVar[str] = "fm"

    def __init__(
        self,
        backbone: Backbone,
        expert: Expert,
        normalizer: LinearNormalizer,
        *,
        options: PolicyOptions | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Takes parts in memory; see `load_policy` for files.

        Args:
            backbone: of its decoder the first layers are used, without final norm and head.
            expert: on the same device.
            normalizer: what the expert was trained with.
            options: None: the defaults.
            schedule: steps and method; None: those of the expert's configuration, Euler's.

        Raises:
            ConfigError: parts that do not fit each other, or parameters that do not fit their configuration.
            DataError: the normalizer is not one of action chunks.
        """
        options = PolicyOptions() if options is None else options
        check_expert(expert.config, backbone.config.text)
        _check_expert_params(expert)
        options.check(self.kind)
        super().__init__(backbone, normalizer, options)
        self.schedule = Schedule(expert.config.num_steps) if schedule is None else schedule
        self._config = expert.config
        self._layers = backbone.decoder(expert.config.num_backbone_layers)
        stacked = not isinstance(expert.params.layers, tuple)
        self._params = jax.device_put(unstacked(expert.params) if stacked else expert.params, self._device)
        self._key = jax.device_put(jax.random.key(options.seed), self._device)
        self._counter = 0
        self._compile()

    def reset(self) -> None:
        """A new episode begins: noise is drawn as from the beginning."""
        self._counter = 0

    def infer_batch(
        self,
        observations: Sequence[Observation],
        *,
        noise: Any = None,
        prefix: Prefix | None = None,
        clock: StageClock | None = None,
    ) -> list[Result]:
        """See `BackbonePolicy.infer_batch`. A call that fails uses up no noise."""
        results = super().infer_batch(observations, noise=noise, prefix=prefix, clock=clock)
        if noise is None:
            self._counter += len(results)
        return results

    def _answer(
        self,
        observations: Sequence[Observation],
        inputs: ModelInputs,
        extras: Mapping[str, Any],
        clock: StageClock | None,
    ) -> list[Result]:
        embeddings = self._embed(inputs, clock)
        condition = self._condition(inputs, embeddings, clock)
        sample = timed(clock, "expert", self._sample, condition, extras)
        return [*timed(clock, "detokenise", self._finish, observations, inputs, extras, embeddings, condition, sample)]

    def _condition(self, inputs: ModelInputs, embeddings: jax.Array, clock: StageClock | None) -> Condition:
        text, compute, wanted = self.backbone.config.text, self.backbone.compute, self._config.condition_layers
        batch = without_images(inputs)
        keys_values = timed(clock, "prefill", read_keys_values, self._layers, text, embeddings, batch, compute, wanted)
        return Condition(keys_values, inputs.valid)

    def _sample(self, condition: Condition, extras: Mapping[str, Any]) -> jax.Array:
        """Normalised chunks, on the device."""
        placed = jax.device_put(dict(extras), self._device)
        noise = placed["noise"] if "noise" in placed else _draw_noise(self._key, placed["counters"])
        return _sample(
            self._params,
            self._config,
            noise,
            condition,
            placed["state"],
            self.backbone.compute,
            schedule=self.schedule,
            prefix=placed.get("prefix"),
        )

    def _finish(
        self,
        observations: Sequence[Observation],
        inputs: ModelInputs,
        extras: Mapping[str, Any],
        embeddings: jax.Array,
        condition: Condition,
        sample: jax.Array,
    ) -> list[ActionChunk]:
        normalized = jax.device_get(sample)
        if not np.isfinite(normalized).all():  # then it is worth asking where it began
            self._require_finite_backbone(observations, inputs, embeddings, condition.keys_values)
        return self._chunks(observations, normalized, "expert", extras)

    def _extras(self, observations: Sequence[Observation], noise: Any, prefix: Prefix | None) -> dict[str, Any]:
        count, zeros = len(observations), np.zeros(STATE_DIM, np.float32)
        states = [zeros if o.state is None else o.state for o in observations]
        extras: dict[str, Any] = {"state": np.stack([*states, zeros])[:count]}
        if noise is None:
            # one per observation, so that a batch draws what its observations one after the other would draw
            extras["counters"] = ((self._counter + np.arange(count)) % 2**32).astype(np.uint32)
        else:
            extras["noise"] = _finite(noise, (count, *CHUNK_SHAPE), "noise")
        if prefix is not None:
            extras["prefix"] = self._normalized_prefix(prefix, count)
        return extras

    def _normalized_prefix(self, prefix: Prefix, count: int) -> Prefix:
        """A prefix in physical units, checked, as the network takes it."""
        if not isinstance(prefix, Prefix):
            raise DataError(
                "not a prefix",
                where="prefix",
                expected="rdt2_jax.action_expert.flow.Prefix(actions, weights)",
                found=type(prefix).__name__,
            )
        actions = _finite(prefix.actions, (count, *CHUNK_SHAPE), "prefix.actions")
        weights = _finite(prefix.weights, (count, CHUNK_SHAPE[0]), "prefix.weights")
        if ((weights < 0) | (weights > 1)).any():
            raise DataError("weights outside [0, 1]", where="prefix.weights", expected="0 to 1", found=weights)
        with np.errstate(over="ignore"):
            normalized = np.asarray(self.normalizer.normalize(actions), np.float32)
        _require_finite_input(normalized, "prefix.actions")
        bound = None if prefix.max_guidance is None else flow.checked_guidance(prefix.max_guidance)
        return Prefix(normalized, weights, bound)

    def _compile_for(self, inputs: ModelInputs, size: int) -> None:
        zeros, state = np.zeros((size, *CHUNK_SHAPE), np.float32), np.zeros((size, STATE_DIM), np.float32)
        self._answer([], inputs, {"counters": np.zeros(size, np.uint32), "state": state}, None)
        if self.options.with_prefix:
            self._answer([], inputs, {"noise": zeros, "state": state, "prefix": Prefix(zeros, zeros[:, :, 0])}, None)


def check_expert(config: ActionExpertConfig, text: TextConfig) -> None:
    """Verifies that an expert makes RDT2's chunks and reads this backbone.

    Raises:
        ConfigError: names every size that differs.
    """
    problems = Problems()
    for name, found, expected in (
        ("chunk_length", config.chunk_length, CHUNK_SHAPE[0]),
        ("action_dim", config.action_dim, ACTION_DIM),
        ("state_dim", config.state_dim, STATE_DIM),
    ):
        if found != expected:
            problems.add(f"{name}: the expert has {found}, a chunk needs {expected}")
    problems.raise_if_any(ConfigError, "the action expert does not make RDT2's chunks")
    config.check_backbone(text)


def _check_expert_params(expert: Expert) -> None:
    """`check_params`, in either layout of the layers."""
    specs = param_specs(expert.config)
    if isinstance(expert.params.layers, tuple):
        stack: Any = specs.layers
        layer = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype), stack, is_leaf=is_spec)
        specs = dataclasses.replace(specs, layers=(layer,) * expert.config.num_layers)
    check_params("the action expert", expert.params, specs)


def _finite(values: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape or array.dtype.kind != "f":
        raise DataError(
            f"{where} has another shape or type",
            where=where,
            expected=f"floats {shape}: one row per observation",
            found=f"{array.dtype} {array.shape}",
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    _require_finite_input(array, where)
    return array


def _require_finite_input(array: np.ndarray, where: str) -> None:
    """Of float32, as the network reads it: what was finite in another type or unit need not be finite here."""
    bad = ~np.isfinite(array)
    if bad.any():
        raise DataError(
            f"{where} must be finite",
            where=where,
            expected="finite in float32, also where it is normalised",
            found=f"{bad.sum()} values are not, the first at {[int(i) for i in np.argwhere(bad)[0]]}",
        )
