"""Bitwise residual quantisation over scales (Infinity, arXiv:2412.04431)."""

from __future__ import annotations

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
    is enlarged bilinearly and added to the sum so far, f_hat. Codes are int8 [B, L, bits] of 0 and
    1, and a code has the bits of the P x P cells of a patch, channel after channel.

    Attributes:
        grids: of the scales' codes; the last one, P times as large, is the latent's.
        code_width: C, channels, which are the bits of a cell.
        patch: P.
        entropy, entropy_group, temperature: see `ar_jax.tokenizers.lookup_free`; means over scales.
    """

    grids: tuple[Grid, ...]
    code_width: int
    patch: int = 1
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
        return self.code_width * self.patch**2

    @property
    def cells(self) -> tuple[Grid, ...]:
        """Grids of the cells of the scales; the last one is the latent's."""
        return tuple((rows * self.patch, columns * self.patch) for rows, columns in self.grids)

    @property
    def codebook_size(self) -> int:
        """V = 2^bits."""
        return 2**self.bits

    @property
    def index_size(self) -> int:
        """V, or of longer codes 2^16: `index` is then of their first 16 bits."""
        return 2 ** min(self.bits, INDEX_BITS)

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
        for grid in self.cells:
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
            f_hat = f_hat + interpolate(straight_through(z, chosen), self.cells[-1])
            commitment += jnp.square(chosen - z).mean((1, 2, 3))
            codes.append(self.folded(bits))
            vectors.append(self.folded(rest))
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
        return jnp.zeros((batch_size, *self.cells[-1], self.code_width), jnp.float32)

    def advance(self, state: Array, codes: Array, step: int) -> tuple[Array, Array | None]:
        """Adds a scale; the next sees f_hat resampled to its cells, [B, n, bits] (None at the end).

        Bilinearly, not by area as `quantize` does: that is what Infinity's transformer is fed.
        """
        state = state + self._enlarged(codes, step)
        if step + 1 == len(self.grids):
            return state, None
        return state, self._context(state, step + 1)

    def contexts(self, codes: Array) -> Array:
        """float32 [B, L - n_1, bits], the contexts of all scales after the first."""
        state = self.begin(len(codes))
        contexts = [jnp.zeros((len(codes), 0, self.bits), jnp.float32)]  # of a single scale
        for scale, part in enumerate(self._split(codes)[:-1]):
            state = state + self._enlarged(part, scale)
            contexts.append(self._context(state, scale + 1))
        return jnp.concatenate(contexts, axis=1)

    def correct(
        self,
        features: Array,
        flips: Array,
        codes: Array | None = None,
        *,
        requantize: bool = True,
    ) -> tuple[Array, Array]:
        """Infinity's bitwise self-correction: what training feeds and wants after flipped bits.

        Args:
            features: the encoder's, float32 [B, h, w, C].
            flips: bool [B, L, bits], which bits a scale has wrong; see
                `ar_jax.nn.bits.draw_flips`.
            codes: [B, L, bits], of which the features are `lookup`: what is right of an image as
                long as none of its bits is flipped. None: the features are the encoder's.
            requantize: f_hat takes the flipped codes, so that the finer scales make up for them.
                False: it takes the right ones, and nothing is changed.

        Returns:
            (the right bits int8 [B, L, bits] of what is left over at every scale, the contexts
            float32 [B, L - n_1, bits] of all scales after the first).
        """
        f_hat = self.begin(len(features))
        spoilt = jnp.zeros((len(features), 1, 1), bool)
        known = None if codes is None else self._split(codes.astype(jnp.int8))
        right, contexts = [], [jnp.zeros((len(features), 0, self.bits), jnp.float32)]
        for scale, flipped in enumerate(self._split(flips)):
            if scale:
                contexts.append(self._context(f_hat, scale))
            right.append(self.folded(bits_of(shrink(features - f_hat, self.cells[scale]))))
            if known is not None:
                right[-1] = jnp.where(spoilt, right[-1], known[scale])
                spoilt |= flipped.any((1, 2), keepdims=True)
            used = right[-1] ^ flipped.astype(jnp.int8) if requantize else right[-1]
            f_hat = f_hat + self._enlarged(used, scale)
        return jnp.concatenate(right, axis=1), jnp.concatenate(contexts, axis=1)

    def _enlarged(self, codes: Array, scale: int) -> Array:
        """[B, h, w, C], what codes [B, n, bits] of a scale add to the latent."""
        return interpolate(self.unfolded(self.code_vectors(codes), scale), self.cells[-1])

    def _context(self, f_hat: Array, scale: int) -> Array:
        """What ``scale`` sees of f_hat [B, h, w, C]: [B, n, bits]."""
        return self.folded(interpolate(f_hat, self.cells[scale]))

    @nn.nowrap
    def folded(self, cells: Array) -> Array:
        """[B, n, bits] of a scale's cells [B, h, w, C]."""
        batch, rows, columns, channels = cells.shape
        patch = self.patch
        parts = cells.reshape(batch, rows // patch, patch, columns // patch, patch, channels)
        return parts.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, self.bits)

    @nn.nowrap
    def unfolded(self, rows: Array, scale: int) -> Array:
        """A scale's cells [B, h, w, C] of rows [B, n, bits], one a code."""
        (height, width), patch = self.grids[scale], self.patch
        cells = rows.reshape(len(rows), height, width, -1, patch, patch)
        return cells.transpose(0, 1, 4, 2, 5, 3).reshape(len(rows), *self.cells[scale], -1)

    def _split(self, codes: Array) -> list[Array]:
        return jnp.split(codes, np.cumsum(self.sizes)[:-1].tolist(), axis=1)
