"""A compiled program's text: the compiler's cycle estimates, collectives and custom kernels.

Only what runs is counted: the entry computation, the bodies of its loops times their trip counts
(nested loops multiply), and the dearest branch of a conditional.
"""

from __future__ import annotations

import dataclasses
import math
import re

from ar_jax.compilation.axes import Groups, replica_groups
from ar_jax.compilation.dcn import Transfer, read_transfer

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = (*("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),)

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, results, opcode, operands' names, and the whole line."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    line: str

    def attribute(self, pattern: str) -> str | None:
        """The first group of ``pattern`` in the line."""
        found = re.search(pattern, self.line)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program.

    Attributes:
        kind: 'all-reduce', ...
        count: calls in one run of the program.
        bytes: of one call's results on one device.
        group: devices that take part together; 0: all.
        in_loop: whether it is inside a loop.
        asynchronous: whether it is split into a start and a done.
        groups: numbers of the partitions that take part together; (): all of them;
            None: not read.
        over_dcn: whether it goes over slices, a chip of each together: then ``group`` counts
            slices and ``groups`` is ().
    """

    kind: str
    count: int
    bytes: int
    group: int
    in_loop: bool
    asynchronous: bool
    groups: Groups | None
    over_dcn: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom kernel: its name, calls in one run, and the shapes of operands and results."""

    name: str
    count: int
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


@dataclasses.dataclass
class Totals:
    """What one run of the program does on one device.

    Attributes:
        unknown_loops: loops without a trip count in the text, of which one turn is counted.
    """

    cycles: int = 0
    unknown_loops: int = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)


def shape_bytes(shape: Shape) -> int:
    """Bytes of an array without its padding."""
    return ITEM_BYTES.get(shape[0], 4) * math.prod(shape[1])


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """(computations by name, name of the entry computation).

    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
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
    return Instruction(head.group(1), _shapes(rest[:end]), call.group(1), operands, line)


def _type_end(text: str) -> int:
    """Where the type that ``text`` begins with ends: at the first space outside of brackets."""
    depth = 0
    for place, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == " " and depth == 0:
            return place
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", text)
    return tuple((kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found)


def total(text: str) -> Totals:
    """Sums over one run of the program."""
    computations, entry = parse(text)
    totals = Totals()
    _visit(computations, entry, 1, False, totals)
    return totals


def _visit(
    computations: dict[str, list[Instruction]], name: str, times: int, loop: bool, totals: Totals
) -> None:
    shapes = {instruction.name: instruction.shapes for instruction in computations[name]}
    seen: set[str] = set()
    for instruction in computations[name]:
        cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
        totals.cycles += times * int(cycles or 0)
        _note_collective(instruction, times, loop, totals)
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.line:
            operands = tuple(s for name in instruction.operands for s in shapes.get(name, ()))
            totals.kernels.append(Kernel(instruction.name, times, operands, instruction.shapes))
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%([\w.\-]+)")
            condition = instruction.attribute(r"condition=%([\w.\-]+)")
            assert body and condition
            trips = _trips(instruction, computations[condition])
            totals.unknown_loops += trips is None
            _visit(computations, body, times * (trips or 1), True, totals)
        elif instruction.opcode == "call":
            called = instruction.attribute(r"to_apply=%([\w.\-]+)")
            if called in computations:
                _visit(computations, called, times, loop, totals)
        elif instruction.opcode == "conditional":
            _add(totals, _dearest(computations, instruction, times, loop))
        elif instruction.opcode in ("fusion", "async-start"):
            called = instruction.attribute(r"calls=%([\w.\-]+)")
            inside = computations.get(called or "", [])
            apart = instruction.opcode == "async-start"
            _note_fused(inside, times, loop, totals, seen, asynchronous=apart)


def _dearest(
    computations: dict[str, list[Instruction]], instruction: Instruction, times: int, loop: bool
) -> Totals:
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}") or ""
    names = re.findall(r"%([\w.\-]+)", listed)
    names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.line)
    found = []
    for name in names:
        found.append(Totals())
        _visit(computations, name, times, loop, found[-1])
    return max(found, key=lambda totals: totals.cycles, default=Totals())


def _add(totals: Totals, more: Totals) -> None:
    totals.cycles += more.cycles
    totals.unknown_loops += more.unknown_loops
    totals.collectives += more.collectives
    totals.kernels += more.kernels


def _trips(loop: Instruction, condition: list[Instruction]) -> int | None:
    """Trip count: what the compiler knows, or the constant that the condition compares with.

    None where it depends on the data.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if known:
        return int(known)
    constants = [i.attribute(r"constant\((\d+)\)") for i in condition if i.opcode == "constant"]
    numbers = [int(value) for value in constants if value]
    return max(numbers, default=None)


def _note_fused(
    inside: list[Instruction],
    times: int,
    loop: bool,
    totals: Totals,
    seen: set[str],
    asynchronous: bool,
) -> None:
    """Notes the collectives of a fusion, whose cycles are the fusion's own.

    The compiler overlaps a collective with computation by putting a copy of it, all with one
    channel, into the fusion that starts it, into each that runs beside it and into the last.
    ``seen`` has the channels of the calling computation that have been counted.
    """
    for instruction in inside:
        channel = instruction.attribute(r"channel_id=(\d+)")
        shared = '"async_collective_fusion_config":{"flag_start"' in instruction.line
        if shared and channel in seen:
            continue
        if shared and channel:
            seen.add(channel)
        _note_collective(instruction, times, loop, totals, asynchronous or shared)


def _note_collective(
    instruction: Instruction, times: int, loop: bool, totals: Totals, asynchronous: bool = False
) -> None:
    transfer = read_transfer(instruction.line) if instruction.opcode == "recv" else None
    if transfer:
        totals.collectives.append(_over_dcn(transfer, instruction.shapes, times, loop))
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    started = kind != instruction.opcode
    sizes = [shape_bytes(shape) for shape in instruction.shapes]
    count = len(instruction.operands)
    if started and len(sizes) >= 2 * count:  # operands come before the results
        sizes = sizes[count : 2 * count]
    groups = replica_groups(instruction.line)
    totals.collectives.append(
        Collective(
            kind=kind,
            count=times,
            bytes=sum(sizes),
            group=max(map(len, groups or ()), default=0),
            in_loop=loop,
            asynchronous=started or asynchronous,
            groups=groups,
        )
    )


def _over_dcn(transfer: Transfer, shapes: tuple[Shape, ...], times: int, loop: bool) -> Collective:
    arrays = [shape for shape in shapes if shape[0] != "token"][:-1]  # the last is a context
    size = sum(shape_bytes(shape) for shape in arrays)
    kind, slices = transfer
    return Collective(kind, times, size, slices, loop, True, (), over_dcn=True)
