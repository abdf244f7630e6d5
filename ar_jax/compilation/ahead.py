"""A configuration's train step, compiled for a TPU topology without its hardware."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import topologies

from ar_jax.build import build_objective
from ar_jax.compilation.chips import Chip, find_chip
from ar_jax.compilation.hlo import Kernel, Totals, shape_bytes, total
from ar_jax.nn.splash import block_size, padded_mask
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.parallel.mesh import check_batch, make_mesh, use_mesh
from ar_jax.parallel.rules import path_name, shardings
from ar_jax.train.fields import EmaFields, TrainFields, call_with, matmul_precision
from ar_jax.train.optimizer import build_optimizer
from ar_jax.train.program import build_program

# Matrix products of a splash kernel, each of 2 T T K FLOPs a head: what its name says it computes.
PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
LANES = 128  # of the MXU: a head narrower than this fills only a part of it


class DoesNotFit(RuntimeError):
    """The program needs more memory than a chip has; the message says how much, and for what."""


def compile_train_step(config: ml_collections.ConfigDict, topology: str) -> dict[str, Any]:
    """What the compiler says of one train step of a generator on cached codes.

    Args:
        config: of a generator of discrete codes; the section data is not read.
        topology: 'v5e:4x4' and the like.

    Returns:
        Plain numbers: 'memory' (bytes a chip), 'seconds' (of a step, see `estimate`),
        'collectives' (see `ar_jax.compilation.hlo.Collective`), 'model_flops' and 'mfu'.

    Raises:
        DoesNotFit: see there.
        ValueError: a bad field or topology.
    """
    chip = find_chip(topology)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = call_with(make_mesh, config["mesh"], "mesh", devices=devices)
    fields = call_with(TrainFields, config["train"], "train")
    check_batch(mesh, batch_size=fields.batch_size, accumulation=fields.accumulation)
    config = ml_collections.ConfigDict(config.to_dict())
    if config.get("attention", "auto") == "auto":  # what a TPU would choose
        dropout = config.backbone.get("attention_dropout", 0.0)
        config.attention = "xla" if dropout else "splash"
    objective: Any = build_objective(config)
    system = objective.system
    program = build_program(
        objective,
        call_with(build_optimizer, config["optimizer"], "optimizer", steps=fields.steps),
        mesh,
        seed=config["seed"],
        accumulation=fields.accumulation,
        ema_decay=call_with(EmaFields, config["ema"], "ema").decay,
        place=lambda key, whole: jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
    )
    tokenizer = jax.eval_shape(lambda key: init_tokenizer(system, key), jax.random.key(0))
    frozen = {"tokenizer": jax.tree.map(_place, tokenizer, shardings(tokenizer, mesh))}
    rows, length = fields.batch_size, system.schedule.length
    batch = jax.eval_shape(lambda: system.backbone.conditioner.empty(rows))
    batch = {**batch, "codes": jax.ShapeDtypeStruct((rows, length), jnp.int32)}
    batch = jax.tree.map(lambda leaf: _place(leaf, program.rows), batch)
    with use_mesh(mesh), jax.default_matmul_precision(matmul_precision(config)):
        step: Any = program.train_step
        try:
            compiled = step.lower(program.abstract, frozen, batch, program.key).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _explain(error) from error
    flops = model_flops(program.abstract.params, system, rows)
    steps = system.backbone.row_steps
    report = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "attention": config.attention,
        "batch_size": rows,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(program.abstract.params)),
        "memory": _memory(compiled, chip),
        "model_flops": flops,
    }
    totals = total(compiled.as_text())
    seconds = estimate(totals, chip, visible_share(steps))
    mfu = flops / (len(devices) * chip.peak * seconds["total"])
    collectives = [dataclasses.asdict(c) for c in totals.collectives]
    return {**report, "seconds": seconds, "mfu": mfu, "collectives": collectives}


def _place(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _memory(compiled: Any, chip: Chip) -> dict[str, int]:
    """Bytes of one chip; the peak is what is alive together at most by the compiler's plan."""
    plan = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    found = {name: int(getattr(plan, f"{name}_size_in_bytes")) for name in names}
    peak = sum(found.values()) - 2 * found["alias"]  # aliased outputs are the arguments
    return {**found, "peak": peak, "capacity": chip.capacity}


def estimate(totals: Totals, chip: Chip, visible: float) -> dict[str, float]:
    """Seconds of one run on one device.

    'compiler' is the sum of the compiler's estimated cycles over the chip's clock; 'kernels' what
    custom kernels, of which it estimates none, take at least: each the larger of its bytes over the
    bandwidth and, for attention, its FLOPs over the peak at the part of the MXU that a head's
    width fills. Left out: waiting for collectives and for other devices, and the host.

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
    return max(by_bytes, flops / (chip.peak * min(1.0, width / LANES)))


def visible_share(steps: tuple[int, ...]) -> float:
    """Share of the attention kernel's blocks that hold a visible pair."""
    mask = padded_mask(steps)
    block = block_size(len(mask))
    count = len(mask) // block
    return float(mask.reshape(count, block, count, block).any(axis=(1, 3)).mean())


def model_flops(params: Any, system: Any, batch: int) -> float:
    """FLOPs of one train step by formula: 6 for a weight and row it multiplies, and attention's.

    Attention counts visible pairs only. Weights that act on the condition count once an image;
    tables are looked up and count nothing; recomputed activations do not count.
    """
    length, backbone = system.backbone.rows, system.backbone
    flops = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if not name.endswith("kernel"):
            continue
        rows = 1 if "modulation" in name else length
        flops += 6.0 * math.prod(leaf.shape) * batch * rows
    order = np.asarray(backbone.row_steps)
    pairs = int((order[None, :] <= order[:, None]).sum())
    return flops + 12.0 * batch * backbone.depth * backbone.width * pairs


def _explain(error: Exception) -> Exception:
    """A verdict in place of the compiler's trace where memory ran out; else the error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    amounts = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    sizes = f"needs {amounts[1]} of {amounts[2]}" if amounts else "needs more than there is"
    buffers = re.findall(r"Size: ([\d.]+\w)\n\s*(?:Operator: op_name=\"([^\"]*)\")?", text)
    largest = "; ".join(f"{size} {name}".strip() for size, name in buffers[:3])
    return DoesNotFit(
        f"does not fit: a chip's HBM {sizes}. Largest buffers: {largest or 'not named'}. Lower "
        "config.train.batch_size or raise config.train.accumulation, set "
        "config.backbone.remat='block', or split the parameters: config.mesh.data=1 and fsdp=-1"
    )
