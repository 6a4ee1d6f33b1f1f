"""Whether a compiled program keeps weights in eight bits: nothing of a weight's size may be written in floats.

Reads the text of optimised HLO. What happens inside a fused computation stays in registers; a value is in memory where
a computation that is not fused makes it. So a copy is any instruction outside fusions that takes integers of eight bits
and gives as many floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[^\s(]+) (?:\(.*\) -> .*)?\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[^\s=]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]\w*?\d+\w*)\[(?P<shape>[\d,]*)\]")
_NAME = re.compile(r"%(?P<name>[\w.\-]+)")
_FUSED = re.compile(r"\bfusion\(.*?\bcalls=%?(?P<name>[\w.\-]+)")

_FLOATS = ("bf16", "f16", "f32", "f64")
_MOVES_NOTHING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
"""Hand values on; what they call is looked at by itself."""


def float_copies(hlo: str, sizes: Collection[int]) -> list[str]:
    """Instructions that write a weight in eight bits down in floats.

    Args:
        hlo: text of optimised HLO, `jax.stages.Compiled.as_text()`.
        sizes: numbers of elements of the weights in eight bits.

    Returns:
        "computation: instruction", in the order of the text; none where the weights are converted as they are read.
    """
    fused = {match["name"] for match in _FUSED.finditer(hlo)}
    types = _types(hlo)
    found, computation = [], ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is None or computation in fused or instruction["opcode"] in _MOVES_NOTHING:
            continue
        written = {size for dtype, size in _arrays(instruction["type"]) if dtype in _FLOATS and size in sizes}
        operands = _operands(instruction["rest"])
        read = [array for name in _NAME.findall(operands) for array in types.get((computation, name), [])]
        # older texts name the type of every operand in its place
        if written & {size for dtype, size in [*read, *_arrays(operands)] if dtype == "s8"}:
            found.append(f"{computation}: {line.strip()}")
    return found


def _types(hlo: str) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """(computation, instruction) -> its arrays."""
    types, computation = {}, ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        elif instruction := _INSTRUCTION.match(line):
            types[computation, instruction["name"]] = _arrays(instruction["type"])
    return types


def _arrays(text: str) -> list[tuple[str, int]]:
    """(dtype, number of elements) of every array type in a text."""
    return [
        (match["dtype"], math.prod(int(side) for side in match["shape"].split(",") if side))
        for match in _ARRAY.finditer(text)
    ]


def _operands(rest: str) -> str:
    """What stands between an opcode's parentheses, of which the first is cut off already."""
    depth = 1
    for i, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return rest
