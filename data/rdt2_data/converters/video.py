"""Frames of a video by presentation time: sequential where they lie close together, by seeking where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rdt2_data.converters.damage import damage_named
from rdt2_data.converters.frames import OrderedFrames, image_or_problem
from rdt2_data.problems import SampleError

_FIRST_STEP_BACK_S = 1.0
"""When a seek lands behind its target (the index holds decoding times, which precede those of presentation)."""

_WORTH_SEEKING_S = 0.15
"""A seek costs a few frames too: those in the decoder are lost, those from the keyframe on are decoded."""

_ROUNDING_S = 1e-3
"""Times are kept in float32 seconds and in ticks of the container; a keyframe this little later is the wanted one."""


@dataclass(frozen=True, eq=False)
class VideoFrames(OrderedFrames):
    """Frames of one video file, found by their time.

    Times are those of presentation as the container gives them: frames that the encoder stored in another order
    (B-frames) come in the order in which they are shown.

    Attributes:
        path: the file; opened by every `read`.
        time_s: float64 (N,), when each of the N images is shown, strictly increasing.
        tolerance_s: largest distance to the nearest frame; half of the frames' distance, so that no frame can be taken
            for its neighbour.
    """

    path: Path
    time_s: np.ndarray
    tolerance_s: float

    def _count(self) -> int:
        return len(self.time_s)

    def _where(self) -> str:
        return str(self.path)

    def _read(self, indices: list[int]) -> Iterator[np.ndarray | SampleError]:
        with _opened(self.path) as (container, stream):
            cursor = _Cursor(self.path, container, stream)
            for index in indices:
                yield image_or_problem(self._image, cursor, index)

    def _image(self, cursor: _Cursor, index: int) -> np.ndarray:
        wanted_s = float(self.time_s[index])
        found_s, frame = cursor.nearest(wanted_s)
        if abs(found_s - wanted_s) > self.tolerance_s:
            raise SampleError(
                "bad-recording",
                what="the video has no frame at this time",
                where=f"{self.path}, image {index}",
                expected=f"a frame within {self.tolerance_s:.4g} s of {wanted_s:.6f} s",
                found=f"the nearest at {found_s:.6f} s",
            )
        with _errors_named(self.path):
            return frame.to_ndarray(format="rgb24")


class _Cursor:
    """Two neighbouring frames of a video that is decoded forwards; seeks when that is shorter."""

    def __init__(self, path: Path, container: Any, stream: Any) -> None:
        self.path, self.container, self.stream = path, container, stream
        entries = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        self.keyframes_s = np.sort(np.array(entries, np.float64)) * float(stream.time_base)
        self.current: tuple[float, Any] | None = None
        self.following: tuple[float, Any] | None = None
        self.decoded: Iterator[tuple[float, Any]] = iter(())

    def nearest(self, wanted_s: float) -> tuple[float, Any]:
        """The frame nearest to a time that is not before the one asked for last."""
        try:
            return self._nearest(wanted_s)
        except SampleError:
            # The decoder is not where it was: the next frame is looked for anew.
            self.current, self.following, self.decoded = None, None, iter(())
            raise

    def _nearest(self, wanted_s: float) -> tuple[float, Any]:
        current, following = self.current, self.following
        if current is None or self._keyframe_between(current if following is None else following, wanted_s):
            current, following = self._seek(wanted_s)
        while following is not None and following[0] <= wanted_s:
            current, following = following, next(self.decoded, None)
        self.current, self.following = current, following
        if following is not None and following[0] - wanted_s < abs(wanted_s - current[0]):
            return following
        return current

    def _keyframe_between(self, decoded: tuple[float, Any], wanted_s: float) -> bool:
        """Whether decoding can start later than where it stands and still meet the wanted frame."""
        position = np.searchsorted(self.keyframes_s, wanted_s, side="right") - 1
        return bool(position >= 0 and self.keyframes_s[position] > decoded[0] + _WORTH_SEEKING_S)

    def _seek(self, wanted_s: float) -> tuple[tuple[float, Any], tuple[float, Any] | None]:
        """Decodes from a keyframe that is shown at or before a time, or from the first: that frame, and the next."""
        step_back_s = 0.0
        # Before the first time there is, because some containers jump over a keyframe that lies where they are sent.
        start_s = float((self.stream.start_time or 0) * self.stream.time_base) - _FIRST_STEP_BACK_S
        while True:
            target_s = max(wanted_s + _ROUNDING_S - step_back_s, start_s)
            with _errors_named(self.path):
                self.container.seek(round(target_s / self.stream.time_base), stream=self.stream, backward=True)
            self.decoded = self._frames()
            first = next(self.decoded, None)
            if first is not None and (first[0] <= wanted_s + _ROUNDING_S or target_s <= start_s):
                return first, next(self.decoded, None)
            if target_s <= start_s:
                raise SampleError("bad-recording", where=self.path, expected="a video", found="no frame at all")
            step_back_s = max(2 * step_back_s, _FIRST_STEP_BACK_S)

    def _frames(self) -> Iterator[tuple[float, Any]]:
        """(presentation time [s], frame) from where the container stands."""
        last_s = -np.inf
        with _errors_named(self.path):
            for frame in self.container.decode(self.stream):
                if frame.pts is None:
                    raise SampleError("bad-time", where=self.path, found="a frame without a time of presentation")
                time_s = float(frame.pts * self.stream.time_base)
                if frame.is_corrupt:
                    what = "a frame of the video is damaged"
                    raise SampleError("bad-recording", what=what, where=f"{self.path}, at {time_s:.6f} s")
                if time_s <= last_s:
                    found = f"{time_s} s after {last_s} s"
                    raise SampleError("bad-time", where=self.path, expected="frames whose times increase", found=found)
                last_s = time_s
                yield time_s, frame


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its only video stream."""
    import av

    with _errors_named(path):
        container = av.open(str(path))
    with container:
        if len(container.streams.video) != 1:
            found = f"{len(container.streams.video)} of them"
            raise SampleError("bad-recording", where=path, expected="one video stream", found=found)
        stream = container.streams.video[0]
        # Decoders patch damaged pictures up from their neighbours unless they are told not to. Those that do so all the
        # same mark what they patched (`is_corrupt`).
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.thread_count = 1  # a conversion keeps every core busy with a process of its own
        yield container, stream


def _errors_named(path: Path) -> AbstractContextManager[None]:
    """Errors of the video library as a SampleError that names the file."""
    from av.error import FFmpegError

    return damage_named("the video cannot be decoded", path, FFmpegError, OSError, EOFError)
