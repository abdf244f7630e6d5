"""ArrayRecord files of one split: written whole or not at all, counted when opened, read by index.

Files have group size 1, so that a record is read without its neighbours, and are not compressed:
image files do not shrink, codes by a tenth, and those would take two to four times as long to read.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from ar_jax.data.manifest import META
from ar_jax.data.source import UnreadableItem

OPTIONS = "group_size:1,uncompressed"


class ShardWriter:
    """Writes ``directory``/``stem``-00000.arrayrecord and so on, ``shard_size`` records a file.

    A file appears under its name when it is whole. Files that are there already are kept, as far as
    they follow one another and have ``shard_size`` records each: what is written comes after them.

    Attributes:
        shards: [file name, number of records] of every file that is there.
    """

    def __init__(self, directory: pathlib.Path, stem: str, shard_size: int) -> None:
        self.shards: list[list[Any]] = []
        self._directory, self._stem, self._shard_size = directory, stem, shard_size
        self._writer: Any = None
        self._count = 0
        while self._next.is_file() and count_records(self._next) == shard_size:
            self.shards.append([self._next.name, shard_size])

    @property
    def _next(self) -> pathlib.Path:
        return self._directory / f"{self._stem}-{len(self.shards):05d}.arrayrecord"

    @property
    def _partial(self) -> pathlib.Path:
        return self._next.with_name(f".{self._next.name}.partial")

    def write(self, record: bytes) -> None:
        if self._writer is None:
            self._writer = array_record_module.ArrayRecordWriter(str(self._partial), OPTIONS)
        self._writer.write(record)
        self._count += 1
        if self._count == self._shard_size:
            self.close()

    def close(self) -> None:
        """Ends the last file. OSError if it cannot be read, because the disk is full perhaps."""
        if self._writer is None:
            return
        self._writer.close()
        if count_records(self._partial) != self._count:
            raise OSError(f"{self._partial}: was written and cannot be read; is the disk full?")
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(self._partial, self._next)
        self.shards.append([self._next.name, self._count])
        self._writer, self._count = None, 0

    def drop(self) -> None:
        """Forgets what was written to a file that is not whole."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()
        self._partial.unlink(missing_ok=True)
        self._writer, self._count = None, 0


class Shards:
    """The records of ``directory``'s files, in order; for threads, and may be pickled.

    Args:
        shards: [file name, number of records] of every file.

    Raises:
        ValueError: names a file that is missing or holds another number of records.
    """

    def __init__(self, directory: pathlib.Path, shards: Sequence[Sequence[Any]]) -> None:
        for file, count in shards:
            _check_shard(directory / file, count)
        self._files = [str(directory / file) for file, _ in shards]
        self._ends = np.cumsum([count for _, count in shards])
        self._readers: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # every process opens the files for itself

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        """Record ``index`` in [0, len); UnreadableItem where its checksum fails."""
        shard, row = self._place(index)
        reader = self._readers.get(shard)
        if reader is None:
            reader = self._readers.setdefault(shard, _open(self._files[shard]))
        try:
            # As a range: by a list of rows, as grain's own source reads, it is for a pool of
            # threads, which takes four times as long for a single one.
            record: bytes = reader.read(row, row + 1)[0]
        except RuntimeError as error:  # how the reader reports a failed checksum
            raise UnreadableItem(
                f"{self.describe(index)}: damaged ({error}); write the file again"
            ) from error
        return record

    def describe(self, index: int) -> str:
        """The file and the place in it."""
        shard, row = self._place(index)
        return f"{self._files[shard]} record {row}"

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index) - (int(self._ends[shard - 1]) if shard else 0)


def count_records(path: pathlib.Path) -> int:
    """Records that can be read in a file; 0 of one that is cut off, or no ArrayRecord file."""
    # A truncated file opens without complaint, reports no records, and complains when closed.
    reader = _open(str(path))
    found: int = reader.num_records()
    with contextlib.suppress(RuntimeError):
        reader.close()
    return found


def _check_shard(path: pathlib.Path, count: int) -> None:
    """Raises a ValueError unless the file is there and complete."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; {META} lists it with {count} records")
    if (found := count_records(path)) != count:
        raise ValueError(
            f"{path}: holds {found} readable records where {META} says {count}; the file is "
            "truncated or not an ArrayRecord file, write it again"
        )


def _open(path: str) -> Any:
    """A reader for random access, as grain opens it: it reads nothing ahead."""
    return array_record_module.ArrayRecordReader(
        path, "readahead_buffer_size:0", file_reader_buffer_size=32768
    )
