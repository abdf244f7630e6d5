"""Norms, feed-forward layers and stochastic depth."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

Array = jax.Array


def layer_norm(x: Array, *, epsilon: float) -> Array:
    """LayerNorm over the last axis without parameters, in float32 -> float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module, kw_only=True):
    """`layer_norm` times a scale plus a bias, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)
        ahead = tuple(range(x.ndim - 1))
        normed = layer_norm(x, epsilon=self.epsilon)
        return normed * jnp.expand_dims(scale, ahead) + jnp.expand_dims(bias, ahead)


def rms_norm(x: Array, *, epsilon: float) -> Array:
    """x / rms(x) over the last axis without parameters (arXiv:1910.07467), in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module, kw_only=True):
    """`rms_norm` times a scale, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        return rms_norm(x, epsilon=self.epsilon) * scale


def unit(x: Array) -> Array:
    """x / max(|x|, 1e-12) over the last axis, float32; the gradient at zero is zero, not NaN."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def drop_path(x: Array, rate: Array, key: Array) -> Array:
    """Stochastic depth per sample (arXiv:1603.09382): x [B, ...], rate a scalar in [0, 1)."""
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), jnp.zeros_like(x))


def activate(x: Array, name: str) -> Array:
    """'gelu_tanh' (VAR), 'gelu' (exact), 'silu' or 'relu' (cheapest on CPUs)."""
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name == "silu":
        return jax.nn.silu(x)
    if name == "relu":
        return jax.nn.relu(x)
    raise ValueError(f"activation {name!r} is none of gelu_tanh, gelu, silu, relu")


class MLP(nn.Module, kw_only=True):
    """Position-wise feed-forward layer, plain or gated (SwiGLU, arXiv:2002.05202).

    Attributes:
        hidden: inner width.
        activation: see `activate`.
        gated: ``down(act(gate x) * up x)`` instead of ``down(act(up x))``.
        bias: whether the projections have biases.
        hidden_dropout: rate after the activation.
    """

    hidden: int
    activation: str
    gated: bool
    bias: bool
    hidden_dropout: float = 0.0
    kernel_init: Initializer
    out_init: Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        def dense(features: int, name: str, init: Initializer) -> nn.Dense:
            return nn.Dense(
                features, use_bias=self.bias, kernel_init=init, dtype=self.dtype, name=name
            )

        hidden = dense(self.hidden, "up", self.kernel_init)(x)
        if self.gated:
            hidden = (
                activate(dense(self.hidden, "gate", self.kernel_init)(x), self.activation) * hidden
            )
        else:
            hidden = activate(hidden, self.activation)
        hidden = nn.Dropout(self.hidden_dropout, deterministic=not train)(hidden)
        return dense(x.shape[-1], "down", self.out_init)(hidden)
