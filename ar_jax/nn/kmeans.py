"""k-means in one program: the start of a codebook, and codes of given features."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ar_jax.nn.quantize import nearest, normalise

Array = jax.Array

CHUNK = 4096  # rows whose distances to all centres are in memory at a time


@functools.partial(jax.jit, static_argnames=("count", "iterations", "l2_norm"))
def kmeans(
    points: Array, count: int, key: Array, *, iterations: int = 10, l2_norm: bool = False
) -> Array:
    """Centres [count, C] of points float32 [N, C], N >= count, by Lloyd's iterations.

    They start at different rows, drawn from the key. A centre without points stays where it is.
    With ``l2_norm`` points and centres are unit vectors.
    """
    points = normalise(points, l2_norm)
    rows = jax.random.choice(key, len(points), (count,), replace=False)

    def improve(_: Array | int, centres: Array) -> Array:
        index = assign(points, centres)
        sums = jnp.zeros_like(centres).at[index].add(points)
        counts = jnp.zeros((count,)).at[index].add(1.0)[:, None]
        moved = normalise(sums / counts.clip(min=1.0), l2_norm)
        return jnp.where(counts > 0, moved, centres)

    return jax.lax.fori_loop(0, iterations, improve, points[rows])


def assign(points: Array, centres: Array) -> Array:
    """int32 [N], the nearest centre of every point [N, C]."""
    if len(points) <= CHUNK:
        return nearest(points, centres)
    return jax.lax.map(lambda z: nearest(z[None], centres)[0], points, batch_size=CHUNK)
