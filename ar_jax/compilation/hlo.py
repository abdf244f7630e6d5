"""A compiled program's text, read into instructions."""

from __future__ import annotations

import dataclasses
import math
import re

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        shapes: of its results.
        in_hbm: of each result, whether it lies in HBM and not in memory of the chip itself.
        operands: names.
        line: its text, of several lines where its metadata has some.
    """

    name: str
    shapes: tuple[Shape, ...]
    in_hbm: tuple[bool, ...]
    opcode: str
    operands: tuple[str, ...]
    line: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of ``pattern`` in the line."""
        found = re.search(pattern, self.line)
        return found.group(1) if found else None

    @property
    def cycles(self) -> int:
        """What the compiler expects it to take; 0 where it says nothing."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from: 'jit(step)/jvp(Model)/dot_general'."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or ""

    @property
    def called(self) -> str:
        """The computation of a fusion or of an asynchronous start."""
        return self.attribute(r"calls=%([\w.\-]+)") or ""

    @property
    def is_root(self) -> bool:
        """Whether it gives its computation's result."""
        return self.line.lstrip().startswith("ROOT ")

    @property
    def bytes(self) -> int:
        """Of all results, without padding."""
        return sum(shape_bytes(shape) for shape in self.shapes)


Computations = dict[str, list[Instruction]]


def shape_bytes(shape: Shape) -> int:
    """Bytes of an array without its padding."""
    return ITEM_BYTES.get(shape[0], 4) * math.prod(shape[1])


def is_scheduled(text: str) -> bool:
    """Whether the instructions of a computation stand in the order in which they run."""
    return re.match(r"HloModule [^\n]*\bis_scheduled=true", text) is not None


def parse(text: str) -> tuple[Computations, str]:
    """(computations by name, name of the entry computation).

    Raises:
        ValueError: there is no entry computation.
    """
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header and "=" not in line.split("(", 1)[0]:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line.rstrip() == "}":  # metadata that spans lines may begin one with a brace
            current = None
        elif current is not None:
            found = _parse_line(line)
            if found:
                current.append(found)
            elif current and not line.startswith(" "):  # goes on with the metadata of the last
                last = current[-1]
                current[-1] = dataclasses.replace(last, line=f"{last.line}\n{line}")
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is no compiled HLO module")
    return computations, entry


def _parse_line(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _type_end(rest)
    call = re.match(r"([\w\-]+)\(([^)]*)\)", rest[end + 1 :])
    if not call:
        return None
    operands = tuple(re.findall(r"%([\w.\-]+)", call.group(2)))
    shapes, in_hbm = _arrays(rest[:end])
    return Instruction(head.group(1), shapes, in_hbm, call.group(1), operands, line)


def _type_end(text: str) -> int:
    """Where the type that ``text`` begins with ends: at the first space outside of brackets."""
    depth = 0
    for place, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == " " and depth == 0:
            return place
    return len(text)


def _arrays(text: str) -> tuple[tuple[Shape, ...], tuple[bool, ...]]:
    """(shapes, whether each is in HBM): a layout that ends in S(1) names the chip's own memory."""
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", text)
    shapes = tuple((kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims, _ in found)
    return shapes, tuple("S(" not in layout for _, _, layout in found)
