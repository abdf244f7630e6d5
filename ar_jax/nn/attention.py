"""Scaled dot-product attention and the one visibility rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Array = jax.Array
Steps = TypeVar("Steps", jax.Array, np.ndarray)

SUBLANES = 8  # rows of a TPU's vector register


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None,
    scale: float,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Softmax attention with float32 logits and softmax.

    Args:
        q: queries [B, Q, H, K].
        k: keys [B, T, H, K].
        v: values [B, T, H, K].
        mask: bool, broadcastable to [B, H, Q, T], True where visible; None means all.
        scale: factor on the dot products.
        dropout: applied to the softmax's weights [B, H, Q, T].

    Returns:
        [B, Q, H, K] in the dtype of ``v``.
    """
    logits = jnp.einsum("bqhk,bthk->bhqt", q, k, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("bhqt,bthk->bqhk", weights, v)


def attend_cache(q: Array, k: Array, v: Array, *, mask: Array | None, scale: float) -> Array:
    """`attend` to a cache's rows, which lie head after head: a step reads them without a copy.

    Args:
        q: queries [B, Q, H, K].
        k, v: keys and values [B, G, T, K], each head of which serves H / G of queries.
        mask: bool, broadcastable to [B, H, Q, T], True where visible; None means all.
        scale: factor on the dot products.

    Returns:
        [B, Q, H, K] in the dtype of ``v``.
    """
    batch, count, heads, width = q.shape
    rows = q.swapaxes(1, 2).reshape(batch, k.shape[1], -1, width)  # [B, G, H/G Q, K]
    # Queries first: `einsum` puts the keys first, and then turns the logits in memory.
    logits = _head_products(rows, k, over=3, dtype=jnp.float32)
    logits = logits.reshape(batch, heads, count, -1) * scale  # [B, H, Q, T]
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(*rows.shape[:3], -1)
    out = _head_products(weights, v, over=2, dtype=v.dtype)  # [B, G, H/G Q, K]
    return out.reshape(batch, heads, count, width).swapaxes(1, 2)


def _head_products(rows: Array, cached: Array, *, over: int, dtype: DTypeLike) -> Array:
    """Products of rows [B, G, R, N] and, over its axis ``over`` of size N, a cache [B, G, .., ..].

    A TPU's compiler multiplies few rows number by number on the vector unit, where arithmetic
    bounds it and not the cache's bytes: there they go as `filled_products`.
    """
    plain = functools.partial(plain_products, over=over, dtype=dtype)
    if rows.shape[2] >= SUBLANES:
        return plain(rows, cached)
    filled = functools.partial(filled_products, over=over, dtype=dtype)
    return jax.lax.platform_dependent(rows, cached, tpu=filled, default=plain)


def plain_products(rows: Array, cached: Array, *, over: int, dtype: DTypeLike) -> Array:
    """[B, G, R, M]; the cache is [B, G, M, N] where ``over`` is 3, [B, G, N, M] where it is 2."""
    dimensions = (((3,), (over,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(rows, cached, dimensions, preferred_element_type=dtype)


def filled_products(rows: Array, cached: Array, *, over: int, dtype: DTypeLike) -> Array:
    """`plain_products` with rows of zeros up to a register's, which a TPU's matrix unit takes."""
    spare = SUBLANES - rows.shape[2]
    filled = jnp.pad(rows, ((0, 0), (0, 0), (0, spare), (0, 0)))
    return plain_products(filled, cached, over=over, dtype=dtype)[:, :, : rows.shape[2]]


def write(rows: Array, new: Array, start: Array | int) -> Array:
    """A cache's rows [B, G, T, K] with ``new`` [B, n, G, K] from row ``start`` on."""
    new = new.swapaxes(1, 2).astype(rows.dtype)
    return jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=2)


def visibility(query_steps: Steps, key_steps: Steps) -> Steps:
    """Bool [Q, T]: key j is visible to query i iff its step is not later than the query's."""
    return key_steps[None, :] <= query_steps[:, None]
