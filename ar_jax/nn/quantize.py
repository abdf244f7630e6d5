"""Vector quantisation: nearest codes, straight-through, entropy term, EMA codebook, restarts.

Everything here is float32: distances in a lower precision pick other codes.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.nn.layers import unit

Array = jax.Array


def squared_distances(z: Array, codebook: Array) -> Array:
    """[N, V] squared distances of z [N, C] to codebook [V, C]."""
    dots = jnp.matmul(z, codebook.T, precision="highest")
    return jnp.square(z).sum(1)[:, None] + jnp.square(codebook).sum(1)[None] - 2 * dots


def nearest(z: Array, codebook: Array) -> Array:
    """int32 [N]: index of the nearest codebook row of every z [N, C]; the first on ties."""
    distances = squared_distances(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook))
    return jnp.argmin(distances, axis=1).astype(jnp.int32)


def normalise(x: Array, l2_norm: bool) -> Array:
    """Unit rows if ``l2_norm``, else x."""
    return unit(x) if l2_norm else x


def straight_through(z: Array, quantised: Array) -> Array:
    """The value of ``quantised`` with the gradient of ``z``."""
    return z + jax.lax.stop_gradient(quantised - z)


def entropies(
    z: Array, codebook: Array, temperature: float = 0.01, weights: Array | None = None
) -> tuple[Array, Array]:
    """(mean entropy of each assignment, entropy of the mean one), scalars in nats (LlamaGen).

    Each z [N, C] is assigned to the rows of codebook [V, C] with softmax(-distance^2 /
    temperature); ``weights`` [N] are those of the vectors in both means, 0 for padding; None: all
    alike.
    """
    log_p = jax.nn.log_softmax(-squared_distances(z, codebook) / temperature, axis=-1)  # [N, V]
    p = jnp.exp(log_p)
    negative = (p * log_p).sum(-1)  # [N], of entropies
    if weights is None:
        each, mean = -negative.mean(), p.mean(0)
    else:
        shares = weights / weights.sum().clip(min=1e-9)  # [N]
        each, mean = -(negative * shares).sum(), (p * shares[:, None]).sum(0)
    return each, -(mean * jnp.log(mean + 1e-5)).sum()


@flax.struct.dataclass
class Assignments:
    """What quantisation did to one batch, for the codebook's own updates."""

    codes: Array  # int32 [B, L]
    vectors: Array  # float32 [B, L, C], the vectors that were assigned


def code_counts(codes: Array, step_id: Array, num_steps: int, vocab_size: int) -> Array:
    """float32 [S, V]: how often each scale uses each code, over codes int32 [B, L]."""
    flat = (step_id[None, :] * vocab_size + codes).reshape(-1)
    counts = jnp.zeros((num_steps * vocab_size,), jnp.float32).at[flat].add(1.0)
    return counts.reshape(num_steps, vocab_size)


def vector_sums(assignments: Assignments, vocab_size: int) -> Array:
    """float32 [V, C]: the sum of the vectors that were assigned to each code."""
    vectors = assignments.vectors.reshape(-1, assignments.vectors.shape[-1])
    zeros = jnp.zeros((vocab_size, vectors.shape[-1]), jnp.float32)
    return zeros.at[assignments.codes.reshape(-1)].add(jax.lax.stop_gradient(vectors))


def usage(counts: Array) -> Array:
    """Fraction [...] of codes with a positive count, counts [..., V]."""
    return (counts > 0).mean(-1)


def perplexity(counts: Array) -> Array:
    """exp of the entropy [...] of the code distribution, counts [..., V]; V if uniform."""
    p = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1e-9)
    return jnp.exp(-(p * jnp.log(jnp.maximum(p, 1e-20))).sum(-1))
