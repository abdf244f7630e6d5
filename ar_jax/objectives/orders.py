"""Random orders of generation for training (RAR, arXiv:2411.00776)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.schedules import Schedule

Array = jax.Array


def random_share(schedule: Schedule, step: Array | int) -> Array:
    """Probability, float32 scalar, that training step ``step`` permutes a sample's codes."""
    if not schedule.random:
        return jnp.float32(0.0)
    if schedule.anneal is None:
        return jnp.float32(1.0)
    start, end = schedule.anneal
    # The difference is of integers: float32 has no room for large numbers of steps.
    past = (jnp.asarray(step, jnp.int32) - start).astype(jnp.float32)
    return 1.0 - jnp.clip(past / max(end - start, 1), 0.0, 1.0)


def draw_orders(key: Array, share: Array, batch_size: int, schedule: Schedule) -> Array:
    """Orders int32 [B, L]: ``order[b, t]`` is the cell of sample b's t-th code.

    Each sample's is a uniform permutation with probability ``share``, else the schedule's own.
    """
    length = schedule.length
    choice_key, order_key = jax.random.split(key)
    keys = jax.random.split(order_key, batch_size)
    orders = jax.vmap(lambda k: jax.random.permutation(k, length))(keys).astype(jnp.int32)
    chosen = jax.random.bernoulli(choice_key, share, (batch_size, 1))
    own = np.arange(length) if schedule.cells is None else np.asarray(schedule.cells)
    return jnp.where(chosen, orders, jnp.asarray(own, jnp.int32)[None])
