"""Pictures on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PICTURE_CHANNELS = (1, 3)  # grey and colour: what a PNG of ours holds


def image_grid(images: np.ndarray, *, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Tiles uint8 [N, H, W, C] in reading order -> uint8 [rows, columns, C], white between them.

    Args:
        columns: tiles in a row; None: about as many as rows.
        gap: pixels between tiles.

    Raises:
        ValueError: no images, another dtype or rank, or C other than 1 and 3.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in PICTURE_CHANNELS:
        raise ValueError(
            f"images of dtype {images.dtype} and shape {images.shape} cannot be drawn: uint8 "
            "[N, H, W, C] with C 1 or 3 is needed"
        )
    count, height, width, channels = images.shape
    if not count:
        raise ValueError("images has no rows: nothing to draw")
    columns = min(count, columns or int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    grid = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(path: str | Path, image: np.ndarray, *, scale: int = 1) -> None:
    """Writes one uint8 image [H, W, C]; ``scale`` repeats every pixel that often, both ways."""
    image = image.repeat(scale, axis=0).repeat(scale, axis=1)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def save_grid(
    path: str | Path, images: np.ndarray, *, columns: int | None = None, scale: int = 1
) -> None:
    """Writes `image_grid` of uint8 [N, H, W, C] as PNG."""
    save_png(path, image_grid(images, columns=columns), scale=scale)


def save_gif(
    path: str | Path, frames: np.ndarray, *, milliseconds: int = 200, rest: int = 1500
) -> None:
    """Writes frames uint8 [S, H, W, C] that repeat for ever.

    Colours are reduced to 256 a frame; grey values are kept.

    Args:
        milliseconds: of a frame.
        rest: of the last one.

    Raises:
        ValueError: no frames, another dtype or rank, or C other than 1 and 3.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in PICTURE_CHANNELS:
        raise ValueError(
            f"frames of dtype {frames.dtype} and shape {frames.shape} cannot be drawn: uint8 "
            "[S, H, W, C] with C 1 or 3 is needed"
        )
    if not len(frames):
        raise ValueError("frames has no rows: nothing to draw")
    first, *others = (Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f) for f in frames)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    durations = [milliseconds] * len(others) + [rest]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
