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


def visibility(query_steps: Steps, key_steps: Steps) -> Steps:
    """Bool [Q, T]: key j is visible to query i iff its step is not later than the query's."""
    return key_steps[None, :] <= query_steps[:, None]
