"""Square images cut into square patches, row by row, and put together again."""

from __future__ import annotations

import jax

Array = jax.Array


def patchify(images: Array, patch: int) -> Array:
    """[N, C, s, s] -> [N, L, C, p, p], L = (s / p)^2."""
    count, channels, size, _ = images.shape
    side = size // patch
    cut = images.reshape(count, channels, side, patch, side, patch)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(count, side**2, channels, patch, patch)


def unpatchify(patches: Array) -> Array:
    """The inverse of `patchify`."""
    count, length, channels, patch, _ = patches.shape
    side = round(length**0.5)
    cut = patches.reshape(count, side, side, channels, patch, patch)
    return cut.transpose(0, 3, 1, 4, 2, 5).reshape(count, channels, side * patch, side * patch)
