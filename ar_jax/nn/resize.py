"""Separable resampling of grids as matrix products: torch's area, bilinear and bicubic, exactly.

`jax.image.resize` has another bicubic kernel and antialiases; the residual quantisers of VAR and
Infinity were trained with torch's.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.schedules import Grid

Array = jax.Array


@functools.cache
def area_matrix(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: adaptive average pooling, windows overlapping where they must."""
    matrix = np.zeros((target, source))
    for i in range(target):
        first, last = i * source // target, math.ceil((i + 1) * source / target)
        matrix[i, first:last] = 1 / (last - first)
    return matrix.astype(np.float32)


@functools.cache
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: Keys' kernel with a = -0.75, half-pixel centres, clamped edges."""

    def kernel(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        base = math.floor(centre)
        for tap in range(base - 1, base + 3):
            matrix[i, min(max(tap, 0), source - 1)] += kernel(centre - tap)
    return matrix.astype(np.float32)


@functools.cache
def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """float32 [target, source]: half-pixel centres, clamped edges, never antialiased."""
    matrix = np.zeros((target, source))
    for i in range(target):
        centre = max((i + 0.5) * source / target - 0.5, 0.0)
        base = min(math.floor(centre), source - 1)
        matrix[i, base] += 1 - (centre - base)
        matrix[i, min(base + 1, source - 1)] += centre - base
    return matrix.astype(np.float32)


def _resample(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    return jnp.einsum("ih,jw,bhwc->bijc", jnp.asarray(rows), jnp.asarray(columns), x)


def shrink(x: Array, grid: Grid) -> Array:
    """Area-resamples float32 [B, h, w, C] to ``grid``; the identity if the grid is its own."""
    if x.shape[1:3] == tuple(grid):
        return x
    return _resample(x, area_matrix(x.shape[1], grid[0]), area_matrix(x.shape[2], grid[1]))


def enlarge(x: Array, grid: Grid) -> Array:
    """Bicubically resamples float32 [B, h, w, C] to ``grid``; the identity if it is its own."""
    if x.shape[1:3] == tuple(grid):
        return x
    return _resample(x, bicubic_matrix(x.shape[1], grid[0]), bicubic_matrix(x.shape[2], grid[1]))


def interpolate(x: Array, grid: Grid) -> Array:
    """Bilinearly resamples float32 [B, h, w, C] to ``grid``; the identity if it is its own."""
    if x.shape[1:3] == tuple(grid):
        return x
    return _resample(x, bilinear_matrix(x.shape[1], grid[0]), bilinear_matrix(x.shape[2], grid[1]))
