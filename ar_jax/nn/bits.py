"""Codes without a codebook: bits, and their entropies factorised into independent groups.

A vector z [d] is assigned to the codes c in {-a, a}^d with softmax(-|z - c|^2 / temperature). The
channels are independent in it: bit i is 1 with the probability sigmoid(4 a z_i / temperature), so
that sums over 2^d codes become sums over d bits. All float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def pack_bits(bits: Array) -> Array:
    """int32 [...] of bits [..., d], the first one the most significant; d <= 31."""
    weights = 2 ** np.arange(bits.shape[-1] - 1, -1, -1)
    return bits.astype(jnp.int32) @ jnp.asarray(weights, jnp.int32)


def unpack_bits(index: Array, count: int) -> Array:
    """int8 [..., count], the inverse of `pack_bits`."""
    pieces = [(index >> shift) & 1 for shift in range(count - 1, -1, -1)]
    return jnp.stack(pieces, axis=-1).astype(jnp.int8)


def bits_of(z: Array) -> Array:
    """int8 of the sign: 1 where z > 0, so that zero gives 0."""
    return (z > 0).astype(jnp.int8)


def signs(bits: Array) -> Array:
    """float32 -1 or 1."""
    return 2.0 * bits.astype(jnp.float32) - 1.0


def bit_logits(z: Array, size: float, temperature: float) -> Array:
    """Logits of the bits of z [..., d] for codes of +-``size``."""
    return 4.0 * size / temperature * z


def bit_entropies(
    logits: Array, group: int = 1, weights: Array | None = None
) -> tuple[Array, Array]:
    """(mean entropy of each assignment, entropy of the mean one), scalars in nats.

    The first is exact. The second is summed over groups of bits that are taken for independent of
    each other in the mean: an upper bound, which is exact for one group of all bits.

    Args:
        logits: [N, d], of bit 1.
        group: bits in a group, a divisor of d; costs an [N, d / group, 2^group] array.
        weights: [N], of the vectors in both means, 0 for padding; None: all alike.
    """
    count, width = logits.shape
    if width % group:
        raise ValueError(f"{width} bits are no groups of {group}")
    shares = jnp.full((count,), 1.0 / count) if weights is None else _shares(weights)
    magnitude = jnp.abs(logits)
    each = jnp.log1p(jnp.exp(-magnitude)) + magnitude * jax.nn.sigmoid(-magnitude)  # [N, d]
    ones = unpack_bits(jnp.arange(2**group), group).astype(jnp.float32)  # [2^g, g]
    grouped = logits.reshape(count, -1, group)
    log_p = sum(
        jnp.einsum("nkg,pg->nkp", jax.nn.log_sigmoid(sign * grouped), taken, precision="highest")
        for sign, taken in ((1.0, ones), (-1.0, 1.0 - ones))
    )
    p = jnp.exp(log_p)  # [N, d / g, 2^g]
    mean = (p * shares[:, None, None]).sum(0)
    return (each.sum(-1) * shares).sum(), -(mean * jnp.log(mean.clip(min=1e-20))).sum()


def _shares(weights: Array) -> Array:
    return weights / weights.sum().clip(min=1e-9)


def draw_flips(
    key: Array, batch_size: int, sizes: Sequence[int], bits: int, *, strength: float, scales: int
) -> Array:
    """bool [B, L, bits]: which bits of the first ``scales`` scales are wrong.

    Every scale has one share for the whole batch, uniform among 0, 1, ... hundredths up to
    ``strength``.
    """
    share_key, bit_key = jax.random.split(key)
    percents = jax.random.randint(share_key, (len(sizes),), 0, int(100 * strength) + 1)
    shares = jnp.where(jnp.arange(len(sizes)) < scales, percents, 0) / 100
    uniform = jax.random.uniform(bit_key, (batch_size, sum(sizes), bits))
    return flips_of(shares, uniform, sizes)


def flips_of(shares: Array, uniform: Array, sizes: Sequence[int]) -> Array:
    """bool [B, L, bits]: where ``uniform`` [B, L, bits] is below its scale's share [S]."""
    step_id = np.repeat(np.arange(len(sizes)), sizes)
    return uniform < shares[step_id][None, :, None]
