"""Inception features: the resize, batches over devices, and the files that are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.evaluation.batches import apply_in_batches
from ar_jax.evaluation.inception import InceptionNetwork, load_inception
from ar_jax.io.network_file import write_network
from ar_jax.nn.inception import Inception, inception_features, resize
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_resize_takes_pixels_without_half_centres():
    ramp = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1).repeat(4, axis=1)
    along = np.asarray(resize(jnp.asarray(ramp), 8))[0, 0, :, 0]
    np.testing.assert_array_equal(along, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])  # the edge repeats
    turned = resize(jnp.asarray(ramp.transpose(0, 2, 1, 3)), 8)
    np.testing.assert_array_equal(turned[0, :, 0, 0], along)
    images = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize(jnp.asarray(images), 9), images)


def test_batches_over_devices():
    """Any size of batch on any number of devices gives the same rows in their order."""

    def function(params: jax.Array, images: jax.Array) -> dict[str, jax.Array]:
        x = images.astype(jnp.float32) * params
        return {"mean": x.mean((1, 2)), "first": x[:, 0, 0, 0]}

    images = np.random.default_rng(0).integers(0, 256, (11, 2, 2, 3)).astype(np.uint8)
    expected = function(jnp.float32(2), jnp.asarray(images))
    for count, size in ((1, 4), (8, 4), (8, 16)):
        devices = tuple(jax.devices()[:count])
        found = apply_in_batches(function, jnp.float32(2), images, batch_size=size, devices=devices)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    with pytest.raises(ValueError, match="11 images in batches of 0"):
        apply_in_batches(function, 2.0, images, batch_size=0, devices=devices)


def test_what_is_refused(tmp_path):
    network = InceptionNetwork({}, {}, tuple(jax.devices()))
    with pytest.raises(ValueError, match=r"float32 \(1, 8, 8, 3\), but Inception takes uint8"):
        network(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="no such file: convert pt_inception-2015-12-05"):
        load_inception(tmp_path / "no.npz")
    write_network(tmp_path / "x.npz", {"a": np.ones(1)}, {"family": "lpips"})
    with pytest.raises(ValueError, match="of the family 'lpips', not 'inception'"):
        load_inception(tmp_path / "x.npz")


@pytest.mark.slow
def test_from_a_file_on_all_devices(tmp_path):
    """Eight devices give what one gives, row by row; a grey image is that of three equal channels.

    Only the order of sums differs with the size of a device's batch.
    """
    images = jnp.zeros((1, 299, 299, 3))
    params = jax.jit(Inception().init)(jax.random.key(0), images)["params"]
    write_network(tmp_path / "x.npz", jax.device_get(params), {"family": "inception"})
    network = load_inception(tmp_path / "x.npz")
    assert len(network.devices) == 8
    grey = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 1)).astype(np.uint8)
    found = network(grey, batch_size=3)
    wanted = jax.jit(inception_features)(params, jnp.asarray(grey.repeat(3, axis=-1)))
    for name in ("pool", "spatial", "logits"):
        ours, theirs = (np.asarray(getattr(x, name)) for x in (found, wanted))
        assert ours.shape == theirs.shape and np.ptp(theirs) > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
