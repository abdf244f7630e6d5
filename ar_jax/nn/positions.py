"""Rotary position embedding over two-dimensional grids (RoPE, arXiv:2104.09864, as in LlamaGen)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def rope_2d(coords: np.ndarray, head_width: int, base: float = 10_000.0) -> np.ndarray:
    """Rotation table of grid cells.

    The first half of the K/2 feature pairs turns with the row, the second half with the column,
    both with frequencies ``base ** (-2 j / (K / 2))``.

    Args:
        coords: int [N, 2], row and column of each cell.
        head_width: K, a multiple of 4.

    Returns:
        float32 [N, K/2, 2], the cosine and the sine of each pair's angle.
    """
    if head_width % 4:
        raise ValueError(f"2-D RoPE needs a head width that is a multiple of 4, not {head_width}")
    half = head_width // 2
    frequencies = 1.0 / base ** (np.arange(0, half, 2, dtype=np.float32) / half)  # [K/4]
    angles = coords[:, :, None].astype(np.float32) * frequencies.astype(np.float32)  # [N, 2, K/4]
    angles = angles.reshape(len(coords), half)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def rotate(x: Array, table: Array) -> Array:
    """Rotates interleaved feature pairs (0, 1), (2, 3), ... in float32.

    Args:
        x: [B, N, H, K].
        table: [N, K/2, 2] or, for samples of their own, [B, N, K/2, 2] from `rope_2d`; a row of
            zeros makes the vector zero, which is what LlamaGen does to its condition rows.
    """
    return jax.lax.platform_dependent(x, table, tpu=rotate_by_product, default=rotate_pairs)


def rotate_pairs(x: Array, table: Array) -> Array:
    """`rotate` with the two of each pair apart, twice as fast on CPUs as by a product."""
    table = _by_sample(table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # [B, N, H, K/2, 2]
    cos, sin = table[:, :, None, :, 0], table[:, :, None, :, 1]  # [B or 1, N, 1, K/2]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_by_product(x: Array, table: Array) -> Array:
    """`rotate` by a quarter turn of every pair as a product with a matrix.

    An axis of two, as pairs apart have it, would leave nearly all of a TPU's 128 lanes empty.
    """
    table = _by_sample(table)
    quarter = jnp.asarray(np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]), x.dtype)  # [K, K]
    turned = jnp.einsum(
        "bnhk,bkj->bnhj",  # by sample, as rematerialisation 'dots' keeps products by weights only
        x,
        jnp.broadcast_to(quarter, (len(x), *quarter.shape)),
        precision="highest",  # each result is one of the operands, exactly
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.repeat(table[..., i], 2, axis=-1)[:, :, None] for i in (0, 1))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _by_sample(table: Array) -> Array:
    """[B or 1, N, K/2, 2]."""
    return table if table.ndim == 4 else table[None]
