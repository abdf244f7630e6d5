"""Pictures made of images: class grids, reconstructions under originals, images forming."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ar_jax.io.images import image_grid, save_gif, save_png

# Images smaller than this on a side are enlarged by a whole factor.
VISIBLE_SIZE = 64


def to_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [..., H, W, C] with C of 1 or 3 to [..., H, W, 3]."""
    if images.dtype != np.uint8:
        raise ValueError(f"images: dtype {images.dtype}, expected uint8")
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images: {images.shape[-1]} channels, a picture takes 1 or 3")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def upscale(images: np.ndarray, factor: int | None = None) -> np.ndarray:
    """Repeats every pixel of [..., H, W, C] `factor` times each way.

    By default the smallest factor that takes the longer side to `VISIBLE_SIZE`.
    """
    if factor is None:
        factor = -(-VISIBLE_SIZE // max(images.shape[-3:-1]))
    if factor < 1:
        raise ValueError(f"factor: {factor}, expected at least 1")
    return images.repeat(factor, axis=-3).repeat(factor, axis=-2)


def tile(images: np.ndarray, factor: int | None = None, gap: int = 2) -> np.ndarray:
    """One picture of images uint8 [rows, columns, H, W, C], white between them.

    Args:
        images: in reading order, C of 1 or 3.
        factor: enlargement, as in `upscale`.
        gap: pixels between images.

    Returns:
        uint8 [height, width, C].
    """
    if images.ndim != 5 or 0 in images.shape:
        raise ValueError(f"images: shape {images.shape}, expected [rows, columns, H, W, C]")
    cells = upscale(images, factor)
    return image_grid(cells.reshape(-1, *cells.shape[2:]), columns=cells.shape[1], gap=gap)


def save_tiles(
    path: str | Path, images: np.ndarray, factor: int | None = None, gap: int = 2
) -> Path:
    """Writes `tile` of images uint8 [rows, columns, H, W, C] as PNG; returns the path."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: {str(path)!r} must end in .png")
    save_png(path, tile(images, factor, gap))
    return path


def class_grid(
    images: np.ndarray, labels: np.ndarray, num_classes: int, columns: int = 10
) -> np.ndarray:
    """A row for every class with its first `columns` images, as [num_classes, columns, H, W, C].

    Args:
        images: uint8 [N, H, W, C].
        labels: int [N].
        num_classes: number of rows.
        columns: images in a row; cells of a class with fewer images stay grey.
    """
    if len(images) != len(labels):
        raise ValueError(f"labels: {len(labels)} for {len(images)} images")
    grid = np.full((num_classes, columns, *images.shape[1:]), 128, np.uint8)
    for label in range(num_classes):
        members = images[np.asarray(labels) == label][:columns]
        grid[label, : len(members)] = members
    return grid


def reconstruction_pairs(
    originals: np.ndarray, reconstructions: np.ndarray, columns: int = 10
) -> np.ndarray:
    """Originals in the odd rows, the reconstruction of each below it.

    Args:
        originals: uint8 [N, H, W, C].
        reconstructions: uint8 [N, H, W, C].
        columns: pairs side by side; the last row of pairs is filled up with grey.

    Returns:
        uint8 [2 * ceil(N / columns), columns, H, W, C], to be given to `tile`.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"shapes disagree: {originals.shape} and {reconstructions.shape}")
    rows = -(-len(originals) // columns)
    grid = np.full((rows, 2, columns, *originals.shape[1:]), 128, np.uint8)
    for index in range(len(originals)):
        row, column = divmod(index, columns)
        grid[row, 0, column] = originals[index]
        grid[row, 1, column] = reconstructions[index]
    return grid.reshape(rows * 2, columns, *originals.shape[1:])


def formation_strip(partial: np.ndarray) -> np.ndarray:
    """Images as they form: [S, N, H, W, C] (after each step) to rows of S stages [N, S, H, W, C].

    Give it [S, 1, ...] for the strip of a single image.
    """
    if partial.ndim != 5:
        raise ValueError(f"partial: shape {partial.shape}, expected [S, N, H, W, C]")
    return partial.swapaxes(0, 1)


def save_frames(path: str | Path, partial: np.ndarray) -> None:
    """Writes images as they form, uint8 [S, N, H, W, C].

    A GIF shows all of them at once, one stage after the other; a PNG has a row of S stages for each
    (`formation_strip`).
    """
    if Path(path).suffix.lower() == ".gif":
        save_gif(path, np.stack([image_grid(upscale(stage)) for stage in partial]))
    else:
        save_tiles(path, formation_strip(partial))
