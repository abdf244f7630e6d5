"""Residual MLP blocks whose norms a second vector shifts, scales and gates: heads of one code."""

from __future__ import annotations

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from ar_jax.nn.layers import MLP, LayerNorm
from ar_jax.nn.modulation import Modulation

Array = jax.Array

NORM_EPSILON = 1e-6
XAVIER = nn.initializers.xavier_uniform()


def divided(x: Array) -> Array:
    """[N, ...] with its rows over the devices that divide the batch.

    Without it the compiler follows the sharding of the weights: every device computes all rows, and
    the sums over what it has of the width travel.
    """
    return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))


class AdaptiveBlock(nn.Module, kw_only=True):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), the three vectors from a second input."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, condition: Array, temperature: Array | float = 1.0) -> Array:
        """x [N, W], its condition [N, 1, W] and a factor on the shift -> [N, W]."""
        x, condition, width = divided(x), divided(condition), x.shape[-1]
        vectors = Modulation(
            vectors=3, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
        )(condition)
        shift, scale, gate = (vectors[:, 0, i] for i in range(3))
        normed = LayerNorm(epsilon=NORM_EPSILON, name="norm")(x)
        h = normed * (1 + scale) + temperature * shift
        h = MLP(
            hidden=width,
            activation="silu",
            gated=False,
            bias=True,
            kernel_init=XAVIER,
            out_init=XAVIER,
            dtype=self.dtype,
            name="mlp",
        )(h.astype(self.dtype))
        return x + gate * h
