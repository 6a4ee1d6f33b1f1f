"""Safetensors files: written whole or not at all, read one tensor at a time, and never believed unchecked."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdt2_jax.errors import CheckpointError, Rdt2Error, UnsafeFileError
from rdt2_jax.weights.safetensors_files import DTYPES, INDEX_FILE, SINGLE_FILE, SafetensorsFiles
from rdt2_jax.weights.safetensors_writer import write_safetensors
from rdt2_jax.weights.sources import ArraySource, TensorInfo

F32 = "F32"


def numbered(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return (np.arange(math.prod(shape)) % 100).astype(dtype).reshape(shape)


ARRAYS = {
    "layer.bias": numbered((5,), np.float32),
    "layer.weight": numbered((5, 3), ml_dtypes.bfloat16),
    "scalar": numbered((), np.float32),
    "empty": numbered((0, 4), np.float32),
    "mask": np.array([True, False, True]),
    "count": np.array([-1, 2**62], np.int64),
}


def write(path: Path, arrays: dict[str, np.ndarray] = ARRAYS, **options: Any) -> tuple[Path, ...]:
    infos = [TensorInfo(name, array.dtype, array.shape) for name, array in arrays.items()]
    return write_safetensors(path, infos, arrays.__getitem__, **options)


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: Any, start: Any, end: Any, dtype: Any = F32) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def assert_has(files: SafetensorsFiles, arrays: dict[str, np.ndarray]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert set(files.tensors) == set(arrays)
    for name, array in arrays.items():
        assert (files.tensors[name].dtype, files.tensors[name].shape) == (array.dtype, array.shape)
        read = files.read(name)
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())


def refused(path: Path, match: str, error: type[Rdt2Error] = CheckpointError) -> Rdt2Error:
    with pytest.raises(error, match=match) as caught:
        SafetensorsFiles(path)
    assert str(path.name) in str(caught.value) or str(path) in str(caught.value), "the message names the file"
    return caught.value


class TestSingleFile:
    def test_round_trip(self, tmp_path):
        path = tmp_path / "any.safetensors"
        assert write(path, metadata={"format": "pt"}) == (path,)
        with SafetensorsFiles(path) as files:
            assert_has(files, ARRAYS)
            assert files.metadata == {"format": "pt"}
            assert {info.where for info in files.tensors.values()} == {str(path)}

    def test_a_folder_with_one_file(self, tmp_path):
        write(tmp_path / SINGLE_FILE)
        assert_has(SafetensorsFiles(tmp_path), ARRAYS)

    @pytest.mark.parametrize("code", DTYPES)
    def test_every_dtype(self, tmp_path, code):
        arrays = {"x": numbered((3, 2), DTYPES[code])}
        write(tmp_path / "x.safetensors", arrays)
        assert_has(SafetensorsFiles(tmp_path / "x.safetensors"), arrays)

    def test_bfloat16_keeps_its_bits(self, tmp_path):
        bits = np.arange(2**16, dtype=np.uint16)  # with all infinities and NaNs
        write(tmp_path / "x.safetensors", {"x": bits.view(ml_dtypes.bfloat16)})
        read = SafetensorsFiles(tmp_path / "x.safetensors").read("x")
        assert read.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read.view(np.uint16), bits)

    def test_tensors_are_aligned(self, tmp_path):
        write(tmp_path / "x.safetensors", {"a": np.zeros(3, np.int8), "b": np.zeros(3, np.float64)})
        read = SafetensorsFiles(tmp_path / "x.safetensors").read("b")
        assert read.flags.aligned

    def test_unaligned_tensors_of_others_are_read(self, tmp_path):
        values = np.array([1.5, -2.5], np.float32)
        for padding in range(4):
            text = json.dumps({"x": entry([2], 0, 8)}).encode() + b" " * padding
            path = raw(tmp_path / "x.safetensors", text, values.tobytes())
            np.testing.assert_array_equal(SafetensorsFiles(path).read("x"), values)

    def test_arrays_are_read_only_and_outlive_their_release_and_the_files(self, tmp_path):
        write(tmp_path / "x.safetensors")
        with SafetensorsFiles(tmp_path / "x.safetensors") as files:
            read = files.read("layer.weight")
            files.release("layer.weight")
        assert not read.flags.writeable
        np.testing.assert_array_equal(read, ARRAYS["layer.weight"])

    def test_unknown_tensor(self, tmp_path):
        write(tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match="no such tensor"):
            SafetensorsFiles(tmp_path / "x.safetensors").read("layer")

    def test_headers_are_read_without_the_data(self, tmp_path):
        """The data is a hole of 1 TiB: only an attempt to read it could fail."""
        size = 2**40
        path = raw(tmp_path / "x.safetensors", {"x": entry([2**38], 0, size)})
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + size)
        assert SafetensorsFiles(path).tensors["x"].nbytes == size


class TestSafetensorsLibrary:
    def test_reads_what_we_write(self, tmp_path):
        write(tmp_path / "x.safetensors", metadata={"format": "pt", "alias": "layer.weight"})
        loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
        assert set(loaded) == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert (loaded[name].dtype, loaded[name].shape) == (array.dtype, array.shape)
            assert loaded[name].tobytes() == array.tobytes()
        with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
            assert file.metadata() == {"format": "pt", "alias": "layer.weight"}

    def test_we_read_what_it_writes(self, tmp_path):
        safetensors.numpy.save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"format": "pt"})
        with SafetensorsFiles(tmp_path / "x.safetensors") as files:
            assert_has(files, ARRAYS)
            assert files.metadata == {"format": "pt"}

    def test_a_file_without_tensors(self, tmp_path):
        write(tmp_path / "x.safetensors", {})
        assert safetensors.numpy.load_file(tmp_path / "x.safetensors") == {}
        assert SafetensorsFiles(tmp_path / "x.safetensors").tensors == {}

    @pytest.mark.torch_peer
    def test_torch_reads_what_we_write(self, tmp_path):
        import safetensors.torch
        import torch

        write(tmp_path / "x.safetensors")
        loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
        assert loaded["layer.weight"].dtype == torch.bfloat16
        np.testing.assert_array_equal(loaded["layer.weight"].float().numpy(), ARRAYS["layer.weight"].astype(np.float32))


class TestShards:
    LARGE: ClassVar = {f"h.{i}.w": numbered((4, 2), np.float32) + i for i in range(5)}  # 32 bytes each

    def test_round_trip(self, tmp_path):
        files = write(tmp_path, self.LARGE, max_shard_bytes=70, metadata={"format": "pt"})
        assert [file.name for file in files] == [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            INDEX_FILE,
        ]
        for source in (tmp_path, tmp_path / INDEX_FILE):
            with SafetensorsFiles(source) as opened:
                assert_has(opened, self.LARGE)
                assert opened.metadata == {"format": "pt"}

    def test_the_index_and_the_sizes(self, tmp_path):
        *shards, index = write(tmp_path, self.LARGE, max_shard_bytes=70)
        content = json.loads(index.read_text())
        assert content["metadata"] == {"total_size": 160}
        found = {name: shard.name for shard in shards for name in safetensors.numpy.load_file(shard)}
        assert content["weight_map"] == found
        assert [sum(a.nbytes for a in safetensors.numpy.load_file(shard).values()) for shard in shards] == [64, 64, 32]

    def test_a_tensor_over_the_limit_has_a_file_to_itself(self, tmp_path):
        assert len(write(tmp_path, self.LARGE, max_shard_bytes=1)) == 5 + 1
        assert_has(SafetensorsFiles(tmp_path), self.LARGE)

    def test_a_folder_with_weights_is_not_written_into(self, tmp_path):
        write(tmp_path / SINGLE_FILE)
        with pytest.raises(CheckpointError, match="has weights already"):
            write(tmp_path, self.LARGE, max_shard_bytes=70)
        with pytest.raises(CheckpointError, match="existing folder"):
            write(tmp_path / "new", self.LARGE, max_shard_bytes=70)

    def test_a_missing_shard(self, tmp_path):
        _, second, third, _ = write(tmp_path, self.LARGE, max_shard_bytes=70)
        second.unlink()
        third.unlink()
        message = str(refused(tmp_path, "files of a model are missing"))
        assert second.name in message
        assert third.name in message

    def test_a_truncated_shard_is_named(self, tmp_path):
        _, second, *_ = write(tmp_path, self.LARGE, max_shard_bytes=70)
        second.write_bytes(second.read_bytes()[:-4])
        refused(second, "header of a safetensors file is wrong")
        with pytest.raises(CheckpointError, match="take 64 bytes of data, the file has 60") as error:
            SafetensorsFiles(tmp_path)
        assert error.value.where == second

    def test_a_tensor_in_two_shards(self, tmp_path):
        first, second, *_ = write(tmp_path, self.LARGE, max_shard_bytes=70)
        write(second, {name: self.LARGE[name] for name in ("h.0.w", "h.2.w", "h.3.w")}, overwrite=True)
        refused(tmp_path, rf"tensor h\.0\.w: in {first.name} and in {second.name}")

    def test_index_and_files_contradict_each_other(self, tmp_path):
        first, second, _, index = write(tmp_path, self.LARGE, max_shard_bytes=70)
        content = json.loads(index.read_text())
        content["weight_map"]["h.0.w"] = second.name  # is in the first
        content["weight_map"]["ghost"] = first.name  # is nowhere
        del content["weight_map"]["h.4.w"]
        content["weight_map"]["other"] = "model-00003-of-00003.safetensors"
        index.write_text(json.dumps(content))
        message = str(refused(tmp_path, r"contradict each other \(4 problems\)"))
        assert f"tensor h.0.w: in {first.name}, the index says {second.name}" in message
        assert "tensor h.4.w: in model-00003-of-00003.safetensors, the index says nothing of it" in message
        assert f"tensor ghost: the index says {first.name}, which does not have it" in message
        assert "tensor other: the index says model-00003-of-00003.safetensors" in message

    @pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
    def test_an_index_that_points_outside(self, tmp_path, name):
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": name}}))
        refused(tmp_path, "points outside its folder", UnsafeFileError)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"weight_map": []}',
            '{"weight_map": {"w": 1}}',
            '{"weight_map": {"w": "a", "w": "b"}}',
            "\xff",
            "[" * 100_000,
        ],
    )
    def test_not_an_index(self, tmp_path, text):
        (tmp_path / INDEX_FILE).write_bytes(text.encode("latin-1"))
        refused(tmp_path, "not an index of safetensors files")


class TestFindingFiles:
    def test_nothing_there(self, tmp_path):
        refused(tmp_path / "no.safetensors", "no such file or folder")
        refused(tmp_path, "no weights in the folder")

    def test_a_file_of_another_name_is_offered(self, tmp_path):
        write(tmp_path / "adapter.safetensors")
        error = refused(tmp_path, "no weights in the folder")
        assert error.found == "adapter.safetensors"

    def test_two_sets_of_weights(self, tmp_path):
        write(tmp_path, TestShards.LARGE, max_shard_bytes=70)
        write(tmp_path / SINGLE_FILE)
        refused(tmp_path, "two sets of weights")


class TestHeadersThatLie:
    """One tensor of two floats, and one lie in each header."""

    DATA = bytes(8)
    ENTRIES: ClassVar = {
        "size too large": (entry([3], 0, 8), "takes 12 bytes"),
        "size far too large": (entry([2**60], 0, 8), "takes 4611686018427387904 bytes"),
        "size too small": (entry([1], 0, 8), "takes 4 bytes"),
        "size that overflows 64 bits": (entry([2**62, 4], 0, 8), "larger than an array can be"),
        "size that wraps to the right one": (entry([2**64 + 2], 0, 8), "larger than an array can be"),
        "end before start": (entry([2], 8, 0), "hold -8"),
        "negative offsets": (entry([2], -8, 0), "not negative"),
        "negative dimensions": (entry([-1, -2], 0, 8), "not negative"),
        "beyond the file": (entry([4], 0, 16), "take 16 bytes of data, the file has 8"),
        "hole in front": (entry([1], 4, 8), "a hole before it"),
        "data left over": (entry([1], 0, 4), "take 4 bytes of data, the file has 8"),
        "fractional dimension": (entry([2.0], 0, 8), "whole numbers"),
        "boolean dimension": (entry([True, 2], 0, 8), "whole numbers"),
        "fractional offset": (entry([2], 0, 8.0), "whole numbers"),
        "unknown dtype": (entry([2], 0, 8, "F33"), "unknown dtype 'F33'"),
        "dtype of another kind": (entry([2], 0, 8, ["F32"]), "unknown dtype"),
        "dtype of another size": (entry([2], 0, 8, "F64"), "takes 16 bytes"),
        "shape is a number": (entry(2, 0, 8), "shape"),
        "shape is null": (entry(None, 0, 8), "shape"),
        "shape is text": (entry("2", 0, 8), "shape"),
        "three offsets": ({**entry([2], 0, 8), "data_offsets": [0, 4, 8]}, "two data_offsets"),
        "no offsets": ({"dtype": F32, "shape": [2]}, "two data_offsets"),
        "not an object": ([1, 2], "entry without"),
        "null": (None, "entry without"),
    }

    @pytest.mark.parametrize("lie", ENTRIES)
    def test_one_entry(self, tmp_path, lie):
        wrong, message = self.ENTRIES[lie]
        path = raw(tmp_path / "x.safetensors", {"x": wrong}, self.DATA)
        assert message in str(refused(path, "header of a safetensors file is wrong"))

    @pytest.mark.parametrize("shape", [[0, 2**63], [2**70, 0], [1] * 65, [1] * 3000])
    def test_shapes_that_no_array_has(self, tmp_path, shape):
        size = 4 * math.prod(shape)
        path = raw(tmp_path / "x.safetensors", {"x": entry(shape, 0, size)}, bytes(size))
        assert "tensor x: shape" in str(refused(path, "header of a safetensors file is wrong"))

    def test_overlapping(self, tmp_path):
        path = raw(tmp_path / "x.safetensors", {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))
        assert "tensor b: an overlap before it" in str(refused(path, "is wrong"))

    def test_one_inside_the_other(self, tmp_path):
        path = raw(tmp_path / "x.safetensors", {"a": entry([4], 0, 16), "b": entry([1], 4, 8)}, bytes(16))
        assert "tensor b: an overlap before it" in str(refused(path, "is wrong"))

    def test_all_wrong_entries_are_reported_together(self, tmp_path):
        header = {"a": entry([3], 0, 8), "b": entry([2], 8, 16), "c": entry([2], 16, 24, "F33")}
        message = str(refused(raw(tmp_path / "x.safetensors", header, bytes(24)), r"\(2 problems\)"))
        assert "tensor a" in message
        assert "tensor c" in message

    @pytest.mark.parametrize("metadata", [{"step": 1}, ["pt"], None, "pt"])
    def test_metadata_must_be_text(self, tmp_path, metadata):
        path = raw(tmp_path / "x.safetensors", {"__metadata__": metadata, "x": entry([2], 0, 8)}, self.DATA)
        refused(path, "metadata must be text")

    def test_a_name_twice(self, tmp_path):
        one = json.dumps(entry([2], 0, 8))
        path = raw(tmp_path / "x.safetensors", f'{{"x": {one}, "x": {one}}}'.encode(), self.DATA)
        assert "named twice: ['x']" in str(refused(path, "not JSON"))


class TestNotSafetensors:
    @pytest.mark.parametrize("content", [b"", b"\x08", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00." * 10])
    def test_other_files(self, tmp_path, content):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        refused(path, "not a safetensors file|not JSON")

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 1000])
    def test_a_header_longer_than_the_file(self, tmp_path, length):
        refused(raw(tmp_path / "x.safetensors", {}, length=length), "cut off in its header")

    @pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
    def test_a_header_that_is_not_json(self, tmp_path, text):
        refused(raw(tmp_path / "x.safetensors", text), "not JSON")

    @pytest.mark.parametrize("header", [[], 1, None, "x"])
    def test_a_header_that_is_no_object(self, tmp_path, header):
        refused(raw(tmp_path / "x.safetensors", header), "must be a JSON object")

    def test_cut_off_anywhere(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write(path)
        whole = path.read_bytes()
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError):
                SafetensorsFiles(path)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    @given(place=st.integers(0, 10_000), value=st.integers(0, 255))
    def test_a_changed_byte_never_raises_anything_else(self, tmp_path, place, value):
        path = tmp_path / "x.safetensors"
        write(path, overwrite=True)
        content = bytearray(path.read_bytes())
        content[place % len(content)] = value
        path.write_bytes(content)
        try:
            files = SafetensorsFiles(path)
        except CheckpointError:
            return
        for name in files.tensors:
            assert files.read(name).shape == files.tensors[name].shape


class TestWriting:
    def failing(self, name: str) -> np.ndarray:
        if name == "scalar":
            raise RuntimeError("lost")
        return ARRAYS[name]

    def infos(self) -> list[TensorInfo]:
        return [TensorInfo(name, array.dtype, array.shape) for name, array in ARRAYS.items()]

    def test_a_failure_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write(path, {"old": np.ones(3, np.float32)})
        before = path.read_bytes()
        with pytest.raises(RuntimeError, match="lost"):
            write_safetensors(path, self.infos(), self.failing, overwrite=True)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path], "no temporary stays behind"

    def test_a_failure_leaves_nothing(self, tmp_path):
        with pytest.raises(RuntimeError, match="lost"):
            write_safetensors(tmp_path / "x.safetensors", self.infos(), self.failing)
        assert list(tmp_path.iterdir()) == []

    def test_a_failure_between_shards_leaves_no_index(self, tmp_path):
        with pytest.raises(RuntimeError, match="lost"):
            write_safetensors(tmp_path, self.infos(), self.failing, max_shard_bytes=1)
        assert not (tmp_path / INDEX_FILE).exists()
        for file in tmp_path.iterdir():
            safetensors.numpy.load_file(file)  # what is there is whole
        with pytest.raises(CheckpointError, match="no weights in the folder"):
            SafetensorsFiles(tmp_path)

    def test_an_existing_file_is_replaced_only_on_demand(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write(path, {"old": np.ones(3, np.float32)})
        path.chmod(0o640)
        with pytest.raises(CheckpointError, match="the file exists"):
            write(path)
        assert set(SafetensorsFiles(path).tensors) == {"old"}
        write(path, overwrite=True)
        assert_has(SafetensorsFiles(path), ARRAYS)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_a_file_that_is_open_survives_its_replacement(self, tmp_path):
        path = tmp_path / "x.safetensors"
        write(path, {"x": np.full(3, 1, np.float32)})
        view = SafetensorsFiles(path).read("x")
        write(path, {"x": np.full(3, 2, np.float32)}, overwrite=True)
        assert view.tolist() == [1, 1, 1]

    def test_every_tensor_is_asked_for_once_in_the_order_of_the_file(self, tmp_path):
        asked = []

        def read(name: str) -> np.ndarray:
            asked.append(name)
            return ARRAYS[name]

        write_safetensors(tmp_path / "x.safetensors", self.infos(), read)
        assert asked == ["count", "layer.bias", "scalar", "empty", "layer.weight", "mask"]

    def test_strided_arrays(self, tmp_path):
        array = numbered((4, 6), np.float32).T[::2]
        write(tmp_path / "x.safetensors", {"x": array})
        np.testing.assert_array_equal(SafetensorsFiles(tmp_path / "x.safetensors").read("x"), array)

    @pytest.mark.parametrize("array", [np.zeros((2, 3), np.float64), np.zeros((3, 2), np.float32)])
    def test_another_tensor_than_announced(self, tmp_path, array):
        with pytest.raises(CheckpointError, match="not what was announced"):
            write_safetensors(
                tmp_path / "x.safetensors", [TensorInfo("x", np.dtype(np.float32), (2, 3))], lambda _: array
            )
        assert list(tmp_path.iterdir()) == []

    def test_what_the_format_cannot_hold(self, tmp_path):
        infos = [
            TensorInfo("a", np.dtype(np.float32), (2,)),
            TensorInfo("a", np.dtype(np.float32), (2,)),
            TensorInfo("z", np.dtype(np.complex64), (2,)),
            TensorInfo("big", np.dtype(">f4"), (2,)),
            TensorInfo("__metadata__", np.dtype(np.float32), (2,)),
        ]
        with pytest.raises(CheckpointError, match=r"\(4 problems\)") as error:
            write_safetensors(tmp_path / "x.safetensors", infos, ARRAYS.__getitem__)
        for text in ("tensor a: named twice", "no complex64", "no >f4", "__metadata__"):
            assert text in str(error.value)
        assert list(tmp_path.iterdir()) == []


class TestArraySource:
    def test_lists_and_reads(self):
        source = ArraySource(ARRAYS, "archive.pt")
        assert {name: (i.dtype, i.shape, i.where) for name, i in source.tensors.items()} == {
            name: (array.dtype, array.shape, "archive.pt") for name, array in ARRAYS.items()
        }
        np.testing.assert_array_equal(source.read("count"), ARRAYS["count"])

    def test_other_values_are_refused(self):
        with pytest.raises(CheckpointError, match="not a tensor") as error:
            ArraySource({"w": np.zeros(1), "step": 3}, "archive.pt")  # pyright: ignore[reportArgumentType]
        assert error.value.where == "archive.pt: step"
