"""Codes as they were kept before ArrayRecord: read here, no longer written.

    DIR/<split>/labels.npy          int32 [N]
    DIR/<split>/codes-00000.npy ... uint16 (int32 where the vocabulary needs it) [n, A, L], or
                                    float32 [n, A, L, W]

with the meta.json of `ar_jax.data.codes`. The files are memory mapped; nothing in them would tell
of a bit that changed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.data.manifest import META
from ar_jax.data.source import check_labels

ARRAYS_FORMAT = "ar_jax.codes.1"
LABELS = "labels.npy"


class ArraysOfCodes:
    """Codes in .npy files; every file's shape is checked when it is opened."""

    def __init__(self, path: pathlib.Path, meta: Mapping[str, Any]) -> None:
        self._files = [str(path / file) for file, _ in meta["shards"]]
        self._ends = np.cumsum([count for _, count in meta["shards"]])
        self._mapped: dict[int, np.ndarray] = {}
        for shard, (_, count) in enumerate(meta["shards"]):
            self._check_shard(shard, count, meta)
        labels = _load(path / LABELS)
        if labels.shape != (len(self),):
            raise ValueError(
                f"{path / LABELS}: shape {list(labels.shape)} for {len(self)} images; the cache is "
                "damaged, write it again"
            )
        check_labels(str(path / LABELS), labels, meta["num_classes"])
        self._labels = labels.astype(np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file.
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def describe(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self._files[shard]} row {row}"

    def read(self, index: int, copy: int) -> tuple[np.ndarray, int]:
        """(codes [L] or [L, W], label) of one copy."""
        shard, row = self._place(index)
        return np.asarray(self._shard(shard)[row, copy]), int(self._labels[index])

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._mapped:
            self._mapped[shard] = _load(pathlib.Path(self._files[shard]), mmap=True)
        return self._mapped[shard]

    def _check_shard(self, shard: int, count: int, meta: Mapping[str, Any]) -> None:
        codes, width = self._shard(shard), meta.get("width", 0)
        expected: tuple[int, ...] = (count, meta["copies"], meta["length"])
        kinds: tuple[Any, ...]
        kinds, named = (np.uint16, np.int32), "uint16 or int32"
        if width:
            expected, kinds, named = (*expected, width), (np.float32,), "float32"
        if codes.shape != expected or codes.dtype not in kinds:
            raise ValueError(
                f"{self._files[shard]}: {codes.dtype} {list(codes.shape)}, but {META} says {named} "
                f"{list(expected)}; the cache is damaged, write it again"
            )


def _load(path: pathlib.Path, mmap: bool = False) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the cache is incomplete, write it again") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); write it again") from error
