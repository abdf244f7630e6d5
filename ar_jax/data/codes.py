"""Codes computed once by a tokenizer and kept on disk, in ArrayRecord files.

    DIR/<split>/meta.json
    DIR/<split>/codes-00000.arrayrecord, codes-00001.arrayrecord, ...

A record is an image: its label as int32 (4 bytes), followed by the codes of its A augmented copies
as uint16 (int32 where the vocabulary needs it) [A, L], or float32 [A, L, W], all little-endian.
Copy 0 is the plain one that evaluation reads; in training one of the A is drawn at every visit. L
codes are in generation order. Of the files see `ar_jax.data.shards`. meta.json, written last:

    format           'ar_jax.codes.2'; 'ar_jax.codes.1' is read too, see `codes_arrays`
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

import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.data import manifest
from ar_jax.data.codes_arrays import ARRAYS_FORMAT, ArraysOfCodes
from ar_jax.data.shards import Shards
from ar_jax.data.source import Item, Source, UnreadableItem

FORMAT = "ar_jax.codes.2"
LABEL = struct.Struct("<i")
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


def stored_type(vocabulary_size: int, width: int) -> np.dtype[Any]:
    """Of the codes in a record."""
    if width:
        return np.dtype("<f4")
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<i4")


class CodesSource(Source):
    """Reads what `CodesWriter` wrote; that every file is whole is checked when it is opened.

    Beyond the attributes of every source: `length`, `vocabulary_size`, `width`, `sizes`,
    `tokenizer`.
    """

    kind = "codes"

    def __init__(self, directory: str, split: str) -> None:
        path = pathlib.Path(directory) / split
        meta = manifest.read(path, FORMAT, META_TYPES, older=[ARRAYS_FORMAT])
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
        stored = ArraysOfCodes if meta["format"] == ARRAYS_FORMAT else _Records
        self._stored: ArraysOfCodes | _Records = stored(path, meta)

    def __len__(self) -> int:
        return len(self._stored)

    def describe(self, index: int) -> str:
        return self._stored.describe(index)

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        copy = 0 if rng is None or self.copies == 1 else int(rng.integers(self.copies))
        codes, label = self._stored.read(index, copy)
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{self.describe(index)}: label {label} is out of range; {manifest.META} names "
                f"{self.num_classes} classes, 0..{self.num_classes - 1}"
            )
        if self.width:
            if not np.isfinite(codes).all():
                raise UnreadableItem(
                    f"{self.describe(index)}: the codes hold NaN or infinity; the file is damaged, "
                    "write it again"
                )
            return {"codes": codes, "label": np.int32(label)}
        codes = codes.astype(np.int32)
        if codes.min() < 0 or codes.max() >= self.vocabulary_size:
            raise UnreadableItem(
                f"{self.describe(index)}: codes span {codes.min()}..{codes.max()}, outside "
                f"vocabulary_size={self.vocabulary_size}; the file is damaged, write it again"
            )
        return {"codes": codes, "label": np.int32(label)}


class _Records:
    """Codes in ArrayRecord files."""

    def __init__(self, path: pathlib.Path, meta: Mapping[str, Any]) -> None:
        width = meta.get("width", 0)
        self._shards = Shards(path, meta["shards"])
        self._type = stored_type(meta["vocabulary_size"], width)
        self._shape = (meta["length"], width) if width else (meta["length"],)
        self._bytes = LABEL.size + meta["copies"] * math.prod(self._shape) * self._type.itemsize

    def __len__(self) -> int:
        return len(self._shards)

    def describe(self, index: int) -> str:
        return self._shards.describe(index)

    def read(self, index: int, copy: int) -> tuple[np.ndarray, int]:
        """(codes [L] or [L, W], label) of one copy; UnreadableItem where the record is damaged."""
        record = self._shards[index]
        if len(record) != self._bytes:
            raise UnreadableItem(
                f"{self.describe(index)}: {len(record)} bytes, but {manifest.META} says "
                f"{self._bytes}: a label and the codes of every copy; write it again"
            )
        count = math.prod(self._shape)
        start = LABEL.size + copy * count * self._type.itemsize
        codes = np.frombuffer(record, self._type, count, start).reshape(self._shape)
        return codes, LABEL.unpack_from(record)[0]
