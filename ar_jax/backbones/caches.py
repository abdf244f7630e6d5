"""Empty caches of decoders."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Array, Cache


def empty_cache(
    batch_size: int, rows: int, layers: int, heads: int, head_width: int, dtype: DTypeLike
) -> Cache:
    """Zeros in the compute dtype, their samples and heads divided over the mesh."""

    def empty() -> tuple[Array, ...]:
        shape, axes = (batch_size, heads, rows, head_width), ("batch", "heads", None, None)
        return tuple(
            nn.with_logical_constraint(jnp.zeros(shape, dtype), axes) for _ in range(layers)
        )

    return Cache(k=empty(), v=empty())
