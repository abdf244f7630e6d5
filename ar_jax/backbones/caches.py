"""Empty caches of decoders."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Array, Cache
from ar_jax.nn.splash import LANES


def empty_cache(
    batch_size: int,
    rows: int,
    layers: int,
    heads: int,
    head_width: int,
    dtype: DTypeLike,
    *,
    largest: int = 0,
) -> Cache:
    """Zeros in the compute dtype, their samples and heads divided over the mesh.

    Args:
        largest: rows of the largest step. If the kernel of `ar_jax.nn.splash.attend_newest` takes
            it, there are as many rows more as fill its blocks, which nothing sees.
    """
    spare = -rows % LANES if largest >= LANES else 0
    shape = (batch_size, heads, rows + spare, head_width)

    def empty() -> Array:
        zeros = nn.with_logical_constraint(jnp.zeros(shape, dtype), ("batch", "heads", None, None))
        # A first write known to the compiler would become padding, which a TPU is slow at.
        return jax.lax.optimization_barrier(zeros)

    k, v = (tuple(empty() for _ in range(layers)) for _ in range(2))
    return Cache(k=k, v=v)
