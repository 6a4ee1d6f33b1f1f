"""What the `data.pkl` of a torch checkpoint says, without letting it say anything else.

A pickle is a program, and the interpreter in Python's `pickle` module calls whatever that program names. This
one has no way to import, call or set an attribute of anything: it knows the opcodes that `torch.save` emits
(pickle protocol 2), keeps class names as inert `Global` records, and gives meaning to a fixed table of them.
`pickletools` of the standard library only lends it the names of the opcodes it refuses.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

from rdt2_jax.errors import CheckpointError, Rdt2Error, UnsafeFileError
from rdt2_jax.io.torch_records import (
    ALLOWED_GLOBALS,
    ORDERED_DICT,
    PARAMETER_DICT,
    REBUILD_PARAMETER,
    REBUILD_TENSOR,
    SETS,
    STORAGE_DTYPES,
    Global,
    OrderedDictRef,
    ParameterDictRef,
    StorageRef,
    TensorRef,
    describe,
)

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPCODES = 1_000_000
"""Far above need: a checkpoint of a thousand tensors has about thirty thousand opcodes in 150 kB."""

MAX_DIMENSIONS = 32

_OPCODE_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
_TRUST = "do not load this file with any other tool; get the checkpoint from a source you trust"


def interpret_pickle(data: bytes, where: str) -> tuple[Any, list[TensorRef]]:
    """Runs the restricted interpreter over the bytes of one pickle.

    Args:
        data: content of the member `data.pkl`.
        where: file and member, for the messages.

    Returns:
        The root object, made of plain values and the records of this module; and all tensor records.

    Raises:
        UnsafeFileError: a class, opcode or size outside the table.
        CheckpointError: bytes that are no complete pickle, or records of the wrong form.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise UnsafeFileError(
            "the pickle is too large", where=where, expected=f"at most {MAX_PICKLE_BYTES} bytes", found=len(data)
        )
    machine = _Machine(data, where)
    for _ in range(MAX_OPCODES):
        if machine.step():
            return machine.finish(), machine.tensors
    raise UnsafeFileError("the pickle has too many opcodes", where=where, expected=f"at most {MAX_OPCODES}")


class _Machine:
    """The bytes, the stack, the memo, and one method per record that torch writes."""

    def __init__(self, data: bytes, where: str) -> None:
        self.tensors: list[TensorRef] = []
        self._data, self._position, self._opcode_position = data, 0, 0
        self._file = where
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._set_items = 0

    def step(self) -> bool:
        """Runs one opcode; True when it was the end of the pickle."""
        self._opcode_position = self._position
        opcode = self.take(1)
        if opcode == b".":
            return True
        if opcode not in _OPCODES:
            raise self._refused_opcode(opcode)
        read, handle = _OPCODES[opcode]
        try:
            if read is None:
                handle(self)
            else:
                handle(self, read(self))
        except IndexError as error:
            raise self.damaged(f"the opcode {opcode!r} finds too few values on the stack") from error
        return False

    def finish(self) -> Any:
        if self._position != len(self._data):
            raise self.damaged("there are bytes after the end of the pickle")
        if len(self._stack) != 1 or self._below:
            raise self.damaged("the pickle does not end with exactly one value")
        return self._stack[0]

    @property
    def where(self) -> str:
        return f"{self._file}, byte {self._opcode_position}"

    def damaged(self, what: str, found: object = None) -> CheckpointError:
        return CheckpointError(what, where=self.where, found=None if found is None else describe(found))

    def refused(self, what: str, found: object = None) -> UnsafeFileError:
        return UnsafeFileError(what, where=self.where, found=None if found is None else describe(found))

    def _refused_opcode(self, opcode: bytes) -> Rdt2Error:
        """Names the opcode and, where it carries one, the class behind it."""
        known = _OPCODE_NAMES.get(opcode)
        if known is None:
            return self.damaged("the pickle holds a byte that is no opcode", opcode.hex())
        named = None
        if known == "INST":
            named = self.global_name()
        elif known == "STACK_GLOBAL":
            named = ".".join(part for part in self._stack[-2:] if isinstance(part, str))
        return UnsafeFileError(
            f"the pickle uses the opcode {known}, which torch.save does not write",
            where=self.where,
            expected="only the opcodes of a torch checkpoint (pickle protocol 2)",
            found=None if named is None else describe(named),
            fix=_TRUST,
        )

    # --- bytes

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise self.damaged("the pickle is cut off")
        piece = self._data[self._position : end]
        self._position = end
        return piece

    def unsigned(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def text(self) -> str:
        return self._decode(self.take(self.unsigned(4)))

    def global_name(self) -> str:
        """Module and attribute, each a line."""
        parts = []
        for _ in range(2):
            end = self._data.find(b"\n", self._position)
            if end < 0:
                raise self.damaged("the pickle is cut off inside a name")
            parts.append(self._decode(self._data[self._position : end]))
            self._position = end + 1
        return ".".join(parts)

    def _decode(self, encoded: bytes) -> str:
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged("the pickle holds text that is not UTF-8") from error

    # --- stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop_to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise self.damaged("the pickle recalls a value it never stored", index)
        self.push(self._memo[index])

    def tuple_of_marked(self) -> None:
        self.push(tuple(self.pop_to_mark()))

    def make_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self.push(items)

    def protocol(self, version: int) -> None:
        if version != 2:
            raise self.refused(f"the pickle has protocol {version}; torch.save writes protocol 2")

    def long_integer(self, length: int) -> None:
        if length > 8:
            raise self.refused("the pickle holds an integer of more than 64 bits")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    # --- containers

    def extend_list(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise self.damaged("values are appended to something that is no list", self._stack[-1])
        self._stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict) or len(items) % 2:
            raise self.damaged("items are set on something that is no dict", self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._stack[-1][self.plain_key(key)] = value

    def plain_key(self, key: Any) -> str | int:
        """Only text and integers are hashed: hashing deeply nested tuples would exhaust the C stack."""
        if type(key) not in (str, int, bool):
            raise self.refused(f"the pickle uses a {type(key).__name__} as a key", key)
        return key

    # --- classes and functions

    def name_global(self, name: str) -> None:
        if name not in ALLOWED_GLOBALS:
            raise UnsafeFileError(
                f"the pickle names {describe(name)}, which is not part of a checkpoint of tensors",
                where=self.where,
                expected="one of " + ", ".join(sorted(ALLOWED_GLOBALS)),
                found=describe(name),
                fix=_TRUST,
            )
        self.push(Global(name))

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if cls != Global(PARAMETER_DICT) or arguments != ():
            raise self.refused("the pickle makes an object that is no empty ParameterDict", cls)
        self.push(ParameterDictRef())

    def build(self) -> None:
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, ParameterDictRef) and target.state is None and isinstance(state, dict):
            target.state = state
        elif (
            isinstance(target, OrderedDictRef) and isinstance(state, dict) and len(state) == 1 and "_metadata" in state
        ):
            return  # version numbers of torch modules: they say nothing about the tensors
        else:
            raise self.refused("the pickle sets the state of an object that has none", target)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self.refused("the pickle calls something that is no function", function)
        if function.name == ORDERED_DICT and arguments == ():
            self.push(OrderedDictRef())
        elif function.name in SETS and len(arguments) == 1 and isinstance(arguments[0], list):
            self._make_set(arguments[0])
        elif function.name == REBUILD_TENSOR and len(arguments) == 6:
            self._rebuild_tensor(*arguments)
        elif function.name == REBUILD_PARAMETER and len(arguments) == 3:
            self._rebuild_parameter(*arguments)
        else:
            raise self.refused(f"the pickle calls {function.name} with arguments torch.save never writes")

    def persistent_storage(self) -> None:
        record = self.pop()
        if not isinstance(record, tuple) or len(record) != 5:
            raise self.refused("the pickle refers to something that is no storage", record)
        kind, cls, key, location, numel = record
        dtype = STORAGE_DTYPES.get(cls.name) if isinstance(cls, Global) else None
        if kind != "storage" or dtype is None or not isinstance(location, str):
            raise self.refused("the pickle refers to something that is no storage", record)
        if not isinstance(key, str) or not (key.isascii() and key.isdigit()):
            raise self.refused("a storage has a key that is no number", key)
        if type(numel) is not int or numel < 0:
            raise self.damaged("a storage has an impossible number of elements", numel)
        self.push(StorageRef(key, dtype, numel))

    def _make_set(self, items: list[Any]) -> None:
        # One long list could be made a set over and over at the cost of a few opcodes each.
        self._set_items += len(items)
        if self._set_items > MAX_OPCODES:
            raise self.refused("the pickle makes too many sets", len(items))
        self.push({self.plain_key(item) for item in items})

    def _rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
    ) -> None:
        sizes_are_ints = all(
            isinstance(sizes, tuple) and all(type(size) is int for size in sizes) for sizes in (shape, strides)
        )
        if not isinstance(storage, StorageRef) or type(offset) is not int or not sizes_are_ints:
            raise self.damaged("a tensor record has the wrong form", (storage, offset, shape, strides))
        self._require_no_hooks(requires_grad, hooks)
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise self.damaged("a tensor has sizes and strides that do not belong together", (shape, strides))
        tensor = TensorRef(storage, offset, shape, strides)
        self.tensors.append(tensor)
        self.push(tensor)

    def _rebuild_parameter(self, tensor: Any, requires_grad: Any, hooks: Any) -> None:
        if not isinstance(tensor, TensorRef):
            raise self.damaged("a parameter is made of something that is no tensor", tensor)
        self._require_no_hooks(requires_grad, hooks)
        self.push(tensor)

    def _require_no_hooks(self, requires_grad: Any, hooks: Any) -> None:
        if not isinstance(requires_grad, bool) or not isinstance(hooks, OrderedDictRef) or hooks:
            raise self.refused("a tensor carries hooks", hooks)


_Read = Callable[[_Machine], Any]


def _unsigned(count: int) -> _Read:
    return lambda machine: machine.unsigned(count)


def _signed_int32(machine: _Machine) -> int:
    return int.from_bytes(machine.take(4), "little", signed=True)


def _float64(machine: _Machine) -> float:
    return struct.unpack(">d", machine.take(8))[0]


# Opcode -> (how its argument is read, what it does). Numbering and names: `pickletools` of the standard library.
_OPCODES: dict[bytes, tuple[_Read | None, Callable[..., None]]] = {
    b"\x80": (_unsigned(1), _Machine.protocol),  # PROTO
    b"(": (None, _Machine.mark),  # MARK
    b"N": (None, lambda m: m.push(None)),  # NONE
    b"\x88": (None, lambda m: m.push(True)),  # NEWTRUE
    b"\x89": (None, lambda m: m.push(False)),  # NEWFALSE
    b"J": (_signed_int32, _Machine.push),  # BININT
    b"K": (_unsigned(1), _Machine.push),  # BININT1
    b"M": (_unsigned(2), _Machine.push),  # BININT2
    b"\x8a": (_unsigned(1), _Machine.long_integer),  # LONG1
    b"G": (_float64, _Machine.push),  # BINFLOAT
    b"X": (_Machine.text, _Machine.push),  # BINUNICODE
    b"}": (None, lambda m: m.push({})),  # EMPTY_DICT
    b"]": (None, lambda m: m.push([])),  # EMPTY_LIST
    b")": (None, lambda m: m.push(())),  # EMPTY_TUPLE
    b"t": (None, _Machine.tuple_of_marked),  # TUPLE
    b"\x85": (None, lambda m: m.make_tuple(1)),  # TUPLE1
    b"\x86": (None, lambda m: m.make_tuple(2)),  # TUPLE2
    b"\x87": (None, lambda m: m.make_tuple(3)),  # TUPLE3
    b"a": (None, lambda m: m.extend_list([m.pop()])),  # APPEND
    b"e": (None, lambda m: m.extend_list(m.pop_to_mark())),  # APPENDS
    b"s": (None, lambda m: m.set_items([m.pop(), m.pop()][::-1])),  # SETITEM
    b"u": (None, lambda m: m.set_items(m.pop_to_mark())),  # SETITEMS
    b"q": (_unsigned(1), _Machine.remember),  # BINPUT
    b"r": (_unsigned(4), _Machine.remember),  # LONG_BINPUT
    b"h": (_unsigned(1), _Machine.recall),  # BINGET
    b"j": (_unsigned(4), _Machine.recall),  # LONG_BINGET
    b"c": (_Machine.global_name, _Machine.name_global),  # GLOBAL
    b"\x81": (None, _Machine.new_object),  # NEWOBJ
    b"b": (None, _Machine.build),  # BUILD
    b"R": (None, _Machine.reduce),  # REDUCE
    b"Q": (None, _Machine.persistent_storage),  # BINPERSID
}
