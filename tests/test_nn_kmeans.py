"""k-means, and the semantic codes that it makes of features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.evaluation.semantic_codes import SemanticCodebook, fit, read_features
from ar_jax.nn import kmeans as kmeans_module
from ar_jax.nn.kmeans import assign, kmeans
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)


def test_kmeans_finds_clusters(monkeypatch):
    """From any start that has a point of each; distances in one piece or in several."""
    centres = np.array([[0.0, 5.0], [5.0, 0.0], [-5.0, -5.0]], np.float32)
    label = np.arange(90) % 3
    points = centres[label] + 0.3 * RNG.standard_normal((90, 2)).astype(np.float32)
    means = np.stack([points[label == k].mean(0) for k in range(3)])
    codebook = fit(points.reshape(30, 3, 2), 3, seed=2)
    found = codebook.encode(points.reshape(30, 3, 2))
    assert found.shape == (30, 3)
    order = found.reshape(-1)[:3]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_array_equal(found.reshape(-1), order[label])
    np.testing.assert_allclose(codebook.centres[order], means, atol=1e-5)
    monkeypatch.setattr(kmeans_module, "CHUNK", 7)
    pieces = assign(jnp.asarray(points), jnp.asarray(codebook.centres))
    np.testing.assert_array_equal(pieces, found.reshape(-1))


@pytest.mark.slow
def test_kmeans_of_directions_and_of_too_few_points():
    points = jnp.asarray(RNG.standard_normal((20, 3)), jnp.float32)
    centres = kmeans(points, 4, jax.random.key(0), l2_norm=True)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(centres, kmeans(points, 4, jax.random.key(0), l2_norm=True))
    # As many centres as points: every point is its own.
    alone = kmeans(points, 20, jax.random.key(1), iterations=2)
    np.testing.assert_allclose(np.sort(alone, axis=0), np.sort(points, axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="21 centres of 20 features"):
        fit(np.asarray(points), 21)
    with pytest.raises(ValueError, match="features of 2 numbers, but centres of 3"):
        SemanticCodebook(np.asarray(centres)).encode(np.zeros((4, 2)))


def test_features_of_a_file(tmp_path):
    features = RNG.standard_normal((4, 2, 3)).astype(np.float32)
    np.savez(tmp_path / "features.npz", features=features, others=features)
    np.testing.assert_array_equal(read_features(tmp_path / "features.npz"), features)
    np.savez(tmp_path / "other.npz", other=features)
    with pytest.raises(ValueError, match=r"other.npz has no array 'features', only \['other'\]"):
        read_features(tmp_path / "other.npz")
    np.savez(tmp_path / "whole.npz", features=np.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match=r"features are int64 \[2, 3\]; they must be floats"):
        read_features(tmp_path / "whole.npz")
