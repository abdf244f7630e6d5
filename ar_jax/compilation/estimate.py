"""Seconds, model FLOPs and rooflines, from what a compiled program does."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from ar_jax.compilation.chips import Chip
from ar_jax.compilation.execution import Executed, Run
from ar_jax.compilation.exposure import RULE as COLLECTIVES
from ar_jax.compilation.exposure import Timed
from ar_jax.compilation.hlo import Shape, shape_bytes
from ar_jax.nn.splash import block_size, padded_mask, visible_rows
from ar_jax.parallel.rules import path_name

# Matrix products of a splash kernel, each of 2 Q T K FLOPs a head: what its name says it computes.
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}

METHOD = (
    "sum of the compiler's estimated_cycles of every executed instruction, times the trip counts "
    "of the loops around it, over the chip's clock; custom kernels, which carry none, by the "
    "larger of bytes over bandwidth and FLOPs over peak; collectives, which carry none either, "
    f"apart: {COLLECTIVES}"
)
LEFT_OUT = (
    "what collectives and custom kernels take beyond those bounds (latency, links that are not "
    "there or shared) and waiting for slower chips; the host, input and checkpoints; a clock below "
    "its nominal rate"
)
FLOPS_RULE = (
    "matrix products of backbone and head: 2 FLOPs a weight and row forward, twice that backward; "
    "attention by visible pairs only; recomputation, tokenizer and padding rows count nothing"
)


def left_out(run: Run) -> str:
    """What is not in the seconds of a program, in words."""
    if not run.unknown_loops:
        return LEFT_OUT
    return f"{LEFT_OUT}; all turns but one of {run.unknown_loops} loops that end by their data"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom kernel: its name and the shapes of operands and results."""

    name: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


def kernel_of(step: Executed) -> Kernel | None:
    """The custom kernel that an instruction calls."""
    instruction = step.instruction
    if instruction.opcode != "custom-call" or "tpu_custom_call" not in instruction.line:
        return None
    operands = tuple(shape for one in step.operands for shape in one.shapes)
    return Kernel(instruction.name, operands, instruction.shapes)


def kernel_flops(kernel: Kernel, visible: float) -> float:
    """FLOPs of one call, if it is of attention; 0 for others."""
    products = next((n for name, n in PRODUCTS.items() if kernel.name.startswith(name)), 0)
    heads = [dims for _, dims in kernel.operands if len(dims) == 4]
    if not products or len(heads) < 2:
        return 0.0
    batch, count, rows, width = heads[0]
    keys = math.prod(heads[1]) // (batch * count * width)  # of as many heads, in either layout
    return products * 2 * batch * count * rows * keys * width * visible


def kernel_seconds(kernel: Kernel, chip: Chip, visible: float) -> float:
    """What one call takes at least: bytes over bandwidth or FLOPs over peak.

    Of the peak, as much as a head's width fills of the MXU.
    """
    moved = sum(shape_bytes(shape) for shape in kernel.operands + kernel.results)
    flops = kernel_flops(kernel, visible)
    if not flops:
        return moved / chip.bandwidth
    width = next(dims[3] for _, dims in kernel.operands if len(dims) == 4)
    return max(moved / chip.bandwidth, flops / (chip.peak * min(1.0, width / chip.mxu)))


def step_seconds(step: Executed, chip: Chip, visible: float) -> dict[str, float]:
    """'compiler' and 'kernels' of all executions of one instruction."""
    kernel = kernel_of(step)
    bound = step.times * kernel_seconds(kernel, chip, visible) if kernel else 0.0
    return {"compiler": step.cycles / chip.clock, "kernels": bound}


def estimate(run: Run, chip: Chip, visible: float, timed: Sequence[Timed]) -> dict[str, float]:
    """Seconds of one run on one device.

    'compiler' is the sum of the compiler's estimated cycles over the chip's clock; 'kernels' what
    custom kernels, of which it estimates none, take at least (see `kernel_seconds`); 'total' their
    sum. 'collectives_exposed' and 'collectives_overlapped' are lower bounds of what is not and what
    is hidden by those, 'with_collectives' is the total with what is not. For what is in none of
    them see `left_out`.

    Args:
        visible: share of the attention's blocks that are computed.
        timed: the run's collectives.
    """
    compiler = run.cycles / chip.clock
    kernels = sum(step_seconds(step, chip, visible)["kernels"] for step in run.steps)
    total = compiler + kernels
    exposed = sum(one.exposed for one in timed)
    return {
        "compiler": compiler,
        "kernels": kernels,
        "total": total,
        "collectives_exposed": exposed,
        "collectives_overlapped": sum(one.overlapped for one in timed),
        "with_collectives": total + exposed,
    }


def visible_share(steps: tuple[int, ...]) -> float:
    """Share of the attention kernel's blocks that hold a visible pair."""
    mask = padded_mask(steps)
    block = block_size(len(mask))
    count = len(mask) // block
    return float(mask.reshape(count, block, count, block).any(axis=(1, 3)).mean())


# Kernels that act on the rows of a text, and not on those of the sequence.
TEXT = re.compile("(^|/)(reader/|cross_attention/(key|value)/)")
# Kernels that act on codes where a row stands for several.
CODES = re.compile("(^|/)(head|reduce|restore)/")


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
            if TEXT.search(name):
                rows = backbone.caption_length
            if CODES.search(name):
                rows *= getattr(backbone, "merged", 1)
            flops += 2.0 * math.prod(leaf.shape) * batch * rows
    pairs = int(visible_rows(backbone.row_steps).sum())
    if hasattr(backbone, "text_pairs"):
        pairs += backbone.text_pairs
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
