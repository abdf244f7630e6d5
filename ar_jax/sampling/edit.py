"""Editing: parts of an image are drawn anew, the rest stays, with any system that has a sampler.

Inpainting, outpainting, class-conditional editing and regeneration differ in the mask and the
condition alone. A mask of pixels becomes a mask of codes (`code_mask`), the codes outside of it are
kept by the sampler (`ar_jax.sampling.kept`), and pixels may be put back after decoding (`blend`).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cond, Params, Samples
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.schedules import Grid, Schedule

COARSE_SHARE = 0.5


@flax.struct.dataclass
class Edited:
    """What `edit` returns."""

    samples: Samples  # as of the sampler; the images are blended if that was asked for
    given: Array  # the codes of the source images, as they are stored
    keep: Array  # bool [B, L], which of them the samples have too


def edit(
    sampler: Any,
    image: Array,
    mask: Any,
    cond: Cond,
    keys: Array | None = None,
    *,
    keep_first: int = 0,
    coarse_share: float = COARSE_SHARE,
    blend_pixels: bool = False,
    feather: int = 0,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    **chance: Any,
) -> Edited:
    """Images that are drawn anew under a mask, one for every condition.

    Codes outside the mask are the source's, bit for bit, and so are the pixels with
    ``blend_pixels``. One program serves all masks, conditions, knobs and keys of a batch size.

    Args:
        sampler: `ar_jax.build.create_sampler` of (system, params): any with ``system``, ``params``
            and the arguments ``given`` and ``keep``.
        image: float32 [B, H, W, C] in [-1, 1].
        mask: bool [B, H, W], or [H, W] for all, of any shape: where pixels are to be made anew.
        cond: what to draw there, for classes ``{'label': int32 [B]}``.
        keys: one an image [B]; see the sampler.
        keep_first: so many scales, or codes of a single grid in raster order, stay whatever the
            mask says: with a mask of everything, a regeneration that begins there.
        coarse_share: see `code_mask`.
        blend_pixels: take the source's pixels outside the mask.
        feather: with it, pixels over which the new ones fade in, inside the mask.
        knobs, guidance: of the sampler.
        chance: what else the sampler takes in place of keys: ``noise``, ``order``.

    Raises:
        ValueError: names what does not fit: the images, the mask, ``keep_first``.
    """
    system = sampler.system
    batch_size = len(jax.tree.leaves(cond)[0])
    shape = (batch_size, *system.tokenizer.image_shape)
    if image.shape != shape or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"image is {image.dtype} {image.shape}; it must be float32 {shape} in [-1, 1], one for "
            "every condition"
        )
    mask = check_mask(mask, shape[:3])
    keep = ~code_mask(system.schedule, mask, coarse_share) | _first(system.schedule, keep_first)
    given = source_codes(system.tokenizer, sampler.params["tokenizer"], image)
    samples = sampler(
        cond, keys, knobs=knobs, guidance=guidance, given=given, keep=jnp.asarray(keep), **chance
    )
    if blend_pixels:
        images = blend(image, samples.images, jnp.asarray(mask), jnp.int32(feather))
        samples = samples.replace(images=images)
    return Edited(samples=samples, given=given, keep=jnp.asarray(keep))


def check_mask(mask: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """``mask`` as bool [B, H, W]; ValueError unless it is that, or [H, W]."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape not in (shape, shape[1:]):
        raise ValueError(
            f"the mask is {mask.dtype} {mask.shape}; it must be bool {shape} or {shape[1:]}, True "
            "where pixels are made anew"
        )
    return np.broadcast_to(mask, shape)


def code_mask(
    schedule: Schedule, mask: np.ndarray, coarse_share: float = COARSE_SHARE
) -> np.ndarray:
    """Which codes are drawn anew, bool [B, L] as codes are stored, of pixels bool [B, H, W].

    A cell of the finest grid is, if any pixel is that it covers. A cell of a coarser scale is, if
    more than ``coarse_share`` of what it covers of the finest grid is: 0 redraws all that has to do
    with the masked part, so that it can take any form, but changes what the kept codes of finer
    scales around it refine; near 1 keeps the layout.

    Raises:
        ValueError: a share outside [0, 1).
    """
    if not 0 <= coarse_share < 1:
        raise ValueError(f"coarse_share is {coarse_share}; it must be in [0, 1)")
    finest = _covered(mask.astype(np.float64), schedule.grids[-1]) > 0  # [B, h, w]
    parts = [
        _covered(finest.astype(np.float64), grid) > coarse_share + 1e-9
        for grid in schedule.grids[:-1]
    ]
    return np.concatenate([part.reshape(len(mask), -1) for part in (*parts, finest)], axis=1)


def _covered(values: np.ndarray, grid: Grid) -> np.ndarray:
    """Mean [B, rows, columns] of ``values`` [B, H, W] over every cell of a grid laid over them."""
    for axis, cells in ((1, grid[0]), (2, grid[1])):
        size = values.shape[axis]
        edges = np.arange(cells + 1) * size / cells
        low, high = edges[:-1, None], edges[1:, None]
        pixels = np.arange(size)[None]
        # [cells, size]: the length of each pixel inside each cell, as a share of the cell's
        weights = np.clip(np.minimum(high, pixels + 1) - np.maximum(low, pixels), 0, 1)
        weights *= cells / size
        values = np.moveaxis(np.tensordot(values, weights, axes=(axis, 1)), -1, axis)
    return values


def _first(schedule: Schedule, count: int) -> np.ndarray:
    """bool [L]: the codes of the first ``count`` parts in which they are stored."""
    sizes = schedule.stored_sizes
    if not 0 <= count <= len(sizes):
        raise ValueError(
            f"keep_first is {count}; the codes are stored in {len(sizes)} parts: it must be "
            f"between 0 and {len(sizes)}"
        )
    return np.repeat(np.arange(len(sizes)), sizes) < count


@functools.partial(jax.jit, static_argnames="tokenizer")
def source_codes(tokenizer: Any, params: Params, image: Array) -> Array:
    """Codes of images float32 [B, H, W, C]; of a posterior its mean."""

    def encode(module: Any, image: Array) -> Array:
        return module.codes_of(module.encode(image))

    codes: Array = tokenizer.apply({"params": params}, image, method=encode)
    return codes


@jax.jit
def blend(source: Array, made: Array, mask: Array, feather: Array | int) -> Array:
    """Images [B, H, W, C]: ``source`` where ``mask`` [B, H, W] is not, ``made`` inside of it.

    Over the first ``feather`` pixels inside the mask, by the distance (of a king's moves) to its
    border, one fades into the other; the image's own border is none.
    """

    def erode(state: tuple[Array, Array]) -> tuple[Array, Array]:
        inside, distance = state
        inside = jax.lax.reduce_window(inside, True, jnp.logical_and, (1, 3, 3), (1, 1, 1), "SAME")
        return inside, distance + inside

    def goes_on(state: tuple[Array, Array]) -> Array:
        return (state[1].max() < feather + 1) & state[0].any()

    distance = mask.astype(jnp.int32)  # 0 outside, 1 at the border
    _, distance = jax.lax.while_loop(goes_on, erode, (mask, distance))
    share = jnp.minimum(distance / (feather + 1), 1.0)[..., None]
    return jnp.where(share == 1, made, source + share * (made - source))
