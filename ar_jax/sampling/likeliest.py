"""The likeliest maps of codes that are drawn in one step, exactly."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_jax.api import Array


def likeliest_maps(logits: Array, free: Array, count: int) -> tuple[Array, Array]:
    """The likeliest maps of codes that are independent of each other, exactly, the best first.

    Position after position only the best C of all beginnings can go on to one of the best C maps,
    each by one of that position's best C codes.

    Args:
        logits: [R, n, V], or of bits [R, n, bits, 2]; -inf where a code is removed.
        free: bool [R, n]; others are padding or known, and are 0.
        count: C.

    Returns:
        (int32 [R C, n] or int8 [R C, n, bits]; bool [R C], False where there are fewer maps)
    """
    rows, shape = len(logits), logits.shape[1:-1]
    log_p = jax.nn.log_softmax(logits, axis=-1)
    only = jnp.zeros_like(log_p).at[..., 1:].set(-jnp.inf)
    mask = free.reshape(*free.shape, *(1,) * (logits.ndim - 2))
    flat = jnp.where(mask, log_p, only).reshape(rows, -1, logits.shape[-1])  # [R, N, V]
    values, best = jax.lax.top_k(flat, min(count, flat.shape[-1]))  # [R, N, M]

    def extend(total: Array, values: Array) -> tuple[Array, tuple[Array, Array]]:
        """[R, C] of the beginnings, [R, M] of the position's codes -> (parent, code's rank)."""
        ways = (total[:, :, None] + values[:, None]).reshape(rows, -1)
        total, chosen = jax.lax.top_k(ways, count)
        return total, (chosen // values.shape[-1], chosen % values.shape[-1])

    start = jnp.zeros((rows, count)).at[:, 1:].set(-jnp.inf)
    total, (parents, ranks) = jax.lax.scan(extend, start, jnp.moveaxis(values, 1, 0))

    def trace(at: Array, position: tuple) -> tuple[Array, Array]:
        parents, ranks, best = position  # [R, C], [R, C], [R, M]
        rank = jnp.take_along_axis(ranks, at, axis=1)
        return jnp.take_along_axis(parents, at, axis=1), jnp.take_along_axis(best, rank, axis=1)

    ends = jnp.broadcast_to(jnp.arange(count), (rows, count))
    traced = (parents, ranks, jnp.moveaxis(best, 1, 0))
    _, codes = jax.lax.scan(trace, ends, traced, reverse=True)  # [N, R, C]
    codes = jnp.moveaxis(codes, 0, -1).reshape(rows * count, *shape)
    codes = codes.astype(jnp.int8 if len(shape) > 1 else jnp.int32)
    return codes, (total > -jnp.inf).reshape(-1)
