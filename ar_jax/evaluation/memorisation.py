"""Are generated images copies of training images? Nearest neighbours, beside real held-out ones.

A distance alone cannot be judged: how near a training image an unseen real image lies says what is
usual. Generated images that are blurred or plain lie nearer in pixels without being copies, so the
distance in classifier features is taken too, and the pairs are returned to be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ar_jax.evaluation.classifier import Classifier


@dataclass(frozen=True)
class Neighbours:
    """Nearest training images by one distance, and how usual such distances are.

    Attributes:
        index: position of the nearest training image of each of k generated ones, int [k].
        distance: distance to it, float64 [k].
        held_out_distance: the same of m real held-out images, ascending, float64 [m].
        percentile: percentage of held-out images at least as near to a training image, float64 [k];
            around 50 on average for fresh images, 0 for one nearer than any held-out image.
        ratio: median distance of generated images divided by that of held-out ones; 1 is usual, far
            below 1 means copies (or, in pixels, blur).
        closer_than_usual: fraction of generated images nearer than 99% of the held-out ones;
            0.01 is usual.
    """

    index: np.ndarray
    distance: np.ndarray
    held_out_distance: np.ndarray
    percentile: np.ndarray
    ratio: float
    closer_than_usual: float


@dataclass(frozen=True)
class MemorisationResult:
    """Nearest training images of k generated ones, in pixels and in classifier features.

    Attributes:
        pixels: by root-mean-square pixel difference, pixel values in [0, 1].
        features: by Euclidean distance of classifier features.
        exact_copies: generated images equal to a training image, pixel by pixel.
        generated: the k images, uint8 [k, H, W, C].
        nearest_pixels: their nearest training images by pixels, uint8 [k, H, W, C].
        nearest_features: their nearest training images by features, uint8 [k, H, W, C].
    """

    pixels: Neighbours
    features: Neighbours
    exact_copies: int
    generated: np.ndarray
    nearest_pixels: np.ndarray
    nearest_features: np.ndarray


def nearest(
    queries: np.ndarray, references: np.ndarray, chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest reference of every query by Euclidean distance.

    Args:
        queries: [k, D], any real dtype.
        references: [M, D].
        chunk: references taken at a time.

    Returns:
        index int [k] and distance float64 [k]. Exact for uint8 vectors: a copy is at distance 0.
    """
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(f"shapes {queries.shape} and {references.shape}: expected [k, D], [M, D]")
    if len(references) == 0:
        raise ValueError("references: there are none to search")
    wide = queries.astype(np.float64)
    best = np.full(len(queries), np.inf)
    index = np.zeros(len(queries), np.int64)
    for start in range(0, len(references), chunk):
        part = references[start : start + chunk].astype(np.float64)  # [m, D]
        # |q - r|^2 without |q|^2, which is the same for every reference.
        scores = np.square(part).sum(axis=1)[None] - 2.0 * (wide @ part.T)  # [k, m]
        here = scores.argmin(axis=1)
        value = np.take_along_axis(scores, here[:, None], axis=1)[:, 0]
        better = value < best
        best = np.where(better, value, best)
        index = np.where(better, here + start, index)
    # Once more without the cancellation of the expanded square.
    difference = wide - references[index].astype(np.float64)
    return index, np.sqrt(np.square(difference).sum(axis=1))


def _neighbours(
    generated: np.ndarray, train: np.ndarray, held_out: np.ndarray, unit: float
) -> Neighbours:
    """`Neighbours` of vectors [k, D], [M, D], [m, D]; distances are multiplied by `unit`."""
    index, distance = nearest(generated, train)
    _, usual = nearest(held_out, train)
    usual = np.sort(usual)
    percentile = 100.0 * np.searchsorted(usual, distance, side="right") / len(usual)
    median = float(np.median(usual))
    return Neighbours(
        index=index,
        distance=distance * unit,
        held_out_distance=usual * unit,
        percentile=percentile,
        ratio=float(np.median(distance)) / median if median > 0 else float("nan"),
        closer_than_usual=float((distance < np.percentile(usual, 1.0)).mean()),
    )


def evaluate_memorisation(
    generated: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    features: Classifier | Callable[[np.ndarray], np.ndarray],
) -> MemorisationResult:
    """Nearest training images of generated ones, judged by those of held-out images.

    Args:
        generated: k images, uint8 [k, H, W, C].
        train: the training images, uint8 [M, H, W, C].
        held_out: real images not trained on, uint8 [m, H, W, C]; a hundred and more, with the
            classes in the same proportions as in `generated`.
        features: a classifier, or a function from uint8 images to features [n, F].

    Raises:
        ValueError: not uint8 images of one shape, or an empty set.
    """
    for name, images in (("generated", generated), ("train", train), ("held_out", held_out)):
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError(
                f"{name}: {images.dtype} {images.shape}, expected uint8 [N, H, W, C], N > 0"
            )
        if images.shape[1:] != generated.shape[1:]:
            raise ValueError(
                f"{name}: {images.shape[1:]} an image, the generated ones have "
                f"{generated.shape[1:]}"
            )

    def embed(images: np.ndarray) -> np.ndarray:
        return features(images).features if isinstance(features, Classifier) else features(images)

    dimensions = int(np.prod(generated.shape[1:]))
    by_pixels = _neighbours(
        generated.reshape(-1, dimensions),
        train.reshape(-1, dimensions),
        held_out.reshape(-1, dimensions),
        unit=1.0 / (255.0 * math.sqrt(dimensions)),
    )
    by_features = _neighbours(embed(generated), embed(train), embed(held_out), unit=1.0)
    return MemorisationResult(
        pixels=by_pixels,
        features=by_features,
        exact_copies=int((by_pixels.distance == 0).sum()),
        generated=generated,
        nearest_pixels=train[by_pixels.index],
        nearest_features=train[by_features.index],
    )
