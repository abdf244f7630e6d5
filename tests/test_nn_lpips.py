"""LPIPS: identity, channels, and the gradient where features are zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nn.lpips import (
    SMALLEST,
    Backbone,
    check_images,
    layer_distances,
    lpips,
    normalised,
    param_shapes,
    scaled,
)


def test_channels():
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)), jnp.float32)
    np.testing.assert_array_equal(scaled(images), scaled(images.repeat(3, axis=-1)))
    with pytest.raises(ValueError, match="images have 4 channels"):
        check_images((2, 64, 64, 4), network="vgg")
    for network, size in SMALLEST.items():
        check_images((2, size, size, 3), network=network)
        with pytest.raises(ValueError, match=f"'{network}' takes at least {size}x{size}"):
            check_images((2, size - 1, size, 3), network=network)
    with pytest.raises(ValueError, match="network 'squeeze' is none of vgg, alexnet"):
        param_shapes("squeeze")
    with pytest.raises(ValueError, match="network 'squeeze' is none of vgg, alexnet"):
        lpips({}, images, images, network="squeeze")


@pytest.mark.parametrize("network", SMALLEST)
def test_the_smallest_images_have_a_last_map(network):
    for size in (SMALLEST[network], SMALLEST[network] - 1):
        images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        module = Backbone(network=network)
        maps, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
        assert (min(maps[-1].shape) == 0) == (size < SMALLEST[network])


def test_the_gradient_where_features_are_zero():
    """Naively it is NaN; it is zero, and others keep theirs."""
    features = jnp.asarray([[0.0, 0.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(normalised(features)[0, 0, 1], [0.6, 0.8], rtol=1e-6)

    def total(x: jax.Array) -> jax.Array:
        return layer_distances([x], [jnp.ones_like(x)]).sum()

    gradient = np.asarray(jax.jit(jax.grad(total))(features)).reshape(2, 2)
    np.testing.assert_array_equal(gradient[0], 0)
    # d/dx |x/|x| - u|^2 = -2 (u - (u.x) x / |x|^2) / |x| for a unit vector u, half in the mean.
    u, x = np.full(2, 0.5**0.5), np.array([3.0, 4.0])
    np.testing.assert_allclose(gradient[1], -(u - u @ x * x / 25) / 5, rtol=1e-5)
