"""Finite scalar quantisation: every channel is rounded to a few levels (FSQ, arXiv:2309.15505)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.quantize import straight_through
from ar_jax.tokenizers.contract import OneGrid, Quantized

Array = jax.Array

MARGIN = 1e-3  # of the bound, so that the outermost level is never missed


class FiniteScalarQuantizer(OneGrid, kw_only=True):
    """One code for every latent cell, from an implicit codebook of all products of levels.

    A channel of L levels is bounded to L - 1 wide, by half a step lower where L is even, and
    rounded to an integer; over floor(L / 2) that is a number in [-1, 1]. The code is the number
    with these integers as its digits, the first channel's the lowest. There is nothing to learn
    and no loss of its own.

    Attributes:
        levels: L of every channel, at least two; their product is the size of the codebook.
        code_width: channels, as many as levels.
    """

    levels: tuple[int, ...]
    code_width: int

    losses = ()
    codebook_update = None
    entropy = False
    unit_vectors = False

    @property
    def codebook_size(self) -> int:
        """V, the product of the levels."""
        return math.prod(self.levels)

    @property
    def _half(self) -> np.ndarray:
        """floor(L / 2) of every channel: what is added to integers to make digits."""
        return np.array(self.levels) // 2

    @property
    def _basis(self) -> np.ndarray:
        """What a digit of every channel counts."""
        return np.cumprod((1, *self.levels[:-1]))

    def bound(self, z: Array) -> Array:
        """z [..., C] in the interval that rounds to its levels."""
        levels = np.array(self.levels)
        half = (levels - 1) * (1 - MARGIN) / 2
        offset = np.where(levels % 2 == 1, 0.0, 0.5)
        shift = np.tan(offset / half)
        return jnp.tanh(z + row(shift, z)) * row(half, z) - row(offset, z)

    def to_codes(self, vectors: Array) -> Array:
        """Codes int32 [...] of code vectors [..., C] in [-1, 1]."""
        half = row(self._half, vectors)
        digits = (jnp.round(vectors * half) + half).astype(jnp.int32)
        return digits @ jnp.asarray(self._basis, jnp.int32)

    def code_vectors(self, codes: Array) -> Array:
        """The inverse of `to_codes`."""
        digits = [
            codes // int(count) % levels
            for count, levels in zip(self._basis, self.levels, strict=True)
        ]
        vectors = jnp.stack(digits, axis=-1).astype(jnp.float32)
        half = row(self._half, vectors)
        return (vectors - half) / half

    def quantize(self, features: Array, mask: Array | None = None) -> Quantized:
        """See the contract."""
        bounded = self.bound(features)
        chosen = straight_through(bounded, jnp.round(bounded)) / row(self._half, bounded)
        zeros, none = jnp.zeros((len(features),)), jnp.zeros(())
        return Quantized(
            features=chosen,
            codes=self.to_codes(jax.lax.stop_gradient(chosen)).reshape(len(features), -1),
            vectors=bounded.reshape(len(features), -1, self.code_width),
            codebook_loss=zeros,
            commitment_loss=zeros,
            sample_entropy=none,
            codebook_entropy=none,
        )


def row(channels: np.ndarray, like: Array) -> Array:
    """float32 [C] with as many axes as ``like`` [..., C]."""
    return jnp.asarray(channels, jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))
