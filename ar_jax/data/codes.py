"""Codes computed once by a tokenizer and kept on disk.

    DIR/<split>/meta.json
    DIR/<split>/labels.npy          int32 [N]
    DIR/<split>/codes-00000.npy ... uint16 (int32 where the vocabulary needs it) [n, A, L], or
                                    float32 [n, A, L, W]

N images in order, A augmented copies of each (copy 0 is the plain one that evaluation reads; in
training one of the A is drawn at every visit), L codes in generation order. Shards are memory
mapped. meta.json, written last:

    format           'ar_jax.codes.1'
    split            'train' or 'test'
    shards           [[file name, n], ...] in order
    copies           A
    length           L
    vocabulary_size  codes lie in [0, vocabulary_size); 0: they are floats
    width            W, floats for every code; 0 or absent: codes are integers
    sizes            [n_1, ..., n_S], codes of every step; sums to L
    num_classes, class_names
    tokenizer        what made the codes (a JSON object; compare it before decoding)
    image_size, channels   of the images behind the codes
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ar_jax.data import manifest
from ar_jax.data.source import Item, Source, UnreadableItem, check_labels

FORMAT = "ar_jax.codes.1"
LABELS = "labels.npy"
META_TYPES = {
    "split": str,
    "shards": list,
    "copies": int,
    "length": int,
    "vocabulary_size": int,
    "sizes": list,
    "num_classes": int,
    "class_names": list,
    "tokenizer": dict,
    "image_size": int,
    "channels": int,
}


class CodesWriter:
    """Streams one split of codes to disk; use as a context manager.

    Nothing counts as written until the `with` block ends without an exception: then, and only
    then, meta.json appears.

    Args:
        directory: DIR/train or DIR/test; made, must be empty or absent.
        split: 'train' or 'test'.
        sizes: codes of every step, in order.
        copies: A, augmented copies per image.
        vocabulary_size: codes lie in [0, vocabulary_size); 0 with a ``width``.
        num_classes: labels lie in [0, num_classes).
        tokenizer: identity of the tokenizer, a JSON object.
        image_size, channels: of the images behind the codes.
        class_names: one per label; the labels' numbers if absent.
        width: floats for every code; 0: codes are integers.
        shard_size: images per file.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: str,
        *,
        sizes: Sequence[int],
        copies: int,
        vocabulary_size: int,
        num_classes: int,
        tokenizer: Mapping[str, Any],
        image_size: int,
        channels: int,
        class_names: Sequence[str] | None = None,
        width: int = 0,
        shard_size: int = 65536,
    ) -> None:
        if width and vocabulary_size:
            raise ValueError(
                f"{directory}: vocabulary_size={vocabulary_size} with width={width}: codes are "
                "integers or floats, set one of them to 0"
            )
        numbers = {
            "copies": copies,
            **({"width": width} if width else {"vocabulary_size": vocabulary_size}),
            "num_classes": num_classes,
            "shard_size": shard_size,
        }
        for field, value in numbers.items():
            if value < 1:
                raise ValueError(f"{directory}: {field}={value} must be at least 1")
        if split not in ("train", "test"):
            raise ValueError(f"{directory}: split={split!r}; use 'train' or 'test'")
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{directory}: sizes={list(sizes)} must be positive step sizes")
        names = [str(n) for n in (range(num_classes) if class_names is None else class_names)]
        if len(names) != num_classes:
            raise ValueError(f"{directory}: {len(names)} class names for num_classes={num_classes}")
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "split": split,
            "shards": [],
            "copies": int(copies),
            "length": int(sum(sizes)),
            "vocabulary_size": int(vocabulary_size),
            "width": int(width),
            "sizes": [int(n) for n in sizes],
            "num_classes": int(num_classes),
            "class_names": names,
            "tokenizer": dict(tokenizer),
            "image_size": int(image_size),
            "channels": int(channels),
        }
        self._dtype: Any = np.uint16 if vocabulary_size <= 2**16 else np.int32
        if width:
            self._dtype = np.float32
        self._shard_size = shard_size
        self._path = manifest.start(directory)
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._labels: list[np.ndarray] = []

    def __enter__(self) -> CodesWriter:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.close()

    def write(self, codes: np.ndarray, labels: np.ndarray) -> None:
        """Appends codes [n, A, L] or [n, A, L, W] (A left out where it is 1) and labels [n].

        Raises ValueError for another shape or dtype, for a code or label out of range, and for a
        float that is not finite.
        """
        codes, labels = np.asarray(codes), np.asarray(labels)
        copies, width = self._meta["copies"], self._meta["width"]
        shape = (self._meta["length"], width) if width else (self._meta["length"],)
        if codes.ndim == 1 + len(shape) and copies == 1:
            codes = codes[:, None]
        kind = np.floating if width else np.integer
        fits = np.issubdtype(codes.dtype, kind) and np.issubdtype(labels.dtype, np.integer)
        if codes.shape != (len(labels), copies, *shape) or labels.ndim != 1 or not fits:
            raise ValueError(
                f"{self._path}: codes {codes.dtype} {list(codes.shape)} with labels "
                f"{labels.dtype} {list(labels.shape)}; expected {'floats' if width else 'integers'}"
                f" [n, {copies}, {', '.join(map(str, shape))}] and integers [n]"
            )
        if len(labels) == 0:
            return
        if width:
            if not np.isfinite(codes).all():
                raise ValueError(f"{self._path}: the codes hold NaN or infinity")
        elif codes.min() < 0 or codes.max() >= self._meta["vocabulary_size"]:
            raise ValueError(
                f"{self._path}: codes span {codes.min()}..{codes.max()}, outside vocabulary_size="
                f"{self._meta['vocabulary_size']}"
            )
        check_labels(str(self._path), labels, self._meta["num_classes"])
        self._labels.append(labels.astype(np.int32))
        self._pending.append(codes.astype(self._dtype))
        self._pending_rows += len(codes)
        while self._pending_rows >= self._shard_size:
            self._flush(self._shard_size)

    def close(self) -> None:
        """Writes what is pending, the labels, and meta.json. ValueError if nothing was written."""
        if not self._labels:
            raise ValueError(f"{self._path}: no codes were written")
        if self._pending_rows:
            self._flush(self._pending_rows)
        np.save(self._path / LABELS, np.concatenate(self._labels))
        manifest.finish(self._path, self._meta)

    def _flush(self, rows: int) -> None:
        pending = np.concatenate(self._pending)
        name = f"codes-{len(self._meta['shards']):05d}.npy"
        np.save(self._path / name, pending[:rows])
        self._meta["shards"].append([name, rows])
        self._pending = [pending[rows:]]
        self._pending_rows = len(pending) - rows


class CodesSource(Source):
    """Reads what `CodesWriter` wrote; every file's shape is checked when it is opened.

    Beyond the attributes of every source: `length`, `vocabulary_size`, `width`, `sizes`,
    `tokenizer`.
    """

    kind = "codes"

    def __init__(self, directory: str, split: str) -> None:
        path = pathlib.Path(directory) / split
        meta = manifest.read(path, FORMAT, META_TYPES)
        self.name = f"codes:{directory} ({split})"
        if meta["split"] != split:
            raise ValueError(
                f"{path / manifest.META}: split is {meta['split']!r}, but the directory is named "
                f"{split!r}"
            )
        self.length: int = meta["length"]
        self.vocabulary_size: int = meta["vocabulary_size"]
        self.width: int = meta.get("width", 0)
        self.sizes: tuple[int, ...] = tuple(meta["sizes"])
        self.tokenizer: dict[str, Any] = meta["tokenizer"]
        self.copies = meta["copies"]
        self.num_classes = meta["num_classes"]
        self.class_names = tuple(meta["class_names"])
        self.channels = meta["channels"]
        self.image_size = (meta["image_size"], meta["image_size"])
        if sum(self.sizes) != self.length:
            raise ValueError(
                f"{path / manifest.META}: sizes {list(self.sizes)} sum to {sum(self.sizes)}, not to"
                f" length={self.length}"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{path / manifest.META}: {len(self.class_names)} class_names for num_classes="
                f"{self.num_classes}"
            )
        self._files = [str(path / file) for file, _ in meta["shards"]]
        self._ends = np.cumsum([count for _, count in meta["shards"]])
        self._mapped: dict[int, np.ndarray] = {}
        for shard, (_, count) in enumerate(meta["shards"]):
            self._check_shard(shard, count)
        self._labels = _load(path / LABELS)
        if self._labels.shape != (len(self),):
            raise ValueError(
                f"{path / LABELS}: shape {list(self._labels.shape)} for {len(self)} images; the "
                "cache is damaged, write it again"
            )
        check_labels(str(path / LABELS), self._labels, self.num_classes)
        self._labels = self._labels.astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file.
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def describe(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self._files[shard]} row {row}"

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        shard, row = self._place(index)
        copy = 0 if rng is None or self.copies == 1 else int(rng.integers(self.copies))
        codes = np.asarray(self._shard(shard)[row, copy])  # [L] or [L, W]
        if self.width:
            if not np.isfinite(codes).all():
                raise UnreadableItem(
                    f"{self.describe(index)}: the codes hold NaN or infinity; the file is damaged, "
                    "write it again"
                )
            return {"codes": codes, "label": self._labels[index]}
        codes = codes.astype(np.int32)
        if codes.min() < 0 or codes.max() >= self.vocabulary_size:
            raise UnreadableItem(
                f"{self.describe(index)}: codes span {codes.min()}..{codes.max()}, outside "
                f"vocabulary_size={self.vocabulary_size}; the file is damaged, write it again"
            )
        return {"codes": codes, "label": self._labels[index]}

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._mapped:
            self._mapped[shard] = _load(pathlib.Path(self._files[shard]), mmap=True)
        return self._mapped[shard]

    def _check_shard(self, shard: int, count: int) -> None:
        codes = self._shard(shard)
        expected: tuple[int, ...] = (count, self.copies, self.length)
        kinds: tuple[Any, ...]
        kinds, named = (np.uint16, np.int32), "uint16 or int32"
        if self.width:
            expected, kinds, named = (*expected, self.width), (np.float32,), "float32"
        if codes.shape != expected or codes.dtype not in kinds:
            raise ValueError(
                f"{self._files[shard]}: {codes.dtype} {list(codes.shape)}, but {manifest.META} "
                f"says {named} {list(expected)}; the cache is damaged, write it again"
            )


def _load(path: pathlib.Path, mmap: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the cache is incomplete, write it again") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); write it again") from error
