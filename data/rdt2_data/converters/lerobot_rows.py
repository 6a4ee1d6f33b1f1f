"""Rows of a LeRobot dataset's Parquet files: the numbers of one episode, and images kept among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.converters.damage import damage_named
from rdt2_data.converters.encoded_images import decode_image
from rdt2_data.converters.frames import OrderedFrames, image_or_problem
from rdt2_data.converters.mappings import ColumnRef
from rdt2_data.converters.source_files import names_shown
from rdt2_data.problems import SampleError

_EPISODE = "episode_index"
_IMAGES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class EpisodeRows:
    """The rows of one episode.

    Attributes:
        path: the Parquet file.
        row_numbers: int64 (T,), their positions in the file.
        columns: by name, float64 (T, n): lists of numbers, lists of lists (flattened) and single numbers alike.
    """

    path: Path
    row_numbers: np.ndarray
    columns: dict[str, np.ndarray]

    def numbers(self, refs: Sequence[ColumnRef]) -> np.ndarray:
        """Columns, or parts of them, side by side: (T, n).

        Raises:
            SampleError: "wrong-shape", for a range beyond the numbers of a row.
        """
        parts = []
        for ref in refs:
            column = self.columns[ref.name]
            if ref.numbers is not None and ref.numbers.stop > column.shape[1]:
                expected = f"at least {ref.numbers.stop} numbers in each row"
                where = f"{self.path}, column {ref.name}"
                raise SampleError("wrong-shape", where=where, expected=expected, found=column.shape[1])
            parts.append(column if ref.numbers is None else column[:, ref.numbers])
        return np.concatenate(parts, axis=1)


def read_rows(path: Path, names: Sequence[str], episode_index: int) -> EpisodeRows:
    """Reads columns of the rows that belong to one episode.

    Row groups whose statistics exclude the episode are not read.

    Raises:
        SampleError: "bad-recording", for a file that is missing, damaged, lacks columns or has no row of the episode;
            "wrong-shape", "wrong-dtype" or "not-finite" for a column that is no table of numbers.
    """
    import pyarrow

    wanted = list(dict.fromkeys([_EPISODE, *names]))
    row_numbers, tables, start = [], [], 0
    with _opened(path) as file:
        known = file.schema_arrow.names
        missing = [name for name in wanted if name not in known]
        if missing:
            expected, found = f"columns {', '.join(missing)}", names_shown(known)
            raise SampleError("bad-recording", where=path, expected=expected, found=found)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if _may_hold(file.metadata.row_group(group), episode_index):
                table = file.read_row_group(group, columns=wanted)
                mine = table.column(_EPISODE).to_numpy() == episode_index
                row_numbers.append(start + np.flatnonzero(mine))
                tables.append(table.filter(pyarrow.array(mine)))
            start += count
    if not tables or not sum(len(numbers) for numbers in row_numbers):
        raise SampleError("bad-recording", where=path, expected=f"rows of episode {episode_index}", found="none")
    table = pyarrow.concat_tables(tables)
    columns = {name: _column_numbers(table.column(name), f"{path}, column {name}") for name in names}
    return EpisodeRows(path, np.concatenate(row_numbers), columns)


@dataclass(frozen=True, eq=False)
class ParquetImages(OrderedFrames):
    """Images kept as files in a column of {"bytes", "path"}.

    Attributes:
        path: the Parquet file; opened by every `read`.
        column: name.
        row_numbers: int64 (N,), the rows of the N images, increasing.
    """

    path: Path
    column: str
    row_numbers: np.ndarray

    def _count(self) -> int:
        return len(self.row_numbers)

    def _where(self) -> str:
        return f"{self.path}, column {self.column}"

    def _read(self, indices: list[int]) -> Iterator[np.ndarray | SampleError]:
        rows = self.row_numbers[indices]
        with _opened(self.path) as file:
            start = 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if ((rows >= start) & (rows < stop)).any():
                    yield from self._read_group(file, group, start, rows)
                start = stop

    def _read_group(self, file: Any, group: int, start: int, rows: np.ndarray) -> Iterator[np.ndarray | SampleError]:
        batches = file.iter_batches(batch_size=_IMAGES_AT_ONCE, row_groups=[group], columns=[self.column])
        while True:
            with _errors_named(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            column = batch.column(batch.schema.get_field_index(self.column))
            for row in rows[(rows >= start) & (rows < start + len(column))]:
                where = f"{self._where()}, row {row}"
                yield image_or_problem(_image, column[int(row) - start].as_py(), where)
            start += len(column)


def _image(cell: Any, where: str) -> np.ndarray:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        found = f"only a path, {cell['path']!r}" if isinstance(cell, dict) and cell.get("path") else type(data).__name__
        fix = "store the images in the Parquet files themselves"
        raise SampleError("bad-recording", where=where, expected="the bytes of an image", found=found, fix=fix)
    return decode_image(data, where)


def _may_hold(row_group: Any, episode_index: int) -> bool:
    """Whether the statistics of a row group allow a row of the episode; True without statistics."""
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        if column.path_in_schema == _EPISODE and column.is_stats_set and column.statistics.has_min_max:
            return bool(column.statistics.min <= episode_index <= column.statistics.max)
    return True


def _column_numbers(column: Any, where: str) -> np.ndarray:
    """An Arrow column as float64 (T, n)."""
    import pyarrow.compute
    import pyarrow.types as types

    compute: Any = pyarrow.compute  # its functions are made when it is imported, unseen by type checkers
    array, count = column.combine_chunks(), len(column)
    while types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        lengths = compute.unique(compute.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            found = f"rows of {', '.join(map(str, lengths))} numbers"
            raise SampleError("wrong-shape", where=where, expected="equally many numbers in each row", found=found)
        array = array.flatten()
    if not (types.is_floating(array.type) or types.is_integer(array.type)):
        raise SampleError("wrong-dtype", where=where, expected="numbers", found=str(array.type))
    if array.null_count:
        raise SampleError("not-finite", where=where, expected="numbers", found=f"{array.null_count} that are missing")
    return array.to_numpy(zero_copy_only=False).astype(np.float64).reshape(count, -1)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with _errors_named(path), pyarrow.parquet.ParquetFile(path) as file:
        yield file


def _errors_named(path: Path) -> AbstractContextManager[None]:
    """Errors of the Parquet library as a SampleError that names the file."""
    import pyarrow

    return damage_named("a Parquet file of the dataset cannot be read", path, OSError, pyarrow.ArrowException)
