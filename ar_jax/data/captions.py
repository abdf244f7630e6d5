"""Caption features from files: a condition to draw for, or beside the items of a source.

No text encoder is run here. Training reads one file a split, `DIR/train.npz` and `DIR/test.npz`, in
the format of `read_captions`, and holds it in memory. Captions are in the order of the source's
items, unless the file has ``caption_of`` int [items], which caption each item has; so the names of
classes are a caption each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ar_jax.data.source import Item, Source, WrappedSource

FEATURES, MASK, CHOICE = "caption", "caption_mask", "caption_of"


def read_captions(
    path: str | Path, length: int | None = None, features: int | None = None
) -> dict[str, np.ndarray]:
    """The condition that an npz file of caption features makes.

    The file has ``caption`` float [N, T, F], the rows a text encoder gave each caption (LlamaGen's
    text models: flan-T5-XL's, F = 2048), and ``caption_mask`` bool [N, T], the rows that are real;
    without it all are. T may be less than ``length``; real rows keep their order and are moved to
    the end, because the models were trained on left-padded captions.

    Args:
        length: rows of the model's prefix; None: as many as the file has.
        features: F of the model; None: the file's.

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
        raise ValueError(f"{path} has no array {FEATURES!r}, float [N, T, {features or 'F'}]")
    caption = arrays[FEATURES]
    if caption.ndim != 3 or not len(caption) or not np.issubdtype(caption.dtype, np.floating):
        raise ValueError(
            f"{path}: {FEATURES!r} is {caption.dtype} {list(caption.shape)}; it must be float "
            f"[N, T, {features or 'F'}]"
        )
    count, rows, width = caption.shape
    length, features = length or rows, features or width
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


class CaptionedSource(WrappedSource):
    """Items of a source with their captions' features: what a generator of captions trains on.

    An item has 'caption' float32 [T, F], 'caption_mask' bool [T] and 'dropped' False beside what
    the source gives; see `ar_jax.backbones.conditions`.

    Raises:
        ValueError: no file for this split, one that is wrong, or not a caption for every item.
    """

    def __init__(self, source: Source, directory: str, split: str) -> None:
        path = Path(directory) / f"{split}.npz"
        if not path.is_file():
            raise ValueError(
                f"data.captions={directory}: there is no {path}; it must hold the caption features "
                f"of the {len(source)} items of {source.name}"
            )
        self._captions = read_captions(path)
        found = len(self._captions[FEATURES])
        with np.load(path, allow_pickle=False) as file:
            choice = file[CHOICE] if CHOICE in file.files else np.arange(found)
        if choice.shape != (len(source),):
            raise ValueError(
                f"{path} has captions for {len(choice)} items, but {source.name} has {len(source)}"
            )
        if not np.issubdtype(choice.dtype, np.integer) or (choice < 0).any():
            raise ValueError(f"{path}: {CHOICE!r} must be numbers of captions, int and >= 0")
        if choice.max() >= found:
            raise ValueError(
                f"{path}: {CHOICE!r} names caption {choice.max()}, but there are {found}"
            )
        super().__init__(source)
        self._choice = choice
        rows, width = self._captions[FEATURES].shape[1:]
        self.caption_shape = (rows, width)

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        row = self._choice[index]
        return self._source.fetch(index, rng) | {n: a[row] for n, a in self._captions.items()}
