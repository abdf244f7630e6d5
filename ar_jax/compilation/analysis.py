"""Time, phases and collectives of a compiled program, from its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ar_jax.compilation import estimate, phases
from ar_jax.compilation.axes import mesh_axes
from ar_jax.compilation.chips import Chip
from ar_jax.compilation.collectives import find_collectives
from ar_jax.compilation.execution import execute
from ar_jax.compilation.exposure import Network, Timed, time_collectives
from ar_jax.parallel.mesh import SLICE


def analyse(
    text: str,
    chip: Chip,
    topology: str,
    mesh: Mapping[str, int],
    phase: phases.Phase,
    visible: float,
) -> dict[str, Any]:
    """What one run of a program does on one device.

    Args:
        topology: of one slice of ``chip``s.
        mesh: sizes of the axes.
        phase: which part of the program an op_name is of.
        visible: share of the attention's blocks that are computed.

    Returns:
        Plain numbers: 'seconds' (see `ar_jax.compilation.estimate.estimate`; of the total those of
        'attention', see `ar_jax.compilation.phases.attention_seconds`), 'method', 'left_out',
        'phases' (see `ar_jax.compilation.phases.split_into_phases`), 'phases_rule', 'collectives'
        (see `ar_jax.compilation.collectives.Collective`; besides bytes_per_run, axes, of which
        slice is DCN, and of all calls the seconds at least and those of them that are exposed).

    Raises:
        ValueError: it is no compiled HLO module.
    """
    run = execute(text)
    busy = [sum(estimate.step_seconds(step, chip, visible).values()) for step in run.steps]
    network = Network(chip=chip, topology=topology, slices=mesh.get(SLICE, 1))
    timed = time_collectives(find_collectives(run), busy, run.scheduled, network)
    seconds = estimate.estimate(run, chip, visible, timed)
    seconds["attention"] = phases.attention_seconds(run, chip, visible)
    return {
        "seconds": seconds,
        "method": estimate.METHOD,
        "left_out": estimate.left_out(run),
        "phases": phases.split_into_phases(run, phase, chip, visible, timed),
        "phases_rule": phases.RULE,
        "collectives": [_collective(one, mesh) for one in timed],
    }


def _collective(timed: Timed, mesh: Mapping[str, int]) -> dict[str, Any]:
    found = timed.collective
    inside = {axis: size for axis, size in mesh.items() if axis != SLICE}  # see `dcn`
    left = ("groups", "step", "done")
    return {
        **{name: value for name, value in vars(found).items() if name not in left},
        "bytes_per_run": found.count * found.bytes,
        "axes": SLICE if found.over_dcn else mesh_axes(found.groups, inside),
        "seconds": timed.seconds,
        "exposed": timed.exposed,
    }
