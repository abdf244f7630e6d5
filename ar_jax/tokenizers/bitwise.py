"""Bitwise residual quantisation over scales (Infinity, arXiv:2412.04431)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.bits import bit_entropies, bit_logits, bits_of, pack_bits, signs
from ar_jax.nn.quantize import normalise, straight_through
from ar_jax.nn.resize import interpolate, shrink
from ar_jax.schedules import Grid
from ar_jax.tokenizers.contract import Quantized, of_vectors

Array = jax.Array

INDEX_BITS = 16  # at most, of the numbers that the use of codes is counted by


class MultiScaleBitwiseQuantizer(nn.Module, kw_only=True):
    """Residual quantisation over scales, coarse to fine, into signs on the unit sphere.

    Each scale quantises what the coarser ones left over, shrunk to its grid by area: a bit is the
    sign of a channel, a code vector bits of +-1 / sqrt(C), of length one whatever is left over. It
    is enlarged bilinearly and added to the sum so far, f_hat. Codes are int8 [B, L, C] of 0 and 1.

    Attributes:
        grids: of the scales; the last one is the latent's.
        code_width: channels, which are the bits of a code.
        entropy, entropy_group, temperature: see `ar_jax.tokenizers.lookup_free`; means over scales.
    """

    grids: tuple[Grid, ...]
    code_width: int
    entropy: bool = False
    entropy_group: int = 1
    temperature: float = 0.01

    losses = ("commitment", "entropy")
    codebook_update = None
    mixes = False
    context = "features"
    unit_vectors = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.code_width

    @property
    def codebook_size(self) -> int:
        """V = 2^bits."""
        return 2**self.code_width

    @property
    def index_size(self) -> int:
        """V, or of longer codes 2^16: `index` is then of their first 16 bits."""
        return 2 ** min(self.code_width, INDEX_BITS)

    def index(self, codes: Array) -> Array:
        """int32 [B, L] of the first 16 bits, the first one the most significant."""
        return pack_bits(codes[..., :INDEX_BITS])

    def code_vectors(self, bits: Array) -> Array:
        """Unit vectors [..., C] of bits [..., C]."""
        return self.code_width**-0.5 * signs(bits)

    def quantize(self, features: Array, mask: Array | None = None) -> Quantized:
        """See the contract; the commitment loss is of unit vectors, averaged over scales."""
        f_hat = jnp.zeros_like(features)
        codes, vectors = [], []
        commitment = jnp.zeros((len(features),))
        each = mean = jnp.zeros(())
        for grid in self.grids:
            rest = shrink(features - jax.lax.stop_gradient(f_hat), grid)
            z = normalise(rest, True)
            bits = bits_of(rest)
            chosen = self.code_vectors(bits)
            if self.entropy:
                flat = z.reshape(-1, self.code_width)
                logits = bit_logits(flat, self.code_width**-0.5, self.temperature)
                weights = of_vectors(mask, len(flat))
                pair = bit_entropies(logits, self.entropy_group, weights)
                each, mean = each + pair[0], mean + pair[1]
            f_hat = f_hat + interpolate(straight_through(z, chosen), self.grids[-1])
            commitment += jnp.square(chosen - z).mean((1, 2, 3))
            codes.append(bits.reshape(len(features), -1, self.code_width))
            vectors.append(rest.reshape(len(features), -1, self.code_width))
        count = len(self.grids)
        return Quantized(
            features=f_hat,
            codes=jnp.concatenate(codes, axis=1),
            vectors=jnp.concatenate(vectors, axis=1),
            codebook_loss=jnp.zeros((len(features),)),
            commitment_loss=commitment / count,
            sample_entropy=each / count,
            codebook_entropy=mean / count,
        )

    def lookup(self, codes: Array, steps: int | None = None) -> Array:
        """f_hat [B, h, w, C] after the first ``steps`` scales (all if None)."""
        f_hat = self.begin(len(codes))
        for scale, part in enumerate(self._split(codes)[:steps]):
            f_hat = f_hat + self._enlarged(part, scale)
        return f_hat

    def begin(self, batch_size: int) -> Array:
        """f_hat of no codes: zeros [B, h, w, C]."""
        return jnp.zeros((batch_size, *self.grids[-1], self.code_width), jnp.float32)

    def advance(self, state: Array, codes: Array, step: int) -> tuple[Array, Array | None]:
        """Adds a scale; the next one sees f_hat resampled to its grid, [B, n, C] (None at the end).

        Bilinearly, not by area as `quantize` does: that is what Infinity's transformer is fed.
        """
        state = state + self._enlarged(codes, step)
        if step + 1 == len(self.grids):
            return state, None
        return state, self._context(state, step + 1)

    def contexts(self, codes: Array) -> Array:
        """float32 [B, L - n_1, C], the contexts of all scales after the first."""
        state = self.begin(len(codes))
        contexts = [jnp.zeros((len(codes), 0, self.code_width), jnp.float32)]  # of a single scale
        for scale, part in enumerate(self._split(codes)[:-1]):
            state = state + self._enlarged(part, scale)
            contexts.append(self._context(state, scale + 1))
        return jnp.concatenate(contexts, axis=1)

    def correct(
        self, features: Array, flips: Array, *, requantize: bool = True
    ) -> tuple[Array, Array]:
        """Infinity's bitwise self-correction: what training feeds and wants after flipped bits.

        Args:
            features: the encoder's, float32 [B, h, w, C].
            flips: bool [B, L, C], which bits a scale has wrong; see `draw_flips`.
            requantize: f_hat takes the flipped codes, so that the finer scales make up for them.
                False: it takes the right ones, and nothing is changed.

        Returns:
            (the right bits int8 [B, L, C] of what is left over at every scale, the contexts
            float32 [B, L - n_1, C] of all scales after the first).
        """
        f_hat = self.begin(len(features))
        right, contexts = [], [jnp.zeros((len(features), 0, self.code_width), jnp.float32)]
        for scale, flipped in enumerate(self._split(flips)):
            if scale:
                contexts.append(self._context(f_hat, scale))
            rest = shrink(features - f_hat, self.grids[scale])
            right.append(bits_of(rest).reshape(flipped.shape))
            used = right[-1] ^ flipped.astype(jnp.int8) if requantize else right[-1]
            f_hat = f_hat + self._enlarged(used, scale)
        return jnp.concatenate(right, axis=1), jnp.concatenate(contexts, axis=1)

    def _enlarged(self, codes: Array, scale: int) -> Array:
        """[B, h, w, C], what codes [B, n, C] of a scale add to the latent."""
        vectors = self.code_vectors(codes).reshape(len(codes), *self.grids[scale], self.code_width)
        return interpolate(vectors, self.grids[-1])

    def _context(self, f_hat: Array, scale: int) -> Array:
        """What ``scale`` sees of f_hat [B, h, w, C]: [B, n, C]."""
        return interpolate(f_hat, self.grids[scale]).reshape(len(f_hat), -1, self.code_width)

    def _split(self, codes: Array) -> list[Array]:
        return jnp.split(codes, np.cumsum(self.sizes)[:-1].tolist(), axis=1)


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
