"""The image processor: against the published one, against loops, and with images it must refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdt2_jax.errors import ConfigError, DataError
from rdt2_jax.qwen2_5_vl.config import preset
from rdt2_jax.qwen2_5_vl.processor import (
    ProcessorConfig,
    composite,
    from_published,
    patchify,
    process,
    read_processor_config,
    resize,
    smart_resize,
    to_published,
)

PUBLISHED = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
CONFIG = from_published(PUBLISHED)
SMALL = CONFIG.model_copy(update={"patch_size": 2, "min_pixels": 16, "max_pixels": 4096})

# height and width in pixels: as published, fitting already, not dividing, wide, tall, tiny (grown), a single row
SIZES = [(384, 768), (392, 756), (100, 333), (57, 800), (500, 60), (5, 9), (1, 150)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def module():
    """Where transformers keeps the processor that needs no torchvision."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

    return image_processing_pil_qwen2_vl


@pytest.mark.torch_peer
class TestPublishedProcessor:
    @pytest.mark.parametrize("size", SIZES)
    def test_patches(self, module, size):
        image = noise(*size, 3)
        peer = module.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
        expected = peer(images=image, input_data_format="channels_last", return_tensors="np")
        ours = process(image, CONFIG)
        assert [list(ours.grid)] == expected["image_grid_thw"].tolist()
        assert ours.values.dtype == np.float32
        np.testing.assert_allclose(ours.values, expected["pixel_values"], rtol=0, atol=1e-6)

    def test_shrunk(self, module):
        config = CONFIG.model_copy(update={"max_pixels": 100_000})
        image = noise(384, 768, 3)
        peer = module.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100_000)
        expected = peer(images=image, input_data_format="channels_last", return_tensors="np")
        ours = process(image, config)
        assert ours.grid == (1, 14, 30)
        np.testing.assert_allclose(ours.values, expected["pixel_values"], rtol=0, atol=1e-6)

    def test_sizes(self, module):
        rng = np.random.default_rng(0)
        for _ in range(5000):
            height, width = (int(side) for side in np.exp(rng.uniform(0, 9, 2)))
            low = int(rng.integers(1, 100_000))
            high = int(rng.integers(max(low, 784), 1_000_000))
            if max(height, width) > 200 * min(height, width):
                continue
            config = CONFIG.model_copy(update={"min_pixels": low, "max_pixels": high})
            expected = module.smart_resize(height, width, 28, low, high)
            assert smart_resize(height, width, config) == expected, (height, width, low, high)

    def test_reads_our_file(self, module, tmp_path):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(to_published(CONFIG)))
        peer = module.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
        assert from_published(peer.to_dict()) == CONFIG


class TestSmartResize:
    def test_composite(self):
        assert smart_resize(384, 768, CONFIG) == (392, 756)

    def test_halves_go_to_the_even_multiple(self):
        assert smart_resize(70, 98, CONFIG) == (56, 112)

    @given(st.integers(1, 3000), st.integers(1, 3000))
    def test_properties(self, height, width):
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(DataError, match="too elongated"):
                smart_resize(height, width, CONFIG)
            return
        rows, columns = smart_resize(height, width, CONFIG)
        assert rows % 28 == columns % 28 == 0
        assert CONFIG.min_pixels <= rows * columns <= CONFIG.max_pixels
        assert smart_resize(rows, columns, CONFIG) == (rows, columns)

    def test_no_pixels(self):
        with pytest.raises(DataError, match="without pixels"):
            smart_resize(0, 20, CONFIG)


class TestPatchify:
    def test_against_loops(self):
        pixels = noise(8, 12, 3)
        values, grid = patchify(pixels, SMALL)
        assert grid == (1, 4, 6)
        scaled = (pixels / 255 - np.array(SMALL.mean)) / np.array(SMALL.std)
        expected = []
        for block_row in range(2):
            for block_column in range(3):
                for row in (2 * block_row, 2 * block_row + 1):
                    for column in (2 * block_column, 2 * block_column + 1):
                        patch = scaled[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                        expected.append(
                            [patch[y, x, c] for c in range(3) for _ in range(2) for y in (0, 1) for x in (0, 1)]
                        )
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)

    def test_batches_are_images_one_by_one(self):
        pixels = noise(2, 3, 8, 12, 3)
        values, grid = patchify(pixels, SMALL)
        assert values.shape == (2, 3, 24, 24)
        assert grid == (1, 4, 6)
        for index in np.ndindex(2, 3):
            np.testing.assert_array_equal(values[index], patchify(pixels[index], SMALL)[0])

    def test_inside_jit(self):
        pixels = noise(2, 56, 84, 3)
        compiled = jax.jit(lambda pixels: patchify(pixels, CONFIG)[0])(pixels)
        assert isinstance(compiled, jax.Array)
        assert compiled.dtype == jnp.float32
        np.testing.assert_allclose(compiled, patchify(pixels, CONFIG)[0], rtol=0, atol=1e-6)

    def test_size_that_does_not_divide(self):
        with pytest.raises(DataError, match=r"multiples of 28[\s\S]*384 x 768[\s\S]*resize"):
            patchify(noise(384, 768, 3), CONFIG)


class TestImages:
    def test_resize_leaves_a_fitting_image_alone(self):
        image = noise(392, 756, 3)
        np.testing.assert_array_equal(resize(image, CONFIG), image)

    def test_resize_takes_views(self):
        image = noise(120, 200, 3)
        turned = image[::-1, ::2]
        np.testing.assert_array_equal(resize(turned, CONFIG), resize(turned.copy(), CONFIG))

    def test_composite(self):
        left, right = noise(384, 384, 3), noise(384, 384, 3, seed=1)
        both = composite(left, right)
        assert both.shape == (384, 768, 3)
        assert both.dtype == np.uint8
        np.testing.assert_array_equal(both[:, :384], left)
        np.testing.assert_array_equal(both[:, 384:], right)
        np.testing.assert_array_equal(jax.jit(composite)(left, right), both)

    def test_composite_names_the_wrong_one(self):
        image = noise(384, 384, 3)
        with pytest.raises(DataError, match=r"right_wrist[\s\S]*384, 384, 3[\s\S]*\(480, 640, 3\)"):
            composite(image, noise(480, 640, 3))
        with pytest.raises(DataError, match="do not belong together"):
            composite(image, image[None])

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((40, 40, 3), np.float32), r"grey levels[\s\S]*float32 \(40, 40, 3\)[\s\S]*image \* 255"),
            (np.zeros((40, 40, 3), np.int64), "grey levels"),
            ([[0, 0, 0]], r"grey levels[\s\S]*list"),
            (np.zeros((40, 40), np.uint8), "not an RGB image"),
            (np.zeros((40, 40, 4), np.uint8), r"not an RGB image[\s\S]*alpha"),
            (np.zeros((3, 40, 40), np.uint8), r"not an RGB image[\s\S]*channels last"),
            (np.zeros((40, 0, 3), np.uint8), "without pixels"),
        ],
    )
    def test_refused(self, image, message):
        with pytest.raises(DataError, match=message):
            patchify(image, CONFIG)

    def test_resize_and_composite_refuse_them_too(self):
        floats = np.zeros((384, 384, 3), np.float32)
        for use in (lambda: resize(floats, CONFIG), lambda: process(floats, CONFIG), lambda: composite(floats, floats)):
            with pytest.raises(DataError, match=r"grey levels[\s\S]*float32"):
                use()

    def test_resize_takes_one_image(self):
        with pytest.raises(DataError, match="one by one"):
            resize(noise(2, 40, 40, 3), CONFIG)

    def test_too_elongated(self):
        with pytest.raises(DataError, match=r"too elongated[\s\S]*200[\s\S]*201 x 1"):
            process(noise(201, 1, 3), CONFIG)


class TestConfig:
    def test_both_spellings(self):
        bounds = {"shortest_edge": 3136, "longest_edge": 12845056}
        newer = {**PUBLISHED, "min_pixels": None, "max_pixels": None, "size": bounds, "rescale_factor": 1 / 255}
        assert from_published(newer) == CONFIG
        assert from_published({"image_processor": newer, "processor_class": "Qwen2_5_VLProcessor"}) == CONFIG
        assert from_published({**PUBLISHED, "size": {"shortest_edge": 1, "longest_edge": 2}}) == CONFIG

    def test_files(self, tmp_path):
        with pytest.raises(ConfigError, match=r"needs its preprocessor_config.json[\s\S]*copy it"):
            read_processor_config(tmp_path)
        combined = tmp_path / "processor_config.json"
        combined.write_text(json.dumps({"image_processor": to_published(SMALL)}))
        assert read_processor_config(tmp_path) == SMALL
        file = tmp_path / "preprocessor_config.json"
        file.write_text(json.dumps(to_published(CONFIG)))
        assert read_processor_config(tmp_path) == read_processor_config(file) == CONFIG

    @pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("[1]", "must be a mapping")])
    def test_garbled_file(self, tmp_path, content, message):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ConfigError, match=rf"{message}[\s\S]*preprocessor_config.json"):
            read_processor_config(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_mean": None}, "missing key 'mean'"),
            ({"max_pixels": None}, "missing key 'max_pixels'"),
            ({"image_std": [0.1, 0.0, 0.1]}, "std"),
            ({"min_pixels": 20_000_000}, "more than max_pixels"),
            ({"min_pixels": 1, "max_pixels": 783}, "no room for one token"),
            ({"do_normalize": False}, r"does not do that[\s\S]*do_normalize"),
            ({"resample": 2}, r"does not do that[\s\S]*resample"),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(ConfigError, match=message):
            from_published({**PUBLISHED, **change})

    def test_belongs_to_a_model(self):
        CONFIG.check(preset("7b"))
        other = CONFIG.model_copy(update={"patch_size": 16, "merge_size": 1})
        with pytest.raises(ConfigError, match=r"2 problems[\s\S]*patch_size[\s\S]*16[\s\S]*merge_size"):
            other.check(preset("7b"))

    def test_is_hashable(self):
        assert hash(CONFIG) == hash(ProcessorConfig(**CONFIG.model_dump()))


def test_the_host_side_needs_no_jax():
    code = (
        "import sys, rdt2_jax.qwen2_5_vl.processor, rdt2_jax.qwen2_5_vl.prompt; "
        "print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
