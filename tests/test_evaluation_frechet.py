"""Frechet distances against closed forms, streaming statistics, the floor."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from ar_jax.evaluation.frechet import (
    FeatureAccumulator,
    GaussianStats,
    balanced_subset,
    frechet_distance,
    frechet_floor,
    gaussian_stats,
    max_balanced,
)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> GaussianStats:
    return GaussianStats(1000, np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


def random_covariance(rng: np.random.Generator, width: int, rank: int) -> np.ndarray:
    factor = rng.normal(size=(width, rank))
    return factor @ factor.T


@pytest.mark.parametrize("rank", [12, 5, 0])
def test_equal_distributions_are_at_distance_zero(rank: int) -> None:
    rng = np.random.default_rng(0)
    stats = gaussian(rng.normal(size=12), random_covariance(rng, 12, rank))
    # Square roots of rounding errors would give 1e-7 here in the rank deficient cases.
    assert frechet_distance(stats, stats) < 1e-12 * max(1.0, np.trace(stats.covariance))


def test_a_shift_costs_its_squared_length() -> None:
    rng = np.random.default_rng(1)
    covariance = random_covariance(rng, 8, 8)
    mean, shift = rng.normal(size=8), rng.normal(size=8)
    distance = frechet_distance(gaussian(mean, covariance), gaussian(mean + shift, covariance))
    np.testing.assert_allclose(distance, shift @ shift, rtol=1e-11)


def test_commuting_covariances() -> None:
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    a[0] = b[1] = 0.0  # rank deficient, each in another direction
    got = frechet_distance(
        gaussian(np.zeros(6), (basis * a[None]) @ basis.T),
        gaussian(np.zeros(6), (basis * b[None]) @ basis.T),
    )
    np.testing.assert_allclose(got, np.square(np.sqrt(a) - np.sqrt(b)).sum(), rtol=1e-10)


def test_general_covariances_agree_with_a_matrix_square_root() -> None:
    rng = np.random.default_rng(3)
    a, b = random_covariance(rng, 10, 10), random_covariance(rng, 10, 10)
    means = rng.normal(size=(2, 10))
    root = scipy.linalg.sqrtm(a @ b)
    want = np.square(means[0] - means[1]).sum() + np.trace(a + b - 2 * root.real)
    got = frechet_distance(gaussian(means[0], a), gaussian(means[1], b))
    np.testing.assert_allclose(got, want, rtol=1e-8)
    np.testing.assert_allclose(
        got, frechet_distance(gaussian(means[1], b), gaussian(means[0], a)), rtol=1e-12
    )


def test_statistics_of_batches_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(4)
    # An offset of 1e6 leaves nothing of the covariance when squares are added up in float32, and
    # ten digits less when they are in float64.
    features = rng.normal(size=(501, 5)) * np.array([[1, 2, 3, 4, 5]]) + 1e6
    accumulator = FeatureAccumulator()
    for part in np.split(features, [1, 1, 200, 499]):
        accumulator.add(part)
    stats = accumulator.stats()
    assert stats.count == 501
    np.testing.assert_allclose(stats.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(stats.covariance, np.cov(features.T), rtol=1e-9, atol=1e-9)
    by_squares = (features.T @ features) / 501 - np.outer(stats.mean, stats.mean)
    assert np.abs(by_squares * 501 / 500 - np.cov(features.T)).max() > 1e-5  # the broken variant


def test_what_is_refused() -> None:
    features = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match="1 feature vectors; a covariance needs at least 2"):
        gaussian_stats(features[:1])
    broken = features.copy()
    broken[2, 1] = np.nan
    accumulator = FeatureAccumulator("generated features")
    accumulator.add(features)
    with pytest.raises(ValueError, match="generated features: NaN or infinity in row 6"):
        accumulator.add(broken)
    with pytest.raises(ValueError, match="width 2, but 3 in earlier batches"):
        accumulator.add(features[:, :2])
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \[N, F\]"):
        accumulator.add(features[:, 0])
    assert accumulator.count == 4  # nothing refused was counted
    with pytest.raises(ValueError, match="widths differ: 3 and 2"):
        frechet_distance(gaussian_stats(features), gaussian_stats(features[:, :2]))
    bad = gaussian(np.zeros(3), np.full((3, 3), np.inf))
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(bad, gaussian_stats(features))


def test_balanced_subsets() -> None:
    labels = np.array([0] * 5 + [1] * 4 + [2] * 9)
    assert max_balanced(labels, 3) == 12
    assert max_balanced(labels, 4) == 0
    chosen = balanced_subset(labels, 12, 3, np.random.default_rng(0))
    assert len(set(chosen)) == 12
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match=r"class 1 has 4; at most 12"):
        balanced_subset(labels, 15, 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match="10 is not a positive multiple of 3"):
        balanced_subset(labels, 10, 3, np.random.default_rng(0))


def test_the_floor_falls_with_the_number_of_images() -> None:
    rng = np.random.default_rng(5)
    width, classes = 16, 4
    reference = gaussian_stats(rng.normal(size=(20_000, width)))
    held_out, labels = rng.normal(size=(4000, width)), np.arange(4000) % classes
    floors = [
        frechet_floor(reference, held_out, labels, n, classes, draws=5) for n in (200, 800, 3200)
    ]
    # For standard normals the bias is close to (F + F (F + 1) / 4) / N while N is far below the
    # size of the reference: F / N from the mean, F (F + 1) / 4 N from the covariance.
    expected = (width + width * (width + 1) / 4) / 200
    assert abs(floors[0].mean / expected - 1) < 0.15
    assert floors[0].mean > 3 * floors[1].mean > 9 * floors[2].mean > 0
    assert floors[0].count == 200
    assert floors[0] == frechet_floor(reference, held_out, labels, 200, classes, draws=5)
    with pytest.raises(ValueError, match="held_out_labels: 3 for 4000"):
        frechet_floor(reference, held_out, labels[:3], 200, classes)
    with pytest.raises(ValueError, match="draws: 0"):
        frechet_floor(reference, held_out, labels, 200, classes, draws=0)
