"""Stage 1 of 4: the action tokenizer, from a set of chunks to a checkpoint in the published layout.

The trainable tree is `ActionTokenizerParams.networks`; the codebooks follow by moving averages. The loss is
`rdt2_jax.action_tokenizer.training.loss_and_codebooks`. The order of the data is a function of seed and step, so a run
that is stopped anywhere continues as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field, model_validator
from rdt2_data.synthetic import smooth_chunks

from rdt2_jax.action_tokenizer.checkpoint import LoadedTokenizer, save_tokenizer
from rdt2_jax.action_tokenizer.config import ActionTokenizerConfig
from rdt2_jax.action_tokenizer.plot import plot_report
from rdt2_jax.action_tokenizer.report import TokenizerReport, check_chunks, examine, reconstruct
from rdt2_jax.action_tokenizer.tokenizer import param_specs
from rdt2_jax.action_tokenizer.training import (
    TrainState,
    draw_choices,
    init_state,
    standardize,
    train_step,
)
from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.checkpoints import Checkpoints
from rdt2_jax.config import FrozenConfig, PositiveInt, dump_config
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.io.arrays import read_array
from rdt2_jax.io.files import atomic_directory
from rdt2_jax.params import initialize
from rdt2_jax.progress import progress_bar
from rdt2_jax.sharding import batch_sharding, make_mesh, replicated
from rdt2_train.claim import claim


class SyntheticActions(FrozenConfig):
    """Smooth synthetic bimanual chunks (`rdt2_data.synthetic`)."""

    chunks: PositiveInt = 20_000
    seed: Annotated[int, Field(ge=0)] = 0


class ActionsConfig(FrozenConfig):
    """Where chunks come from: a `.npy` file (N, 24, 20) in metres, or synthetic motion; exactly one."""

    file: str | None = None
    synthetic: SyntheticActions | None = None
    held_out: PositiveInt = 2_000

    @model_validator(mode="after")
    def _one_source(self) -> ActionsConfig:
        if (self.file is None) == (self.synthetic is None):
            raise ValueError("give exactly one of 'file' and 'synthetic'")
        return self


class TokenizerTrainingConfig(FrozenConfig):
    """One training run.

    Attributes:
        model: shape of the tokenizer.
        actions: training and held-out chunks.
        batch_size: chunks per step over all devices.
        steps: optimizer steps.
        learning_rate: peak; linear warm-up over `warmup_steps`, then a cosine to `final_learning_rate`.
        weight_decay, adam_b2, gradient_clip: AdamW, clipped by global norm.
        continuous_steps: steps at the beginning without codes, so that every channel is in the latents when the
            codebooks are drawn from them.
        seed: initial values, order of the data, codebook restarts.
        log_every, checkpoint_every: in steps.
    """

    model: ActionTokenizerConfig
    actions: ActionsConfig
    batch_size: PositiveInt
    steps: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    adam_b2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    continuous_steps: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 500

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TokenizerTrainingConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


def train_tokenizer(config: TokenizerTrainingConfig, out: Path) -> TokenizerReport:
    """Trains, continuing from the latest checkpoint under `out/state` if there is one, and writes `out/checkpoint`.

    `out/log.jsonl` gets one line per `log_every` steps. The finished folder holds config.json, model.safetensors,
    normalizer.npz, training.json, report.json and report.png.

    Raises:
        ConfigError: the batch does not fit the devices or the data, or `out` holds a run of another configuration.
        DataError: unusable chunks.
    """
    if out.is_file():
        raise ConfigError("the folder of the run is a file", where=out, fix="give a folder with --out")
    train, held_out = load_actions(config.actions, config.model)
    if len(train) < config.batch_size:
        raise ConfigError(
            "fewer chunks than one batch", where="batch_size", expected=f"at most {len(train)}", found=config.batch_size
        )
    normalizer = LinearNormalizer.fit_actions(train)
    trainer = _Trainer(config, normalizer.normalize(train))
    claim(out, config)
    with Checkpoints(out / "state", keep_last=2) as checkpoints:
        state = trainer.restore_or_init(checkpoints)
        state = trainer.run(state, checkpoints, out / "log.jsonl")
    params = jax.device_put(jax.device_get(state.params))
    with progress_bar("checking", len(held_out), "chunks") as advance:
        reconstruction = reconstruct(params, config.model, normalizer, held_out, progress=advance)
    report = examine(reconstruction, config.model, normalizer)
    with atomic_directory(out / "checkpoint", overwrite=True) as folder:
        save_tokenizer(LoadedTokenizer(config.model, params, normalizer), folder)
        (folder / "training.json").write_text(dump_config(config))
        (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        plot_report(reconstruction, report, folder / "report.png")
    return report


def load_actions(config: ActionsConfig, model: ActionTokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out chunks (N, frames, 20) in metres; of a file, the last `held_out` chunks are held out.

    Raises:
        DataError: unreadable or unusable chunks, or none left to train on.
    """
    if config.synthetic is not None:
        spec = config.synthetic
        count = spec.chunks + config.held_out
        with progress_bar("synthesizing", count, "chunks") as advance:
            chunks = smooth_chunks(count, spec.seed, model.chunk_length, progress=advance)
    else:
        chunks = check_chunks(read_array(str(config.file)), model, where=str(config.file))
    if len(chunks) <= config.held_out:
        raise DataError(
            "no chunks left to train on",
            where=config.file,
            expected=f"more than the {config.held_out} held out",
            found=len(chunks),
            fix="lower actions.held_out or give more chunks",
        )
    return chunks[: -config.held_out], chunks[-config.held_out :]


class _Trainer:
    """Holds what does not change between steps: data, mesh, compiled step."""

    def __init__(self, config: TokenizerTrainingConfig, chunks: np.ndarray) -> None:
        self.config, self.chunks = config, chunks
        devices = jax.device_count()
        if config.batch_size % devices:
            raise ConfigError(
                "the batch does not divide over the devices",
                where="batch_size",
                expected=f"a multiple of {devices}",
                found=config.batch_size,
            )
        mesh = make_mesh({"data": devices})
        self.batch_sharding, self.replicated = batch_sharding(mesh), replicated(mesh)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate
        )
        # One long vector instead of hundreds of small leaves: it compiles in a fraction of the time.
        self.optimizer = optax.flatten(
            optax.chain(
                optax.clip_by_global_norm(config.gradient_clip),
                optax.adamw(schedule, b2=config.adam_b2, weight_decay=config.weight_decay),
            )
        )
        self.key = jax.random.key(config.seed)
        self.continuous_step = jax.jit(partial(self._step, continuous=True), donate_argnums=0)
        self.step = jax.jit(partial(self._step, continuous=False), donate_argnums=0)

    def restore_or_init(self, checkpoints: Checkpoints) -> TrainState:
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.replicated),
            jax.eval_shape(self._init),
        )
        resumed = checkpoints.restore_latest({"params": target.params, "optimizer": target.optimizer_state})
        if resumed is None:
            return jax.jit(self._init, out_shardings=self.replicated)()
        step = jax.device_put(jnp.asarray(resumed.step, target.step.dtype), self.replicated)
        return TrainState(resumed.items["params"], resumed.items["optimizer"], step)

    def run(self, state: TrainState, checkpoints: Checkpoints, log: Path) -> TrainState:
        config, first = self.config, int(state.step)
        with progress_bar("training the tokenizer", config.steps, "steps") as advance, log.open("a") as log_file:
            advance(first, status="compiling")
            started = time.monotonic()
            for step, batch in zip(range(first, config.steps), self._batches(first), strict=False):
                take_step = self.continuous_step if step < config.continuous_steps else self.step
                state, losses = take_step(state, jax.device_put(batch, self.batch_sharding))
                done = step + 1
                saving = done % config.checkpoint_every == 0 or done == config.steps
                if done % config.log_every == 0 or saving:
                    values = {name: float(value) for name, value in losses.items()}
                    rate = (done - first) * config.batch_size / (time.monotonic() - started)
                    print(
                        json.dumps({"step": done, "chunks_per_s": round(rate, 1), **values}), file=log_file, flush=True
                    )
                    _stop_on_nan(values, done)
                    advance(0, status=f"loss {values['total']:.4f}")
                if saving:
                    checkpoints.save(done, {"params": state.params, "optimizer": state.optimizer_state})
                advance()
        return state

    def _init(self) -> TrainState:
        params = initialize(param_specs(self.config.model), jax.random.fold_in(self.key, 0))
        return init_state(standardize(params, *_channel_moments(self.chunks)), self.optimizer)

    def _step(
        self, state: TrainState, batch: jax.Array, *, continuous: bool
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), state.step)
        choices = draw_choices(key, self.config.model, self.config.batch_size)
        state, outputs = train_step(state, batch, choices, self.config.model, self.optimizer, continuous=continuous)
        losses = {
            f"{group}_{name}": getattr(output.losses, name)
            for group, output in outputs.items()
            for name in ("reconstruction", "commitment")
        }
        return state, losses | {"total": jnp.stack([output.losses.total for output in outputs.values()]).sum()}

    def _batches(self, first: int) -> Iterator[np.ndarray]:
        """Batches from step `first` on: every epoch is a permutation drawn from seed and epoch; the rest is dropped."""
        size = self.config.batch_size
        per_epoch = len(self.chunks) // size
        step, order, order_epoch = first, np.empty(0, np.int64), -1
        while True:
            epoch, index = divmod(step, per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.chunks))
                order_epoch = epoch
            yield self.chunks[order[index * size : (index + 1) * size]]
            step += 1


def _channel_moments(normalized: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation (20,) of each channel; channels that never move count as moving a little."""
    flat = normalized.reshape(-1, normalized.shape[-1]).astype(np.float64)
    return jnp.asarray(flat.mean(0), jnp.float32), jnp.asarray(np.maximum(flat.std(0), 1e-3), jnp.float32)


def _stop_on_nan(losses: Mapping[str, float], step: int) -> None:
    bad = [name for name, value in losses.items() if not np.isfinite(value)]
    if bad:
        raise DataError(
            "the loss is not a number any more",
            where=f"step {step}",
            found=", ".join(bad),
            fix="lower learning_rate; the last checkpoint before this step is intact",
        )
