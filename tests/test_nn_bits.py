"""Bits, and their entropies against sums over all codes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nn.bits import bit_entropies, bit_logits, bits_of, pack_bits, signs, unpack_bits
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def enumerated(
    z: np.ndarray, size: float, temperature: float, shares: np.ndarray
) -> tuple[float, float]:
    """Both entropies by the definition, over all 2^d codes, in float64."""
    codes = size * np.array(list(itertools.product((-1, 1), repeat=z.shape[1])))
    distances = np.square(z[:, None].astype(np.float64) - codes[None]).sum(-1)
    p = np.exp(-(distances - distances.min(1, keepdims=True)) / temperature)
    p /= p.sum(1, keepdims=True)
    return float((entropy(p) * shares).sum()), float(entropy((p * shares[:, None]).sum(0)))


def test_bits_and_numbers():
    index = jnp.arange(32)
    bits = unpack_bits(index, 5)
    assert bits.dtype == jnp.int8
    np.testing.assert_array_equal(bits, list(itertools.product((0, 1), repeat=5)))
    np.testing.assert_array_equal(pack_bits(bits), index)
    np.testing.assert_array_equal(signs(bits), 2.0 * np.asarray(bits) - 1)
    np.testing.assert_array_equal(bits_of(jnp.array([-1.0, 0.0, 1e-9])), [0, 0, 1])


@pytest.mark.parametrize(
    ("size", "temperature"), [(1.0, 2.0), pytest.param(4**-0.5, 0.05, marks=pytest.mark.slow)]
)
def test_factorised_entropies_are_the_enumerated_ones(size, temperature):
    """Of one group of all bits, for every weight of the vectors; of less, an upper bound."""
    z = 0.7 * RNG.standard_normal((40, 4)).astype(np.float32)
    weights = RNG.uniform(size=40).astype(np.float32)
    weights[:9] = 0.0
    for given, shares in ((None, np.full(40, 1 / 40)), (weights, weights / weights.sum())):
        each, mean = enumerated(z, size, temperature, shares)
        logits = bit_logits(jnp.asarray(z), size, temperature)
        found = jax.jit(lambda x, w: [bit_entropies(x, n, w) for n in (1, 2, 4)])(logits, given)
        np.testing.assert_allclose([e for e, _ in found], each, rtol=1e-5)
        np.testing.assert_allclose(found[2][1], mean, rtol=1e-5)
        assert found[0][1] > found[1][1] > found[2][1]


def test_groups_that_are_independent_in_the_mean_are_exact():
    """The first two bits and the last two of a product of two sets of vectors."""
    first, second = RNG.standard_normal((2, 6, 2)).astype(np.float32)
    z = np.array([[*a, *b] for a in first for b in second])
    _, mean = enumerated(z, 1.0, 2.0, np.full(36, 1 / 36))
    logits = bit_logits(jnp.asarray(z), 1.0, 2.0)
    pairs, bits = jax.jit(lambda x: [bit_entropies(x, n)[1] for n in (2, 1)])(logits)
    np.testing.assert_allclose(pairs, mean, rtol=1e-5)
    assert bits > mean + 1e-3
    with pytest.raises(ValueError, match="4 bits are no groups of 3"):
        bit_entropies(logits, 3)


def test_sure_bits_have_finite_gradients():
    def total(logits: jax.Array) -> jax.Array:
        each, mean = bit_entropies(logits, 2)
        return each - mean

    logits = jnp.array([[0.0, 400.0], [-400.0, 0.0], [200.0, -300.0]])
    value, gradient = jax.jit(jax.value_and_grad(total))(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
