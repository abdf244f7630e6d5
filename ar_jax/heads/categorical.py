"""A softmax over the codebook."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array

# By how much an inverted draw wins at least: far above the rounding of logits, and so little that
# the noise's law is changed by less than could be measured.
MARGIN = 1e-3


class CategoricalHead(nn.Module, kw_only=True):
    """p(code | hidden) = softmax(linear(hidden)); logits are float32.

    Attributes:
        vocab_size: V.
        bias: whether the linear layer has one.
        init_std: of its kernel; 0 starts from the uniform distribution.
    """

    vocab_size: int
    bias: bool
    init_std: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        """Logits float32 [..., V] of hidden [..., D]."""
        init = nn.initializers.normal(self.init_std) if self.init_std else nn.initializers.zeros
        kernel = self.param("kernel", init, (hidden.shape[-1], self.vocab_size), jnp.float32)
        logits = jnp.einsum(
            "...d,dv->...v",
            hidden.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
            logits = logits + jnp.expand_dims(bias, tuple(range(logits.ndim - 1)))
        return logits

    @staticmethod
    def log_prob(logits: Array, codes: Array) -> Array:
        """log p(codes) in nats: logits [..., V], codes int32 [...] -> float32 [...]."""
        picked = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    @staticmethod
    def loss(logits: Array, codes: Array, *, label_smoothing: float = 0.0) -> Array:
        """Cross-entropy [...] in nats against (1 - e) one_hot + e / V, torch's convention."""
        nll = -CategoricalHead.log_prob(logits, codes)
        if not label_smoothing:
            return nll
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
        return (1 - label_smoothing) * nll + label_smoothing * uniform

    @staticmethod
    def correct(logits: Array, codes: Array) -> Array:
        """Float32 [...], 1 where no other code is more probable than that of int32 [...]."""
        return (jnp.argmax(logits, axis=-1) == codes).astype(jnp.float32)

    @staticmethod
    def guide(cond: Array, null: Array, scale: Array) -> Array:
        """Classifier-free guidance on logits: null + scale * (cond - null)."""
        return null + scale * (cond - null)

    @staticmethod
    def draw(logits: Array, gumbel: Array) -> Array:
        """The code of largest perturbed logit, int32 [...]: an exact draw (Gumbel-max)."""
        return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)

    @staticmethod
    def invert(logits: Array, codes: Array, gumbel: Array) -> Array:
        """The noise [..., V] with which `draw` gives ``codes`` int32 [...].

        A draw from the posterior: standard Gumbel noise given that the code's perturbed logit is
        the largest. With log-probabilities l that maximum is a standard Gumbel itself, T, whichever
        code it belongs to, and every other perturbed logit is a Gumbel of location l cut off at T.
        So noise of codes that the model drew is standard Gumbel noise again.

        Args:
            logits: [..., V], after the filters; -inf where a code was removed.
            codes: int32 [...]; the noise is not finite where a filter removed the code.
            gumbel: standard Gumbel noise [..., V] to make it from.
        """
        log_p = jax.nn.log_softmax(logits, axis=-1)
        chosen = jax.nn.one_hot(codes, logits.shape[-1], dtype=bool)
        top = jnp.where(chosen, gumbel, 0.0).sum(-1, keepdims=True)
        below = jnp.minimum(-jnp.logaddexp(-top, -(log_p + gumbel)), top - MARGIN)
        noise = jnp.where(chosen, top, below) - log_p
        return jnp.where(jnp.isneginf(logits) & ~chosen, gumbel, noise)

    @staticmethod
    def soften(logits: Array, gumbel: Array, ratio: Array | float) -> Array:
        """Weights float32 [..., V] of a soft draw, VAR's more_smooth (``models/var.py``).

        softmax(((1 + r) logits + gumbel) / tau) with tau = max(0.27 (1 - 0.95 r), 0.005), r the
        ``ratio`` of steps that are done: soft at the first scale, all but hard at the last.
        """
        tau = jnp.maximum(0.27 * (1 - 0.95 * ratio), 0.005)
        return jax.nn.softmax(((1 + ratio) * logits + gumbel) / tau, axis=-1)
