"""Vector quantisation against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.quantize import (
    Assignments,
    code_counts,
    entropies,
    nearest,
    perplexity,
    squared_distances,
    straight_through,
    usage,
    vector_sums,
)

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_nearest():
    z, codebook = normal(50, 4), normal(7, 4)
    distances = np.square(z[:, None] - codebook[None]).sum(-1)
    np.testing.assert_allclose(
        squared_distances(jnp.asarray(z), jnp.asarray(codebook)), distances, atol=1e-5
    )
    index = nearest(jnp.asarray(z), jnp.asarray(codebook))
    np.testing.assert_array_equal(index, distances.argmin(1))
    assert index.dtype == jnp.int32
    twice = jnp.asarray(np.concatenate([codebook, codebook]))
    np.testing.assert_array_equal(nearest(jnp.asarray(z), twice), distances.argmin(1))


def test_straight_through():
    z, quantised = jnp.asarray(normal(3, 2)), jnp.asarray(normal(3, 2))
    weights = jnp.asarray(normal(3, 2))
    value, (dz, dquantised) = jax.value_and_grad(
        lambda z, q: (straight_through(z, q) * weights).sum(), argnums=(0, 1)
    )(z, quantised)
    np.testing.assert_allclose(value, (quantised * weights).sum(), rtol=1e-5)
    np.testing.assert_array_equal(dz, weights)
    np.testing.assert_array_equal(dquantised, 0.0)


def test_entropies():
    z, codebook = normal(20, 4), normal(5, 4)
    distances = np.square(z[:, None] - codebook[None]).sum(-1).astype(np.float64)
    p = np.exp(-distances / 2.0)
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    expected = -(p * np.log(p)).sum(1).mean(), -(mean * np.log(mean + 1e-5)).sum()
    pair = entropies(jnp.asarray(z), jnp.asarray(codebook), temperature=2.0)
    np.testing.assert_allclose(pair, expected, rtol=1e-5)
    # A vector of weight zero is left out, whatever the others' is.
    weights = jnp.asarray(np.arange(20) < 7, jnp.float32)
    left = entropies(jnp.asarray(z), jnp.asarray(codebook), temperature=2.0, weights=weights)
    few = entropies(jnp.asarray(z[:7]), jnp.asarray(codebook), temperature=2.0)
    np.testing.assert_allclose(left, few, rtol=1e-5)
    # Sure assignments that use all codes evenly: no entropy each, ln V of the mean.
    sure = entropies(jnp.asarray(codebook), jnp.asarray(codebook), temperature=0.01)
    np.testing.assert_allclose(sure, (0, np.log(5)), rtol=1e-4, atol=1e-6)


def test_counts_and_sums():
    step_id = jnp.array([0, 1, 1], jnp.int32)
    codes = jnp.array([[0, 2, 2], [1, 2, 0]], jnp.int32)
    counts = code_counts(codes, step_id, 2, 4)
    np.testing.assert_array_equal(counts, [[1, 1, 0, 0], [1, 0, 3, 0]])
    vectors = normal(2, 3, 5)
    sums = vector_sums(Assignments(codes=codes, vectors=jnp.asarray(vectors)), 4)
    expected = np.zeros((4, 5))
    for index in np.ndindex(2, 3):
        expected[int(codes[index])] += vectors[index]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)


def test_usage_and_perplexity():
    counts = jnp.array([[5.0, 5, 5, 5], [7, 7, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(usage(counts), [1, 0.5, 0.25, 0])
    np.testing.assert_allclose(perplexity(counts)[:3], [4, 2, 1], rtol=1e-5)
    assert np.isfinite(perplexity(counts)).all()
