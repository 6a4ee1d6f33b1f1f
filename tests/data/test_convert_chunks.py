"""Which frames become samples, and their chunks: properties, and the numbers of the public code.

Of the golden entries `plain`, `ds2`, `pad`, `resample`, `resample_direct` and `dataset` are reproduced; see each test.
Not reproduced, because they are defects of the public sampler: the empty chunk at each episode's last frame with
padding (`pad`, NaN rows: ours is held), the episode mask that is ignored without videos (`mask_no_videos`), and a grid
that starts at the time of the next row (`resample`, where that is more than one frame away, and `ds2`).
`mask_with_videos` and `val_mask` are about splitting episodes, which a conversion does not do.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from convert_sources import smooth_recording
from hypothesis import given, settings
from hypothesis import strategies as st
from rdt2_data.converters import chunks as chunks_module
from rdt2_data.converters.chunks import AFTER, BEFORE, UNPAIRED, UNTOLD, cut_chunks, select_frames
from rdt2_data.converters.options import ChunkOptions
from rdt2_data.converters.recording import CameraTrack, PoseTrack, Recording, WidthTrack, require_increasing
from rdt2_data.converters.tracks import interpolate_poses, interpolate_values
from rdt2_data.problems import SampleError, Tally

from rdt2_jax.actions.chunks import chunk_to_poses, relative_to_absolute_chunk
from rdt2_jax.actions.layout import ARM_NAMES, CAMERA_NAMES, ArmName
from rdt2_jax.actions.poses import compose, invert, pose6_to_matrix
from rdt2_jax.actions.rotations import geodesic_angle

GOLDEN = Path(__file__).parents[1] / "golden" / "dataset" / "io.npz"
HOLD = ChunkOptions(at_end="hold", max_gap_s=1e3)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as archive:
        return dict(archive)


def golden_recording(golden: dict[str, np.ndarray], start: int, stop: int, time_s: np.ndarray) -> Recording:
    poses, widths = {}, {}
    for number, arm in enumerate(ARM_NAMES):
        rows = slice(start, stop)
        pose6 = [golden[f"buffer/robot{number}_{part}"][rows] for part in ("eef_pos", "eef_rot_axis_angle")]
        poses[arm] = PoseTrack(time_s, pose6_to_matrix(np.concatenate(pose6, axis=1).astype(np.float64)))
        width = golden[f"buffer/robot{number}_gripper_width"][rows, 0].astype(np.float64)
        widths[arm] = WidthTrack(time_s, width, golden["buffer/gripper_width_mask"][rows])
    recording = smooth_recording(rows=2)
    cameras = {camera: CameraTrack(time_s, recording.cameras[camera].frames) for camera in CAMERA_NAMES}
    return Recording(f"rows {start} to {stop}", poses, widths, cameras, [(time_s[0], "Do 0.")])


def absolute(recording: Recording, actions: np.ndarray, frame: int) -> tuple[dict, dict]:
    now: dict[ArmName, np.ndarray] = {arm: recording.poses[arm].pose_world_policy[frame] for arm in ARM_NAMES}
    return relative_to_absolute_chunk(now, actions.astype(np.float64))


def assert_is_golden(recording: Recording, frame: int, actions: np.ndarray, expected: np.ndarray) -> None:
    """Ours, relative, against absolute (T, 14): position, rotation vector and width of each arm."""
    poses, widths = absolute(recording, actions, frame)
    for number, arm in enumerate(ARM_NAMES):
        own = expected[:, 7 * number : 7 * number + 7]
        pose = pose6_to_matrix(own[:, :6].astype(np.float64))
        np.testing.assert_allclose(poses[arm], pose, atol=1e-6)
        np.testing.assert_allclose(widths[arm], own[:, 6], atol=1e-6)


def chunks_of(recording: Recording, options: ChunkOptions) -> dict[int, np.ndarray]:
    selection = select_frames(recording, options, Tally(strict=True))
    return dict(zip(selection.right_frame.tolist(), cut_chunks(recording, selection).actions, strict=True))


# ------------------------------------------------------------------------------------------------ goldens


def test_relative_chunks_are_those_of_the_public_dataset(golden: dict[str, np.ndarray]) -> None:
    for pick, expected, exact in zip(
        golden["dataset/pick"], golden["dataset/action_rel_20"], golden["dataset/action_rel_20_exact_f64"], strict=True
    ):
        current, start, stop, _ = golden["dataset/train_indices"][pick]
        recording = golden_recording(golden, start, stop, np.arange(stop - start) / 30)
        ours = chunks_of(recording, ChunkOptions())[current - start]
        np.testing.assert_allclose(ours, exact, atol=1e-6)
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_the_same_frames_are_used_as_by_the_public_sampler(golden: dict[str, np.ndarray]) -> None:
    used = []
    starts = [0, *golden["buffer/episode_ends"]]
    for start, stop in pairwise(starts):
        recording = golden_recording(golden, start, stop, np.arange(stop - start) / 30)
        used += [start + frame for frame in chunks_of(recording, ChunkOptions())]
    assert used == golden["plain/indices"][:, 0].tolist()


def test_absolute_chunks(golden: dict[str, np.ndarray]) -> None:
    for pick, expected in zip(golden["plain/pick"], golden["plain/action"], strict=True):
        current, start, stop, _ = golden["plain/indices"][pick]
        recording = golden_recording(golden, start, stop, np.arange(stop - start) / 30)
        assert_is_golden(recording, current - start, chunks_of(recording, ChunkOptions())[current - start], expected)


def test_rows_at_twice_the_rate(golden: dict[str, np.ndarray]) -> None:
    """`ds2` takes every second row, beginning with the very next one; ours begins 1/30 s later than the image.

    So the poses of its chunk are those of our chunk one row earlier.
    """
    compared = 0
    for pick, expected in zip(golden["ds2/pick"], golden["ds2/action"], strict=True):
        current, start, stop, _ = golden["ds2/indices"][pick]
        if current == start:
            continue
        recording = golden_recording(golden, start, stop, np.arange(stop - start) / 60)
        ours = chunks_of(recording, HOLD)[current - start - 1]
        assert_is_golden(recording, current - start - 1, ours[: len(expected)], expected)
        compared += 1
    assert compared >= 4


def test_the_last_pose_is_held_like_padding(golden: dict[str, np.ndarray]) -> None:
    empty = 0
    for pick, expected in zip(golden["pad/pick"], golden["pad/action"], strict=True):
        current, start, stop, _ = golden["pad/indices"][pick]
        recording = golden_recording(golden, start, stop, np.arange(stop - start) / 30)
        ours = chunks_of(recording, HOLD)[current - start]
        if np.isnan(expected).any():
            empty += 1
            assert current == stop - 1
            np.testing.assert_allclose(ours[:, :9], np.tile([0, 0, 0, 1, 0, 0, 0, 1, 0], (24, 1)), atol=1e-6)
        else:
            assert_is_golden(recording, current - start, ours[: len(expected)], expected)
    assert empty == 1


def test_stretched_timestamps_are_resampled(golden: dict[str, np.ndarray]) -> None:
    shifted = 0
    for pick, expected in zip(golden["resample/pick"], golden["resample/action"], strict=True):
        current, start, stop, _ = golden["resample/indices"][pick]
        frames = golden["buffer/timestamp"][start:stop]
        recording = golden_recording(golden, start, stop, frames / 30)
        ours = chunks_of(recording, HOLD)[current - start]
        skipped = int(frames[current - start + 1] - frames[current - start]) - 1  # the defect: the grid starts late
        shifted += skipped > 0
        assert_is_golden(recording, current - start, ours[skipped : skipped + len(expected)], expected)
    assert shifted == 1


def test_interpolation_is_linear_and_slerp(golden: dict[str, np.ndarray]) -> None:
    time_s, query_s = golden["resample_direct/timestamps"], golden["resample_direct/query"]
    for number in range(2):
        own = golden["resample_direct/actions"][:, 7 * number : 7 * number + 7].astype(np.float64)
        expected = golden["resample_direct/out"][:, 7 * number : 7 * number + 7]
        pose = interpolate_poses(time_s, pose6_to_matrix(own[:, :6]), query_s)
        np.testing.assert_allclose(pose, pose6_to_matrix(expected[:, :6]), atol=1e-6)
        np.testing.assert_allclose(interpolate_values(time_s, own[:, 6], query_s), expected[:, 6], atol=1e-6)


def test_unmeasured_widths_are_those_of_the_public_sampler_and_more(golden: dict[str, np.ndarray]) -> None:
    """It looks at the current row alone; we at every row behind the chunk."""
    for pick, expected in zip(golden["plain/pick"], golden["plain/gripper_valid"], strict=True):
        current, start, stop, _ = golden["plain/indices"][pick]
        recording = golden_recording(golden, start, stop, np.arange(stop - start) / 30)
        selection = select_frames(recording, ChunkOptions(), Tally(strict=True))
        row = selection.right_frame.tolist().index(current - start)
        mask = golden["buffer/gripper_width_mask"][current : current + 25]
        assert cut_chunks(recording, selection).gripper_valid[row].tolist() == [mask.all()] * 2
        assert expected or not mask.all()


# ----------------------------------------------------------------------------------------- interpolation


def test_a_row_comes_back_exactly_and_the_ends_are_held() -> None:
    track = smooth_recording().poses["right"]
    assert np.array_equal(
        interpolate_poses(track.time_s, track.pose_world_policy, track.time_s), track.pose_world_policy
    )
    outside = interpolate_poses(track.time_s, track.pose_world_policy, np.array([-1.0, 99.0]))
    assert np.array_equal(outside, track.pose_world_policy[[0, -1]])


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 59 / 30), st.integers(0, 2**16))
def test_between_rows_lies_a_pose_on_the_shortest_way(query_s: float, seed: int) -> None:
    track = smooth_recording(seed=seed).poses["left"]
    pose = interpolate_poses(track.time_s, track.pose_world_policy, np.array([query_s]))[0]
    before = track.pose_world_policy[int(np.searchsorted(track.time_s, query_s, side="right")) - 1]
    after = track.pose_world_policy[int(np.searchsorted(track.time_s, query_s, side="left"))]
    np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-9)
    angles = [float(geodesic_angle(a[:3, :3], b[:3, :3])) for a, b in ((before, pose), (pose, after), (before, after))]
    assert angles[0] + angles[1] == pytest.approx(angles[2], abs=1e-7)
    lengths = [np.linalg.norm(b[:3, 3] - a[:3, 3]) for a, b in ((before, pose), (pose, after), (before, after))]
    assert lengths[0] + lengths[1] == pytest.approx(lengths[2], abs=1e-9)


# ------------------------------------------------------------------------------------ anchors and choice


def test_each_arm_is_anchored_at_its_own_image() -> None:
    recording = smooth_recording(rows=90)
    time_s = recording.cameras["right_wrist"].time_s
    late = CameraTrack(time_s + 0.011, recording.cameras["left_wrist"].frames)
    recording = replace(recording, cameras={**recording.cameras, "left_wrist": late})
    selection = select_frames(recording, ChunkOptions(), Tally(strict=True))
    assert selection.right_frame[0] == 0
    assert selection.left_frame[0] == 0
    poses, widths = chunk_to_poses(cut_chunks(recording, selection).actions[10].astype(np.float64))
    anchors_s: dict[ArmName, float] = {"right": time_s[10], "left": time_s[10] + 0.011}
    for arm, anchor_s in anchors_s.items():
        track, width = recording.poses[arm], recording.widths[arm]
        due_s = anchor_s + np.arange(1, 25) / 30
        now = interpolate_poses(track.time_s, track.pose_world_policy, np.array([anchor_s]))[0]
        future = interpolate_poses(track.time_s, track.pose_world_policy, due_s)
        np.testing.assert_allclose(poses[arm], compose(invert(now), future), atol=1e-6)
        np.testing.assert_allclose(widths[arm], np.interp(due_s, width.time_s, width.width), atol=1e-6)


def test_frames_at_the_edges_are_counted_and_are_no_problem() -> None:
    recording = smooth_recording(rows=90)
    frames = recording.cameras["left_wrist"].frames
    cameras = {
        "right_wrist": CameraTrack(-10 / 30 + np.arange(90) / 30, frames),
        "left_wrist": CameraTrack(-7 / 30 + np.arange(90) / 30, frames),
    }
    recording = replace(recording, cameras=cameras, instructions=[(0.1, "Wait."), (1.0, "Go.")])
    selection = select_frames(recording, ChunkOptions(), Tally(strict=True))
    assert selection.left_out == {UNPAIRED: 3, BEFORE: 7, AFTER: 14, UNTOLD: 3}
    assert len(selection) + sum(selection.left_out.values()) == 90
    assert selection.right_frame.tolist() == list(range(13, 76))
    assert selection.instruction.tolist() == [0] * 27 + [1] * 36
    held = select_frames(recording, ChunkOptions(at_end="hold"), Tally(strict=True))
    assert held.right_frame.tolist() == list(range(13, 90))


def test_every_nth_frame() -> None:
    selection = select_frames(smooth_recording(), ChunkOptions(every=4), Tally(strict=True))
    assert selection.right_frame.tolist() == list(range(0, 36, 4))
    assert selection.frame_s == pytest.approx(4 / 30)


def test_images_too_far_apart_are_counted() -> None:
    recording = smooth_recording()
    time_s = np.delete(recording.cameras["left_wrist"].time_s, 10)
    left = CameraTrack(time_s, recording.cameras["left_wrist"].frames)
    recording = replace(recording, cameras={**recording.cameras, "left_wrist": left})
    tally = Tally()
    selection = select_frames(recording, ChunkOptions(), tally)
    assert 10 not in selection.right_frame
    assert len(selection) == 35
    assert tally.counts() == {"camera-skew": 1}
    assert "right_wrist image 10" in tally.text()
    with pytest.raises(SampleError, match="33"):
        select_frames(recording, ChunkOptions(), Tally(strict=True))


def test_a_hole_in_a_track_costs_the_windows_that_touch_it() -> None:
    recording = smooth_recording(rows=120)
    keep = np.r_[0:50, 55:120]
    full = recording.poses["left"]
    holed = PoseTrack(full.time_s[keep], full.pose_world_policy[keep])
    recording = replace(recording, poses={**recording.poses, "left": holed})
    tally = Tally()
    selection = select_frames(recording, ChunkOptions(), tally)
    # The hole runs from row 49 to row 55: windows end before it (frame 25 + 24 = 49) or start after it.
    assert selection.right_frame.tolist() == [*range(26), *range(55, 96)]
    assert tally.counts() == {"time-gap": 29}
    assert len(select_frames(recording, ChunkOptions(max_gap_s=0.2), Tally(strict=True))) == 96


def test_widths_that_were_not_measured_mark_their_windows() -> None:
    recording = smooth_recording(rows=90)
    width, valid = recording.widths["right"].width.copy(), np.ones(90, bool)
    width[40], valid[40] = np.nan, False
    track = WidthTrack(recording.widths["right"].time_s, width, valid)
    recording = replace(recording, widths={**recording.widths, "right": track})
    selection = select_frames(recording, ChunkOptions(), Tally(strict=True))
    cut = cut_chunks(recording, selection)
    assert np.isfinite(cut.actions).all()
    assert np.flatnonzero(~cut.gripper_valid[:, 0]).tolist() == list(range(16, 41))
    assert cut.gripper_valid[:, 1].all()


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = smooth_recording()
    selection = select_frames(recording, ChunkOptions(), Tally(strict=True))
    whole = cut_chunks(recording, selection).actions
    monkeypatch.setattr(chunks_module, "_BLOCK", 7)
    assert np.array_equal(cut_chunks(recording, selection).actions, whole)
    assert np.array_equal(cut_chunks(recording, selection.part(5, 9)).actions, whole[5:9])


def test_large_clocks_lose_no_frame() -> None:
    """Seconds since 1970 in float64 have steps of 0.24 microseconds."""
    selection = select_frames(smooth_recording(start_s=1.7e9), ChunkOptions(), Tally(strict=True))
    assert len(selection) == 36


@pytest.mark.parametrize("start_s", [0.0, 100.0, 900.0])
def test_times_stored_as_float32_lose_no_frame(start_s: float) -> None:
    recording = smooth_recording(start_s=start_s)
    poses, widths, cameras = (
        {
            name: replace(track, time_s=track.time_s.astype(np.float32).astype(np.float64))
            for name, track in part.items()
        }
        for part in (recording.poses, recording.widths, recording.cameras)
    )
    starts = [(float(np.float32(start_s)), "Go.")]
    rounded = replace(recording, poses=poses, widths=widths, cameras=cameras, instructions=starts)
    options = ChunkOptions(max_gap_s=1 / 30)
    assert len(select_frames(rounded, options, Tally(strict=True))) == 36


def test_a_single_sample_lasts_as_long_as_its_stride() -> None:
    selection = select_frames(smooth_recording(rows=60), ChunkOptions(every=50), Tally(strict=True))
    assert len(selection) == 1
    assert selection.frame_s == pytest.approx(50 / 30)


# ------------------------------------------------------------------------------------------ bad recordings


def broken_tracks() -> dict[str, tuple[str, Recording]]:
    recording = smooth_recording()
    pose, width = recording.poses["right"], recording.widths["left"]
    nan = pose.pose_world_policy.copy()
    nan[7, 0, 3] = np.nan
    skewed = pose.pose_world_policy.copy()
    skewed[7, 0, 0] += 0.01
    mirrored = pose.pose_world_policy @ np.diag([1.0, 1.0, -1.0, 1.0])
    lost = width.width.copy()
    lost[3] = np.inf
    poses = {
        "not-finite": replace(pose, pose_world_policy=nan),
        "bad-rotation": replace(pose, pose_world_policy=skewed),
        "bad-rotation, mirrored": replace(pose, pose_world_policy=mirrored),
        "wrong-shape": replace(pose, pose_world_policy=pose.pose_world_policy[:-1]),
    }
    cases = {name: replace(recording, poses={**recording.poses, "right": track}) for name, track in poses.items()}
    broken_width = {**recording.widths, "left": replace(width, width=lost)}
    cases["not-finite, width"] = replace(recording, widths=broken_width)
    cases["unknown-instruction, none"] = replace(recording, instructions=[])
    cases["unknown-instruction, blank"] = replace(recording, instructions=[(0.0, "Go."), (0.5, " \n")])
    cases["bad-time"] = replace(recording, instructions=[(1.0, "Go."), (0.5, "Wait.")])
    return {name: (name.split(",")[0], case) for name, case in cases.items()}


@pytest.mark.parametrize("name", broken_tracks())
def test_broken_tracks_are_refused(name: str) -> None:
    reason, recording = broken_tracks()[name]
    with pytest.raises(SampleError) as caught:
        select_frames(recording, ChunkOptions(), Tally())
    assert caught.value.reason == reason
    assert "episode" in str(caught.value.where)


def test_times_that_do_not_increase_are_named() -> None:
    recording = smooth_recording()
    time_s = recording.poses["right"].time_s.copy()
    time_s[5] = time_s[4]
    with pytest.raises(SampleError, match=r"row 5, is 0\.1333\d* after 0\.1333") as caught:
        replace(recording, poses={**recording.poses, "right": replace(recording.poses["right"], time_s=time_s)})
    assert caught.value.reason == "bad-time"
    with pytest.raises(SampleError, match="nan at row 3"):
        require_increasing(np.array([0, 1, 2, np.nan]), "here")
