"""What the parts of a program take: a train step's forward and backward, a sampler's steps.

An instruction belongs to the phase that its op_name names, by `jax.named_scope`s of
`ar_jax.train.step`, `ar_jax.objectives` and `ar_jax.sampling`, by names of modules and by the marks
that differentiation leaves. What the attention among all rows takes, a part of several phases, goes
by the scope of `ar_jax.nn.splash.attend_all`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ar_jax.compilation.chips import Chip
from ar_jax.compilation.estimate import kernel_flops, kernel_of, step_seconds
from ar_jax.compilation.execution import Executed, Run
from ar_jax.compilation.exposure import Timed
from ar_jax.compilation.work import moved_bytes, product_flops

Phase = Callable[[str], str | None]  # of an op_name; None where it does not say

OTHER = "other"
ORDER = (  # then a sampler's steps by their numbers
    *("tokenizer", "forward", "head and loss", "head and loss backward", "backward", "optimizer"),
    *("prefill", "decode", "refine_backbone", "refine_head", "quantizer", "decoder"),
)
RULE = (
    "by the op_names of instructions; a fusion of several phases counts for the one that it is "
    "named by; FLOPs of matrix products and convolutions as compiled, with recomputation and "
    "padding; bytes of operands and results in HBM, an upper bound of what is moved"
)


def train_phase(op_name: str) -> str | None:
    """The phase of ORDER that an op_name of a train step says, 'tokenizer' to 'optimizer'."""
    scopes = _scopes(op_name)
    backward = "transpose(" in op_name
    if "optimizer" in scopes:
        return "optimizer"
    if "tokenizer" in scopes:
        return "tokenizer"
    if "head_and_loss" in scopes:
        return "head and loss backward" if backward else "head and loss"
    if backward:
        return "backward"
    return "forward" if "jvp(" in op_name else None


def sample_phase(op_name: str) -> str | None:
    """'prefill' and 'decode' where all steps are equal, else 'step_0', 'step_1', ...

    Of iterative refinement 'refine_backbone' and 'refine_head'.
    """
    known = r"step_\d+|prefill|decode|refine_backbone|refine_head"
    steps = (scope for scope in _scopes(op_name) if re.fullmatch(known, scope))
    return next(steps, None)


def attention_seconds(run: Run, chip: Chip, visible: float) -> float:
    """Seconds of `ar_jax.nn.splash.attend_all`, either direction, in one run on one device.

    A fusion counts where it is named by it, or, without a name, most that are fused in it are.

    Args:
        visible: share of the attention's blocks that are computed.
    """

    def within(step: Executed) -> bool:
        names = [step.instruction.op_name] if step.instruction.op_name else []
        names = names or [one.op_name for one in step.inside if one.op_name]
        return 2 * sum("attend" in _scopes(name) for name in names) > len(names)

    return sum(
        sum(step_seconds(step, chip, visible).values()) for step in run.steps if within(step)
    )


def decode_phase(op_name: str) -> str | None:
    """'quantizer' (codes to features) or 'decoder' (features to images)."""
    parts = {"quantizer": "quantizer", "autoencoder": "decoder"}  # of a tokenizer's modules
    modules = (scope.partition(".")[0] for scope in _scopes(op_name))
    return next((parts[module] for module in modules if module in parts), None)


def _scopes(op_name: str) -> list[str]:
    return re.findall(r"[\w.]+", op_name)


def phase_of(step: Executed, phase: Phase) -> str:
    """The phase of an instruction, or else of most that are fused in it, or else of its loop."""
    own = phase(step.instruction.op_name)
    if own:
        return own
    fused = Counter(filter(None, (phase(one.op_name) for one in step.inside)))
    if fused:
        return fused.most_common(1)[0][0]
    around = (phase(loop.op_name) for loop in reversed(step.loops))
    return next(filter(None, around), OTHER)


def split_into_phases(
    run: Run, phase: Phase, chip: Chip, visible: float, timed: Sequence[Timed]
) -> dict[str, dict[str, Any]]:
    """Figures of each phase of a run on one device, in the order of the traced program.

    Args:
        visible: share of the attention's blocks that are computed.
        timed: the run's collectives.

    Returns:
        {phase: figures}, of which 'other', the last, has what no other phase has. Seconds
        'compiler', 'kernels' and 'collectives_exposed' add up to those of the run. 'flops' and
        'bytes' over the chip's peak and bandwidth are 'compute' and 'bandwidth' (seconds); 'bound'
        names the larger.
    """
    exposed: Counter[int] = Counter()
    for one in timed:
        exposed[one.collective.step] += one.exposed  # type: ignore[assignment]
    sums: dict[str, dict[str, Any]] = {}
    for place, step in enumerate(run.steps):
        kernel = kernel_of(step)
        flops = product_flops(step, run.computations)
        found = {
            **step_seconds(step, chip, visible),
            "collectives_exposed": exposed[place],
            "flops": step.times * (kernel_flops(kernel, visible) if kernel else flops),
            "bytes": step.times * moved_bytes(step, run.computations),
        }
        if any(found.values()):
            row = sums.setdefault(phase_of(step, phase), dict.fromkeys(found, 0.0))
            for name, value in found.items():
                row[name] += value
    return {name: {**sums[name], **_bounds(sums[name], chip)} for name in sorted(sums, key=_place)}


def _place(name: str) -> float:
    if name in ORDER:
        return ORDER.index(name)
    return math.inf if name == OTHER else len(ORDER) + int(name.removeprefix("step_"))


def _bounds(row: dict[str, float], chip: Chip) -> dict[str, float | str]:
    bounds = {"compute": row["flops"] / chip.peak, "bandwidth": row["bytes"] / chip.bandwidth}
    return {**bounds, "bound": max(bounds, key=lambda name: bounds[name])}
