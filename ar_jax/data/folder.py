"""A directory of class folders of images, in one of two layouts.

    DIR/train/<class>/x.png  and  DIR/test/<class>/y.png   (or DIR/val/, DIR/validation/)
    DIR/<class>/x.png                                      (held-out images chosen by a hash)

In the second layout an image is held out when the SHA-256 of '<class>/<file>' falls below
`holdout`: the choice depends on nothing but the name, so it survives copies, additions and
removals. Of every class the image with the largest hash stays in training.

Classes are the folders' names in the order of `sorted`. Hidden files are ignored; files that are
not images are ignored with a warning.
"""

from __future__ import annotations

import hashlib
import os
import pathlib

import numpy as np
from absl import logging

from ar_jax.data.decode import SUFFIXES, decode_image
from ar_jax.data.source import MAX_SKIPS_IN_A_ROW, Item, Source, UnreadableItem

HELD_OUT_FOLDERS = ("test", "val", "validation")
DEFAULT_HOLDOUT = 0.1


class FolderSource(Source):
    """Images decoded on access from files; see the module's text for the layouts."""

    decodes = True

    def __init__(
        self,
        directory: str,
        split: str,
        *,
        channels: int | None = None,
        holdout: float = DEFAULT_HOLDOUT,
    ) -> None:
        if channels not in (None, 1, 3):
            raise ValueError(
                f"folder:{directory}: channels={channels}; image files give channels=1 or 3"
            )
        root = pathlib.Path(directory)
        if not root.is_dir():
            raise ValueError(f"folder:{directory}: no such directory")
        self.name = f"folder:{directory} ({split})"
        self._root, listing = _list_split(root, split, holdout)
        self.class_names = tuple(listing)
        self.num_classes = len(listing)
        self._files = [f"{name}/{file}" for name, files in listing.items() for file in files]
        counts = [len(files) for files in listing.values()]
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        if not self._files:
            raise ValueError(
                f"{self.name}: holds no images; with so few images put the held-out ones into "
                f"{directory}/val/<class>/ and the others into {directory}/train/<class>/"
            )
        self._convert = channels
        self.channels = channels if channels is not None else self._first_channels()

    def __len__(self) -> int:
        return len(self._files)

    def describe(self, index: int) -> str:
        return os.path.join(self._root, self._files[index])

    def encoded(self, index: int) -> bytes:
        """The file's bytes. Raises UnreadableItem where it cannot be opened."""
        path = self.describe(index)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableItem(f"{path}: cannot be read ({error})") from error

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        path = self.describe(index)
        image = decode_image(self.encoded(index), path, self._convert)
        if image.shape[-1] != self.channels:
            raise ValueError(
                f"{path}: has {image.shape[-1]} channel(s), while the first readable image of "
                f"{self._root} has {self.channels}; set data.channels=1 or 3 to convert them all"
            )
        return {"image": image, "label": self._labels[index]}

    def _first_channels(self) -> int:
        for index in range(min(len(self), MAX_SKIPS_IN_A_ROW)):
            try:
                return decode_image(self.encoded(index), self.describe(index)).shape[-1]
            except UnreadableItem as error:
                last = error
        raise ValueError(f"{self.name}: its first {index + 1} images are unreadable: {last}")


def _list_split(root: pathlib.Path, split: str, holdout: float) -> tuple[str, dict[str, list[str]]]:
    """(directory that holds the class folders, {class: sorted file names of the split})."""
    if not _folders(root / "train"):
        return str(root), _choose(root, _list_classes(root), split, holdout)
    train = _list_classes(root / "train")
    if split == "train":
        return str(root / "train"), train
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if held_out is None:
        raise ValueError(
            f"{root}: has train/ but none of {', '.join(f'{n}/' for n in HELD_OUT_FOLDERS)}; put "
            f"the held-out images into {root}/val/<class>/"
        )
    classes = _list_classes(held_out)
    strangers = sorted(set(classes) - set(train))
    if strangers:
        raise ValueError(
            f"{held_out / strangers[0]}: class {strangers[0]!r} is not among the {len(train)} "
            f"classes of {root / 'train'}; the held-out folders need the same names"
        )
    return str(held_out), {name: classes.get(name, []) for name in train}


def _folders(directory: pathlib.Path) -> list[str]:
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_classes(directory: pathlib.Path) -> dict[str, list[str]]:
    """{class: sorted image files}. ValueError where there is no class, or one without images."""
    names = _folders(directory)
    if not names:
        raise ValueError(
            f"{directory}: holds no class folders; images belong into {directory}/<class>/x.png"
        )
    classes: dict[str, list[str]] = {}
    ignored: list[str] = []
    for name in names:
        classes[name] = []
        with os.scandir(directory / name) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                wanted = entry.name.lower().endswith(SUFFIXES) and entry.is_file()
                (classes[name] if wanted else ignored).append(entry.name)
        if not classes[name]:
            raise ValueError(
                f"{directory / name}: class folder without images ({', '.join(SUFFIXES)}); add "
                "images or remove the folder"
            )
        classes[name].sort()
    if ignored:
        logging.warning(
            "%s: ignored %d entries that are not images, such as %s",
            directory, len(ignored), sorted(ignored)[0],
        )  # fmt: skip
    return classes


def _choose(
    root: pathlib.Path, classes: dict[str, list[str]], split: str, holdout: float
) -> dict[str, list[str]]:
    """The files of a split by the hash of their names."""
    if not 0 < holdout < 1:
        raise ValueError(
            f"folder:{root}: holdout={holdout} must be a fraction between 0 and 1, such as "
            f"{DEFAULT_HOLDOUT}"
        )
    chosen: dict[str, list[str]] = {}
    for name, files in classes.items():
        hashes = {file: _hash(f"{name}/{file}") for file in files}
        kept = max(files, key=lambda file: (hashes[file], file))
        held = {file for file in files if file != kept and hashes[file] < holdout}
        chosen[name] = [file for file in files if (file in held) == (split == "test")]
    return chosen


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
