"""Writes codes as `ar_jax.data.codes` reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ar_jax.data import manifest
from ar_jax.data.codes import FORMAT, LABEL, layout_of
from ar_jax.data.shards import ShardWriter
from ar_jax.data.source import check_labels

SHARD_SIZE = 16384  # images: at 800 a second, half a minute of encoding


class CodesWriter:
    """Streams one split of codes to disk; use as a context manager.

    Files appear as they are whole, and meta.json when the `with` block ends without an exception:
    nothing counts as a split of codes before. A writer of the same arguments goes on after the
    files that an interrupted one left.

    Attributes:
        written: images that are there already: those to come are written after them.

    Args:
        directory: DIR/train or DIR/test; made, must be absent or empty, or hold what a writer of
            the same arguments began.
        split: 'train' or 'test'.
        sizes: codes of every step, in order.
        copies: A, augmented copies per image.
        vocabulary_size: codes lie in [0, vocabulary_size); 0 with a ``width`` or ``bits``.
        num_classes: labels lie in [0, num_classes).
        tokenizer: identity of the tokenizer, a JSON object.
        image_size, channels: of the images behind the codes.
        class_names: one per label; the labels' numbers if absent.
        width: floats for every code; 0: codes are integers or bits.
        bits: of every code; 0: codes are integers or floats.
        shard_size: images per file: what an interrupted writer loses at most.

    Raises:
        ValueError: an argument out of range, or a directory that holds anything else; names what
            differs from what was begun there.
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
        bits: int = 0,
        shard_size: int = SHARD_SIZE,
    ) -> None:
        kinds = {"vocabulary_size": vocabulary_size, "width": width, "bits": bits}
        said = {name: value for name, value in kinds.items() if value}
        if len(said) > 1:
            raise ValueError(
                f"{directory}: {' with '.join(f'{name}={value}' for name, value in said.items())}: "
                "codes are integers, floats or bits, set all but one of them to 0"
            )
        numbers = {
            "copies": copies,
            **(said or {"vocabulary_size": vocabulary_size}),
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
            "copies": int(copies),
            "length": int(sum(sizes)),
            "vocabulary_size": int(vocabulary_size),
            "width": int(width),
            **({"bits": int(bits)} if bits else {}),
            "sizes": [int(n) for n in sizes],
            "num_classes": int(num_classes),
            "class_names": names,
            "tokenizer": dict(tokenizer),
            "image_size": int(image_size),
            "channels": int(channels),
        }
        self._layout = layout_of(self._meta)
        self._path = manifest.start(directory, {**self._meta, "shard_size": shard_size})
        self._writer = ShardWriter(self._path, "codes", shard_size)
        self.written = sum(count for _, count in self._writer.shards)

    def __enter__(self) -> CodesWriter:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.drop()

    def write(self, codes: np.ndarray, labels: np.ndarray) -> None:
        """Appends codes [n, A, L(, W or b)] (A left out where it is 1) and labels [n].

        Raises ValueError for another shape or dtype, for a code or label out of range, and for a
        float that is not finite.
        """
        codes, labels = np.asarray(codes), np.asarray(labels)
        copies, width, shape = self._meta["copies"], self._meta["width"], self._layout.shape
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
        else:
            bits, size = self._layout.bits, self._layout.vocabulary_size
            if codes.min() < 0 or codes.max() >= (2 if bits else size):
                outside = "the bits 0 and 1" if bits else f"vocabulary_size={size}"
                raise ValueError(
                    f"{self._path}: codes span {codes.min()}..{codes.max()}, outside {outside}"
                )
        check_labels(str(self._path), labels, self._meta["num_classes"])
        for label, row in zip(labels.tolist(), codes, strict=True):
            self._writer.write(LABEL.pack(label) + self._layout.pack(row))
        self.written += len(labels)

    def close(self) -> None:
        """Ends the last file and writes meta.json. ValueError if nothing was written."""
        if not self.written:
            raise ValueError(f"{self._path}: no codes were written")
        self._writer.close()
        manifest.finish(self._path, {**self._meta, "shards": self._writer.shards})
