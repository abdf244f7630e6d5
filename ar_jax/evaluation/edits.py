"""Edits of images from files with a trained generator, into files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array
from ar_jax.build import AnySampler, create_sampler
from ar_jax.evaluation.composition import Composition
from ar_jax.evaluation.edit_sources import label_each, read_images, read_mask
from ar_jax.evaluation.grids import save_frames, save_tiles
from ar_jax.evaluation.labels import check_classes
from ar_jax.evaluation.load import describe_weights, load_system
from ar_jax.evaluation.samples import (
    check_class_conditional,
    check_outputs,
    describe_sampling,
    sampling_of,
    save_npz,
    stages,
)
from ar_jax.evaluation.standard import record_samples
from ar_jax.sampling.beam import BeamSearch
from ar_jax.sampling.edit import COARSE_SHARE, Edited, blend, edit, source_codes
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.invert import blend_noise, invert
from ar_jax.sampling.loop import image_keys
from ar_jax.tokenizers.tokenizer import to_float, to_uint8

MAX_FRAMES = 40
MAX_ROWS = 20  # images of a picture
GREY = 128


class EditedImages(NamedTuple):
    """K edits of each of N images, image after image."""

    images: np.ndarray  # uint8 [N K, H, W, C]
    labels: np.ndarray  # int32 [N K], the classes that were asked for
    source: np.ndarray  # uint8 [N, H, W, C]
    mask: np.ndarray  # bool [N, H, W], what was made anew
    codes: np.ndarray  # [N K, L(, C)]
    keep: np.ndarray  # bool [N K, L], the codes that are the source's

    @property
    def picture(self) -> np.ndarray:
        """Rows of an image, what of it was kept, and its edits: uint8 [N, 2 + K, H, W, C]."""
        source = self.source[:, None]
        kept = np.where(self.mask[:, None, ..., None], GREY, source).astype(np.uint8)
        edits = self.images.reshape(len(source), -1, *source.shape[2:])
        return np.concatenate([source, kept, edits], axis=1)


def edit_images(
    sampler: AnySampler | BeamSearch,
    images: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray,
    *,
    source_labels: np.ndarray | None = None,
    keep_noise: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    **settings: Any,
) -> tuple[np.ndarray, Edited]:
    """One edit of each image, of so many at a time; image n depends on its row and ``seed`` alone.

    Args:
        images: uint8 [N, H, W, C].
        mask: bool [N, H, W].
        labels: int32 [N], what to draw.
        source_labels: int32 [N]; what the images are: draw under the noise that gives them as
            such, see `ar_jax.sampling.invert`.
        keep_noise: the share of it that is kept, the rest fresh.
        settings: of `ar_jax.sampling.edit.edit`.

    Returns:
        (uint8 [N, H, W, C], the rest with rows as numpy arrays).
    """
    count = len(images)
    batch_size = min(batch_size, count)
    made: list[tuple[np.ndarray, Edited]] = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        image, cond = to_float(jnp.asarray(images[rows])), {"label": jnp.asarray(labels[rows])}
        keys = image_keys(seed, start, batch_size)
        chance: dict[str, Any] = {}
        if source_labels is not None:
            source = {"label": jnp.asarray(source_labels[rows])}
            chance = _noise(sampler, image, source, keys, keep_noise, knobs, guidance)
        edited = edit(
            sampler,
            image,
            mask[rows],
            cond,
            keys,
            knobs=knobs,
            guidance=guidance,
            **settings,
            **chance,
        )
        real = min(batch_size, count - start)
        edited = jax.tree.map(lambda leaf, real=real: np.asarray(leaf[:real]), edited)
        made.append((np.asarray(to_uint8(edited.samples.images)), edited))
    return jax.tree.map(lambda *parts: np.concatenate(parts), made[0], *made[1:])


def _noise(
    sampler: AnySampler | BeamSearch,
    image: Array,
    cond: dict[str, Array],
    keys: Array,
    share: float,
    knobs: Knobs | None,
    guidance: Guidance | None,
) -> dict[str, Array]:
    """The noise of images as images of ``cond``, partly replaced."""
    codes = source_codes(sampler.system.tokenizer, sampler.params["tokenizer"], image)
    noise = invert(sampler, codes, cond, keys, knobs=knobs, guidance=guidance)
    unused = sampler.system.schedule.num_steps  # the keys' numbers below are of the steps
    fresh = jax.vmap(lambda key: jax.random.fold_in(key, unused))(keys)
    return {"noise": blend_noise(noise, fresh, share)}


def edit_frames(
    sampler: AnySampler | BeamSearch,
    edited: Edited,
    source: np.ndarray,
    mask: np.ndarray,
    *,
    feather: int | None = None,
) -> np.ndarray:
    """The images as they change, uint8 [frames, N, H, W, C]: codes give way in their order.

    Args:
        edited: as of `edit_images`.
        source: uint8 [N, H, W, C].
        mask: bool [N, H, W].
        feather: of the blend in pixels; None: there is none.
    """
    schedule, codes, order = sampler.system.schedule, edited.samples.codes, edited.samples.order
    rank = np.broadcast_to(np.arange(schedule.length), edited.keep.shape)
    if order is not None:
        rank = np.argsort(np.asarray(order), axis=1)
    ends = np.cumsum(schedule.sizes)
    frames = [np.asarray(source)]
    for steps in stages(schedule.num_steps, MAX_FRAMES):
        drawn = rank < ends[steps - 1]
        drawn = drawn.reshape(drawn.shape + (1,) * (codes.ndim - 2))
        shown = sampler.decode(jnp.asarray(np.where(drawn, codes, edited.given)))
        if feather is not None:
            shown = blend(to_float(jnp.asarray(source)), shown, jnp.asarray(mask), feather)
        frame = np.asarray(to_uint8(shown))
        if (frame != frames[-1]).any():
            frames.append(frame)
    return np.stack(frames)


def edit_workdir(
    workdir: str | Path,
    out: str | Path,
    *,
    image: str | Path,
    mask: str | None = None,
    labels: Sequence[int] | None = None,
    per_class: int | None = None,
    inverted: bool = False,
    source_labels: Sequence[int] | None = None,
    keep_noise: float = 1.0,
    keep_first: int = 0,
    coarse_share: float = COARSE_SHARE,
    feather: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    composition: Composition | None = None,
    seed: int = 0,
    batch_size: int = 100,
    step: int | None = None,
    npz: str | Path | None = None,
    frames: str | Path | None = None,
    overwrite: bool = False,
) -> EditedImages:
    """Edits images of files with a trained generator of classes.

    Args:
        workdir, sampling, composition, seed, batch_size, step, overwrite: see
            `samples.sample_workdir`.
        out: the PNG: a row for each of at most `MAX_ROWS` images, see `EditedImages.picture`.
        image: see `edit_sources.read_images`.
        mask: see `edit_sources.read_mask`; with ``inverted`` or ``keep_first`` it is 'all' by
            default.
        labels: what to draw: one class for each image, or one for all, or several for one image;
            None: what the file says the images are.
        per_class: edits of each image for each of its classes.
        inverted: draw under the noise that gives the source as what it is.
        source_labels: what it is, one class for each image or for all; None: as the file says.
        keep_noise, keep_first, coarse_share: see `edit_images` and `ar_jax.sampling.edit.edit`.
        feather: put the source's pixels back outside the mask, fading over so many inside it;
            None leaves what was decoded.
        npz: also write all edits and their classes there.
        frames: GIF or PNG of the images as they change, see `edit_frames`.

    Raises:
        ValueError: names what is wrong, before anything is drawn or written.
    """
    check_outputs(out, npz, frames, overwrite=overwrite)
    if mask is None and not inverted and not keep_first:
        raise ValueError(f"--edit={image} needs --mask: which of its pixels are made anew")
    if not 0 <= keep_noise <= 1:
        raise ValueError(f"--keep_noise={keep_noise} must be in [0, 1]")
    config, system, params = load_system(workdir, step=step)
    check_class_conditional(system)
    shape, num_classes = system.tokenizer.image_shape, system.backbone.num_classes
    source, own = read_images(image, shape)
    masks = read_mask(mask or "all", len(source), shape[:2])
    if labels is not None and len(source) == 1:
        wanted = check_classes(labels, num_classes)[None]  # [1, K]
    else:
        wanted = label_each(image, "labels", labels, own, len(source), num_classes)[:, None]
    wanted = wanted.repeat(per_class or 1, axis=1)
    known = None
    if inverted:
        known = label_each(image, "source_labels", source_labels, own, len(source), num_classes)
    knobs, guidance = sampling_of(config, sampling)
    composition, edits = composition or Composition(), wanted.shape[1]
    sampler = composition.around(create_sampler(system, params), workdir)
    repeated = source.repeat(edits, axis=0), masks.repeat(edits, axis=0)
    with jax.default_matmul_precision(config["precision"]):
        images, edited = edit_images(
            sampler,
            *repeated,
            wanted.reshape(-1),
            source_labels=None if known is None else known.repeat(edits),
            keep_noise=keep_noise,
            seed=seed,
            batch_size=batch_size,
            knobs=knobs,
            guidance=guidance,
            keep_first=keep_first,
            coarse_share=coarse_share,
            blend_pixels=feather is not None,
            feather=feather or 0,
        )
        codes, keep = np.asarray(edited.samples.codes), np.asarray(edited.keep)
        made = EditedImages(images, wanted.reshape(-1), source, masks, codes, keep)
        save_tiles(out, made.picture[:MAX_ROWS])
        if frames is not None:
            first = jax.tree.map(lambda leaf: leaf[:MAX_ROWS], (edited, *repeated))
            save_frames(frames, edit_frames(sampler, *first, feather=feather))
    if npz is not None:
        save_npz(npz, made.images, made.labels)
        weights = describe_weights(workdir, config, step)
        how = f"{describe_sampling(knobs, guidance)}{composition.describe(workdir)}"
        record_samples(npz, f"edits of {image}, {how}, {weights}, seed {seed}")
    return made
