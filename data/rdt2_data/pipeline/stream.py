"""The training stream: Grain shuffles, mixes and prefetches; every batch is a pure function of its number.

Sample p of the stream is drawn by Grain from (seed, p): a shuffle without memory of each component, mixed by weight.
Step s with a global batch of B holds samples s * B to (s + 1) * B, and host h of H the h-th part of them. So the stream
can be taken up at any step, by any number of hosts that divides the batch.

A sample that cannot be used is replaced by another of the same component, drawn from (seed, p) again, and counted: the
batch keeps its shape, and nothing after it moves.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import grain
import numpy as np
from pydantic import Field

from rdt2_data.dataset_config import Dataset
from rdt2_data.pipeline.batch import Batch, BatchBuilder, Corruption
from rdt2_data.pipeline.text import TextEncoder
from rdt2_data.problems import SampleError, Tally
from rdt2_data.shards.source import SampleSource, open_source
from rdt2_jax.config import FrozenConfig, PositiveInt
from rdt2_jax.errors import ConfigError, DataError

STATE_VERSION = 1
_ATTEMPTS = 100
"""Substitutes tried for one bad sample before the dataset is given up."""

_BAD_REMEMBERED = 1_000_000
"""Beyond it, a bad sample may be counted again: a dataset of that kind is not worth the memory."""


class StreamConfig(FrozenConfig):
    """What is drawn, and how it is read.

    Attributes:
        batch_size: samples of a step, over all hosts.
        seed: of shuffling, mixing, substitutes and augmentation keys.
        shuffle: False keeps the order of the shards, for evaluation.
        epochs: passes over a single dataset, each in an order of its own; None: without end. A mixture has no passes:
            its parts are drawn by weight, whatever their size.
        last_batch: "drop" leaves out samples that do not fill a batch; "pad", for evaluation, fills it with samples
            marked not valid, and marks substitutes of bad samples so too.
        threads: that read and decode, a batch each.
        prefetch: batches made ahead, per host.
        strict: stop at the first bad sample instead of replacing it.
    """

    batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    shuffle: bool = True
    epochs: PositiveInt | None = None
    last_batch: Literal["drop", "pad"] = "drop"
    threads: PositiveInt = 2
    prefetch: PositiveInt = 2
    strict: bool = False


@dataclass(frozen=True)
class Host:
    """Which part of every batch is made here: `jax.process_index()` and `jax.process_count()`."""

    index: int = 0
    count: int = 1


class TrainingStream:
    """Batches of a dataset or mixture.

    Args:
        dataset: see `dataset_config.load_dataset`.
        config: see `StreamConfig`.
        host: the part made here.
        encoder: makes ids of the texts; None: batches carry the texts alone.
        corrupt: changes images on the host, see `augment.jpeg`.
        index_folder: see `shards.source.TarShards`.

    Attributes:
        tally: what was wrong with shards and samples, as far as this process has read; a bad sample counts once.

    All hosts must see the same shards: compare `fingerprint` between them before training.

    Raises:
        ConfigError: a batch that the hosts cannot share or the dataset does not fill, or passes over a mixture.
        DataError: no shards, or no sample in them.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: StreamConfig,
        *,
        host: Host = Host(),
        encoder: TextEncoder | None = None,
        corrupt: Corruption | None = None,
        index_folder: Path | None = None,
    ) -> None:
        _require_shared(config.batch_size, host)
        if config.epochs is not None and len(dataset.components) > 1:
            raise ConfigError(
                "a mixture has no passes",
                where="epochs",
                expected="none: its parts are drawn by weight without end",
                found=config.epochs,
                fix="leave epochs out, or give one dataset of the mixture",
            )
        self.config, self.host = config, host
        self.tally = Tally(strict=config.strict)
        self._components, self._encoder, self._corrupt = dataset.components, encoder, corrupt
        self._bad: set[tuple[int, int]] = set()
        self._bad_lock = threading.Lock()
        self._sources: list[SampleSource] = []
        for component in dataset.components:
            source = open_source(component.shards, index_folder=index_folder, tally=self.tally)
            if not len(source):
                raise DataError("a dataset has no samples", where=component.shards, found=self.tally.text() or None)
            self._sources.append(source)
        self._starts = [0, *accumulate(map(len, self._sources))]
        self._samples = self._draw()
        self.num_steps = self._count_steps()

    def _draw(self) -> grain.MapDataset[int]:
        """Sample p of the stream, as a number in all components one after the other."""
        parts: list[grain.MapDataset[int]] = []
        for component, (start, stop) in enumerate(pairwise(self._starts)):
            numbers = grain.MapDataset.range(start, stop)
            if self.config.shuffle:  # with seeds of their own: equally long components would go hand in hand
                numbers = numbers.shuffle(seed=_words(self.config.seed, component)[0])
            parts.append(numbers.repeat(self.config.epochs))
        if len(parts) == 1:
            return parts[0]
        return grain.MapDataset.mix(parts, [component.weight for component in self._components])

    def _count_steps(self) -> int | None:
        """Steps of the whole stream; None without end."""
        if self.config.epochs is None:
            return None
        count, size = len(self._samples), self.config.batch_size
        steps = -(-count // size) if self.config.last_batch == "pad" else count // size
        if not steps:
            expected, found = f"at least one batch of {size}", f"{count} samples"
            raise ConfigError("the dataset does not fill a batch", where="batch_size", expected=expected, found=found)
        return steps

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def fingerprint(self) -> str:
        """Of everything that decides which sample comes at which place; the same on every host."""
        parts = [
            [
                component.weight,
                None if component.instructions is None else component.instructions.digest(),
                source.fingerprint(),
            ]
            for component, source in zip(self._components, self._sources, strict=True)
        ]
        drawn = {name: getattr(self.config, name) for name in ("seed", "shuffle", "epochs", "last_batch")}
        return hashlib.sha256(json.dumps([parts, drawn]).encode()).hexdigest()[:32]

    def batch(self, step: int) -> Batch:
        """The part of step `step` that belongs to this host. Safe to call from several threads.

        Raises:
            SampleError: a bad sample, when strict; or no substitute that can be read.
            DataError: a step beyond the end.
        """
        if step < 0 or (self.num_steps is not None and step >= self.num_steps):
            raise DataError("there is no such step", expected=f"0 to {self.num_steps}, exclusive", found=step)
        rows = self.config.batch_size // self.host.count
        first = step * self.config.batch_size + self.host.index * rows
        positions = range(first, first + rows)
        total = len(self._samples)
        drawn = [self._sample(position % total) for position in positions]
        builder = BatchBuilder(rows, self._encoder, self._corrupt)
        for row, (position, sample, raw) in enumerate(zip(positions, drawn, self._read(drawn), strict=True)):
            used = self._fill(builder, row, position, sample, raw)
            replaced = used != sample
            valid = self.config.epochs is None or position < total
            if self.config.last_batch == "pad":
                valid = valid and not replaced
            builder.mark(row, used, replaced=replaced, valid=valid)
        return builder.build()

    def _sample(self, position: int) -> tuple[int, int]:
        """Component and number of sample `position`."""
        number = int(self._samples[position])  # type: ignore[arg-type]  # None only where something filters
        component = bisect_right(self._starts, number) - 1
        return component, number - self._starts[component]

    def _read(self, drawn: Sequence[tuple[int, int]]) -> list[Any]:
        """The bytes of every sample; those of one component are asked for together."""
        raws: list[Any] = [None] * len(drawn)
        for component, source in enumerate(self._sources):
            rows = [row for row, (own, _) in enumerate(drawn) if own == component]
            for row, raw in zip(rows, source.read([drawn[row][1] for row in rows]), strict=True):
                raws[row] = raw
        return raws

    def _fill(
        self, builder: BatchBuilder, row: int, position: int, sample: tuple[int, int], raw: Any
    ) -> tuple[int, int]:
        """Puts a sample or its substitute into a row; returns which it was."""
        component, number = sample
        key = np.array(_words(self.config.seed, position, 0), np.uint32)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if isinstance(raw, SampleError):
                    raise raw
                builder.fill(row, raw, self._components[component].instructions, key)
                return component, number
            except SampleError as problem:
                self._count(problem, (component, number))
            high, low = _words(self.config.seed, position, attempt)
            number = (high << 32 | low) % len(self._sources[component])
            (raw,) = self._sources[component].read([number])
        raise DataError(
            "no sample of a dataset can be read",
            where=self._components[component].shards,
            found=f"{_ATTEMPTS} bad ones in a row:\n{self.tally.text()}",
            fix="look at the dataset with `rdt2 data check`",
        )

    def _count(self, problem: SampleError, sample: tuple[int, int]) -> None:
        """Counts a bad sample once, however often it is drawn."""
        with self._bad_lock:
            known = sample in self._bad
            if not known and len(self._bad) < _BAD_REMEMBERED:
                self._bad.add(sample)
        if not known or self.config.strict:
            self.tally.add(problem)


class BatchIterator(Iterator[Batch]):
    """Walks a `TrainingStream`, with batches made ahead by threads.

    The state is small, plain JSON, the same on every host, and counts what was handed out, not what was made ahead.
    """

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream
        self._step = 0
        self._replaced = self._truncated = 0
        self._iterator = self._start()

    def _start(self) -> grain.DatasetIterator[Batch]:
        """Batches from the present step on."""
        stream, first = self.stream, self._step
        steps = grain.MapDataset.range(1).repeat(None if stream.num_steps is None else max(stream.num_steps - first, 1))
        made = steps.map_with_index(_MakeBatch(stream, first))
        config = stream.config
        return iter(made.to_iter_dataset(grain.ReadOptions(config.threads, max(config.prefetch, config.threads))))

    def __next__(self) -> Batch:
        if self.stream.num_steps is not None and self._step >= self.stream.num_steps:
            raise StopIteration
        try:
            batch = next(self._iterator)
        except Exception:
            self._iterator = self._start()  # Grain's would go on behind the step that failed
            raise
        self._step += 1
        self._replaced += int(batch.replaced.sum())
        self._truncated += 0 if batch.text is None else int(batch.text.truncated.sum())
        return batch

    def __iter__(self) -> BatchIterator:
        return self

    @property
    def counts(self) -> dict[str, int]:
        """Of the rows handed out by this iterator: samples replaced and texts shortened."""
        return {"replaced": self._replaced, "truncated": self._truncated}

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands: JSON."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.stream.fingerprint(),
            "position": self._step * self.stream.config.batch_size,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken: the batches that follow are those that followed there.

        The number of hosts may differ. So may the batch size, when the samples handed out so far fill whole batches.

        Raises:
            DataError: a state of another dataset, order or seed, or one that lies within a batch.
        """
        names = {"version", "fingerprint", "position"}
        if not isinstance(state, Mapping) or set(state) != names or state["version"] != STATE_VERSION:
            expected = f"version {STATE_VERSION} with {', '.join(sorted(names))}"
            raise DataError("this is no state of a stream", expected=expected, found=state)
        if state["fingerprint"] != self.stream.fingerprint():
            raise DataError(
                "the state belongs to another stream",
                where="iterator state",
                expected=self.stream.fingerprint(),
                found=state["fingerprint"],
                fix="use the same shards, weights, seed, epochs and order, or start the data anew on purpose",
            )
        position, end = state["position"], self.stream.num_steps
        size = self.stream.config.batch_size
        whole = isinstance(position, int) and not isinstance(position, bool) and position >= 0
        if not whole or (end is not None and position > end * size):
            expected = "a whole number of samples" + ("" if end is None else f", at most {end * size}")
            raise DataError("the state lies outside the stream", where="position", expected=expected, found=position)
        step, rest = divmod(position, size)
        if rest:
            raise DataError(
                "the state lies within a batch of this size",
                where="iterator state",
                expected=f"a multiple of {self.stream.config.batch_size} samples",
                found=state["position"],
                fix="go on with the batch size the state was saved with",
            )
        self._step = step
        self._iterator = self._start()

    def close(self) -> None:
        """Stops the threads."""
        self._iterator.close()


class _MakeBatch:
    """The batch of a step, for Grain's threads."""

    def __init__(self, stream: TrainingStream, first: int) -> None:
        self._stream, self._first = stream, first

    def __call__(self, index: int, _: Any) -> Batch:
        return self._stream.batch(self._first + index)


def _words(*numbers: int) -> tuple[int, int]:
    """Two 32-bit numbers drawn from some others: a hash, the same on every machine."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    first, second = struct.unpack("<II", digest)
    return first, second


def _require_shared(batch_size: int, host: Host) -> None:
    if not 0 <= host.index < host.count:
        raise ConfigError("no such host", where="host", expected=f"0 to {host.count - 1}", found=host.index)
    if batch_size % host.count:
        raise ConfigError(
            "the hosts cannot share a batch",
            where="batch_size",
            expected=f"a multiple of {host.count} hosts",
            found=batch_size,
        )
