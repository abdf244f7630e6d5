"""FID, inception score, precision and recall: what must hold for any features."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ar_jax.evaluation.frechet import FeatureAccumulator, frechet_distance, gaussian_stats
from ar_jax.evaluation.inception_score import InceptionScore, inception_score
from ar_jax.evaluation.manifold import (
    inside,
    manifold_radii,
    precision_recall,
    squared_distances,
)
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import script

pytestmark = pytest.mark.usefixtures("quick_compilation")


def features(seed: int, count: int, width: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.abs(rng.normal(0.4, 0.3, (count, width))).astype(np.float32)


def shards(array: np.ndarray, count: int) -> list[FeatureAccumulator]:
    """Every ``count``-th row to the same one, as devices share the rows of batches."""
    found = []
    for first in range(count):
        accumulator = FeatureAccumulator(f"shard {first}")
        for part in np.array_split(array[first::count], 2):
            accumulator.add(part)
        found.append(accumulator)
    return found


def test_statistics_merged_from_eight_shards_are_those_of_one():
    whole = features(0, 501) + 1e4  # an offset costs digits where squares are added up
    merged = FeatureAccumulator()
    for shard in shards(whole, 8):
        merged.merge(shard)
    one = gaussian_stats(whole)
    stats = merged.stats()
    assert stats.count == one.count == 501
    np.testing.assert_allclose(stats.mean, one.mean, rtol=1e-14)
    np.testing.assert_allclose(stats.covariance, one.covariance, rtol=1e-9, atol=1e-10)
    assert frechet_distance(stats, one) < 1e-9
    empty = FeatureAccumulator()
    empty.merge(FeatureAccumulator())
    assert empty.count == 0
    other = FeatureAccumulator("other")
    other.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="width 24, but 3 in other"):
        merged.merge(other)


def test_distance_does_not_depend_on_order_or_batches():
    a, b = features(1, 300), features(2, 200) * 1.1
    expected = frechet_distance(gaussian_stats(a), gaussian_stats(b))
    assert expected > 0.01
    for size in (1, 7, 300):
        accumulator = FeatureAccumulator()
        shuffled = np.random.default_rng(size).permutation(a)
        for start in range(0, len(a), size):
            accumulator.add(shuffled[start : start + size])
        got = frechet_distance(accumulator.stats(), gaussian_stats(b))
        np.testing.assert_allclose(got, expected, rtol=1e-10)
    # Of a set and itself: 0 with as many images as the width takes, and with far fewer.
    for count in (300, 10):
        assert frechet_distance(gaussian_stats(a[:count]), gaussian_stats(a[:count])) < 1e-12


def test_bounds_of_the_inception_score():
    classes, each = 6, 5
    sure = np.repeat(np.eye(classes) * 1e4, each, axis=0).astype(np.float32)  # [30, 6]
    np.testing.assert_allclose(inception_score(sure), classes, rtol=1e-12)  # all of them, sure
    np.testing.assert_allclose(inception_score(sure[:each]), 1.0)  # one of them
    np.testing.assert_allclose(inception_score(np.zeros((30, classes))), 1.0)  # no idea
    logits = np.random.default_rng(0).normal(0, 2, (103, classes)).astype(np.float32)
    assert 1.0 < inception_score(logits) < classes
    # Splits are consecutive and weigh the same, the short last one too; in sorted images each
    # split sees one class alone.
    np.testing.assert_allclose(inception_score(sure, each), 1.0)
    parts = [inception_score(logits[start : start + 50]) for start in (0, 50, 100)]
    np.testing.assert_allclose(inception_score(logits, 50), np.mean(parts), rtol=1e-13)
    streamed = InceptionScore(50)
    for start in range(0, len(logits), 17):
        streamed.add(logits[start : start + 17])
    np.testing.assert_allclose(streamed.result(), inception_score(logits, 50), rtol=1e-13)
    order = np.random.default_rng(1).permutation(len(logits))
    np.testing.assert_allclose(inception_score(logits[order]), inception_score(logits), rtol=1e-12)
    with pytest.raises(ValueError, match="of no images"):
        InceptionScore().result()
    with pytest.raises(ValueError, match="without NaN"):
        streamed.add(np.full((1, classes), np.nan))
    with pytest.raises(ValueError, match="7 classes, 6 before"):
        streamed.add(np.zeros((1, 7)))
    with pytest.raises(ValueError, match="split_size: 0"):
        InceptionScore(0)


def test_precision_and_recall():
    a = features(3, 40)
    assert precision_recall(a, a) == (1.0, 1.0)
    far = a + 100
    assert precision_recall(a, far) == (0.0, 0.0)
    # All samples near one reference image: each of them is real, and they reach little of the rest.
    few = a[:1] + np.linspace(0, 1e-3, 40, dtype=np.float32)[:, None]
    precision, recall = precision_recall(a, few)
    assert precision == 1.0 and recall <= 1 / 40
    # Exchanging the sets exchanges the two.
    b = features(4, 40) * 1.05
    precision, recall = precision_recall(a, b)
    assert 0 < precision < 1 and 0 < recall < 1
    assert precision_recall(b, a) == (recall, precision)


def test_manifolds_do_not_depend_on_blocks():
    a, b = features(5, 40), features(6, 40) * 1.05
    # By definition, in float64 and with all distances at hand.
    distances = np.square(a[:, None].astype(np.float64) - a[None]).sum(2)
    radii = np.sort(distances, axis=1)[:, 3]
    across = np.square(b[:, None].astype(np.float64) - a[None]).sum(2)
    for block in ((40, 40), (8, 16)):
        np.testing.assert_allclose(manifold_radii(a, block=block), radii, rtol=1e-4)
        hits = inside(b, a, radii.astype(np.float32), block=block)
        np.testing.assert_array_equal(hits, (across <= radii[None]).any(1))
    largest = 0

    def watched(rows, columns):
        nonlocal largest
        largest = max(largest, len(rows) * len(columns))
        return squared_distances(rows, columns)

    precision_recall(a, b, distances=watched, block=(8, 16))
    assert largest == 8 * 16  # no more distances at a time, however many images


def test_features_that_are_refused():
    a = features(7, 10)
    broken = a.copy()
    broken[3, 3] = np.nan
    with pytest.raises(ValueError, match="sample features: NaN"):
        precision_recall(a, broken)
    with pytest.raises(ValueError, match=r"\(10, 24\) and \(10, 23\)"):
        precision_recall(a, a[:, :-1])
    with pytest.raises(ValueError, match="reference features: 3 of them have no neighbour"):
        precision_recall(a[:3], a)


def test_the_benchmark_measures_every_metric(tmp_path, capsys):
    sizes = ("--samples=40", "--reference=48", "--width=8", "--batch_size=4", "--size=16")
    out = tmp_path / "metrics.json"
    with script("benchmarks/metrics", *sizes, f"--out={out}") as module:
        module.main(["metrics"])
    rows = json.loads(out.read_text())
    names = [row["metric"] for row in rows]
    assert names[0] == "mean and covariance" and names[-1] == "MSE, PSNR, SSIM"
    assert len(names) == 5 and all(row["cpu"] >= 0 and row["peak"] > 0 for row in rows)
    assert "precision, recall; 48 real" in capsys.readouterr().out
