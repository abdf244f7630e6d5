"""Crops and flips on the host: uint8 [H, W, C] in, uint8 [size, size, C] out.

Randomness comes from the `np.random.Generator` given, and from nothing else.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

CROPS = ("none", "center", "random", "margin")


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square, as ADM prepares its training and reference images.

    Halved with a box filter while the shorter side is at least 2 * size, then resized with a
    bicubic filter so that the shorter side is `size`, then cut from the middle.
    """
    resized = _halve_and_resize(image, size)
    return _window(resized, (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2, size)


def random_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    min_crop: float = 0.8,
    max_crop: float = 1.0,
) -> np.ndarray:
    """ADM's random crop: a square of `min_crop` to `max_crop` of the shorter side.

    The shorter side becomes an integer drawn from ceil(size / max_crop) to ceil(size / min_crop),
    both included, by box halving and a bicubic filter; then a window is drawn.
    """
    smallest, largest = math.ceil(size / max_crop), math.ceil(size / min_crop)
    resized = _halve_and_resize(image, int(rng.integers(smallest, largest + 1)))
    return _random_window(resized, size, rng)


def margin_crop(
    image: np.ndarray, size: int, rng: np.random.Generator | None, *, margin: float = 1.125
) -> np.ndarray:
    """The shorter side resized to round(margin * size) with a Lanczos filter, then a window.

    The window is drawn, or the middle one where `rng` is None. With the default margin these are
    the training and validation crops of VAR.
    """
    shorter = round(margin * size)
    height, width = image.shape[:2]
    # The longer side is truncated and the centre rounded, as torchvision does both.
    if height <= width:
        shape = (shorter, int(shorter * width / height))
    else:
        shape = (int(shorter * height / width), shorter)
    resized = _resize(image, shape, Image.Resampling.LANCZOS)
    if rng is not None:
        return _random_window(resized, size, rng)
    top, left = (int(round((n - size) / 2)) for n in shape)
    return _window(resized, top, left, size)


def exact(image: np.ndarray, size: int) -> np.ndarray:
    """The image itself. Raises ValueError unless it is [size, size, C]."""
    if image.shape[:2] != (size, size):
        raise ValueError(
            f"is {image.shape[0]}x{image.shape[1]} pixels while data.image_size={size} and "
            "data.crop='none'; set data.crop='center' (or 'random', 'margin') to resize and cut it"
        )
    return image


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrored left to right with probability 1/2."""
    return image[:, ::-1] if rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """One crop and an optional flip, as data.crop and data.flip say.

    Attributes:
        size: side of the square that comes out.
        crop: 'none' (must already fit), 'center' (ADM), 'random' (ADM's random crop), 'margin'
            (resize to `margin` * size, random window).
        flip: mirror half of the images.
        min_crop, max_crop: fractions of the shorter side, for 'random'.
        margin: for 'margin'.
    """

    size: int
    crop: str = "none"
    flip: bool = False
    min_crop: float = 0.8
    max_crop: float = 1.0
    margin: float = 1.125

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"data.image_size={self.size} must be at least 1")
        if self.crop not in CROPS:
            raise ValueError(f"data.crop={self.crop!r} is not known; use one of {', '.join(CROPS)}")
        if not 0 < self.min_crop <= self.max_crop <= 1:
            raise ValueError(
                f"data.min_crop={self.min_crop}, data.max_crop={self.max_crop}: fractions of the "
                "shorter side with 0 < min_crop <= max_crop <= 1 are needed"
            )
        if not 1 <= self.margin < 16:
            raise ValueError(
                f"data.margin={self.margin} must be at least 1 (and below 16), such as 1.125"
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Training transform; without `rng` the deterministic one used in evaluation.

        In evaluation 'random' becomes 'center', 'margin' takes the middle, nothing is flipped.
        """
        if self.crop == "none":
            cut = exact(image, self.size)
        elif self.crop == "margin":
            cut = margin_crop(image, self.size, rng, margin=self.margin)
        elif self.crop == "random" and rng is not None:
            cut = random_crop(image, self.size, rng, min_crop=self.min_crop, max_crop=self.max_crop)
        else:
            cut = center_crop(image, self.size)
        return random_flip(cut, rng) if self.flip and rng is not None else cut


def _halve_and_resize(image: np.ndarray, shorter: int) -> np.ndarray:
    """Shorter side to `shorter`: box halving as long as it overshoots, then bicubic."""
    while min(image.shape[:2]) >= 2 * shorter:
        shape = (image.shape[0] // 2, image.shape[1] // 2)
        image = _resize(image, shape, Image.Resampling.BOX)
    scale = shorter / min(image.shape[:2])
    shape = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    return _resize(image, shape, Image.Resampling.BICUBIC)


def _resize(image: np.ndarray, shape: tuple[int, int], kind: Image.Resampling) -> np.ndarray:
    """Pillow's resize of uint8 [H, W, C] to [*shape, C]."""
    size = (shape[1], shape[0])
    if image.shape[-1] == 3:
        return np.asarray(Image.fromarray(image).resize(size, kind))
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(image[..., c])).resize(size, kind))
        for c in range(image.shape[-1])
    ]
    return np.stack(planes, axis=-1)


def _window(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return image[top : top + size, left : left + size]


def _random_window(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    top = int(rng.integers(image.shape[0] - size + 1))
    left = int(rng.integers(image.shape[1] - size + 1))
    return _window(image, top, left, size)
