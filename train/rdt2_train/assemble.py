"""From a configuration to a run: mesh, stream, models from their folders, each leaf straight onto its devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rdt2_data.augment.jpeg import corrupt_jpeg
from rdt2_data.dataset_config import Dataset, load_dataset
from rdt2_data.pipeline.stream import BatchIterator, Host, StreamConfig, TrainingStream
from rdt2_data.pipeline.text import TextEncoder

from rdt2_jax.actions.normalizer import LinearNormalizer
from rdt2_jax.actions.types import IMAGE_SHAPE
from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.params import PyTree, initialize
from rdt2_jax.qwen2_5_vl.grid import Grid, num_tokens
from rdt2_jax.qwen2_5_vl.inputs import Preprocessor
from rdt2_jax.qwen2_5_vl.processor import ProcessorConfig, smart_resize
from rdt2_jax.sharding import Layout, replicated
from rdt2_train.configs import RunConfig
from rdt2_train.examples import Examples, make_examples
from rdt2_train.optimizer import make_optimizer
from rdt2_train.placement import state_shardings
from rdt2_train.step import TrainState, init_state
from rdt2_train.task import Task

PARAMS, RUN = 0, 1
"""What the configuration's seed is folded with: initial values, and the run's own key."""


class ExampleStream(Iterator[Examples]):
    """Batches of the training stream as examples; see `loop.Batches`."""

    def __init__(self, iterator: BatchIterator, preprocessor: Preprocessor, max_supervised: int) -> None:
        self._iterator, self._preprocessor, self._max_supervised = iterator, preprocessor, max_supervised

    def __next__(self) -> Examples:
        parts = self._preprocessor
        return make_examples(next(self._iterator), parts.config, parts.processor, self._max_supervised)

    def get_state(self) -> dict[str, Any]:
        """Of the stream."""
        return self._iterator.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Of the stream."""
        self._iterator.set_state(state)


def open_stream(config: RunConfig, preprocessor: Preprocessor, *, with_answers: bool) -> ExampleStream:
    """Examples of this process.

    Raises:
        ConfigError, DataError: data that cannot be used; processes that see different shards.
    """
    data = config.data
    tokens = num_tokens(preprocessor.config.vision, image_grid(preprocessor.processor))
    encoder = TextEncoder(preprocessor.tokenizer, tokens, data.text_length, with_answers=with_answers)
    corrupt = None if data.augment is None else functools.partial(corrupt_jpeg, config=data.augment)
    stream = TrainingStream(
        load_dataset(data.dataset),
        StreamConfig(
            batch_size=config.batch_size,
            seed=config.seed,
            threads=data.threads,
            prefetch=data.prefetch,
            strict=data.strict,
        ),
        host=Host(jax.process_index(), jax.process_count()),
        encoder=encoder,
        corrupt=corrupt,
    )
    require_same_everywhere(stream.fingerprint())
    return ExampleStream(iter(stream), preprocessor, data.max_supervised)


def require_same_everywhere(fingerprint: str) -> None:
    """Raises DataError where processes see different data: they would train on different batches."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = jnp.asarray([int(fingerprint[i : i + 7], 16) for i in range(0, 28, 7)], jnp.int32)
    found = multihost_utils.process_allgather(own)
    if not (found == found[0]).all():
        raise DataError(
            "the processes see different data",
            where=f"process {jax.process_index()}",
            expected="the same shards, indices and instructions on every host",
            found=fingerprint,
        )


def image_grid(processor: ProcessorConfig) -> Grid:
    """Patches of the composite image: (1, rows, columns)."""
    height, width = smart_resize(IMAGE_SHAPE[0], 2 * IMAGE_SHAPE[1], processor)
    return (1, height // processor.patch_size, width // processor.patch_size)


def load_normalizer(path: str | None, dataset: Dataset) -> LinearNormalizer:
    """The one named, or that of the dataset.

    Raises:
        ConfigError: neither.
    """
    chosen = path or dataset.normalizer_path
    if chosen is None:
        raise ConfigError(
            "actions need a normalizer",
            where="normalizer",
            fix="name a file, or one in the dataset's kwargs; `rdt2 data stats` makes one",
        )
    return LinearNormalizer.load(chosen)


def begin(task: Task, config: RunConfig, layout: Layout, params: PyTree, carried: PyTree = None) -> TrainState:
    """The state before the first step, laid out over the mesh.

    Args:
        task: the stage.
        config: of the run.
        layout: mesh and rules.
        params: trainable parameters, float32.
        carried: see `TrainState`.
    """
    optimizer = make_optimizer(config.steps, task.specs)
    key = run_key(config, RUN)
    shardings = state_shardings(task, optimizer, layout)
    build = jax.jit(lambda p, c, k: init_state(p, c, optimizer, k), out_shardings=shardings)
    return build(params, carried, key)


def new_params(specs: PyTree, config: RunConfig, layout: Layout) -> PyTree:
    """Initial values on the mesh, the same for any mesh."""
    return initialize(specs, run_key(config, PARAMS), layout.shardings(specs)[0])


def run_key(config: RunConfig, purpose: int) -> jax.Array:
    """A PRNG key of the configuration's seed."""
    return jax.random.fold_in(jax.random.key(config.seed), purpose)


def on_all_devices(tree: PyTree, layout: Layout) -> PyTree:
    """Small frozen parameters, whole on every device."""
    return jax.device_put(tree, replicated(layout.mesh))
