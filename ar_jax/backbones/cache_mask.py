"""Which rows of a cache the rows of a decode step see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.attention import visibility

Array = jax.Array


def cache_mask(
    steps: tuple[int, ...], real: Array | None, first: Array | int, count: int, *, newest: bool
) -> Array | None:
    """Bool, broadcastable to [B, H, count, T]; None if all is visible.

    Args:
        steps: of the T rows; with a static ``first`` only those up to the last query are keys.
        real: bool [B, T], False for padding.
        first: row of the first query.
        count: queries.
        newest: the queries are all rows of one step, which sees everything up to its own end.
    """
    rows = np.asarray(steps, np.int32)
    keys = jnp.asarray(rows[: first + count] if isinstance(first, int) else rows)
    queries = jax.lax.dynamic_slice_in_dim(jnp.asarray(rows), first, count)
    mask = None if newest else visibility(queries, keys)[None, None]
    if real is None:
        return mask
    # A padded row still sees itself, so that no softmax is empty.
    itself = (jnp.arange(len(keys))[None] == (first + jnp.arange(count))[:, None])[None, None]
    seen = real[:, None, None, : len(keys)] | itself
    return seen if mask is None else mask & seen
