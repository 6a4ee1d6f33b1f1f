"""What a LeRobot dataset says of itself: features, episodes with their files, and tasks. Versions 2.0, 2.1 and 3.0.

Version 2 keeps one Parquet file and one video per camera for every episode, named by templates in `meta/info.json`,
and lists episodes and tasks as lines of JSON. Version 3 packs many episodes into one file; Parquet tables in
`meta/episodes` say which file, and where in a video, each of them lies.

Source of the layouts: documentation and code of huggingface/lerobot (`LeRobotDataset` v2.1 and v3.0).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdt2_jax.errors import DataError

VERSIONS = ("v2.0", "v2.1", "v3.0")
IMAGE_TYPES = ("image", "video")


@dataclass(frozen=True)
class VideoSpan:
    """Where the frames of one camera of one episode lie.

    Attributes:
        path: video file.
        from_s, to_s: presentation times [s] in it at which the episode begins and has ended; None for a file that holds
            this episode alone.
    """

    path: Path
    from_s: float = 0.0
    to_s: float | None = None


@dataclass(frozen=True)
class LeRobotEpisode:
    """One line of the list of episodes.

    Attributes:
        episode_index: its number in the dataset.
        length: rows.
        data_path: Parquet file with its rows, and in version 3 those of others.
        videos: by video feature.
    """

    episode_index: int
    length: int
    data_path: Path
    videos: Mapping[str, VideoSpan]


@dataclass(frozen=True)
class LeRobotMetadata:
    """A dataset's description.

    Attributes:
        source: its folder.
        fps: rows a second.
        features: name -> {"dtype", "shape", ...}, as in `meta/info.json`.
        episodes: by rising episode_index.
        tasks: task_index -> sentence.
    """

    source: Path
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    episodes: tuple[LeRobotEpisode, ...]
    tasks: Mapping[int, str]


def read_metadata(source: Path) -> LeRobotMetadata:
    """Reads `meta/` of a dataset.

    Raises:
        DataError: no dataset, one of another version, or one whose description is damaged or incomplete.
    """
    path = source / "meta" / "info.json"
    if not path.is_file():
        fix = "give the folder that holds meta/, data/ and videos/"
        raise DataError("not a LeRobot dataset", where=source, expected="meta/info.json", fix=fix)
    info = _json(path.read_bytes, str(path))
    version = info.get("codebase_version")
    if version not in VERSIONS:
        expected = " or ".join(VERSIONS)
        fix = "convert it with LeRobot's own tools first"
        raise DataError("a LeRobot dataset of another version", where=path, expected=expected, found=version, fix=fix)
    features, fps = info.get("features"), info.get("fps")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise DataError("a LeRobot dataset needs its features", where=path, expected="'features', a mapping")
    if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not fps > 0:
        raise DataError("a LeRobot dataset needs its rate", where=path, expected="'fps', a positive number", found=fps)
    layout = _Layout(source, path, info, tuple(name for name, f in features.items() if f.get("dtype") == "video"))
    episodes = list(layout.episodes_v3() if version == "v3.0" else layout.episodes_v2())
    episodes.sort(key=lambda episode: episode.episode_index)
    counts = Counter(episode.episode_index for episode in episodes)
    if twice := [number for number, count in counts.items() if count > 1]:
        where = source / "meta" / ("episodes" if version == "v3.0" else "episodes.jsonl")
        raise DataError("episodes are listed twice", where=where, expected="each once", found=twice[:20])
    tasks = _tasks_v3(source) if version == "v3.0" else _tasks_v2(source)
    return LeRobotMetadata(source, float(fps), features, tuple(episodes), tasks)


@dataclass(frozen=True)
class _Layout:
    """File names of a dataset, from the templates in its `info.json`."""

    source: Path
    info_path: Path
    info: Mapping[str, Any]
    video_keys: tuple[str, ...]

    def episodes_v2(self) -> Iterator[LeRobotEpisode]:
        path = self.source / "meta" / "episodes.jsonl"
        chunks_size = self.info.get("chunks_size")
        if not isinstance(chunks_size, int) or chunks_size < 1:
            raise DataError(
                "the files of episodes cannot be named", where=self.info_path, expected="'chunks_size', at least 1"
            )
        for where, line in _json_lines(path):
            index, length = _whole(line, "episode_index", where), _whole(line, "length", where)
            names: dict[str, Any] = {"episode_chunk": index // chunks_size, "episode_index": index}
            videos = {key: VideoSpan(self._path("video_path", {**names, "video_key": key})) for key in self.video_keys}
            yield LeRobotEpisode(index, length, self._path("data_path", names), videos)

    def episodes_v3(self) -> Iterator[LeRobotEpisode]:
        paths = sorted((self.source / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            expected = "meta/episodes/chunk-000/file-000.parquet and the like"
            raise DataError("a LeRobot dataset without its list of episodes", where=self.source, expected=expected)
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in self.video_keys:
            columns += [
                f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            ]
        for path in paths:
            for number, row in enumerate(_parquet_rows(path, columns)):
                yield self._episode_v3(row, f"{path}, row {number}")

    def _episode_v3(self, row: dict[str, Any], where: str) -> LeRobotEpisode:
        videos = {}
        for key in self.video_keys:
            path = self._path("video_path", {"video_key": key, **self._file_v3(row, f"videos/{key}", where)})
            span = [row[f"videos/{key}/{name}"] for name in ("from_timestamp", "to_timestamp")]
            if not all(isinstance(limit, (int, float)) for limit in span) or not 0 <= span[0] < span[1]:
                expected = "from_timestamp before to_timestamp [s]"
                raise DataError("an episode without its part of a video", where=where, expected=expected, found=span)
            videos[key] = VideoSpan(path, *span)
        data_path = self._path("data_path", self._file_v3(row, "data", where))
        return LeRobotEpisode(_whole(row, "episode_index", where), _whole(row, "length", where), data_path, videos)

    @staticmethod
    def _file_v3(row: dict[str, Any], prefix: str, where: str) -> dict[str, int]:
        return {name: _whole(row, f"{prefix}/{name}", where, name) for name in ("chunk_index", "file_index")}

    def _path(self, template_key: str, names: Mapping[str, Any]) -> Path:
        template = self.info.get(template_key)
        if not isinstance(template, str):
            expected = f"'{template_key}', a template"
            raise DataError("the files of episodes cannot be named", where=self.info_path, expected=expected)
        try:
            relative = os.path.normpath(template.format(**names))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            expected = f"a template of {', '.join(names)}"
            what = f"'{template_key}' cannot be filled in"
            raise DataError(what, where=self.info_path, expected=expected, found=f"{template!r}: {error}") from error
        if os.path.isabs(relative) or relative.startswith(".."):
            what = f"'{template_key}' leads out of the dataset"
            raise DataError(what, where=self.info_path, found=template)
        return self.source / relative


# -------------------------------------------------------------------------------------------------- tasks


def _tasks_v2(source: Path) -> dict[int, str]:
    tasks = {}
    for where, line in _json_lines(source / "meta" / "tasks.jsonl"):
        tasks[_whole(line, "task_index", where)] = _text(line.get("task"), where)
    return tasks


def _tasks_v3(source: Path) -> dict[int, str]:
    """The sentences are the index of a data frame, stored as a column called "task", or without a name."""
    path = source / "meta" / "tasks.parquet"
    names = _parquet_columns(path)
    texts = next((name for name in ("task", "__index_level_0__") if name in names), None)
    if texts is None or "task_index" not in names:
        expected = "task_index, and task or __index_level_0__"
        raise DataError("a list of tasks without its columns", where=path, expected=expected, found=", ".join(names))
    rows = enumerate(_parquet_rows(path, ["task_index", texts]))
    return {_whole(row, "task_index", f"{path}, row {n}"): _text(row[texts], f"{path}, row {n}") for n, row in rows}


# ---------------------------------------------------------------------------------------- files, and values


def _json(read: Any, where: str) -> dict[str, Any]:
    try:
        document = json.loads(read())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("not a readable JSON file", where=where, found=str(error)) from error
    if not isinstance(document, dict):
        raise DataError("not a JSON object", where=where, found=type(document).__name__)
    return document


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        # Not `splitlines`, for which a sentence may hold ends of lines (U+2028) that are none in JSON.
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("a list of the dataset cannot be read", where=path, found=str(error)) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _json(lambda line=line: line, where)


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError("a table of the dataset cannot be read", where=path, found=str(error)) from error


def _parquet_rows(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    names = _parquet_columns(path)
    missing = [name for name in columns if name not in names]
    if missing:
        expected, found = ", ".join(missing), ", ".join(name for name in names if not name.startswith("stats/"))
        raise DataError("a table of the dataset lacks columns", where=path, expected=expected, found=found)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read(columns=columns).select(columns).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError("a table of the dataset cannot be read", where=path, found=str(error)) from error


def _whole(line: Mapping[str, Any], key: str, where: str, name: str | None = None) -> int:
    value = line.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        expected = f"'{name or key}', a whole number"
        raise DataError("an entry of the dataset's lists is wrong", where=where, expected=expected, found=value)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError("a task must be a sentence", where=where, expected="text", found=value)
    return value
