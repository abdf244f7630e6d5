"""Seconds, model FLOPs and rooflines, from what a compiled program does."""

from __future__ import annotations

import math
from typing import Any

import jax

from ar_jax.compilation.chips import Chip
from ar_jax.compilation.hlo import Kernel, Totals, shape_bytes
from ar_jax.nn.splash import block_size, padded_mask, visible_rows
from ar_jax.parallel.rules import path_name

# Matrix products of a splash kernel, each of 2 T T K FLOPs a head: what its name says it computes.
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

METHOD = (
    "sum of the compiler's estimated_cycles of every executed instruction, times the trip counts "
    "of the loops around it, over the chip's clock; custom kernels, which carry none, by the "
    "larger of bytes over bandwidth and FLOPs over peak"
)
LEFT_OUT = (
    "all collectives (they carry no cycles; exposed and hidden are not told apart) and waiting for "
    "slower chips; the host, input and checkpoints; what custom kernels take beyond that bound; a "
    "clock below its nominal rate"
)
FLOPS_RULE = (
    "matrix products of backbone and head: 2 FLOPs a weight and row forward, twice that backward; "
    "attention by visible pairs only; recomputation, tokenizer and padding rows count nothing"
)


def left_out(totals: Totals) -> str:
    """What is not in the seconds of a program, in words."""
    if not totals.unknown_loops:
        return LEFT_OUT
    return f"{LEFT_OUT}; all turns but one of {totals.unknown_loops} loops that end by their data"


def estimate(totals: Totals, chip: Chip, visible: float) -> dict[str, float]:
    """Seconds of one run on one device.

    'compiler' is the sum of the compiler's estimated cycles over the chip's clock; 'kernels' what
    custom kernels, of which it estimates none, take at least: each the larger of its bytes over the
    bandwidth and, for attention, its FLOPs over the peak at the part of the MXU that a head's
    width fills. For what is not in it see `left_out`.

    Args:
        visible: share of the attention's blocks that are computed.
    """
    compiler = totals.cycles / chip.clock
    kernels = sum(k.count * _kernel_seconds(k, chip, visible) for k in totals.kernels)
    return {"compiler": compiler, "kernels": kernels, "total": compiler + kernels}


def _kernel_seconds(kernel: Kernel, chip: Chip, visible: float) -> float:
    moved = sum(shape_bytes(shape) for shape in kernel.operands + kernel.results)
    by_bytes = moved / chip.bandwidth
    products = next((n for name, n in PRODUCTS.items() if kernel.name.startswith(name)), 0)
    heads = [dims for _, dims in kernel.operands if len(dims) == 4]
    if not products or not heads:
        return by_bytes
    batch, count, rows, width = heads[0]
    flops = products * 2 * batch * count * rows * rows * width * visible
    return max(by_bytes, flops / (chip.peak * min(1.0, width / chip.mxu)))


def visible_share(steps: tuple[int, ...]) -> float:
    """Share of the attention kernel's blocks that hold a visible pair."""
    mask = padded_mask(steps)
    block = block_size(len(mask))
    count = len(mask) // block
    return float(mask.reshape(count, block, count, block).any(axis=(1, 3)).mean())


def model_flops(params: Any, system: Any, batch: int, *, passes: int = 3) -> float:
    """FLOPs of one run over ``batch`` images by formula; see `FLOPS_RULE`.

    Weights that act on the condition count once an image; tables are looked up and count nothing.

    Args:
        params: of backbone and head, stacked or not.
        passes: forwards' worth of work: 3 to train, 1 to sample, 2 to sample with guidance.
    """
    backbone = system.backbone
    flops = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name.endswith("kernel"):
            rows = 1 if "modulation" in name else backbone.rows
            flops += 2.0 * math.prod(leaf.shape) * batch * rows
    pairs = int(visible_rows(backbone.row_steps).sum())
    return passes * (flops + 4.0 * batch * backbone.depth * backbone.width * pairs)


def rooflines(
    flops: float, memory: dict[str, int], chip: Chip, devices: int
) -> dict[str, float | str]:
    """Lower bounds of one run in seconds, and which of them is the higher.

    Args:
        flops: of the model, over all devices.
        memory: 'argument' and 'output', bytes on one device.

    Returns:
        'compute': every device at its peak; 'bandwidth': every argument read and every output
        written once; 'bound': the name of the larger.
    """
    bounds = {
        "compute": flops / (devices * chip.peak),
        "bandwidth": (memory["argument"] + memory["output"]) / chip.bandwidth,
    }
    return {**bounds, "bound": max(bounds, key=lambda name: bounds[name])}
