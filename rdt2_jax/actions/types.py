"""What goes into a policy and what comes out: observations, action chunks, and the protocol between them.

Every record is frozen, checks its fields when it is made, and holds read-only copies of its arrays. Times are seconds
of the caller's monotonic clock; a policy, local or behind a network, only hands them back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from rdt2_jax.actions.arrays import Array, host_array, read_only_copy
from rdt2_jax.actions.layout import (
    ACTION_RATE_HZ,
    ARM_NAMES,
    CAMERA_NAMES,
    CHUNK_LENGTH,
    STATE_DIM,
    ArmName,
)
from rdt2_jax.actions.validation import check_chunk, check_poses
from rdt2_jax.errors import DataError

Value = TypeVar("Value")

IMAGE_SHAPE = (384, 384, 3)
"""One wrist image: rows, columns, RGB."""

MAX_CAPTURE_SKEW_S = 0.020
"""Images captured further apart than this are reported; the cameras run free, so it is not an error."""


class _Record:
    """Pickling and copying for frozen records whose fields are read-only views: they are made anew, and checked."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        plain = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
        return _rebuild, (type(self), plain)


def _rebuild(record: type, values: dict[str, Any]) -> Any:
    return record(**values)


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation(_Record):
    """What a policy sees at one time.

    Attributes:
        images: uint8 RGB (384, 384, 3) for each of "left_wrist" and "right_wrist".
        capture_time_s: mid-exposure time of each image. The cameras are not synchronised.
        instruction: what to do, e.g. "Pick up the apple.".
        id: name of this observation, which the answer carries back.
        state: proprioception, float32 (20,), or None where the model takes none.

    Raises:
        DataError: on construction, for missing or unknown cameras, wrong shapes or types, times or states that are
            not finite, an empty instruction or id.
    """

    images: Mapping[str, np.ndarray]
    capture_time_s: Mapping[str, float]
    instruction: str
    id: str
    state: np.ndarray | None = None

    def __post_init__(self) -> None:
        images = _exactly(self.images, CAMERA_NAMES, "images")
        frozen = {name: _typed(image, IMAGE_SHAPE, np.uint8, f"images[{name!r}]") for name, image in images.items()}
        _set(self, images=MappingProxyType(frozen), capture_time_s=_times(self.capture_time_s, CAMERA_NAMES))
        _require_text(self.instruction, "instruction")
        _require_text(self.id, "id")
        if self.state is not None:
            state = _typed(self.state, (STATE_DIM,), np.float32, "state")
            _require_finite(state, "state")
            _set(self, state=state)

    @property
    def capture_skew_s(self) -> float:
        """Seconds between the first and the last image."""
        return max(self.capture_time_s.values()) - min(self.capture_time_s.values())

    @property
    def skewed(self) -> bool:
        """Whether the images lie further apart than `MAX_CAPTURE_SKEW_S`."""
        return self.capture_skew_s > MAX_CAPTURE_SKEW_S


@dataclass(frozen=True, eq=False, kw_only=True)
class _TimedChunk(_Record):
    """When the actions of a chunk are due, and which observation they answer.

    Attributes:
        anchor_time_s: for each of "right" and "left", the capture time of that arm's own image: the actions are
            relative to the arm's pose at that time.
        observation_id: `Observation.id` of the observation answered.
        capture_time_s: `Observation.capture_time_s` of it.
        fps: rate of the actions [Hz].
    """

    anchor_time_s: Mapping[ArmName, float]
    observation_id: str
    capture_time_s: Mapping[str, float]
    fps: float = ACTION_RATE_HZ

    def __post_init__(self) -> None:
        _set(self, anchor_time_s=_times(self.anchor_time_s, ARM_NAMES, "anchor_time_s"))
        _set(self, capture_time_s=_times(self.capture_time_s, CAMERA_NAMES))
        _require_text(self.observation_id, "observation_id")
        _set(self, fps=_number(self.fps, "fps"))
        if self.fps <= 0:
            raise DataError("fps must be positive", where="fps", expected="a rate in Hz", found=self.fps)

    def due_time_s(self, arm: ArmName) -> np.ndarray:
        """When each action of an arm is due: (24,) float64, anchor + (i + 1) / fps."""
        if arm not in ARM_NAMES:
            raise DataError("unknown arm", where="due_time_s", expected=" or ".join(ARM_NAMES), found=arm)
        return self.anchor_time_s[arm] + np.arange(1, CHUNK_LENGTH + 1) / self.fps


@dataclass(frozen=True, eq=False, kw_only=True)
class ActionChunk(_TimedChunk):
    """A policy's answer: motion relative to each arm's pose at its anchor time, in the POLICY frame.

    Only the executor converts it (`rdt2_jax.actions.chunks.chunk_to_tcp`).

    Attributes:
        actions: float32 (24, 20), layout of `rdt2_jax.actions.layout`; gripper widths in policy units, nominally
            0 to 0.088. A network may overshoot that range, and nothing here clips it.
        anchor_time_s, observation_id, capture_time_s, fps: see `_TimedChunk`; action i is due at anchor + (i+1)/fps.

    Raises:
        DataError: on construction, for fields of the wrong shape or type, values that are not finite, or rotations
            that cannot be orthonormalised.
    """

    actions: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        actions = _typed(self.actions, None, np.float32, "actions")
        check_chunk(actions, name="actions", where=f"answer to observation {self.observation_id!r}")
        if actions.ndim != 2:
            raise DataError("an action chunk has no batch axis", expected="(24, 20)", found=str(actions.shape))
        _set(self, actions=actions)


@dataclass(frozen=True, eq=False, kw_only=True)
class TcpChunk(_TimedChunk):
    """The same motion for the executor: relative poses of the TCP, and real gripper widths.

    Attributes:
        poses_anchor_tcp: for each arm, float64 (24, 4, 4): the TCP's pose expressed in the TCP frame as it stood at
            the anchor time. `compose(pose_base_tcp at the anchor time, ...)` gives absolute waypoints.
        widths_m: for each arm, float64 (24,): opening of the real gripper [m]. Not clamped: the executor does that,
            after any pre-closing.
        anchor_time_s, observation_id, capture_time_s, fps: see `_TimedChunk`.

    Raises:
        DataError: on construction, for fields of the wrong shape or type, values that are not finite, or matrices
            that are not rigid transforms.
    """

    poses_anchor_tcp: Mapping[ArmName, np.ndarray]
    widths_m: Mapping[ArmName, np.ndarray]

    def __post_init__(self) -> None:
        super().__post_init__()
        poses, widths = {}, {}
        for arm, pose in _exactly(self.poses_anchor_tcp, ARM_NAMES, "poses_anchor_tcp").items():
            name = f"poses_anchor_tcp[{arm!r}]"
            poses[arm] = _typed(pose, (CHUNK_LENGTH, 4, 4), np.float64, name)
            check_poses(poses[arm], name=name)
        for arm, width in _exactly(self.widths_m, ARM_NAMES, "widths_m").items():
            widths[arm] = _typed(width, (CHUNK_LENGTH,), np.float64, f"widths_m[{arm!r}]")
            _require_finite(widths[arm], f"widths_m[{arm!r}]")
        _set(self, poses_anchor_tcp=MappingProxyType(poses), widths_m=MappingProxyType(widths))


@runtime_checkable
class Policy(Protocol):
    """Anything that turns observations into chunks, in process or behind a network."""

    def infer(self, observation: Observation) -> ActionChunk:
        """The chunk that answers an observation; carries its id and capture times back unchanged."""
        ...

    def reset(self) -> None:
        """Forgets what was kept between observations: a new episode begins."""
        ...


def _set(record: object, **values: object) -> None:
    """Replaces fields of a frozen record while it is being made."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _exactly(mapping: Mapping[Any, Value], names: Iterable[str], what: str) -> dict[Any, Value]:
    """The mapping as a dict in the order of `names`, when its keys are exactly those."""
    names = tuple(names)
    if not isinstance(mapping, Mapping) or set(mapping) != set(names):
        found = sorted(map(str, mapping)) if isinstance(mapping, Mapping) else type(mapping).__name__
        raise DataError(f"{what} has the wrong keys", where=what, expected=sorted(names), found=found)
    return {name: mapping[name] for name in names}


def _times(times: Mapping[Any, float], names: Iterable[str], what: str = "capture_time_s") -> Mapping[Any, float]:
    items = _exactly(times, names, what).items()
    return MappingProxyType({name: _number(time, f"{what}[{name!r}]") for name, time in items})


def _number(value: Any, what: str) -> float:
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise DataError(f"{what} must be a number", where=what, expected="float", found=type(value).__name__)
    if not math.isfinite(value):
        raise DataError(f"{what} must be finite", where=what, expected="a number", found=value)
    return float(value)


def _typed(array: Array, shape: tuple[int, ...] | None, dtype: Any, what: str) -> np.ndarray:
    """A read-only copy on the host, when the array has exactly that shape and type (None: any shape)."""
    host = host_array(array, what)
    if host.dtype != dtype:
        raise DataError(
            f"{what} has the wrong type",
            where=what,
            expected=np.dtype(dtype).name,
            found=str(host.dtype),
            fix=f"convert it on purpose: numpy.asarray(x, numpy.{np.dtype(dtype).name})",
        )
    if shape is not None and host.shape != shape:
        raise DataError(f"{what} has the wrong shape", where=what, expected=shape, found=host.shape)
    return read_only_copy(host)


def _require_finite(array: np.ndarray, what: str) -> None:
    if not np.isfinite(array).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise DataError(f"{what} must be finite", where=what, expected="finite numbers", found=f"index {index}")


def _require_text(text: object, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{what} must be text", where=what, expected="a string that is not blank", found=repr(text))
