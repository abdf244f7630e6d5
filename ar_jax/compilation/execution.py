"""What one run of a compiled program executes on one device, instruction by instruction.

Only what runs is there: the entry computation, the bodies of its loops with their trip counts
(nested loops multiply), and the dearest branch of a conditional.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from ar_jax.compilation.hlo import Computations, Instruction, is_scheduled, parse


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction as a run executes it.

    Attributes:
        operands: the instructions that it reads; without shapes where the text has none.
        inside: of a fusion or an asynchronous start, the instructions of its computation.
        times: in one run.
        loops: that it is in, the outermost first.
        visit: a number for each call of a computation: instructions of one call have the same.
    """

    instruction: Instruction
    operands: tuple[Instruction, ...]
    inside: tuple[Instruction, ...]
    times: int
    loops: tuple[Instruction, ...]
    visit: int

    @property
    def cycles(self) -> int:
        """Of all its executions."""
        return self.times * self.instruction.cycles


@dataclasses.dataclass
class Run:
    """One run of the program on one device.

    Attributes:
        steps: in the order of the text, which is that of execution if the module is scheduled.
        unknown_loops: loops without a trip count in the text, of which one turn is counted.
    """

    computations: Computations
    scheduled: bool
    steps: list[Executed] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0

    @property
    def cycles(self) -> int:
        """Sum of the compiler's estimates."""
        return sum(step.cycles for step in self.steps)


def execute(text: str) -> Run:
    """A run of the program with this text.

    Raises:
        ValueError: it is no compiled HLO module.
    """
    computations, entry = parse(text)
    run = Run(computations, is_scheduled(text))
    _visit(run, entry, 1, (), itertools.count())
    return run


def _visit(
    run: Run, name: str, times: int, loops: tuple[Instruction, ...], numbers: Iterator[int]
) -> None:
    computations, visit = run.computations, next(numbers)
    defined = {instruction.name: instruction for instruction in computations[name]}
    for instruction in computations[name]:
        operands = tuple(
            defined.get(operand, Instruction(operand, (), (), "", (), ""))
            for operand in instruction.operands
        )
        holds = instruction.opcode in ("fusion", "async-start")
        inside = tuple(computations.get(instruction.called, ())) if holds else ()
        run.steps.append(Executed(instruction, operands, inside, times, loops, visit))
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%([\w.\-]+)")
            condition = instruction.attribute(r"condition=%([\w.\-]+)")
            assert body and condition
            trips = _trips(instruction, computations[condition], computations[body])
            run.unknown_loops += trips is None
            _visit(run, body, times * (trips or 1), (*loops, instruction), numbers)
        elif instruction.opcode == "call":
            called = instruction.attribute(r"to_apply=%([\w.\-]+)")
            if called in computations:
                _visit(run, called, times, loops, numbers)
        elif instruction.opcode == "conditional":
            branches = []
            for branch in _branches(instruction):
                branches.append(Run(computations, run.scheduled))
                _visit(branches[-1], branch, times, loops, numbers)
            if branches:
                dearest = max(branches, key=lambda branch: branch.cycles)
                run.steps += dearest.steps
                run.unknown_loops += dearest.unknown_loops


def _branches(conditional: Instruction) -> list[str]:
    listed = conditional.attribute(r"branch_computations=\{([^}]*)\}") or ""
    names = re.findall(r"%([\w.\-]+)", listed)
    return names + re.findall(r"(?:true|false)_computation=%([\w.\-]+)", conditional.line)


def _trips(loop: Instruction, condition: list[Instruction], body: list[Instruction]) -> int | None:
    """Trip count: what the compiler knows, or what the condition and the counter's step say.

    None where it depends on the data.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if known:
        return int(known)
    constants = [i.attribute(r"constant\((\d+)\)") for i in condition if i.opcode == "constant"]
    limit = max((int(value) for value in constants if value), default=None)
    return None if limit is None else math.ceil(limit / _counter_step(condition, body))


def _counter_step(condition: list[Instruction], body: list[Instruction]) -> int:
    """What a turn adds to the number that the condition compares; 1 where the text hides it.

    The compiler unrolls loops of its own, products in windows, so that a turn does two.
    """
    own = {one.name: one for one in body}
    compared = {name for one in condition if one.is_root for name in one.operands}
    places = [one.attribute(r"index=(\d+)") for one in condition if one.name in compared]
    root = next((one for one in body if one.is_root and one.opcode == "tuple"), None)
    for place in filter(None, places):
        turn = own.get(root.operands[int(place)]) if root else None
        while turn is not None and turn.opcode == "copy":
            turn = own.get(turn.operands[0])
        if turn is None or turn.opcode != "add":
            continue
        added = [own[name].attribute(r"constant\((\d+)\)") for name in turn.operands if name in own]
        return max((int(value) for value in added if value), default=1)
    return 1
