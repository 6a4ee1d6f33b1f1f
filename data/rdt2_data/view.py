"""Datasets and episodes in the Rerun viewer, or in a file for it.

Shards: one step of the timeline per sample, with both wrist images, the instruction, and each arm's chunk relative to
the hand as it stands. Episodes: everything that was recorded, on the recorder's clock. The bases of two arms are not
known to each other here, so each arm has a 3D view of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdt2_data.instructions import Instructions
from rdt2_data.problems import SampleError, Tally
from rdt2_data.samples import (
    IMAGE,
    INSTRUCTION_KEY,
    RawSample,
    decode_composite,
    read_action,
    read_conversation,
    read_meta,
)
from rdt2_data.shards.source import SampleSource, open_source
from rdt2_jax.actions.chunks import PolicyFrames, RobotName, chunk_to_poses
from rdt2_jax.actions.layout import ACTION_RATE_HZ, ARM_NAMES, CAMERA_NAMES, ArmName
from rdt2_jax.actions.poses import compose, pose7_to_matrix
from rdt2_jax.errors import DataError, missing_extra
from rdt2_jax.io.files import publish_file

if TYPE_CHECKING:
    from rdt2_jax.actions.episode import Series

SAMPLE_TIMELINE, EPISODE_TIMELINE = "sample", "time"

_ARM_COLOURS: dict[ArmName, tuple[int, int, int]] = {"left": (48, 99, 142), "right": (209, 73, 91)}
_JPEG_QUALITY = 92
_AXIS_M = 0.05
_SAMPLES_PER_READ = 32


def view_shards(
    paths: Sequence[str],
    *,
    instructions: Instructions | None = None,
    save: Path | None = None,
    start: int = 0,
    limit: int = 300,
) -> dict[str, Any]:
    """Shows samples of shards, in their order.

    Args:
        paths: see `open_source`.
        instructions: the sentences; without them the keys are shown.
        save: a `.rrd` file to write; None opens a window.
        start, limit: which samples.

    Returns:
        {"counts": name -> how many, "notes": lines about what is not shown}.

    Raises:
        DataError: no shards, or none from `start` on; a file that cannot be written.
        MissingExtraError: Rerun is not installed.
    """
    source = open_source(paths, tally=Tally())
    if not len(source):
        raise DataError("there are no samples", where=", ".join(map(str, paths)), found=source.tally.text() or None)
    if start >= len(source):
        raise DataError("there is no such sample", where="start", expected=f"0 to {len(source) - 1}", found=start)
    stop = min(start + limit, len(source))
    with _recording(save, SAMPLE_TIMELINE) as stream:
        for first in range(start, stop, _SAMPLES_PER_READ):
            indices = range(first, min(first + _SAMPLES_PER_READ, stop))
            for index, raw in zip(indices, source.read(indices), strict=True):
                stream.set_time(SAMPLE_TIMELINE, sequence=index)
                _log_or_count(stream, raw, instructions, source)
    notes = (
        [f"{len(source) - (stop - start)} of {len(source)} samples are not shown"] if stop - start < len(source) else []
    )
    if source.tally.total:
        notes.append(source.tally.text())
    return {"counts": {"samples": stop - start, "problems": source.tally.total}, "notes": notes}


def view_episode(path: Path, *, save: Path | None = None, robot: RobotName | None = None) -> dict[str, Any]:
    """Shows one recorded episode: images, poses of both TCPs with their trails, widths, chunks, instructions, events.

    Args:
        path: a `.mcap` file, or what an interrupted recording left behind.
        save: a `.rrd` file to write; None opens a window.
        robot: whose constants turn the TCP into the policy frame of the chunks; by default the robot that the
            episode names.

    Returns:
        {"counts": name -> how many, "notes": lines about what is not shown}.

    Raises:
        DataError: no episode, chunks of a robot without published constants, or a file that cannot be written.
        MissingExtraError: Rerun is not installed.
    """
    from rdt2_jax.actions.episode import EpisodeReader

    reader = EpisodeReader(path)
    series = reader.read()
    chunks = series["/policy/chunk"]
    frames = _frames(robot or reader.metadata.robot, path) if len(chunks.time_s) else None
    with _recording(save, EPISODE_TIMELINE) as stream:
        for arm in ARM_NAMES:
            _log_arm(stream, arm, series)
        for camera in CAMERA_NAMES:
            images = series[f"/{camera}/image"]
            for time_s, jpeg in zip(images.values["capture_time_s"], images.values["jpeg"], strict=True):
                stream.set_time(EPISODE_TIMELINE, duration=float(time_s))
                _log_jpeg(stream, camera, jpeg)
        _log_texts(stream, series)
        if frames is not None:
            _log_chunks(stream, chunks, frames)
    counts = {topic.strip("/"): len(entry.time_s) for topic, entry in series.items()}
    return {"counts": counts, "notes": [reader.truncation] if reader.truncation else []}


# ------------------------------------------------------------------------------------------------- samples


def _log_or_count(
    stream: Any, raw: RawSample | SampleError, instructions: Instructions | None, source: SampleSource
) -> None:
    """Logs one sample; what is wrong with it is counted and stands in its text. Of a broken one, nothing stays."""
    import rerun as rr

    try:
        if isinstance(raw, SampleError):
            raise raw
        if raw.is_question:
            _log_question(stream, raw)
        else:
            _log_sample(stream, raw, instructions)
    except SampleError as problem:
        source.tally.add(problem)
        for entity in ("/left", "/right", "/left_wrist", "/right_wrist"):
            stream.log(entity, rr.Clear(recursive=True))
        stream.log("instruction", rr.TextDocument(f"problem: {problem.line()}"))


def _log_sample(stream: Any, raw: RawSample, instructions: Instructions | None) -> None:
    import rerun as rr
    import simplejpeg

    meta, image, action = read_meta(raw), decode_composite(raw), read_action(raw)
    key = meta[INSTRUCTION_KEY]
    text = f"instruction {key}" if instructions is None else instructions.text(key, raw.where)
    stream.log("instruction", rr.TextDocument(f"{text}\n\n{raw.where}"))
    for camera, half in zip(CAMERA_NAMES, np.split(image, 2, axis=1), strict=True):
        half = np.ascontiguousarray(half)
        _log_jpeg(stream, camera, simplejpeg.encode_jpeg(half, quality=_JPEG_QUALITY, colorspace="RGB"))
    poses, widths = chunk_to_poses(action.astype(np.float64))
    for arm in ARM_NAMES:
        path = np.concatenate([np.eye(4)[None], np.asarray(poses[arm])])
        _log_pose(stream, f"{arm}/now", path[0])
        _log_pose(stream, f"{arm}/end_of_chunk", path[-1])
        _log_path(stream, f"{arm}/chunk", path[:, :3, 3], arm)
        stream.log(f"widths/{arm}", rr.Scalars(float(np.asarray(widths[arm])[0])))


def _log_question(stream: Any, raw: RawSample) -> None:
    import rerun as rr

    turns = read_conversation(raw)
    stream.log("instruction", rr.TextDocument("\n\n".join(f"{turn.question}\n{turn.answer}" for turn in turns)))
    stream.log("right_wrist", rr.Clear(recursive=True))
    _log_jpeg(stream, "left_wrist", raw.member(IMAGE))


# ------------------------------------------------------------------------------------------------ episodes


def _log_arm(stream: Any, arm: ArmName, series: Mapping[str, Series]) -> None:
    """Poses as transforms in the base of the arm, with the whole way as a line; widths as scalars."""
    import rerun as rr

    for kind in ("measured", "commanded"):
        track = series[f"/{arm}/{kind}/pose"]
        if len(track.time_s):
            poses = np.asarray(pose7_to_matrix(track.values["pose_base_tcp"]))
            for time_s, pose in zip(track.time_s, poses, strict=True):
                stream.set_time(EPISODE_TIMELINE, duration=float(time_s))
                _log_pose(stream, f"{arm}/{kind}/tcp", pose)
            line = rr.LineStrips3D([poses[:, :3, 3]], colors=[_ARM_COLOURS[arm] if kind == "measured" else (150,) * 3])
            stream.log(f"{arm}/{kind}/trajectory", line, static=True)
        gripper = series[f"/{arm}/{kind}/gripper"]
        for time_s, width_m in zip(gripper.time_s, gripper.values["width_m"], strict=True):
            stream.set_time(EPISODE_TIMELINE, duration=float(time_s))
            stream.log(f"widths/{arm}_{kind}", rr.Scalars(float(width_m)))


def _log_texts(stream: Any, series: Mapping[str, Series]) -> None:
    import rerun as rr

    instructions = series["/instruction"]
    for time_s, text in zip(instructions.time_s, instructions.values["instruction"], strict=True):
        stream.set_time(EPISODE_TIMELINE, duration=float(time_s))
        stream.log("instruction", rr.TextDocument(text))
    events = series["/events"]
    for time_s, name, text in zip(events.time_s, events.values["name"], events.values["text"], strict=True):
        stream.set_time(EPISODE_TIMELINE, duration=float(time_s))
        stream.log("events", rr.TextLog(f"{name}: {text}"))


def _log_chunks(stream: Any, chunks: Series, frames: PolicyFrames) -> None:
    """Where each chunk would take the TCPs, in the bases of the arms, shown from when it was answered."""
    for time_s, actions, anchors in zip(
        chunks.time_s, chunks.values["actions"], chunks.values["anchor_pose_base_tcp"], strict=True
    ):
        stream.set_time(EPISODE_TIMELINE, duration=float(time_s))
        poses, _ = chunk_to_poses(actions.astype(np.float64))
        for number, arm in enumerate(ARM_NAMES):
            pose_base_tcp = np.asarray(pose7_to_matrix(anchors[number]))
            pose_base_policy = compose(pose_base_tcp, frames.pose_tcp_policy(arm))
            pose_policy_tcp = np.linalg.inv(frames.pose_tcp_policy(arm))
            future = compose(compose(pose_base_policy, np.asarray(poses[arm])), pose_policy_tcp)
            path = np.concatenate([pose_base_tcp[None], np.asarray(future)])
            _log_path(stream, f"{arm}/chunk", path[:, :3, 3], arm)


def _frames(robot: str, path: Path) -> PolicyFrames:
    try:
        return PolicyFrames.published(robot)  # type: ignore[arg-type]
    except DataError as error:
        fix = "say whose constants to use: --robot ur5e or --robot fr3"
        what = "the chunks of this episode cannot be placed"
        raise DataError(what, where=path, expected=error.expected, found=f"robot {robot!r}", fix=fix) from error


# ------------------------------------------------------------------------------------------------ entities


def _log_pose(stream: Any, entity: str, pose: np.ndarray) -> None:
    import rerun as rr

    axes = rr.Arrows3D(vectors=np.eye(3) * _AXIS_M, colors=[(193, 18, 31), (46, 139, 87), (29, 78, 216)])
    stream.log(entity, rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]), axes)


def _log_path(stream: Any, entity: str, points_m: np.ndarray, arm: ArmName) -> None:
    import rerun as rr

    stream.log(entity, rr.LineStrips3D([points_m], colors=[_ARM_COLOURS[arm]]))
    stream.log(f"{entity}/frames", rr.Points3D(points_m[1:], colors=[_ARM_COLOURS[arm]], radii=[0.002]))


def _log_jpeg(stream: Any, entity: str, jpeg: bytes) -> None:
    import rerun as rr

    stream.log(entity, rr.EncodedImage(contents=jpeg, media_type="image/jpeg"))


@contextmanager
def _recording(save: Path | None, timeline: str) -> Iterator[Any]:
    """A Rerun stream: into a file that appears when it is whole, or into a window."""
    try:
        import rerun as rr
    except ModuleNotFoundError as error:
        raise missing_extra("rerun", "view", "the viewer") from error

    stream = rr.RecordingStream("rdt2")
    if save is None:
        stream.spawn(default_blueprint=_blueprint(timeline))
        yield stream
        stream.flush()
        return
    target = Path(save).resolve()
    if target.suffix != ".rrd" or not target.parent.is_dir():
        expected = "a name ending in .rrd, in an existing folder"
        raise DataError("a recording cannot be written there", where=save, expected=expected)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.rrd")
    try:
        stream.save(temporary, default_blueprint=_blueprint(timeline))
        yield stream
        stream.flush()
        stream.disconnect()
        publish_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _blueprint(timeline: str) -> Any:
    import rerun.blueprint as rrb

    return rrb.Blueprint(
        rrb.Vertical(
            rrb.Horizontal(
                rrb.Spatial2DView(origin="/left_wrist", name="left wrist"),
                rrb.Spatial2DView(origin="/right_wrist", name="right wrist"),
            ),
            rrb.Horizontal(
                rrb.Spatial3DView(origin="/left", name="left arm"),
                rrb.Spatial3DView(origin="/right", name="right arm"),
                rrb.Vertical(
                    rrb.TextDocumentView(origin="/instruction", name="instruction"),
                    rrb.TimeSeriesView(origin="/widths", name="gripper widths"),
                ),
            ),
        ),
        rrb.TimePanel(timeline=timeline, fps=ACTION_RATE_HZ),
    )
