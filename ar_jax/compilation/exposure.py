"""What collectives take at least, and how much of it no computation hides."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from ar_jax.compilation.chips import Chip, dimensions
from ar_jax.compilation.collectives import Collective

RULE = (
    "a collective takes at least the bytes that a ring algorithm sends from a chip over the "
    "published bandwidth of two links for each dimension of the torus that its group needs, as if "
    "every dimension were closed to a ring, or, between slices, of the chip's share of the data "
    "center network; a synchronous one is exposed whole, an asynchronous one by what the estimates "
    "of the instructions between its start and its done fall short of it, two over the same chips "
    "being hidden one after the other"
)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A collective's time in one run, in seconds.

    Attributes:
        seconds: of all its calls, at least.
        overlapped: part of it that other instructions hide.
    """

    collective: Collective
    seconds: float
    overlapped: float

    @property
    def exposed(self) -> float:
        return self.seconds - self.overlapped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What the chips are joined by: ``slices`` of a ``topology`` of ``chip``s."""

    chip: Chip
    topology: str
    slices: int = 1

    def call_seconds(self, collective: Collective) -> float:
        """Lower bound of one call of a collective."""
        sizes = dimensions(self.topology)
        if collective.over_dcn:
            members = collective.group or self.slices
            return sent_bytes(collective, members) / self.chip.network
        members = collective.group or math.prod(sizes)
        links = min(2 * needed_dimensions(sizes, members), self.chip.links)
        bandwidth = self.chip.interconnect * links / self.chip.links
        return sent_bytes(collective, members) / bandwidth


def sent_bytes(collective: Collective, members: int) -> float:
    """Bytes that each of ``members`` chips sends in one call of a ring algorithm."""
    size = collective.bytes
    if collective.kind == "collective-permute":
        return size
    if collective.kind == "reduce-scatter":  # its result is one part of what is reduced
        return size * (members - 1)
    share = size * (members - 1) / members
    return 2 * share if collective.kind == "all-reduce" else share


def needed_dimensions(sizes: tuple[int, ...], members: int) -> int:
    """The least number of a torus's dimensions that together have room for ``members`` chips."""
    room = itertools.accumulate(sorted(sizes, reverse=True), lambda a, b: a * b)
    return next((n for n, chips in enumerate(room, start=1) if chips >= members), len(sizes))


def time_collectives(
    collectives: Sequence[Collective], busy: Sequence[float], scheduled: bool, network: Network
) -> list[Timed]:
    """How much of each collective is hidden.

    Of collectives over the same chips that are under way together, the one that started later
    waits for the earlier one.

    Args:
        busy: seconds that each step of the run takes, collectives not counted, all times together.
        scheduled: whether the steps are in the order of execution; without it nothing is hidden.
    """
    clock = [0.0, *itertools.accumulate(busy)]  # at the begin of each step, without waiting
    free: dict[tuple, float] = {}  # when the links of a group have done what was asked of them
    timed = []
    for found in sorted(collectives, key=lambda one: one.step):
        seconds = found.count * network.call_seconds(found)
        hidden = 0.0
        if scheduled and found.done is not None:
            links = (found.over_dcn, found.groups)
            begin = max(clock[found.step + 1], free.get(links, 0.0))
            hidden = min(seconds, max(0.0, clock[found.done] - begin))
            free[links] = begin + hidden
        timed.append(Timed(found, seconds, hidden))
    return timed
