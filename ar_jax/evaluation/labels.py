"""Which classes are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, ...: every prefix as balanced as can be; int32 [N]."""
    return np.arange(num_images, dtype=np.int32) % num_classes


def choose_labels(
    num_classes: int,
    labels: Sequence[int] | None = None,
    per_class: int | None = None,
    num_images: int | None = None,
) -> np.ndarray:
    """The class of every image to draw, int32 [N].

    Args:
        num_classes: of the generator.
        labels: classes to draw from; None: all.
        per_class: images of each of them, class after class.
        num_images: in place of that, N images whose classes take turns.
            Neither: one image of each of ``labels``, or ten of every class (of ten classes spread
            evenly, where there are more).

    Raises:
        ValueError: a class the generator does not know, counts below 1, or both counts.
    """
    if per_class is not None and num_images is not None:
        raise ValueError(f"--per_class={per_class} and --num_images={num_images}: give one of them")
    for name, value in (("per_class", per_class), ("num_images", num_images)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if labels is None:
        chosen = np.arange(num_classes, dtype=np.int32)
        if per_class is None and num_images is None:
            chosen = np.unique(np.arange(10, dtype=np.int32) * num_classes // 10)
            per_class = 10
    else:
        chosen = check_classes(labels, num_classes)
    if num_images is not None:
        return chosen[np.arange(num_images) % len(chosen)]
    return chosen.repeat(per_class or 1)


def check_classes(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Labels as int32 [N]; ValueError that names one the generator does not know."""
    chosen = np.asarray(labels)
    if chosen.ndim != 1 or not len(chosen) or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"labels {labels!r} must be a list of class numbers, at least one")
    for label in chosen[(chosen < 0) | (chosen >= num_classes)]:
        raise ValueError(f"label {label} is no class: the generator knows 0 to {num_classes - 1}")
    return chosen.astype(np.int32)
