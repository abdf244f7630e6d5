"""What a sampler keeps of codes that it is given: one contract for every schedule.

Every sampler takes ``given`` and ``keep``, both traced, so that no mask compiles anything:
``given`` [B, L] (a code's bits or numbers on a last axis) and ``keep`` bool [B, L], in the order in
which codes are stored. What it returns equals ``given`` bit for bit where ``keep``. All else is
drawn by the system's own steps given those of the kept codes that a step may see: in a sequence
(raster, scales) the earlier ones, in an order that is free (random orders, masked sets) all of
them, since the kept codes come first.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array


@flax.struct.dataclass
class Kept:
    """Codes of images, and which of them stay."""

    codes: Array  # int32 [B, L], int8 [B, L, bits] or float32 [B, L, C]
    keep: Array  # bool [B, L]

    def taken(self, order: Array) -> Kept:
        """Both in the order of the draws, int32 [B, L]."""
        rows = jnp.arange(len(order))[:, None]
        return Kept(codes=self.codes[rows, order], keep=self.keep[rows, order])

    def force(self, drawn: Array) -> Array:
        """``drawn``, or where it is kept the given code."""
        keep = self.keep.reshape(self.keep.shape + (1,) * (drawn.ndim - 2))
        return jnp.where(keep, self.codes.astype(drawn.dtype), drawn)

    def mix(self, weights: Array) -> Array:
        """As `force` for weights [B, n, V] of a soft draw: a kept code has all the weight."""
        whole = jax.nn.one_hot(self.codes, weights.shape[-1], dtype=weights.dtype)
        return jnp.where(self.keep[..., None], whole, weights)


def check_kept(given: Array | None, keep: Array | None, shape: tuple[int, ...]) -> Kept | None:
    """Both arguments of a sampler, of codes of ``shape`` (B, L, ...); None if neither is given.

    Raises:
        ValueError: one of them alone, or another shape or type.
    """
    if given is None and keep is None:
        return None
    if given is None or keep is None:
        alone, missing = ("keep", "given") if given is None else ("given", "keep")
        raise ValueError(f"{alone} is given without {missing}: codes and which of them stay")
    given, keep = jnp.asarray(given), jnp.asarray(keep)
    if given.shape != shape:
        raise ValueError(f"given has the shape {given.shape}; the codes have {shape}")
    if keep.shape != shape[:2] or keep.dtype != bool:
        raise ValueError(f"keep is {keep.dtype} {keep.shape}; it must be bool {shape[:2]}")
    return Kept(codes=given, keep=keep)


def kept_first(order: Array, keep: Array) -> Array:
    """An order int32 [B, L], or [1, L] for all, that begins with the cells of ``keep`` [B, L].

    Those that stay and those that do not are each in the order they were in.
    """
    order = jnp.broadcast_to(order, keep.shape).astype(jnp.int32)
    later = ~jnp.take_along_axis(keep, order, axis=1)
    return jnp.take_along_axis(order, jnp.argsort(later, axis=1, stable=True), axis=1)
