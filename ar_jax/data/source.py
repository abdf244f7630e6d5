"""What every data source offers, and the wrapper that skips unreadable items.

A source is a fixed, ordered, picklable list of labelled items. It does no shuffling and no
batching: `ar_jax.data.pipeline` does both. Worker processes receive a pickled copy, so a source
holds paths and small arrays, never an open file.
"""

from __future__ import annotations

import abc
import contextlib
import os
import tempfile
import weakref
from typing import Any

import numpy as np
from absl import logging

Item = dict[str, Any]

# A run of this many unreadable items is a broken disk or path, not a few bad files.
MAX_SKIPS_IN_A_ROW = 100


class UnreadableItem(ValueError):
    """One item cannot be read (a corrupt image, a damaged record); the others may be fine.

    Every other fault of a source (wrong layout, wrong labels, wrong channels) is a plain
    ValueError, which `on_error='skip'` does not hide.
    """


class Source(abc.ABC):
    """Random access to labelled images or to cached codes.

    Attributes:
        name: the spec it was opened from; begins error messages.
        kind: 'image' (items hold 'image' uint8 [H, W, C]) or 'codes' ('codes' int32 [L],
            float32 [L, W] or int8 [L, bits]).
        num_classes: labels lie in [0, num_classes).
        class_names: one name per label.
        channels: C of every image; 0 for codes whose images are unknown.
        image_size: (H, W) where every image has the same size, else None.
        copies: augmented copies of each item, of which `fetch` draws one.
        caption_shape: (rows, features) of the captions that items have; None: they have none.
        decodes: True where reading an item costs real work (image decoding), so threads pay off.
    """

    name: str
    kind: str = "image"
    num_classes: int
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None = None
    copies: int = 1
    caption_shape: tuple[int, int] | None = None
    decodes: bool = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abc.abstractmethod
    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        """Reads item `index` in [0, len): {'image' | 'codes', 'label' int32 scalar}.

        `rng` draws among the stored copies; without it the first copy is read.
        Raises UnreadableItem where this one item is damaged.
        """

    @abc.abstractmethod
    def describe(self, index: int) -> str:
        """Names item `index` for a message: the file, or the place in the file."""

    def __getitem__(self, index: int) -> Item:
        """Item `index`; IndexError out of range, negative indices count from the end."""
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self.name}: index {index} is out of range for {len(self)} items")
        return self.fetch(position)

    @property
    def skipped(self) -> int:
        """Number of different unreadable items met so far; 0 unless `on_error='skip'`."""
        return 0


class WrappedSource(Source):
    """Has the length, the names and the attributes of the source that it is of."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name = source.name
        self.kind = source.kind
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.channels = source.channels
        self.image_size = source.image_size
        self.copies = source.copies
        self.caption_shape = source.caption_shape
        self.decodes = source.decodes

    def __len__(self) -> int:
        return len(self._source)

    def describe(self, index: int) -> str:
        return self._source.describe(index)


class SkipUnreadable(WrappedSource):
    """Replaces an unreadable item by the next readable one, and counts.

    The replacement depends on the index alone (the next index, wrapping round), so a run is as
    reproducible as without damage. Indices met are appended to a small temporary file: threads and
    grain's worker processes share that file by name, so `skipped` counts what all of them met.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._seen: set[int] = set()
        handle, self._log = tempfile.mkstemp(prefix="ar_jax_skipped_")
        os.close(handle)
        self._cleanup = weakref.finalize(self, _remove, self._log)

    def __getstate__(self) -> dict[str, Any]:
        # Only the process that made the file removes it.
        return {k: v for k, v in self.__dict__.items() if k != "_cleanup"}

    def describe(self, index: int) -> str:
        """Names the item that stands at `index`: its replacement, where one is known."""
        candidates = ((index + step) % len(self) for step in range(len(self)))
        readable = (position for position in candidates if position not in self._seen)
        return self._source.describe(next(readable, index))

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        for step in range(min(MAX_SKIPS_IN_A_ROW, len(self))):
            position = (index + step) % len(self)
            try:
                return self._source.fetch(position, rng)
            except UnreadableItem as error:
                self._record(position, error)
                last = error
        raise ValueError(
            f"{self.name}: {step + 1} items in a row from index {index} are unreadable, so this is "
            f"not a few bad files; the last: {last}"
        )

    @property
    def skipped(self) -> int:
        try:
            return len(np.unique(np.fromfile(self._log, np.int64)))
        except FileNotFoundError:  # a copy that outlived its maker
            return len(self._seen)

    def _record(self, index: int, error: UnreadableItem) -> None:
        if index in self._seen:
            return
        self._seen.add(index)
        try:
            # Appends of 8 bytes are atomic: no lock is needed between threads and processes.
            handle = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            pass
        else:
            try:
                os.write(handle, np.int64(index).tobytes())
            finally:
                os.close(handle)
        logging.warning("skipping an unreadable item (%d so far): %s", self.skipped, error)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def split_name(name: str, split: str) -> str:
    """Canonical split: 'train' or 'test' ('val' and 'validation' mean the held-out split too)."""
    if split == "train":
        return "train"
    if split in ("test", "val", "validation"):
        return "test"
    raise ValueError(f"{name}: split={split!r} is not known; use 'train' or 'test'")


def check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises a ValueError that names the first label outside [0, num_classes)."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise ValueError(
            f"{name}: label {int(labels[bad[0]])} of item {int(bad[0])} is out of range for "
            f"num_classes={num_classes} ({bad.size} such labels); labels must lie in "
            f"0..{num_classes - 1}, the largest here is {int(labels.max())}"
        )
