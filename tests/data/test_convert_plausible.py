"""Values that cannot be meant, and times that count as equal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from convert_sources import smooth_recording
from rdt2_data.converters.chunks import select_frames
from rdt2_data.converters.options import ChunkOptions
from rdt2_data.converters.recording import PoseTrack, WidthTrack
from rdt2_data.converters.tracks import WIDTH_LIMITS, time_tolerance_s
from rdt2_data.problems import SampleError, Tally


def test_values_of_another_unit_are_counted_with_the_likely_cause() -> None:
    recording = smooth_recording(rows=90)
    pose, width = recording.poses["left"], recording.widths["right"]
    millimetres = pose.pose_world_policy.copy()
    millimetres[:, :3, 3] *= 1000
    cases = {
        "millimetres": replace(recording, poses={**recording.poses, "left": PoseTrack(pose.time_s, millimetres)}),
        "a wrong unit": replace(
            recording,
            widths={**recording.widths, "right": WidthTrack(width.time_s, width.width * 1000, width.valid)},
        ),
    }
    for said, case in cases.items():
        tally = Tally()
        assert len(select_frames(case, ChunkOptions(), tally)) == 0
        assert tally.counts() == {"out-of-range": 66}
        assert said in tally.text()
        with pytest.raises(SampleError, match="unit"):
            select_frames(case, ChunkOptions(), Tally(strict=True))


def test_a_single_implausible_width_costs_the_windows_that_touch_it_if_it_was_measured() -> None:
    recording = smooth_recording(rows=90)
    for limit in WIDTH_LIMITS:
        width, valid = recording.widths["left"].width.copy(), np.ones(90, bool)
        width[[10, 80]] = limit  # just allowed
        width[40] = limit + (0.001 if limit > 0 else -0.001)
        track = WidthTrack(recording.widths["left"].time_s, width, valid)
        case = replace(recording, widths={**recording.widths, "left": track})
        tally = Tally()
        selection = select_frames(case, ChunkOptions(), tally)
        assert selection.right_frame.tolist() == [*range(16), *range(41, 66)]
        assert tally.counts() == {"out-of-range": 25}
        valid[40] = False
        assert len(select_frames(case, ChunkOptions(), Tally(strict=True))) == 66


def test_a_hand_may_reach_two_metres_and_no_more() -> None:
    recording = smooth_recording(rows=60)
    for jump_m, samples in ((1.9, 36), (2.1, 12)):
        pose = np.tile(np.eye(4), (60, 1, 1))
        pose[35:, 1, 3] = jump_m
        track = PoseTrack(recording.poses["right"].time_s, pose)
        case = replace(recording, poses={**recording.poses, "right": track})
        tally = Tally()
        assert len(select_frames(case, ChunkOptions(), tally)) == samples  # the windows that touch the jump
        assert tally.total == 36 - samples


@pytest.mark.parametrize(("latest_s", "tolerance_s"), [(1.0, 1e-6), (100.0, 4 * 100 * 2**-23), (1.7e9, 5e-4)])
def test_the_tolerance_is_a_few_steps_of_float32(latest_s: float, tolerance_s: float) -> None:
    assert time_tolerance_s(np.array([0.0, latest_s])) == pytest.approx(tolerance_s)
