"""Frames of a video are found by their time in every container, and what is missing or damaged is named."""

from __future__ import annotations

import av
import numpy as np
import pytest
from rdt2_data.converters.video import VideoFrames
from rdt2_data.problems import SampleError
from recorded_motion import coded_image, coded_number, encode_video, good_images

from rdt2_jax.errors import DataError

FPS = 10


def test_what_follows_damage_inside_a_video_is_read_again(tmp_path):
    path = tmp_path / "video.mp4"
    encode_video(path, [coded_image(number) for number in range(60)], 30, preset="veryfast", bf="2", g="10")
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    damaged = next(packet for packet in packets if packet.is_keyframe and packet.pts * packet.time_base == 1)
    content = bytearray(path.read_bytes())
    content[damaged.pos + 20 : damaged.pos + damaged.size] = bytes(damaged.size - 20)
    path.write_bytes(content)
    frames = VideoFrames(path, np.arange(60) / 30, tolerance_s=0.5 / 30)
    found = list(frames.read(range(60)))
    problems = [row for row, image in enumerate(found) if isinstance(image, SampleError)]
    assert 30 in problems
    assert set(problems) <= set(range(27, 40))  # those that are stored before the keyframe and refer to it too
    for row in set(range(60)) - set(problems):
        assert coded_number(found[row]) == row


def test_frames_missing_inside_a_video_are_never_replaced_by_a_neighbour(tmp_path):
    path = tmp_path / "video.mp4"
    encode_video(path, [coded_image(number) for number in range(20)], FPS)
    twice_as_many = VideoFrames(path, np.arange(40) / (2 * FPS), tolerance_s=0.5 / (2 * FPS) - 1e-6)
    assert [coded_number(image) for image in twice_as_many.read(range(0, 40, 2))] == list(range(20))
    with pytest.raises(SampleError, match="image 7"):
        list(good_images(twice_as_many, [6, 7, 8]))


def test_frames_before_a_keyframe_are_found_in_every_container(tmp_path):
    """The index of a container holds times of decoding, or none at all: a seek may land behind what is wanted."""
    for suffix in ("mp4", "mkv", "ts"):
        path = tmp_path / f"video.{suffix}"
        encode_video(path, [coded_image(number) for number in range(60)], 30, preset="veryfast", bf="3", g="8")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            start_s = float((stream.start_time or 0) * (stream.time_base or 0))  # not 0 in a transport stream
        frames = VideoFrames(path, start_s + np.arange(60) / 30, tolerance_s=0.5 / 30)
        found = [coded_number(image) for index in range(60) for image in frames.read([index])]
        assert found == list(range(60)), suffix


def test_a_video_without_frames_is_named(tmp_path):
    path = tmp_path / "video.mp4"
    encode_video(path, [], 30)
    with pytest.raises(SampleError, match=r"video\.mp4") as caught:
        list(good_images(VideoFrames(path, np.arange(3) / 30, tolerance_s=0.5 / 30), [1]))
    assert caught.value.reason == "bad-recording"


@pytest.mark.parametrize("options", [{"bf": "0", "g": "4"}, {"bf": "3", "g": "12"}, {"bf": "2", "g": "250"}])
def test_any_increasing_choice_of_frames_is_found(tmp_path, options):
    path, rng = tmp_path / "video.mp4", np.random.default_rng(0)
    encode_video(path, [coded_image(number) for number in range(120)], 30, preset="veryfast", **options)
    frames = VideoFrames(path, (np.arange(120) / 30).astype(np.float32).astype(np.float64), tolerance_s=0.5 / 30)
    for count in (1, 2, 5, 40):
        indices = np.sort(rng.choice(120, count, replace=False))
        assert [coded_number(image) for image in frames.read(indices)] == indices.tolist()
    assert list(frames.read([])) == []
    with pytest.raises(DataError, match="increase"):
        frames.read([3, 3])
