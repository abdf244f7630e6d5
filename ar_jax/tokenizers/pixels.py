"""Raw pixels as codes: nothing is learned and nothing is lost."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.schedules import Grid

Array = jax.Array


class PixelTokenizer(nn.Module, kw_only=True):
    """Images float32 [B, H, W, C] in [-1, 1] <-> codes int32 [B, L, C], a pixel's channels a code.

    It has no parameters.

    Attributes:
        image_size: pixels on a side.
        image_channels: C.
        values: V, that a channel can take; 256 are those of uint8 images, exactly.
    """

    image_size: int
    image_channels: int
    values: int = 256

    bits = 0
    codes_dtype = jnp.int32

    @property
    def trained(self) -> PixelTokenizer:
        """What is trained before there are codes: nothing."""
        return self

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The one grid of codes: the image's own."""
        return ((self.image_size, self.image_size),)

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.values

    @property
    def index_size(self) -> int:
        """How many numbers `index` tells apart."""
        return self.values

    def index(self, codes: Array) -> Array:
        """int32 [B, L]: the first channel, for counts of its values' use."""
        return codes[..., 0]

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """(L, C), of one image's codes."""
        return (self.image_size**2, self.image_channels)

    @property
    def encoding_shape(self) -> tuple[int, ...]:
        """Of what `encode` makes of one image: the same."""
        return self.codes_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return (self.image_size, self.image_size, self.image_channels)

    def __call__(self, images: Array) -> Array:
        """Encoded and decoded again: the images, each channel at the nearest of its values."""
        return self.decode(self.encode(images))

    def encode(self, images: Array) -> Array:
        """Codes."""
        codes = jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * (0.5 * (self.values - 1)))
        return codes.astype(jnp.int32).reshape(len(images), *self.codes_shape)

    def codes_of(self, encoding: Array, noise: Array | None = None) -> Array:
        """The codes of what `encode` made of images: itself, nothing is left to draw."""
        return encoding

    def decode(self, codes: Array, steps: Array | int | None = None) -> Array:
        """Images in [-1, 1]; grey from pixel ``steps`` on, or where bool [B, L] is False."""
        images = codes.astype(jnp.float32) * (2.0 / (self.values - 1)) - 1.0
        if steps is not None:
            known = steps if jnp.ndim(steps) > 0 else jnp.arange(codes.shape[1])[None] < steps
            images = jnp.where(jnp.asarray(known)[..., None], images, 0.0)
        return images.reshape(len(codes), *self.image_shape)
