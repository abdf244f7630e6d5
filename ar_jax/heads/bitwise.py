"""A classifier of every bit of a code (Infinity's infinite vocabulary, arXiv:2412.04431)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.heads.categorical import CategoricalHead

Array = jax.Array


class BitwiseHead(nn.Module, kw_only=True):
    """p(code | hidden) = the product over bits of softmax(linear(hidden)) of two classes.

    Codes are bits int8 [..., bits], independent of each other given the hidden state.

    Attributes:
        bits: of a code.
        bias: whether the linear layer has one.
        init_std: of its kernel; 0 starts from even chances.
    """

    bits: int
    bias: bool
    init_std: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Logits float32 [..., bits, 2] of hidden [..., D]: of a bit's 0 and of its 1."""
        classes = CategoricalHead(
            vocab_size=2 * self.bits,
            bias=self.bias,
            init_std=self.init_std,
            dtype=self.dtype,
            name="bit",
        )
        return classes(hidden).reshape(*hidden.shape[:-1], self.bits, 2)

    @staticmethod
    def log_prob(logits: Array, codes: Array) -> Array:
        """log p(codes) in nats: logits [..., bits, 2], codes [..., bits] -> float32 [...]."""
        return CategoricalHead.log_prob(logits, codes.astype(jnp.int32)).sum(-1)

    @staticmethod
    def loss(logits: Array, codes: Array, *, label_smoothing: float = 0.0) -> Array:
        """Cross-entropy [...] in nats a bit: the mean over the bits of a code."""
        bits = codes.astype(jnp.int32)
        return CategoricalHead.loss(logits, bits, label_smoothing=label_smoothing).mean(-1)

    @staticmethod
    def correct(logits: Array, codes: Array) -> Array:
        """Share [...] of the bits of which the other value is less probable."""
        return CategoricalHead.correct(logits, codes).mean(-1)

    guide = staticmethod(CategoricalHead.guide)

    @staticmethod
    def draw(logits: Array, gumbel: Array) -> Array:
        """Bits int8 [..., bits] of the larger perturbed logits [..., bits, 2]: exact draws."""
        return CategoricalHead.draw(logits, gumbel).astype(jnp.int8)

    @staticmethod
    def invert(logits: Array, codes: Array, gumbel: Array) -> Array:
        """The noise [..., bits, 2] with which `draw` gives ``codes`` int8 [..., bits]."""
        return CategoricalHead.invert(logits, codes.astype(jnp.int32), gumbel)
