"""Gaussian statistics of features and the Frechet distance between two of them, in float64.

In Inception's features the distance is FID, as the ADM evaluator computes it. In those of our own
small classifier reports call it `classifier_frechet_distance`: these numbers have nothing to do
with FID. A number says little without its floor: what as many real, held-out images score against
the same reference (`frechet_floor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class GaussianStats:
    """Mean and covariance of a set of features.

    Attributes:
        count: number of feature vectors.
        mean: [F] float64.
        covariance: [F, F] float64, divided by count - 1.
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray


class FeatureAccumulator:
    """Mean and covariance of features that arrive in batches; the batches are not kept.

    Batches are merged by their means and centred second moments, so a large common offset costs no
    digits (unlike sums of squares).
    """

    def __init__(self, name: str = "features") -> None:
        """An empty accumulator; `name` is what its errors call the features."""
        self._name = name
        self._count = 0
        self._mean = np.zeros(0)  # [F]
        self._scatter = np.zeros((0, 0))  # [F, F], sum of centred outer products

    @property
    def count(self) -> int:
        """Feature vectors seen so far."""
        return self._count

    def add(self, features: np.ndarray) -> None:
        """Takes in features [n, F] of any float dtype.

        Raises:
            ValueError: not two dimensional, a NaN or an infinity, or another width than before.
        """
        features = np.asarray(features)
        if features.ndim != 2:
            raise ValueError(f"{self._name}: shape {features.shape}, expected [N, F]")
        if not np.isfinite(features).all():
            row = int(np.nonzero(~np.isfinite(features).all(axis=1))[0][0])
            raise ValueError(
                f"{self._name}: NaN or infinity in row {self._count + row}; "
                "a Frechet distance of non-finite features means nothing"
            )
        if self._count and features.shape[1] != len(self._mean):
            raise ValueError(
                f"{self._name}: width {features.shape[1]}, but {len(self._mean)} in earlier batches"
            )
        n = len(features)
        if n == 0:
            return
        features = features.astype(np.float64)
        mean = features.mean(axis=0)  # [F]
        centred = features - mean[None]  # [n, F]
        self._take_in(n, mean, centred.T @ centred)

    def merge(self, other: FeatureAccumulator) -> None:
        """Takes in what another has seen: of the same features, on another device or host.

        Raises:
            ValueError: the widths differ.
        """
        if self._count and other._count and len(other._mean) != len(self._mean):
            raise ValueError(
                f"{self._name}: width {len(self._mean)}, but {len(other._mean)} in {other._name}"
            )
        if other._count:
            self._take_in(other._count, other._mean, other._scatter)

    def _take_in(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        """n vectors of this mean [F] and this sum of centred outer products [F, F]."""
        if self._count == 0:
            self._count, self._mean, self._scatter = n, mean, scatter
            return
        total = self._count + n
        delta = mean - self._mean  # [F]
        # Two steps in place: a third matrix of Inception's width would be another 32 MiB.
        grown = np.outer(delta, delta * (self._count * n / total))
        grown += self._scatter
        grown += scatter
        self._scatter = grown
        self._mean = self._mean + delta * (n / total)
        self._count = total

    def stats(self) -> GaussianStats:
        """What has been accumulated.

        Raises:
            ValueError: fewer than two feature vectors.
        """
        if self._count < 2:
            raise ValueError(
                f"{self._name}: {self._count} feature vectors; a covariance needs at least 2"
            )
        return GaussianStats(self._count, self._mean, self._scatter / (self._count - 1))


def gaussian_stats(features: np.ndarray, name: str = "features") -> GaussianStats:
    """Statistics of features [N, F] that are all at hand; raises as `FeatureAccumulator` does."""
    accumulator = FeatureAccumulator(name)
    accumulator.add(features)
    return accumulator.stats()


def _symmetric_root(covariance: np.ndarray) -> np.ndarray:
    """Square root of a positive semi-definite matrix [F, F].

    Eigenvalues at the level of rounding, negative ones included, count as zero: their square roots
    would not be at that level (1e-16 becomes 1e-8).
    """
    values, vectors = np.linalg.eigh(covariance)
    threshold = values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    roots = np.sqrt(np.where(values > threshold, values, 0.0))
    return (vectors * roots[None]) @ vectors.T


class FrechetParts(NamedTuple):
    """The terms of a Frechet distance, which is shift + trace_a + trace_b - 2 cross."""

    shift: float  # |mean_a - mean_b|^2
    trace_a: float
    trace_b: float
    cross: float  # tr sqrt(A^1/2 B A^1/2)

    @property
    def distance(self) -> float:
        """Never negative: of equal sets, rounding may leave -1e-15 of the sum."""
        return max(self.shift + self.trace_a + self.trace_b - 2.0 * self.cross, 0.0)


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr sqrt(A^1/2 B A^1/2), A and B the covariances.

    Returns:
        The distance (a squared length, as usual), never negative.

    Raises:
        ValueError: the widths differ, or a statistic is not finite.
    """
    return frechet_parts(a, b).distance


def frechet_parts(a: GaussianStats, b: GaussianStats) -> FrechetParts:
    """The terms of `frechet_distance`.

    ADM takes the trace of scipy's square root of A B, of which singular covariances cost nothing
    but digits: it is the sum of the singular values of A^1/2 B^1/2, which are computed here.

    Raises:
        ValueError: the widths differ, or a statistic is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"feature widths differ: {a.mean.shape[0]} and {b.mean.shape[0]}; "
            "both sets must come from the same classifier"
        )
    for stats in (a, b):
        if not (np.isfinite(stats.mean).all() and np.isfinite(stats.covariance).all()):
            raise ValueError("a mean or covariance holds NaN or infinity")
    product = _symmetric_root(a.covariance) @ _symmetric_root(b.covariance)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    shift = a.mean - b.mean
    return FrechetParts(
        shift=float(shift @ shift),
        trace_a=float(np.trace(a.covariance)),
        trace_b=float(np.trace(b.covariance)),
        cross=float(cross),
    )


def balanced_subset(
    labels: np.ndarray, count: int, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Indices [count] of a random subset with count / num_classes members of every class.

    Raises:
        ValueError: count is not a multiple of num_classes, or a class has too few members.
    """
    labels = np.asarray(labels)
    if count <= 0 or count % num_classes:
        raise ValueError(f"count: {count} is not a positive multiple of {num_classes} classes")
    per_class = count // num_classes
    chosen = []
    for label in range(num_classes):
        members = np.nonzero(labels == label)[0]
        if len(members) < per_class:
            raise ValueError(
                f"count: {count} balanced images take {per_class} of each class, "
                f"but class {label} has {len(members)}; "
                f"at most {max_balanced(labels, num_classes)} can be had"
            )
        chosen.append(rng.choice(members, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def max_balanced(labels: np.ndarray, num_classes: int) -> int:
    """Size of the largest subset with equally many members of every class."""
    labels = np.asarray(labels)
    return int(num_classes * np.bincount(labels, minlength=num_classes)[:num_classes].min())


@dataclass(frozen=True)
class Floor:
    """What real images that no model has made score against the reference.

    Attributes:
        count: images in a draw.
        draws: number of class-balanced draws.
        mean: mean distance over the draws: what a perfect sampler of `count` images would score.
        std: standard deviation over the draws (they overlap, so it is a lower estimate).
    """

    count: int
    draws: int
    mean: float
    std: float


def frechet_floor(
    reference: GaussianStats,
    held_out_features: np.ndarray,
    held_out_labels: np.ndarray,
    count: int,
    num_classes: int,
    draws: int = 10,
    seed: int = 0,
) -> Floor:
    """Distance of `count` class-balanced held-out images to the reference, over several draws.

    Args:
        reference: statistics of the reference images (the train split).
        held_out_features: [N, F] features of images the reference does not contain.
        held_out_labels: [N] their classes.
        count: images in a draw: as many as were generated, because the distance falls with count.
        num_classes: number of classes.
        draws: number of draws.
        seed: of the draws.

    Raises:
        ValueError: too few held-out images of a class, counts that disagree, draws below 1.
    """
    if len(held_out_features) != len(held_out_labels):
        raise ValueError(
            f"held_out_labels: {len(held_out_labels)} for {len(held_out_features)} features"
        )
    if draws < 1:
        raise ValueError(f"draws: {draws}, expected at least 1")
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(draws):
        chosen = balanced_subset(held_out_labels, count, num_classes, rng)
        stats = gaussian_stats(held_out_features[chosen], "held-out features")
        distances.append(frechet_distance(stats, reference))
    return Floor(count, draws, float(np.mean(distances)), float(np.std(distances)))
