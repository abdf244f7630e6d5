"""Continuous tokens: the latents of a KL autoencoder (latent diffusion, arXiv:2112.10752; MAR)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.resize import enlarge, shrink
from ar_jax.schedules import Grid, as_grids
from ar_jax.tokenizers.autoencoder import Autoencoder

Array = jax.Array

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of the official DiagonalGaussianDistribution


@flax.struct.dataclass
class Posterior:
    """Independent Gaussians, one for every number of the latents."""

    mean: Array  # float32 [...]
    log_variance: Array  # float32 [...], clipped

    @classmethod
    def of(cls, moments: Array) -> Posterior:
        """From means and log-variances side by side on the last axis, float32 [..., 2 C]."""
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return cls(mean=mean, log_variance=jnp.clip(log_variance, *LOG_VARIANCE_RANGE))

    @property
    def std(self) -> Array:
        """Standard deviation [...]."""
        return jnp.exp(0.5 * self.log_variance)

    def sample(self, noise: Array) -> Array:
        """mean + std * noise, noise standard normal [...]."""
        return self.mean + self.std * noise

    def kl(self) -> Array:
        """KL divergence from the standard normal, nats, summed over all but the first axis [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * terms.sum(tuple(range(1, terms.ndim)))


class KLTokenizer(nn.Module, kw_only=True):
    """Images float32 [B, H, W, C] in [-1, 1] <-> codes float32 [B, L, code_width], row by row.

    What an image is encoded into, and kept as on disk, are the moments of its latents' posterior;
    training draws latents from them, and codes are these, at every scale one after the other.

    Attributes:
        autoencoder: one with ``moments``.
        scale: codes are the latents times this, so that their variance is about one.
        patch: cells of the latent on a side of a code; within a code channels come first, then the
            rows and columns of the patch (MAR's order).
        scales: grids of area means of the codes, coarse to fine, as `ar_jax.schedules.as_grids`
            takes them; the last is the grid of the codes themselves. None: this one alone.
    """

    autoencoder: Autoencoder
    scale: float = 1.0
    patch: int = 1
    scales: tuple[int | tuple[int, int], ...] | None = None

    # There is no codebook.
    codebook_size = None

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grids of the codes, one for every scale."""
        rows, columns = self.autoencoder.grid
        if rows % self.patch or columns % self.patch:
            raise ValueError(
                f"tokenizer.patch is {self.patch}, but the latent is {rows}x{columns}: patch must "
                "divide both"
            )
        finest = (rows // self.patch, columns // self.patch)
        grids = (finest,) if self.scales is None else as_grids(self.scales)
        if grids[-1] != finest:
            raise ValueError(
                f"tokenizer.scales ends at {grids[-1]}, but the codes lie on the grid {finest}: "
                f"the last scale must be {finest}"
            )
        return grids

    @property
    def trained(self) -> KLTokenizer:
        """What training makes: coarser scales are another view of the same."""
        return self.clone(scales=None)

    @property
    def code_width(self) -> int:
        """Numbers in a code."""
        return self.autoencoder.code_width * self.patch**2

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """(L, code_width), of one image's codes."""
        return sum(rows * columns for rows, columns in self.grids), self.code_width

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """(l, code_width), of one image's codes of the finest scale, and of what draws them."""
        rows, columns = self.grids[-1]
        return rows * columns, self.code_width

    @property
    def codes_dtype(self) -> Any:
        """Of codes."""
        return jnp.float32

    @property
    def encoding_shape(self) -> tuple[int, ...]:
        """(l, 2 code_width), of what `encode` makes of one image."""
        return self.latents_shape[0], 2 * self.code_width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.autoencoder.image_shape

    def __call__(self, images: Array, noise: Array | None = None) -> tuple[Array, Posterior]:
        """Training's pass: (unclamped reconstruction [B, H, W, C], posterior of the latents).

        ``noise``, standard normal [B, h, w, autoencoder.code_width], draws the latents that are
        decoded; without it their mean is.
        """
        posterior = Posterior.of(self.autoencoder.encode(images))
        latents = posterior.mean if noise is None else posterior.sample(noise)
        return self.autoencoder.decode(latents), posterior

    def encode(self, images: Array) -> Array:
        """Moments float32 [B, l, 2 code_width]: means, then log-variances, before ``scale``."""
        mean, log_variance = jnp.split(self.autoencoder.encode(images), 2, axis=-1)
        return jnp.concatenate([self.patchify(mean), self.patchify(log_variance)], axis=-1)

    def codes_of(self, encoding: Array, noise: Array | None = None) -> Array:
        """Codes [B, L, code_width] of moments: drawn with ``noise``, else of the scaled means."""
        posterior = Posterior.of(encoding)
        latents = posterior.mean if noise is None else posterior.sample(noise)
        return self.all_scales(latents * self.scale)

    def all_scales(self, finest: Array) -> Array:
        """Codes [B, L, C] of those of the finest scale [B, l, C]."""
        if len(self.grids) == 1:
            return finest
        image = self._on_grid(finest, -1)
        scales = [shrink(image, grid) for grid in self.grids[:-1]]
        return jnp.concatenate([*(x.reshape(len(x), -1, x.shape[-1]) for x in scales), finest], 1)

    def next_context(self, codes: Array, scale: int) -> Array:
        """What the scale after ``scale`` is fed: the latter's codes [B, n, C], enlarged to it."""
        larger = enlarge(self._on_grid(codes, scale), self.grids[scale + 1])
        return larger.reshape(len(codes), -1, codes.shape[-1])

    def contexts(self, codes: Array) -> Array:
        """`next_context` of all scales but the last, of codes [B, L, C]: teacher forcing."""
        parts = [self.next_context(part, i) for i, part in enumerate(self._by_scale(codes)[:-1])]
        return jnp.concatenate(parts, axis=1)

    def decode(self, codes: Array, known: Array | None = None) -> Array:
        """Images in [-1, 1]; codes that are not ``known`` (bool [B, L]) count as zeros.

        Of several scales the finest is decoded. What is not known of it is enlarged from the one
        before, and so on.
        """
        finest = self._by_scale(codes)[-1]
        if known is not None:
            finest = self._filled(codes, known)
        latents = self.unpatchify(finest / self.scale)
        return jnp.clip(self.autoencoder.decode(latents), -1.0, 1.0)

    def _filled(self, codes: Array, known: Array) -> Array:
        """The finest scale [B, l, C]."""
        made = jnp.zeros((), codes.dtype)
        pairs = zip(self._by_scale(codes), self._by_scale(known), strict=True)
        for scale, (part, seen) in enumerate(pairs):
            made = jnp.where(seen[..., None], part, made)
            if scale + 1 < len(self.grids):
                made = self.next_context(made, scale)
        return made

    def _by_scale(self, rows: Array) -> list[Array]:
        """[B, L, ...] cut into the scales' [B, n, ...]."""
        ends = np.cumsum([height * width for height, width in self.grids])[:-1]
        return jnp.split(rows, ends.tolist(), axis=1)

    def _on_grid(self, codes: Array, scale: int) -> Array:
        """[B, n, C] of a scale as [B, h, w, C]."""
        return codes.reshape(len(codes), *self.grids[scale], codes.shape[-1])

    def patchify(self, latents: Array) -> Array:
        """[B, h, w, C] -> [B, L, C p p]."""
        batch, height, width, channels = latents.shape
        p = self.patch
        x = latents.reshape(batch, height // p, p, width // p, p, channels)
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, channels * p * p)

    def unpatchify(self, codes: Array) -> Array:
        """The inverse of `patchify`."""
        (rows, columns), p = self.grids[-1], self.patch
        x = codes.reshape(len(codes), rows, columns, -1, p, p)
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(len(codes), rows * p, columns * p, -1)
