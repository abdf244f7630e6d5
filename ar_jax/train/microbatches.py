"""What is computed of a batch in parts, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ar_jax.api import Batch
from ar_jax.parallel.mesh import batch_axes

Array = jax.Array
# (of which means are taken, sums, the last one's) of a microbatch, or of all of them.
Parts = tuple[Any, Any, Any]


def over_microbatches(
    part: Callable[[Array | int, Batch], Parts], batch: Batch, accumulation: int
) -> Parts:
    """(means, sums, the last one's value) of what ``part`` makes of (number, microbatch).

    Microbatch i holds the rows i, i + accumulation, ...: a device's rows are contiguous in the
    batch, so each microbatch takes its share of every device and no row moves.
    """
    if accumulation == 1:
        return part(0, batch)

    def split(rows: Array) -> Array:  # [B, ...] -> [accumulation, B / accumulation, ...]
        rows = rows.reshape(-1, accumulation, *rows.shape[1:]).swapaxes(0, 1)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return rows
        return jax.lax.with_sharding_constraint(rows, P(None, batch_axes(mesh)))

    micros = jax.tree.map(split, batch)

    def body(carry: Any, inputs: tuple[Array, Batch]) -> tuple[Any, None]:
        means, sums, last = part(*inputs)
        with jax.named_scope("optimizer"):
            return (*jax.tree.map(jnp.add, carry[:2], (means, sums)), last), None

    first = jax.tree.map(lambda rows: rows[0], micros)
    shapes = jax.eval_shape(part, 0, first)
    carry = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (means, sums, last), _ = jax.lax.scan(body, carry, (jnp.arange(accumulation), micros))
    return jax.tree.map(lambda x: x / accumulation, means), sums, last
