"""Codes computed once by a tokenizer and kept on disk, in ArrayRecord files.

    DIR/<split>/meta.json
    DIR/<split>/codes-00000.arrayrecord, codes-00001.arrayrecord, ...

A record is an image: its label as int32 (4 bytes), followed by the codes of its A augmented copies
as uint16 (int32 where the vocabulary needs it) [A, L], float32 [A, L, W], or bits: of each copy
the L b bits, the first the most significant of its byte, filled up to whole bytes; little-endian.
Copy 0 is the plain one that evaluation reads; in training one of the A is drawn at every visit. L
codes are in generation order. Of the files see `ar_jax.data.shards`. meta.json, written last:

    format           'ar_jax.codes.2'; 'ar_jax.codes.1' is read too, see `codes_arrays`
    split            'train' or 'test'
    shards           [[file name, n], ...] in order
    copies           A
    length           L
    vocabulary_size  codes lie in [0, vocabulary_size); 0: they are floats or bits
    width            W, floats for every code; 0 or absent: codes are integers or bits
    bits             b, bits of every code; 0 or absent: codes are integers or floats
    sizes            [n_1, ..., n_S], codes of every step; sums to L
    num_classes, class_names
    tokenizer        what made the codes (a JSON object; compare it before decoding)
    image_size, channels   of the images behind the codes
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a copy of an image's codes lies in a record: L of them, see the top of this file."""

    length: int
    vocabulary_size: int
    width: int = 0
    bits: int = 0

    @property
    def type(self) -> np.dtype[Any]:
        """Of what is stored."""
        if self.bits:
            return np.dtype("u1")
        if self.width:
            return np.dtype("<f4")
        return np.dtype("<u2" if self.vocabulary_size <= 2**16 else "<i4")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        inner = self.width or self.bits
        return (self.length, inner) if inner else (self.length,)

    @property
    def size(self) -> int:
        """Bytes that a copy takes."""
        count = math.prod(self.shape)
        return -(-count // 8) if self.bits else count * self.type.itemsize

    def pack(self, codes: np.ndarray) -> bytes:
        """Of copies [A, L(, W or b)]."""
        if self.bits:
            return np.packbits(codes.reshape(len(codes), -1).astype(np.uint8), axis=1).tobytes()
        return codes.astype(self.type).tobytes()

    def unpack(self, record: bytes, start: int) -> np.ndarray:
        """The copy that begins at a byte; bits as int8."""
        if self.bits:
            packed = np.frombuffer(record, np.uint8, self.size, start)
            bits = np.unpackbits(packed, count=math.prod(self.shape))
            return bits.astype(np.int8).reshape(self.shape)
        count = math.prod(self.shape)
        return np.frombuffer(record, self.type, count, start).reshape(self.shape)


class CodesSource(Source):
    """Reads what `CodesWriter` wrote; that every file is whole is checked when it is opened.

    Beyond the attributes of every source: `length`, `vocabulary_size`, `width`, `bits`, `sizes`,
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
        self.bits: int = meta.get("bits", 0)
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
        if self.bits:  # no pattern of them is out of range
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
        self._shards = Shards(path, meta["shards"])
        self._layout = layout_of(meta)
        self._bytes = LABEL.size + meta["copies"] * self._layout.size

    def __len__(self) -> int:
        return len(self._shards)

    def describe(self, index: int) -> str:
        return self._shards.describe(index)

    def read(self, index: int, copy: int) -> tuple[np.ndarray, int]:
        """(codes [L(, W or b)], label) of one copy; UnreadableItem where the record is damaged."""
        record = self._shards[index]
        if len(record) != self._bytes:
            raise UnreadableItem(
                f"{self.describe(index)}: {len(record)} bytes, but {manifest.META} says "
                f"{self._bytes}: a label and the codes of every copy; write it again"
            )
        codes = self._layout.unpack(record, LABEL.size + copy * self._layout.size)
        return codes, LABEL.unpack_from(record)[0]


def layout_of(meta: Mapping[str, Any]) -> Layout:
    """The layout that meta.json describes."""
    kinds = {name: meta.get(name, 0) for name in ("width", "bits")}
    return Layout(length=meta["length"], vocabulary_size=meta["vocabulary_size"], **kinds)
