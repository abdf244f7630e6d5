"""Scaled dot-product attention and the one visibility rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Steps = TypeVar("Steps", jax.Array, np.ndarray)


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
    logits = jax.lax.dot_general(
        rows, k, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    logits = logits.reshape(batch, heads, count, -1) * scale  # [B, H, Q, T]
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(*rows.shape[:3], -1)
    out = jax.lax.dot_general(weights, v, (((3,), (2,)), ((0, 1), (0, 1))))  # [B, G, H/G Q, K]
    return out.reshape(batch, heads, count, width).swapaxes(1, 2)


def write(rows: Array, new: Array, start: Array | int) -> Array:
    """A cache's rows [B, G, T, K] with ``new`` [B, n, G, K] from row ``start`` on."""
    new = new.swapaxes(1, 2).astype(rows.dtype)
    return jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=2)


def visibility(query_steps: Steps, key_steps: Steps) -> Steps:
    """Bool [Q, T]: key j is visible to query i iff its step is not later than the query's."""
    return key_steps[None, :] <= query_steps[:, None]
