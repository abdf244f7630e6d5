"""The collectives of a compiled program, and the instructions that run while they are under way."""

from __future__ import annotations

import dataclasses

from ar_jax.compilation.axes import Groups, replica_groups
from ar_jax.compilation.dcn import read_rendezvous, read_transfer
from ar_jax.compilation.execution import Executed, Run
from ar_jax.compilation.hlo import Instruction, shape_bytes

KINDS = (*("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),)


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
        step: place of its start among the steps of the run.
        done: place of what waits for it; None: synchronous, or no done was found.
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
    step: int
    done: int | None = None
    over_dcn: bool = False


def find_collectives(run: Run) -> list[Collective]:
    """The collectives of a run, by their starts."""
    steps = run.steps
    found: list[Collective] = []
    last = _last_copies(steps)
    seen: set[tuple[int, str]] = set()
    for place, step in enumerate(steps):
        instruction = step.instruction
        transfer = read_transfer(instruction.line) if instruction.opcode == "recv" else None
        if transfer:
            kind, slices = transfer
            arrays = [shape for shape in instruction.shapes if shape[0] != "token"][:-1]
            size = sum(shape_bytes(shape) for shape in arrays)  # without a context, the last
            sent, done = _sent(steps, place), _done(steps, place)
            rest = (step.times, size, slices, bool(step.loops), True, ())
            found.append(Collective(kind, *rest, sent, done, over_dcn=True))
        elif instruction.opcode.removesuffix("-start") in KINDS:
            apart = instruction.opcode.endswith("-start")
            done = _done(steps, place) if apart else None
            found.append(_collective(instruction, step, place, done, asynchronous=apart))
        for one in step.inside:
            if one.opcode.removesuffix("-start") not in KINDS:
                continue
            channel = _shared_channel(one)
            if channel is None:
                apart = instruction.opcode == "async-start"
                done = _done(steps, place) if apart else None
                found.append(
                    _scattered(_collective(one, step, place, done, asynchronous=apart), step)
                )
            elif (step.visit, channel) not in seen:
                seen.add((step.visit, channel))
                end = last[step.visit, channel]
                done = end if end > place else None
                found.append(_collective(one, step, place, done, asynchronous=True))
    return sorted(found, key=lambda collective: collective.step)


def result_shapes(instruction: Instruction) -> tuple:
    """Shapes of a collective's results, of which a start may list the operands before them."""
    count = len(instruction.operands)
    if instruction.opcode.endswith("-start") and len(instruction.shapes) >= 2 * count:
        return instruction.shapes[count : 2 * count]
    return instruction.shapes


def _collective(
    instruction: Instruction,
    step: Executed,
    place: int,
    done: int | None,
    *,
    asynchronous: bool,
) -> Collective:
    groups = replica_groups(instruction.line)
    return Collective(
        kind=instruction.opcode.removesuffix("-start"),
        count=step.times,
        bytes=sum(shape_bytes(shape) for shape in result_shapes(instruction)),
        group=max(map(len, groups or ()), default=0),
        in_loop=bool(step.loops),
        asynchronous=asynchronous or instruction.opcode.endswith("-start"),
        groups=groups,
        step=place,
        done=done,
    )


def _scattered(collective: Collective, step: Executed) -> Collective:
    """A reduce-scatter as such: TPU programs have it as a fusion of an all-reduce and a slice."""
    instruction = step.instruction
    if collective.kind != "all-reduce" or "calls=%all-reduce-scatter" not in instruction.line:
        return collective
    size = sum(shape_bytes(shape) for shape in instruction.shapes)
    return dataclasses.replace(collective, kind="reduce-scatter", bytes=size)


def _done(steps: list[Executed], start: int) -> int | None:
    """Place of the done of the start at ``start``."""
    first = steps[start]
    names = {first.instruction.name}
    for place in range(start + 1, len(steps)):
        instruction = steps[place].instruction
        if steps[place].visit != first.visit or names.isdisjoint(instruction.operands):
            continue
        if instruction.opcode.endswith("-done"):
            return place
        if instruction.opcode == "async-update":
            names.add(instruction.name)
    return None


def _sent(steps: list[Executed], received: int) -> int:
    """Where a transfer between slices begins: at its send or its recv, whichever is later."""
    wanted = read_rendezvous(steps[received].instruction.line)
    sends = (
        place
        for place, step in enumerate(steps)
        if step.instruction.opcode == "send"
        and step.visit == steps[received].visit
        and read_rendezvous(step.instruction.line) == wanted
    )
    return max(received, next(sends, received))


def _shared_channel(instruction: Instruction) -> str | None:
    """The channel of a collective that is spread over fusions.

    The compiler overlaps a collective with computation by putting a copy of it, all with one
    channel, into the fusion that starts it, into each that runs beside it and into the last.
    """
    if '"async_collective_fusion_config":{"flag_start"' not in instruction.line:
        return None
    return instruction.attribute(r"channel_id=(\d+)")


def _last_copies(steps: list[Executed]) -> dict[tuple[int, str], int]:
    """Place of the last fusion with each (visit, shared channel)."""
    last = {}
    for place, step in enumerate(steps):
        for one in step.inside:
            channel = _shared_channel(one)
            if channel is not None:
                last[step.visit, channel] = place
    return last
