"""A tiny image source whose items can be told apart, and streams of it."""

from __future__ import annotations

import itertools

import numpy as np

from ar_jax.data import train_iterator
from ar_jax.data.arrays import ArraySource
from ar_jax.data.source import Item, UnreadableItem
from ar_jax.data.transforms import ImageTransform


class Numbered(ArraySource):
    """`count` distinct images; pixel values and the label give the item's number away.

    Items in `bad` are unreadable. A module-level class, so worker processes can unpickle it.
    """

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        images = np.arange(count * 16).reshape(count, 4, 4, 1).astype(np.uint8)
        names = tuple(str(i) for i in range(count))
        super().__init__("numbered", images, np.arange(count), class_names=names)
        self._bad = bad

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        if index in self._bad:
            raise UnreadableItem(f"item {index} is corrupt")
        return super().fetch(index, rng)


TRANSFORM = ImageTransform(size=4, flip=True)


def batches(count: int, source=None, transform=TRANSFORM, **options) -> list[dict]:
    defaults = {"batch_size": 8, "seed": 3, "process_index": 0, "process_count": 1}
    with train_iterator(source or Numbered(24), transform, **(defaults | options)) as iterator:
        return list(itertools.islice(iterator, count))


def equal(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[key], y[key]) for key in x)
        for x, y in zip(a, b, strict=True)
    )


def labels(got: list[dict]) -> np.ndarray:
    return np.concatenate([batch["label"] for batch in got])
