"""Made-up recordings for the tests of converters: poses, widths, and images that say which one they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rdt2_data.problems import SampleError
from scipy.spatial.transform import Rotation

_BITS = 12
HEIGHT, WIDTH = 48, 16 * _BITS // 2


def coded_image(number: int) -> np.ndarray:
    """RGB (48, 96, 3) with twelve blocks, red or blue as the bits of a number are; survives any codec."""
    bits = np.array([(number >> bit) & 1 for bit in range(_BITS)], np.uint8).reshape(2, _BITS // 2)
    blocks = np.stack([bits * 200 + 20, np.full_like(bits, 60), (1 - bits) * 200 + 20], axis=-1)
    return np.repeat(np.repeat(blocks, HEIGHT // 2, axis=0), 16, axis=1)


def coded_number(image: np.ndarray) -> int:
    """The number that `coded_image` drew; an image whose channels are swapped gives another."""
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image.dtype == np.uint8
    blocks = image.reshape(2, HEIGHT // 2, _BITS // 2, 16, 3).mean(axis=(1, 3))
    bits = blocks[..., 0] > blocks[..., 2]
    assert (np.abs(blocks[..., 0] - blocks[..., 2]) > 100).all()
    return int(sum(int(bit) << position for position, bit in enumerate(bits.ravel())))


def good_images(frames: Any, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """The images of `Frames.read`; raises the first problem that comes in the place of one."""
    for image in frames.read(indices):
        if isinstance(image, SampleError):
            raise image
        yield image


def motion(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (T, 3) [m], quaternions (x, y, z, w) (T, 4) and widths (T,) of a hand that moves about."""
    rng = np.random.default_rng(seed)
    position_m = rng.uniform(-0.5, 0.5, (rows, 3))
    rotvec = np.cumsum(rng.normal(0, 0.1, (rows, 3)), axis=0)
    return position_m, Rotation.from_rotvec(rotvec).as_quat(), rng.uniform(0, 0.088, rows)


def matrices(position_m: np.ndarray, quaternion_xyzw: np.ndarray) -> np.ndarray:
    """The poses (T, 4, 4) of `motion`."""
    poses = np.tile(np.eye(4), (len(position_m), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(quaternion_xyzw).as_matrix()
    poses[:, :3, 3] = position_m
    return poses


def encode_video(path: Any, images: list[np.ndarray], fps: int, codec: str = "libx264", **options: str) -> None:
    """Writes a video file; libx264 with B-frames and short groups of pictures by default."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    quick = {"libx264": {"bf": "2", "preset": "veryfast"}, "libsvtav1": {"preset": "12", "crf": "15"}}
    options = options or {"g": "5", **quick.get(codec, {})}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
