"""Images in ArrayRecord files.

    DIR/<split>/meta.json
    DIR/<split>/data-00000.arrayrecord, data-00001.arrayrecord, ...

A record is the label as int32 little-endian (4 bytes) followed by the bytes of an image file (PNG,
JPEG or WebP); of the files see `ar_jax.data.shards`. meta.json, written last:

    format       'ar_jax.images.1'
    shards       [[file name, number of records], ...] in order
    class_names  one per label
"""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ar_jax.data import manifest
from ar_jax.data.decode import decode_image, encode_png
from ar_jax.data.folder import FolderSource
from ar_jax.data.shards import Shards, ShardWriter
from ar_jax.data.source import MAX_SKIPS_IN_A_ROW, Item, Source, UnreadableItem

FORMAT = "ar_jax.images.1"
LABEL = struct.Struct("<i")


def write_records(
    directory: str | os.PathLike[str],
    items: Iterable[tuple[bytes | np.ndarray, int]],
    *,
    class_names: Sequence[str],
    shard_size: int = 16384,
) -> int:
    """Writes one split and returns the number of records.

    Args:
        directory: DIR/train or DIR/test; made, must be empty or absent.
        items: (image, label): the bytes of an image file, kept as they are, or uint8 [H, W, 1 | 3],
            stored as PNG. Consumed as a stream.
        class_names: one per label.
        shard_size: records per file.

    Raises:
        ValueError: the directory is not empty, a label is out of range, or there are no items.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} must be at least 1")
    path = manifest.start(directory)
    writer = ShardWriter(path, "data", shard_size)
    try:
        for index, (image, label) in enumerate(items):
            if not 0 <= label < len(class_names):
                raise ValueError(
                    f"{path}: label {label} of item {index} is out of range; {len(class_names)} "
                    f"class names allow 0..{len(class_names) - 1}"
                )
            encoded = image if isinstance(image, bytes) else encode_png(image)
            writer.write(LABEL.pack(int(label)) + encoded)
        writer.close()
    finally:
        writer.drop()
    if not writer.shards:
        raise ValueError(f"{path}: no items to write")
    names = [str(name) for name in class_names]
    manifest.finish(path, {"format": FORMAT, "shards": writer.shards, "class_names": names})
    return sum(count for _, count in writer.shards)


def source_items(source: Source) -> Iterator[tuple[bytes | np.ndarray, int]]:
    """The items of an image source for `write_records`; files of a folder keep their bytes."""
    for index in range(len(source)):
        item = source.fetch(index)
        image = source.encoded(index) if isinstance(source, FolderSource) else item["image"]
        yield image, int(item["label"])


class RecordSource(Source):
    """Reads what `write_records` wrote."""

    decodes = True

    def __init__(self, directory: str, split: str, *, channels: int | None = None) -> None:
        self.name = f"arrayrecord:{directory} ({split})"
        if channels not in (None, 1, 3):
            raise ValueError(f"{self.name}: channels={channels}; image files give 1 or 3")
        path = pathlib.Path(directory) / split
        meta = manifest.read(path, FORMAT, {"shards": list, "class_names": list})
        self.class_names = tuple(meta["class_names"])
        self.num_classes = len(self.class_names)
        self._records = Shards(path, meta["shards"])
        self._convert = channels
        self.channels = channels if channels is not None else self._first_channels()

    def __len__(self) -> int:
        return len(self._records)

    def describe(self, index: int) -> str:
        return self._records.describe(index)

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        place = self.describe(index)
        label, encoded = self._read(index, place)
        image = decode_image(encoded, place, self._convert)
        if image.shape[-1] != self.channels:
            raise ValueError(
                f"{place}: has {image.shape[-1]} channel(s), while the first readable image has "
                f"{self.channels}; set data.channels=1 or 3 to convert them all"
            )
        return {"image": image, "label": label}

    def _read(self, index: int, place: str) -> tuple[np.int32, bytes]:
        record = self._records[index]
        if len(record) <= LABEL.size:
            raise UnreadableItem(
                f"{place}: {len(record)} bytes; a record is a 4-byte label and an image file"
            )
        label = LABEL.unpack_from(record)[0]
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{place}: label {label} is out of range; {manifest.META} names "
                f"{self.num_classes} classes, 0..{self.num_classes - 1}"
            )
        return np.int32(label), record[LABEL.size :]

    def _first_channels(self) -> int:
        for index in range(min(len(self), MAX_SKIPS_IN_A_ROW)):
            place = self.describe(index)
            try:
                return decode_image(self._read(index, place)[1], place).shape[-1]
            except UnreadableItem as error:
                last = error
        raise ValueError(f"{self.name}: its first {index + 1} images are unreadable: {last}")
