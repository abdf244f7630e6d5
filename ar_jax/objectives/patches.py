"""Coarse to fine in training: windows of codes as one, then codes (Next Patch Prediction).

In a stage of patches of p x p codes the sequence has a row for every such window. It is fed the
mean of the embedded codes of the window before, turns by its place in the grid of windows, and its
one distribution is for each of its window's codes. There are no parameters beside the model's own,
and sampling is that of single codes. A stage costs 1 / p^2 of the rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import schedules
from ar_jax.api import Array, Cond, Params, System
from ar_jax.schedules import window_order

Patches = tuple[tuple[int, int], ...]  # (p, the training step at which its stage ends)


def check_patches(patches: Patches, system: System) -> None:
    """config.objective.patches goes with config.schedule and config.backbone.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    if not patches:
        return
    schedule, backbone = system.schedule, system.backbone
    rope = getattr(backbone, "positions", None) == "rope"
    if (schedule.name, schedule.window) != ("raster", (1, 1)) or not rope:
        raise ValueError(
            f"objective.patches is {patches}, which needs schedule.name='raster' of single codes "
            f"and a backbone of positions='rope', not {schedule.name!r} and "
            f"{getattr(backbone, 'positions', None)!r} with windows {schedule.window}"
        )
    ends = [end for _, end in patches]
    if ends != sorted(set(ends)) or ends[0] < 1:
        raise ValueError(
            f"objective.patches is {patches}; the steps at which stages end must increase"
        )
    for side, _ in patches:
        if side < 2 or any(length % side for length in schedule.grids[0]):
            raise ValueError(
                f"objective.patches has windows of {side} x {side} codes; their side must be at "
                f"least 2 and divide the grid {schedule.grids[0]}"
            )


def patch_logits(
    system: System, params: Params, codes: Array, cond: Cond, side: int, rngs: Any
) -> Array:
    """Logits float32 [B, L, V] of all codes: of the window that each is in.

    Args:
        codes: int32 [B, L].
        rngs: of dropout; None: not in training.
    """
    grid = system.schedule.grids[0]
    windows = window_order(grid, (side, side))
    schedule = schedules.raster(grid=(grid[0] // side, grid[1] // side))
    hidden, _ = system.backbone.clone(schedule=schedule).apply(
        {"params": params["backbone"]},
        codes[:, windows[:-1]],  # [B, windows - 1, side^2]
        cond,
        train=rngs is not None,
        rngs=rngs,
    )
    logits = system.head.apply({"params": params["head"]}, hidden)  # [B, windows, V]
    of_cell = np.argsort(windows.reshape(-1)) // side**2
    return jnp.take(logits, jnp.asarray(of_cell), axis=1)


def stage_of(patches: Patches, step: Array | int) -> Array:
    """Which stage a training step is in, int32; ``len(patches)``: that of single codes."""
    ends = jnp.asarray([end for _, end in patches], jnp.int32)
    return (jnp.asarray(step, jnp.int32) >= ends).sum()


def staged_logits(
    system: System,
    params: Params,
    codes: Array,
    cond: Cond,
    rngs: Any,
    *,
    patches: Patches,
    step: Array | int,
    single: Any,
) -> Array:
    """`patch_logits` of the step's stage, or ``single()`` after the last one."""

    def stage(side: int) -> Any:
        return lambda: patch_logits(system, params, codes, cond, side, rngs)

    return jax.lax.switch(stage_of(patches, step), [*(stage(p) for p, _ in patches), single])
