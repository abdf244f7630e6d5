"""Vector quantisers: features [B, h, w, C] <-> codes int32 [B, L]. All float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.conv import conv
from ar_jax.nn.quantize import entropies, nearest, normalise, straight_through
from ar_jax.nn.resize import enlarge, shrink
from ar_jax.schedules import Grid
from ar_jax.tokenizers.contract import OneGrid, Quantized, SingleIndex, of_vectors

Array = jax.Array


def codebook_init(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """Uniform in +-1 / V, the usual start of a codebook [V, C]."""
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


class VectorQuantizer(OneGrid, kw_only=True):
    """One code for every latent cell (VQ-VAE, arXiv:1711.00937; LlamaGen with l2_norm).

    Attributes:
        codebook_size, code_width: V and C.
        l2_norm: compare and return unit vectors.
        codebook_update: 'gradient', or 'ema': no gradient, the objective moves the codes.
        entropy: whether to compute the entropy term, which costs an [N, V] softmax.
    """

    codebook_size: int
    code_width: int
    l2_norm: bool = False
    codebook_update: str = "gradient"
    entropy: bool = False

    losses = ("codebook", "commitment", "entropy")

    def setup(self) -> None:
        self.codebook = self.param(
            "codebook", codebook_init, (self.codebook_size, self.code_width), jnp.float32
        )

    @property
    def unit_vectors(self) -> bool:
        """With ``l2_norm``."""
        return self.l2_norm

    def table(self) -> Array:
        """The code vectors in use, [V, C]."""
        codebook = normalise(self.codebook, self.l2_norm)
        return jax.lax.stop_gradient(codebook) if self.codebook_update == "ema" else codebook

    def quantize(self, features: Array, mask: Array | None = None) -> Quantized:
        """See the contract; both losses are means over the elements of an image."""
        z = normalise(features, self.l2_norm)
        flat = z.reshape(-1, self.code_width)
        table = self.table()
        codes = nearest(flat, table)
        chosen = table[codes].reshape(z.shape)
        sg = jax.lax.stop_gradient
        each, mean = jnp.zeros(()), jnp.zeros(())
        if self.entropy:
            each, mean = entropies(flat, table, weights=of_vectors(mask, len(flat)))
        return Quantized(
            features=straight_through(z, chosen),
            codes=codes.reshape(len(z), -1),
            vectors=z.reshape(len(z), -1, self.code_width),
            codebook_loss=jnp.square(chosen - sg(z)).mean((1, 2, 3)),
            commitment_loss=jnp.square(sg(chosen) - z).mean((1, 2, 3)),
            sample_entropy=each,
            codebook_entropy=mean,
        )

    def code_vectors(self, codes: Array) -> Array:
        """[B, L, C] of codes [B, L]."""
        return self.table()[codes]


def phi_indices(scales: int, phis: int) -> tuple[int, ...]:
    """Which of ``phis`` convolutions each scale uses: the nearest tick, the first on ties.

    float64 numpy as in the official code, because exact ties are settled by rounding.
    """
    if scales == 1:
        return (0,)
    margin = 1 / (3 * phis) if phis == 4 else 1 / (2 * phis)
    ticks = np.linspace(margin, 1 - margin, phis)
    return tuple(int(np.argmin(np.abs(ticks - k / (scales - 1)))) for k in range(scales))


class MultiScaleQuantizer(SingleIndex, kw_only=True):
    """Residual quantisation over scales, coarse to fine, one codebook (VAR, arXiv:2404.02905).

    Each scale quantises what the coarser ones left over, shrunk to its grid by area; its codes are
    enlarged bicubically, refined by a convolution phi and added to the sum so far, f_hat.

    Attributes:
        grids: of the scales; the last one is the latent's.
        codebook_size, code_width: V and C.
        phis: number of convolutions phi: 1 shared by all scales, 0 one for each, n >= 2 partly
            shared.
        phi_ratio: phi(h) = (1 - ratio) h + ratio conv(h); 0: no convolutions.
        l2_norm, codebook_update, entropy: see `VectorQuantizer`.
    """

    grids: tuple[Grid, ...]
    codebook_size: int
    code_width: int
    phis: int = 4
    phi_ratio: float = 0.5
    l2_norm: bool = False
    codebook_update: str = "gradient"
    entropy: bool = False

    losses = ("codebook", "commitment", "entropy")
    mixes = True
    context = "features"
    unit_vectors = False

    def setup(self) -> None:
        self.codebook = self.param(
            "codebook", codebook_init, (self.codebook_size, self.code_width), jnp.float32
        )
        count = (self.phis or len(self.grids)) if self.phi_ratio else 0
        self.phi_convs = [
            conv(self.code_width, dtype=jnp.float32, name=f"phi_{i}") for i in range(count)
        ]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(rows * columns for rows, columns in self.grids)

    def table(self) -> Array:
        """The code vectors [V, C]; l2_norm compares directions but adds the vectors themselves."""
        return (
            jax.lax.stop_gradient(self.codebook) if self.codebook_update == "ema" else self.codebook
        )

    def refine(self, codes: Array, scale: int) -> Array:
        """[B, h, w, C], what codes [B, n], or weights [B, n, V], of a scale add to the latent."""
        if jnp.issubdtype(codes.dtype, jnp.floating):
            h = jnp.matmul(codes, self.table(), precision="highest")
        else:
            h = self.table()[codes]
        h = enlarge(h.reshape(len(codes), *self.grids[scale], self.code_width), self.grids[-1])
        if not self.phi_ratio:
            return h
        index = phi_indices(len(self.grids), self.phis or len(self.grids))[scale]
        return (1 - self.phi_ratio) * h + self.phi_ratio * self.phi_convs[index](h)

    def quantize(self, features: Array, mask: Array | None = None) -> Quantized:
        """See the contract; losses are of the sum after every scale, averaged over scales."""
        sg = jax.lax.stop_gradient
        if self.is_initializing():
            # Three scales do not use all of four phis; official weights have them all the same.
            for phi in self.phi_convs:
                phi(features)
        f_hat = jnp.zeros_like(features)
        codes, vectors = [], []
        codebook_loss = commitment_loss = jnp.zeros((len(features),))
        each = mean = jnp.zeros(())
        for scale, grid in enumerate(self.grids):
            z = shrink(sg(features - f_hat), grid).reshape(len(features), -1, self.code_width)
            flat = normalise(z.reshape(-1, self.code_width), self.l2_norm)
            table = normalise(self.table(), self.l2_norm)
            index = nearest(flat, table)
            if self.entropy:
                live = shrink(features - sg(f_hat), grid).reshape(flat.shape)
                weights = of_vectors(mask, len(live))
                pair = entropies(normalise(live, self.l2_norm), table, weights=weights)
                each, mean = each + pair[0], mean + pair[1]
            codes.append(index.reshape(len(features), -1))
            vectors.append(z)
            f_hat = f_hat + self.refine(codes[-1], scale)
            codebook_loss += jnp.square(f_hat - sg(features)).mean((1, 2, 3))
            commitment_loss += jnp.square(sg(f_hat) - features).mean((1, 2, 3))
        count = len(self.grids)
        return Quantized(
            features=straight_through(features, f_hat),
            codes=jnp.concatenate(codes, axis=1),
            vectors=jnp.concatenate(vectors, axis=1),
            codebook_loss=codebook_loss / count,
            commitment_loss=commitment_loss / count,
            sample_entropy=each / count,
            codebook_entropy=mean / count,
        )

    def lookup(self, codes: Array, steps: int | None = None) -> Array:
        """f_hat [B, h, w, C] after the first ``steps`` scales (all if None)."""
        f_hat = self.begin(len(codes))
        for scale, part in enumerate(self._split(codes)[:steps]):
            f_hat = f_hat + self.refine(part, scale)
        return f_hat

    def begin(self, batch_size: int) -> Array:
        """f_hat of no codes: zeros [B, h, w, C]."""
        return jnp.zeros((batch_size, *self.grids[-1], self.code_width), jnp.float32)

    def advance(self, state: Array, codes: Array, step: int) -> tuple[Array, Array | None]:
        """Adds a scale; the next one sees f_hat shrunk to its grid, [B, n, C] (None at the end)."""
        state = state + self.refine(codes, step)
        if step + 1 == len(self.grids):
            return state, None
        return state, self._context(state, step + 1)

    def contexts(self, codes: Array) -> Array:
        """float32 [B, L - n_1, C], the contexts of all scales after the first."""
        state = self.begin(len(codes))
        contexts = [jnp.zeros((len(codes), 0, self.code_width), jnp.float32)]  # of a single scale
        for scale, part in enumerate(self._split(codes)[:-1]):
            state = state + self.refine(part, scale)
            contexts.append(self._context(state, scale + 1))
        return jnp.concatenate(contexts, axis=1)

    def correct(self, codes: Array, drawn: Array, wrong: Array) -> tuple[Array, Array]:
        """Teacher forcing after wrong draws: the finer scales make up for them.

        Infinity's self-correction (arXiv:2412.04431) for code vectors: where ``wrong``, a scale
        adds the drawn code's vector in place of the right one's, and what is right for the finer
        scales is then what is left of the latent that ``codes`` stand for.

        Args:
            codes: int32 [B, L], of an image.
            drawn: int32 [B, L], what a model drew.
            wrong: bool [B, L], where that is used.

        Returns:
            (the right codes int32 [B, L], the contexts float32 [B, L - n_1, C] of all scales after
            the first); for rows without a wrong draw ``codes`` and `contexts` of them.
        """
        latent, f_hat = self.lookup(codes), self.begin(len(codes))
        table = normalise(self.table(), self.l2_norm)
        spoilt = jnp.zeros((len(codes), 1), bool)
        right, contexts = [], [jnp.zeros((len(codes), 0, self.code_width), jnp.float32)]
        parts = zip(self._split(codes), self._split(drawn), self._split(wrong), strict=True)
        for scale, (known, other, use_other) in enumerate(parts):
            if scale:
                contexts.append(self._context(f_hat, scale))
            z = self._context(latent - f_hat, scale).reshape(-1, self.code_width)
            index = nearest(normalise(z, self.l2_norm), table).reshape(known.shape)
            right.append(jnp.where(spoilt, index, known))
            f_hat = f_hat + self.refine(jnp.where(use_other, other, right[-1]), scale)
            spoilt |= use_other.any(1, keepdims=True)
        return jnp.concatenate(right, axis=1), jnp.concatenate(contexts, axis=1)

    def _context(self, f_hat: Array, scale: int) -> Array:
        """What ``scale`` sees of f_hat [B, h, w, C]: shrunk to its grid, [B, n, C]."""
        return shrink(f_hat, self.grids[scale]).reshape(len(f_hat), -1, self.code_width)

    def _split(self, codes: Array) -> list[Array]:
        return jnp.split(codes, np.cumsum(self.sizes)[:-1].tolist(), axis=1)
