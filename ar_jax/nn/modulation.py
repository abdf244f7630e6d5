"""Adaptive norms: a condition becomes the shifts, scales and gates of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


def modulation_init(std: float, gate: float, rest: float) -> Callable[..., Array]:
    """Normal initialiser for [..., 6, D] whose first two vectors, the gates, start near zero."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        factors = jnp.array([gate, gate, rest, rest, rest, rest], dtype)
        factors = jnp.broadcast_to(factors[:, None], shape)
        return jax.random.normal(key, shape, dtype) * std * factors

    return init


class Modulation(nn.Module, kw_only=True):
    """SiLU then a linear layer: conditions [B, R, D] to float32 vectors [B, R, n, D]."""

    vectors: int
    kernel_init: Callable[..., Array]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, condition: Array) -> Array:
        shape = (condition.shape[-1], self.vectors, condition.shape[-1])
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        hidden = jax.nn.silu(condition.astype(jnp.float32)).astype(self.dtype)
        out = jnp.einsum(
            "brd,dne->brne", hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return out + bias[None, None]
