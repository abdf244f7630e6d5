"""What a sampling step takes at least on the machine that runs it: arithmetic and memory traffic.

Two floors: the FLOPs of a step's products over the rate of a large float32 product, and the bytes
of weights and cache that it reads over the bandwidth of memory. No step is faster than the larger
of them; both rates are measured, by `measure_rates`, where and when the step is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cache, Cond, Params
from ar_jax.compilation.products import count_products

SIDE = 2048  # of the product: 17 GFLOP
BYTES = 2**28  # that are read


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of a machine."""

    flops: float  # a second, of a large float32 matrix product
    bytes: float  # a second, read

    def floors(self, work: Work) -> dict[str, float]:
        """Seconds at least: 'flops', 'bytes', and 'floor', the larger."""
        flops, moved = work.flops / self.flops, work.bytes / self.bytes
        return {"flops": flops, "bytes": moved, "floor": max(flops, moved)}


@dataclasses.dataclass(frozen=True)
class Work:
    """Of a step, or of all."""

    flops: float
    bytes: float


def measure_rates(repeats: int = 3) -> Rates:
    """Of the default device and the threads that this process has: the best of some repeats."""
    square = jnp.ones((SIDE, SIDE), jnp.float32)
    rows = jnp.ones((BYTES // 4 // 2**14, 2**14), jnp.float32)
    product = _seconds(_product, (square, square), repeats)
    read = min(
        _seconds(_row_sums, (rows,), repeats),
        _seconds(_product, (jnp.ones((1, len(rows)), jnp.float32), rows), repeats),
    )
    return Rates(flops=2.0 * SIDE**3 / product, bytes=rows.nbytes / read)


@jax.jit
def _product(a: Array, b: Array) -> Array:
    return a @ b


@jax.jit
def _row_sums(a: Array) -> Array:
    return a.sum(1)


def _seconds(function: Callable[..., Any], arguments: tuple, repeats: int) -> float:
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - start)
    return best


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a `CachedSampler`'s backbone and head, without the draw: to count and to time."""

    run: Callable[..., tuple[Array, Cache]]  # (params, context, cond, cache) -> (logits, cache)
    context: jax.ShapeDtypeStruct | None
    cache: Cache  # of shapes, only as many rows as the step sees
    work: Work


def sampling_step(sampler: Any, cond: Cond, index: int, *, guided: bool) -> Step:
    """The step ``index`` of an image batch; with guidance both halves are one batch of 2 B.

    Bytes are the kernels of backbone and head and the cache's rows that are visible; tables, of
    which a step reads a few rows, and activations count nothing.

    Args:
        sampler: a `ar_jax.sampling.loop.CachedSampler`.
        cond: [B].
        index: below the schedule's number of steps.
        guided: whether there is a null half.
    """
    system, schedule = sampler.system, sampler.system.schedule
    if guided:
        null = system.backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    rows = len(jax.tree.leaves(cond)[0])
    whole = jax.eval_shape(lambda: system.backbone.init_cache(rows))
    context, seen = None, schedule.starts[index] + schedule.sizes[index]
    if index:
        tokenizer = system.tokenizer
        fed = jax.eval_shape(
            lambda params, codes: tokenizer.apply({"params": params}, codes, method="contexts"),
            sampler.params["tokenizer"],
            jax.ShapeDtypeStruct((rows, *tokenizer.codes_shape), tokenizer.codes_dtype),
        )
        shape = (rows, schedule.sizes[index], *fed.shape[2:])
        context = jax.ShapeDtypeStruct(shape, fed.dtype)

    def run(params: Params, context: Any, cond: Cond, cache: Cache) -> tuple[Array, Cache]:
        hidden, cache = system.backbone.apply(
            {"params": params["backbone"]}, context, cond, step=index, cache=cache
        )
        return system.head.apply({"params": params["head"]}, hidden), cache

    unseen = schedule.length - seen

    def visible(rows: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        held = min(rows.shape[2], system.backbone.rows) - unseen  # some only fill a kernel's blocks
        return jax.ShapeDtypeStruct((*rows.shape[:2], held, rows.shape[3]), rows.dtype)

    cache = jax.tree.map(visible, whole)
    flops = count_products(run, sampler.params, context, cond, cache)
    moved = weight_bytes(sampler.params) + cache_bytes(cache)
    return Step(run=run, context=context, cache=cache, work=Work(flops, moved))


def sampling_work(sampler: Any, cond: Cond, *, guided: bool) -> Work:
    """Of all steps; of steps of one size, the middle one's times their number."""
    sizes = sampler.system.schedule.sizes
    numbers, times = range(len(sizes)), 1
    if len(set(sizes)) == 1:
        numbers, times = range(len(sizes) // 2, len(sizes) // 2 + 1), len(sizes)
    works = [sampling_step(sampler, cond, number, guided=guided).work for number in numbers]
    return Work(times * sum(w.flops for w in works), times * sum(w.bytes for w in works))


def weight_bytes(params: Params) -> int:
    """Of the kernels of backbone and head, whatever they are held in."""
    leaves = jax.tree.leaves_with_path({part: params[part] for part in ("backbone", "head")})
    named = [([getattr(key, "key", None) for key in path], leaf) for path, leaf in leaves]
    return sum(leaf.nbytes for names, leaf in named if "kernel" in names)


def cache_bytes(cache: Cache) -> int:
    """2 x layers x B x H x T x K numbers, B twice the images with guidance; arrays or shapes.

    T is filled up to a multiple of 128 where a step has as many rows, see `empty_cache`.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def activation_bytes(system: Any, rows: int) -> int:
    """Of a `ar_jax.sampling.loop.CachedSampler`'s largest step, at least, in float32.

    4 R n (4 D + 3 V + 2 M) + 8 R H n T for R rows of the batch, twice the images with guidance, n
    codes of the largest step, T rows of the sequence: residual, queries, keys and values of width
    D, logits as they are, filtered and with noise, hidden layers of width M as products and
    activated; attention's logits and weights. Of a sampler's program the whole peak is to be no
    more than this, the weights and `cache_bytes`, and a fifth.
    """
    backbone, size = system.backbone, max(system.schedule.sizes)
    hidden = backbone.mlp_hidden or 4 * backbone.width
    wide = 4 * backbone.width + 3 * system.head.vocab_size + 2 * hidden
    return 4 * rows * size * wide + 8 * rows * backbone.heads * size * backbone.rows
