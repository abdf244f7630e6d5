"""Caption features from a file, as the condition of a text-conditional generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FEATURES, MASK = "caption", "caption_mask"


def read_captions(path: str | Path, length: int, features: int) -> dict[str, np.ndarray]:
    """The condition that an npz file of caption features makes.

    The file has ``caption`` float [N, T, F], the rows a text encoder gave each caption (LlamaGen's
    text models: flan-T5-XL's, F = 2048), and ``caption_mask`` bool [N, T], the rows that are real;
    without it all are. T may be less than ``length``; real rows keep their order and are moved to
    the end, because the models were trained on left-padded captions.

    Args:
        length: rows of the model's prefix.
        features: F of the model.

    Returns:
        ``{'caption': float32 [N, length, F], 'caption_mask': bool [N, length], 'dropped': bool
        [N]}``, rows that are not real being zero.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (FEATURES, MASK) if name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no npz file of caption features: {error}") from error
    if FEATURES not in arrays:
        raise ValueError(f"{path} has no array {FEATURES!r}, float [N, T, {features}]")
    caption = arrays[FEATURES]
    if caption.ndim != 3 or not len(caption) or not np.issubdtype(caption.dtype, np.floating):
        raise ValueError(
            f"{path}: {FEATURES!r} is {caption.dtype} {list(caption.shape)}; it must be float "
            f"[N, T, {features}]"
        )
    count, rows, width = caption.shape
    if width != features or rows > length:
        raise ValueError(
            f"{path}: {FEATURES!r} has {rows} rows of {width} a caption; the generator takes at "
            f"most {length} rows of {features}"
        )
    mask = arrays.get(MASK, np.ones((count, rows), bool))
    if mask.shape != (count, rows):
        raise ValueError(
            f"{path}: {MASK!r} is {list(mask.shape)}; it must be {[count, rows]}, as the captions"
        )
    mask = mask.astype(bool)
    for name, bad in (
        ("has a value that is not finite", ~np.isfinite(caption).all(-1) & mask),
        ("has no real row", ~mask.any(1, keepdims=True)),
    ):
        if bad.any():
            raise ValueError(f"{path}: caption {int(np.argmax(bad.any(1)))} {name}")
    order = np.argsort(mask, axis=1, kind="stable")  # rows that are not real first
    moved = np.where(mask[..., None], caption, 0).astype(np.float32)
    moved = np.take_along_axis(moved, order[..., None], axis=1)
    missing = length - rows
    return {
        FEATURES: np.pad(moved, ((0, 0), (missing, 0), (0, 0))),
        MASK: np.pad(np.take_along_axis(mask, order, axis=1), ((0, 0), (missing, 0))),
        "dropped": np.zeros(count, bool),
    }
