"""What is to be edited: images, masks and classes from files and flags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ar_jax.data.decode import decode_image
from ar_jax.evaluation.image_set import IMAGES, open_images
from ar_jax.evaluation.labels import check_classes

WHITE = 128  # of a mask's pixels and above


def read_images(path: str | Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 [N, H, W, C], labels int [N] or None) of a picture, a folder or an npz.

    Raises:
        ValueError: names the file and what it holds unless that is images of ``shape`` (H, W, C).
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".npz":
        images, labels = decode_image(path.read_bytes(), str(path))[None], None
    else:
        opened = open_images(path)
        images, labels = np.concatenate(list(opened.read(opened.count))), opened.labels
    (*size, channels), (*wanted, expected) = images.shape[1:], shape
    if channels != expected:
        raise ValueError(f"{path}: {channels} channels; the generator's images have {expected}")
    if size != wanted:
        raise ValueError(
            f"{path}: {_times(size)} pixels; the generator's images have {wanted[0]}x{wanted[1]}"
        )
    return images, labels


def read_mask(text: str, count: int, size: tuple[int, int]) -> np.ndarray:
    """Where to draw anew, bool [N, H, W] for ``count`` images of ``size`` (H, W).

    Args:
        text: a picture, white where to draw; an npz with arr_0 [H, W] or [N, H, W] of zeros and
            others; 'box:TOP,LEFT,BOTTOM,RIGHT' in pixels, the last ones not part of it; 'around:'
            with a box, all but it; or 'all'.

    Raises:
        ValueError: names the file, or the text, and what is wrong with it.
    """
    kind, _, numbers = text.partition(":")
    if text == "all":
        mask = np.ones(size, bool)
    elif kind in ("box", "around"):
        mask = _box(text, numbers, size) ^ (kind == "around")
    elif text.endswith(".npz"):
        with np.load(text) as arrays:
            if IMAGES not in arrays:
                raise ValueError(f"{text}: no array {IMAGES}; it has {', '.join(arrays.files)}")
            mask = arrays[IMAGES] != 0
    else:
        if not Path(text).is_file():
            raise ValueError(f"--mask={text} is no file, nor 'all', box:T,L,B,R or around:T,L,B,R")
        mask = decode_image(Path(text).read_bytes(), text, 1)[..., 0] >= WHITE
    if mask.shape not in (size, (count, *size)):
        raise ValueError(
            f"--mask={text}: {_times(mask.shape)}; the images are {count} of {_times(size)}"
        )
    return np.broadcast_to(mask, (count, *size))


def _box(text: str, numbers: str, size: tuple[int, int]) -> np.ndarray:
    parts = numbers.split(",")
    box = [int(part) for part in parts] if all(part.isdigit() for part in parts) else []
    if len(box) != 4 or not (box[0] < box[2] <= size[0] and box[1] < box[3] <= size[1]):
        raise ValueError(
            f"--mask={text}: it must be TOP,LEFT,BOTTOM,RIGHT inside images of {_times(size)}"
        )
    mask = np.zeros(size, bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def label_each(
    image: str | Path,
    flag: str,
    labels: Sequence[int] | None,
    own: np.ndarray | None,
    count: int,
    num_classes: int,
) -> np.ndarray:
    """A class for each of ``count`` images, int32 [count], of a flag or the file itself."""
    if labels is None and own is None:
        raise ValueError(f"{image} does not say what its images are: give --{flag}")
    chosen = check_classes(own if labels is None else labels, num_classes)  # type: ignore[arg-type]
    if len(chosen) not in (1, count):
        raise ValueError(f"--{flag}: {len(chosen)} classes for the {count} images of {image}")
    return np.broadcast_to(chosen, (count,))
