"""Area and bicubic resampling, against their definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nn.resize import area_matrix, bicubic_matrix, enlarge, shrink


@pytest.mark.parametrize(("source", "target"), [(4, 1), (4, 3), (16, 13), (5, 5), (7, 2)])
def test_area(source, target):
    """Output i is the mean of inputs floor(i n / m) .. ceil((i + 1) n / m) - 1."""
    x = np.random.default_rng(0).standard_normal(source)
    windows = [
        x[int(np.floor(i * source / target)) : int(np.ceil((i + 1) * source / target))]
        for i in range(target)
    ]
    expected = [window.mean() for window in windows]
    np.testing.assert_allclose(area_matrix(source, target) @ x, expected, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [(1, 4), (2, 4), (3, 16), (13, 16), (4, 4)])
def test_bicubic(source, target):
    """Convolution with Keys' kernel (a = -0.75) of the signal with its edges repeated."""
    signal = np.random.default_rng(0).standard_normal(source)

    def keys(t: np.ndarray) -> np.ndarray:
        t, a = np.abs(t), -0.75
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * (t**3 - 5 * t**2 + 8 * t - 4)
        return np.where(t <= 1, near, np.where(t < 2, far, 0.0))

    padded, taps = np.pad(signal, 4, mode="edge"), np.arange(source + 8) - 4
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    expected = [(keys(centre - taps) * padded).sum() for centre in centres]
    matrix = bicubic_matrix(source, target)
    np.testing.assert_allclose(matrix @ signal, expected, atol=1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    if source == target:
        np.testing.assert_array_equal(matrix, np.eye(source))


def test_grids_of_any_shape():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)
    small = jax.jit(lambda x: shrink(x, (3, 2)))(x)
    expected = np.einsum("ih,jw,bhwc->bijc", area_matrix(4, 3), area_matrix(6, 2), x)
    np.testing.assert_allclose(small, expected, atol=1e-6)
    large = jax.jit(lambda x: enlarge(x, (4, 6)))(small)
    expected = np.einsum("ih,jw,bhwc->bijc", bicubic_matrix(3, 4), bicubic_matrix(2, 6), small)
    np.testing.assert_allclose(large, expected, atol=1e-6)
    assert shrink(x, (4, 6)) is x
    assert enlarge(x, (4, 6)) is x
