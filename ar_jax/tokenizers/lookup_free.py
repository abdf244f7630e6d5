"""Sign quantisers with one code for every latent cell: LFQ and BSQ."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_jax.nn.bits import bit_entropies, bit_logits, bits_of, pack_bits, signs, unpack_bits
from ar_jax.nn.quantize import normalise, straight_through
from ar_jax.tokenizers.contract import OneGrid, Quantized, of_vectors

Array = jax.Array


class LookupFreeQuantizer(OneGrid, kw_only=True):
    """Every channel is a bit, its sign: a code vector is in {-1, 1}^C (LFQ, arXiv:2310.05737).

    The code is the number of its C bits, the first one the most significant.

    Attributes:
        code_width: channels, which are the bits of a code.
        entropy: whether to compute the entropies.
        entropy_group: bits that the entropy of the mean assignment is computed of at a time; see
            `ar_jax.nn.bits.bit_entropies`.
        temperature: of the soft assignment in the entropies.
    """

    code_width: int
    entropy: bool = False
    entropy_group: int = 1
    temperature: float = 0.01

    sphere = False
    losses = ("commitment", "entropy")
    codebook_update = None
    unit_vectors = False

    @property
    def codebook_size(self) -> int:
        """V = 2^C."""
        return 2**self.code_width

    @property
    def size(self) -> float:
        """Of the numbers in code vectors, which are + or - this."""
        return self.code_width**-0.5 if self.sphere else 1.0

    def code_vectors(self, codes: Array) -> Array:
        """[B, L, C] of codes [B, L]."""
        return self.size * signs(unpack_bits(codes, self.code_width))

    def quantize(self, features: Array, mask: Array | None = None) -> Quantized:
        """See the contract; the commitment loss is a mean over the elements of an image."""
        z = normalise(features, self.sphere)
        bits = bits_of(z)
        chosen = self.size * signs(bits)
        flat = z.reshape(-1, self.code_width)
        each = mean = jnp.zeros(())
        if self.entropy:
            logits = bit_logits(flat, self.size, self.temperature)
            each, mean = bit_entropies(logits, self.entropy_group, of_vectors(mask, len(flat)))
        return Quantized(
            features=straight_through(z, chosen),
            codes=pack_bits(bits).reshape(len(features), -1),
            vectors=z.reshape(len(features), -1, self.code_width),
            codebook_loss=jnp.zeros((len(features),)),
            commitment_loss=jnp.square(chosen - z).mean((1, 2, 3)),
            sample_entropy=each,
            codebook_entropy=mean,
        )


class BinarySphericalQuantizer(LookupFreeQuantizer, kw_only=True):
    """LFQ of unit vectors, code vectors in {-1, 1}^C / sqrt(C) (BSQ, arXiv:2406.07548)."""

    sphere = True
