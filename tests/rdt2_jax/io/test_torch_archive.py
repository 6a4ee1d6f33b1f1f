"""Torch checkpoints are read exactly, and no file makes the reader run code or take memory without bound."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rdt2_jax.errors import CheckpointError, MissingExtraError, Rdt2Error, UnsafeFileError
from rdt2_jax.io import torch_archive, torch_pickle
from rdt2_jax.io.torch_archive import read_torch_archive

GOLDEN = Path(__file__).parents[2] / "golden"
PER_DIM = GOLDEN / "normalizer" / "normalizer_per_dim.pt"
PER_STEP = GOLDEN / "normalizer" / "normalizer_per_step.pt"
BF16 = GOLDEN / "torch_archive" / "pytorch_model_bf16_subset.bin"


# --- building archives by hand


def write_archive(path: Path, data_pkl: bytes, storages: dict[str, bytes] | None = None, **members: bytes) -> Path:
    """A torch archive with the given pickle, `data/<key>` members and further members."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data_pkl)
        archive.writestr("x/byteorder", members.pop("byteorder", b"little"))
        for key, content in (storages or {}).items():
            archive.writestr(f"x/data/{key}", content)
        for name, content in members.items():
            archive.writestr(f"x/{name}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(numel) + b"tQ"


NO_HOOKS = b"ccollections\nOrderedDict\n)R"


def tensor(
    numel: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int = 0,
    key: str = "0",
    kind: str = "FloatStorage",
    hooks: bytes = NO_HOOKS,
) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(numel, key, kind)
        + integer(offset)
        + integers(shape)
        + integers(strides)
        + b"\x89"
        + hooks
        + b"tR"
    )


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


FLOATS = np.arange(6, dtype=np.float32)


def read_tensor(tmp_path: Path, body: bytes, **storages: bytes) -> Any:
    contents = {key.removeprefix("s"): content for key, content in storages.items()} or {"0": FLOATS.tobytes()}
    return read_torch_archive(write_archive(tmp_path / "t.pt", program(body), contents))


# --- what is read


@pytest.mark.parametrize("path", [PER_DIM, PER_STEP], ids=["per_dim", "per_step"])
def test_published_normalizer_files_are_read_bit_exactly(path: Path) -> None:
    tree = read_torch_archive(path)
    expected = np.load(GOLDEN / "normalizer" / "io.npz")
    prefix = path.stem.removeprefix("normalizer_")
    assert set(tree["action"]) == {"scale", "offset", "input_stats"}
    assert set(tree["action"]["input_stats"]) == {"min", "max", "mean", "std"}
    for name in ("scale", "offset"):
        np.testing.assert_array_equal(tree["action"][name], expected[f"{prefix}/{name}"], strict=True)
    for name, value in tree["action"]["input_stats"].items():
        np.testing.assert_array_equal(value, expected[f"{prefix}/input_stats/{name}"], strict=True)


def test_per_step_normalizer_keeps_its_second_field_in_order() -> None:
    tree = read_torch_archive(PER_STEP)
    assert list(tree) == ["action", "robot0_eef_pos"]
    assert tree["robot0_eef_pos"]["scale"].shape == (1,)


def test_bfloat16_strided_shared_and_other_dtypes_match_bit_for_bit() -> None:
    tree = read_torch_archive(BF16)
    expected = np.load(BF16.with_name(BF16.stem + "_expected_bits.npz"))
    assert set(tree) == set(expected)
    for name, bits in expected.items():
        value = tree[name]
        assert value.flags.c_contiguous
        assert value.flags.writeable
        if value.dtype.name == "bfloat16":
            value = value.view(np.uint16)
        np.testing.assert_array_equal(value, bits, strict=True)
    assert not np.shares_memory(tree["zz.shared_view"], tree["zz.strided_view"])


def test_a_state_dict_saved_by_torch_equals_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3)).state_dict()  # carries _metadata
    state["transposed"] = torch.randn(4, 7).T
    state["expanded"] = torch.randn(3, 1).expand(3, 4)
    state["sliced"] = torch.randn(40)[5:25:4]
    state["tied"] = state["0.weight"]
    state["alias"] = state["0.weight"].detach()
    state["scalar"] = torch.tensor(2.5, dtype=torch.float64)
    state["empty"] = torch.zeros(0, 3)
    for dtype in (torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        state[str(dtype)] = torch.randint(0, 2, (2, 3)).to(dtype)
    torch.save(state, tmp_path / "m.bin")

    tree = read_torch_archive(tmp_path / "m.bin")
    assert type(tree) is dict
    assert list(tree) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(tree[name], value.numpy(), strict=True)
        assert tree[name].flags.c_contiguous
    tree["alias"][:] = 0
    assert np.array_equal(tree["0.weight"], state["0.weight"].numpy())


def test_plain_data_of_torch_files_is_kept(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    saved = {"a": [1, 2.5, None, True, "x"], 7: (2**40, -(2**40), {"s"}), "p": torch.nn.Parameter(torch.ones(2))}
    torch.save(saved, tmp_path / "m.pt")
    tree = read_torch_archive(tmp_path / "m.pt")
    np.testing.assert_array_equal(tree.pop("p"), np.ones(2, np.float32), strict=True)
    assert tree == {"a": [1, 2.5, None, True, "x"], 7: (2**40, -(2**40), {"s"})}


def test_torch_is_not_imported_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # from here on `import torch` fails
    assert list(read_torch_archive(PER_DIM)) == ["action"]


def test_bfloat16_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingExtraError, match=r"ml_dtypes(.|\n)*rdt2-jax\[model\]"):
        read_torch_archive(BF16)


def test_handmade_views_are_gathered_from_their_storage(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_tensor(tmp_path, tensor(6, (2, 2), (1, 3), offset=1)), [[1, 4], [2, 5]])
    np.testing.assert_array_equal(read_tensor(tmp_path, tensor(6, (2, 3), (0, 1))), [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(read_tensor(tmp_path, tensor(6, (1, 6), (2**62, 1))), [FLOATS])
    np.testing.assert_array_equal(read_tensor(tmp_path, tensor(6, (), (), offset=5)), 5)
    assert read_tensor(tmp_path, tensor(6, (0, 3), (3, 1), offset=6)).shape == (0, 3)


# --- what would run code


class _Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


SYSTEM = b"cos\nsystem\n"

ATTACKS: dict[str, Callable[[str], bytes]] = {
    **{
        f"reduce, protocol {protocol}": lambda command, protocol=protocol: pickle.dumps(
            _Calls(os.system, command), protocol=protocol
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "GLOBAL": lambda command: program(SYSTEM + text(command) + b"\x85R"),
    "STACK_GLOBAL": lambda command: program(text("os") + text("system") + b"\x93" + text(command) + b"\x85R"),
    "INST": lambda command: program(b"(" + text(command) + b"ios\nsystem\n"),
    "OBJ": lambda command: program(b"(" + SYSTEM + text(command) + b"o"),
    "BUILD": lambda command: program(  # an instance gets os.system as its __setstate__, then the command as state
        b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + SYSTEM + b"sb" + text(command) + b"b"
    ),
    "NEWOBJ": lambda command: program(  # tuple.__new__ walks the map that map.__new__ made of os.system
        b"cbuiltins\ntuple\ncbuiltins\nmap\n" + SYSTEM + text(command) + b"\x85\x86\x81\x85\x81"
    ),
    "eval behind allowed names": lambda command: program(
        b"(" + NO_HOOKS + b"cbuiltins\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85Rt"
    ),
    "inside a dict": lambda command: program(b"}" + text("w") + SYSTEM + text(command) + b"\x85Rs"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_pickle_runs_code(tmp_path: Path, attack: str) -> None:
    canary = tmp_path / "canary"
    payload = ATTACKS[attack](f"touch {canary}")
    pickle.loads(payload)
    assert canary.exists(), "the attack must work on an ordinary unpickler, or this test shows nothing"
    canary.unlink()

    with pytest.raises(UnsafeFileError, match=r"os.system|posix.system|protocol|opcode|types|builtins") as error:
        read_torch_archive(write_archive(tmp_path / "evil.pt", payload))
    assert "evil.pt: x/data.pkl" in str(error.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\n", "names os.system"),
        (b"ctorch\nload\n", "names torch.load"),
        (b"ctorch._utils\n_rebuild_tensor\n", "names torch._utils._rebuild_tensor,"),
        (b"ctorch.storage\nUntypedStorage\n", "names torch.storage.UntypedStorage"),
        (text("os") + text("system") + b"\x93", r"STACK_GLOBAL(.|\n)*os.system"),
        (b"(ios\nsystem\n", r"INST(.|\n)*os.system"),
        (b"\x82\x01", "opcode EXT1"),
        (b"\x83\x01\x00", "opcode EXT2"),
        (b"\x84\x01\x00\x00\x00", "opcode EXT4"),
        (b"Pkey\n", "opcode PERSID"),
        (b"\x97", "opcode NEXT_BUFFER"),
        (b"\x80\x04", "protocol 4"),
        (NO_HOOKS + b"}" + text("update") + b"Nsb", "sets the state"),
        (b"}}" + text("_metadata") + b"Nsb", "sets the state"),
        (b"ccollections\nOrderedDict\nN}" + text("__code__") + b"Ns\x86b", "sets the state"),
        (b"ctorch.nn.modules.container\nParameterDict\n)\x81}b}b", "sets the state"),
        (b"ccollections\nOrderedDict\n)\x81", "no empty ParameterDict"),
        (b"ctorch.nn.modules.container\nParameterDict\nN\x85\x81", "no empty ParameterDict"),
        (b"ctorch\nFloatStorage\n)R", "calls torch.FloatStorage"),
        (b"ccollections\nOrderedDict\n]\x85R", "calls collections.OrderedDict"),
        (text("call me") + b")R", "is no function"),
        (b"ctorch\nFloatStorage\n", "neither a tensor nor plain data"),
        (storage(6), "neither a tensor nor plain data"),
        (text("data/0") + b"Q", "is no storage"),
        (b"(" + text("module") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ", "is no storage"),
        (b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x06tQ", "is no storage"),
        (storage(6, key="../../etc/passwd"), "a key that is no number"),
        (storage(6, key="\u0663"), "a key that is no number"),
        (tensor(6, (6,), (1,), hooks=b"]"), "carries hooks"),
        (tensor(6, (6,), (1,), hooks=NO_HOOKS + text("f") + b"Ns"), "carries hooks"),
        (b"})Ns", "a tuple as a key"),
        (b"}G\x7f\xf8\x00\x00\x00\x00\x00\x00Ns", "a float as a key"),
        (b"cbuiltins\nset\n])a\x85R", "a tuple as a key"),
        (b"\x8a\x09" + b"\xff" * 8 + b"\x7f", "more than 64 bits"),
    ],
)
def test_everything_outside_the_table_is_refused_by_name(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(UnsafeFileError, match=message):
        read_tensor(tmp_path, body)


def test_a_bomb_of_shared_lists_is_refused(tmp_path: Path) -> None:
    doubled = b"]q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(40))
    with pytest.raises(UnsafeFileError, match="repeat without end"):
        read_tensor(tmp_path, b"(" + doubled + b"t")


def test_a_bomb_of_repeated_sets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 5000)
    items = b"](" + b"".join(integer(i) for i in range(500)) + b"e\x85q\x00"
    with pytest.raises(UnsafeFileError, match="too many sets"):
        read_tensor(tmp_path, b"(" + items + b"cbuiltins\nset\nq\x01" + b"h\x01h\x00R" * 50 + b"t")


def test_deep_nesting_and_cycles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="nested too deeply"):
        read_tensor(tmp_path, b")" + b"\x85" * 300_000)
    with pytest.raises(UnsafeFileError, match="nested too deeply"):
        read_tensor(tmp_path, b"]q\x00h\x00a")


def test_limits_on_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_OPCODES", 1000)
    with pytest.raises(UnsafeFileError, match="too many opcodes"):
        read_tensor(tmp_path, b"(" + b"N" * 1000 + b"t")
    with pytest.raises(UnsafeFileError, match="too many opcodes"):
        read_tensor(tmp_path, b"](" + b"N" * 2000 + b"e")
    monkeypatch.setattr(torch_archive, "MAX_PICKLE_BYTES", 100)
    with pytest.raises(UnsafeFileError, match="pickle is too large"):
        read_tensor(tmp_path, text("x" * 200))


# --- what would take memory, or read where it must not


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (tensor(6, (6,), (2,)), "beyond its storage"),
        (tensor(6, (7,), (1,)), "beyond its storage"),
        (tensor(6, (2,), (1,), offset=5), "beyond its storage"),
        (tensor(6, (), (), offset=6), "beyond its storage"),
        (tensor(6, (0,), (1,), offset=7), "beyond its storage"),
        (tensor(6, (2**62, 4), (2**62, 1)), "beyond its storage"),
        (tensor(6, (3,), (2**63 - 1,)), "beyond its storage"),
        (tensor(6, (2,), (-1,), offset=3), "negative"),
        (tensor(6, (2,), (1,), offset=-1), "negative"),
        (tensor(6, (-2,), (1,)), "negative"),
        (tensor(6, (2, 2), (1,)), "do not belong together"),
        (tensor(6, (1,) * 33, (1,) * 33), "do not belong together"),
        (tensor(-6, (1,), (1,)), "impossible number"),
        (tensor(7, (6,), (1,)), r"wrong size(.|\n)*28 bytes(.|\n)*24 bytes"),
        (tensor(5, (5,), (1,)), "wrong size"),
        (tensor(6, (6,), (1,), kind="DoubleStorage"), "wrong size"),
        (tensor(2**61, (6,), (1,)), "wrong size"),
        (tensor(6, (6,), (1,), key="1"), r"missing(.|\n)*x/data/1|x/data/1(.|\n)*missing|missing"),
        (b"(" + tensor(6, (6,), (1,)) + tensor(6, (6,), (1,), kind="IntStorage") + b"t", "declared in two ways"),
        (tensor(24, (1,), (1,), kind="BoolStorage"), "booleans holds other values"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"K\x01" * 6 + b"tR", "wrong form"),
        (b"ctorch._utils\n_rebuild_parameter\n(NNNtR", "no tensor"),
        (b"h\x07", "never stored"),
        (b"R", "too few values"),
        (b"\x87", "too few values"),
        (b"t", "too few values"),
        (b"q\x00", "too few values"),
        (b"", "exactly one value"),
        (b"NN", "exactly one value"),
        (b"N(", "exactly one value"),
        (b"NNa", "no list"),
        (b"NNNs", "no dict"),
        (b"}(Nu", "no dict"),
        (b"N.N", "after the end"),
        (b"X\xff\xff\xff\xff", "cut off"),
        (b"X\x01\x00\x00\x00\xff", "not UTF-8"),
        (b"\xff", "no opcode"),
        (b"cos", "cut off inside a name"),
        (b"ctorch.nn.modules.container\nParameterDict\n)\x81", "lacks its contents"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_tensor(tmp_path, body)
    assert "t.pt: x/data" in str(error.value)


def test_a_parameter_dict_must_hold_what_its_keys_name(tmp_path: Path) -> None:
    state = b"}(" + text("_keys") + b"}" + text("a") + b"Ns" + text("_parameters") + b"}" + text("_modules") + b"}u"
    with pytest.raises(CheckpointError, match="do not match its contents"):
        read_tensor(tmp_path, b"ctorch.nn.modules.container\nParameterDict\n)\x81" + state + b"b")


@pytest.mark.parametrize(
    "body",
    [
        tensor(6, (2**40, 6), (0, 1)),
        tensor(6, (0, 2**62), (0, 0)),
        tensor(6, (2**31, 2**31, 2**31), (0, 0, 0)),
        b"(" + tensor(6, (30_000, 6), (0, 1)) * 2 + b"t",
    ],
    ids=["expanded", "empty but vast", "overflowing", "two that are too much together"],
)
def test_expanded_tensors_do_not_fill_the_memory(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(UnsafeFileError, match="too much memory"):
        read_tensor(tmp_path, body)


def test_max_bytes_is_kept(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "t.pt", program(tensor(6, (2,), (1,))), {"0": FLOATS.tobytes()})
    assert read_torch_archive(path, max_bytes=24).size == 2
    with pytest.raises(UnsafeFileError, match="raise max_bytes"):
        read_torch_archive(path, max_bytes=23)


# --- the zip container


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", program(tensor(2**22, (2**22,), (1,))))
        archive.writestr("x/data/0", bytes(2**24))
    assert path.stat().st_size < 2**16
    with pytest.raises(UnsafeFileError, match="compressed"):
        read_torch_archive(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "x/../../evil", "x\\evil", "C:/evil", "x//y", "x/\x1b[2J"])
def test_odd_member_names_are_refused(tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "t.pt", program(b"N"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(UnsafeFileError, match="does not write"):
        read_torch_archive(path)


def _central_directory(raw: bytes, name: bytes) -> int:
    """Byte position of the central directory entry of a member."""
    position = raw.rindex(name) - 46
    assert raw[position : position + 4] == b"PK\x01\x02"
    return position


def test_duplicate_encrypted_and_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "t.pt", program(tensor(6, (6,), (1,))), {"0": FLOATS.tobytes(), "1": b"1" * 24})
    raw = path.read_bytes()

    path.write_bytes(raw.replace(b"x/data/1", b"x/data/0"))
    with pytest.raises(UnsafeFileError, match="two members of one name"):
        read_torch_archive(path)

    entry = _central_directory(raw, b"x/data/0")
    for flag in (0x01, 0x40):
        path.write_bytes(raw[: entry + 8] + bytes([flag]) + raw[entry + 9 :])
        with pytest.raises(UnsafeFileError, match="encrypted"):
            read_torch_archive(path)

    size = struct.pack("<I", len(raw))
    path.write_bytes(raw[: entry + 20] + size * 2 + raw[entry + 28 :])
    with pytest.raises(UnsafeFileError, match="more bytes than the file has"):
        read_torch_archive(path)

    path.write_bytes(raw[: entry + 24] + size + raw[entry + 28 :])
    with pytest.raises(UnsafeFileError, match=r"compressed(.|\n)*24 bytes that claim"):
        read_torch_archive(path)


def test_a_flipped_number_is_noticed(tmp_path: Path) -> None:
    raw = PER_DIM.read_bytes()
    with zipfile.ZipFile(PER_DIM) as archive:
        start = archive.getinfo("normalizer_per_dim/data/0").header_offset
    position = raw.index(read_torch_archive(PER_DIM)["action"]["input_stats"]["max"].tobytes(), start)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged.pt: normalizer_per_dim/data/\d(.|\n)*CRC"):
        read_torch_archive(damaged)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    raw = PER_DIM.read_bytes()
    path = tmp_path / "t.pt"
    for length in range(0, len(raw), 61):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"cannot be read|no torch checkpoint"):
            read_torch_archive(path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "t.pt", program(b"N"), byteorder=b"big")
    with pytest.raises(CheckpointError, match=r"byte order(.|\n)*big"):
        read_torch_archive(path)


def test_files_of_other_kinds_say_what_to_do(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1.6(.|\n)*save it again"):
        read_torch_archive(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_torch_archive(path)
    path.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="no torch checkpoint"):
        read_torch_archive(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match="exactly one member"):
        read_torch_archive(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_torch_archive(tmp_path / "none.pt")


# --- mutation

VALID_PKL = program(
    b"}(" + text("w") + tensor(6, (2, 3), (3, 1)) + text("b") + tensor(6, (3,), (2,), offset=1) + text("n") + b"K\x07u"
)


def _mutate(content: bytes, changes: list[tuple[float, int]]) -> bytes:
    mutated = bytearray(content)
    for where, value in changes:
        mutated[int(where * len(mutated))] = value
    return bytes(mutated)


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


def fuzz_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples: a thousand of them would cost more than the reading."""
    folder = factory.getbasetemp() / "torch_archive_fuzz"
    folder.mkdir(exist_ok=True)
    return folder


def _read_or_fail_cleanly(path: Path) -> None:
    message = ""
    try:
        read_torch_archive(path)
    except Rdt2Error as error:
        message = str(error)
    assert not message or str(path) in message
    assert os.listdir(path.parent) == [path.name]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=CHANGES)
def test_a_mutated_archive_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    path = fuzz_folder(tmp_path_factory) / "t.pt"
    path.write_bytes(_mutate(PER_DIM.read_bytes(), changes))
    _read_or_fail_cleanly(path)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(changes=CHANGES, attack=st.sampled_from([None, "GLOBAL", "BUILD", "NEWOBJ"]))
def test_a_mutated_pickle_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: Any, attack: str | None
) -> None:
    folder = fuzz_folder(tmp_path_factory)
    valid = VALID_PKL if attack is None else ATTACKS[attack](f"touch {folder}/canary")
    path = write_archive(folder / "t.pt", _mutate(valid, changes), {"0": FLOATS.tobytes()})
    _read_or_fail_cleanly(path)
