"""Sampling in orders of one's own: the distribution, the cells, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.sampling import loop
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import FLATTEN, SETTINGS, Toy, V, p_value
from tests.toy_systems import toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

ORDER = (2, 0, 3, 1)


@pytest.fixture(scope="module")
def toy() -> Toy:
    schedule, autoencoder = dict(grid=2), dict(image_size=4)
    system, params = toy_system("random", vocab_size=V, schedule=schedule, autoencoder=autoencoder)
    # Flat enough for many images to be likely.
    params = params | {"head": jax.tree.map(lambda a: FLATTEN * a, params["head"])}
    return Toy(system, params, ORDER)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "plain" else ()) for n in SETTINGS]
)
def test_samples_follow_the_joint_of_their_order(toy, name):
    joint = toy.joint(*SETTINGS[name])
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    counts = toy.counts(*SETTINGS[name])
    assert p_value(counts, joint) > 1e-3
    if name == "plain":  # Another order of the same model is another distribution.
        raster = Toy(toy.system, toy.params)
        assert p_value(counts, raster.joint(*SETTINGS[name])) < 1e-9


@pytest.mark.slow  # samples of a broken one
def test_a_broken_sampler_is_found(toy, monkeypatch):
    """One that leaves the codes where they were drawn."""
    monkeypatch.setattr(loop, "to_cells", lambda codes, order: codes)
    draw_codes: Any = loop.draw_codes
    # A function of its own: jit remembers traces by function.
    untraced = functools.update_wrapper(lambda *a, **k: draw_codes.__wrapped__(*a, **k), draw_codes)
    fresh = jax.jit(untraced, static_argnums=0, static_argnames="guided")
    monkeypatch.setattr(loop, "draw_codes", fresh)
    plain = SETTINGS["plain"]
    assert p_value(toy.counts(*plain), toy.joint(*plain)) < 1e-9


@pytest.fixture(scope="module")
def sampler() -> CachedSampler:
    return CachedSampler.create(*toy_system("random", backbone=dict(depth=1)))


def test_every_image_has_its_own_order(sampler):
    """An image depends on its own order, and raster order given is raster order."""
    length, batch = sampler.system.schedule.length, 3
    cond, keys = toy_labels(batch), image_keys(0, 0, batch)
    rng = np.random.default_rng(0)
    orders = np.stack([np.arange(length), *(rng.permutation(length) for _ in range(batch - 1))])
    guidance = Guidance(scale=2.0, kind="power_cosine")
    ours = sampler(cond, keys, guidance=guidance, order=orders)
    assert ours.order is not None
    np.testing.assert_array_equal(ours.order, orders)
    plain = sampler(cond, keys, guidance=guidance)
    assert plain.order is None
    np.testing.assert_array_equal(ours.codes[0], plain.codes[0])
    assert (np.asarray(ours.codes[1:]) != np.asarray(plain.codes[1:])).any()
    other = sampler(cond, keys, guidance=guidance, order=orders[[1, 1, 2]])
    np.testing.assert_array_equal(other.codes[1:], ours.codes[1:])
    images = sampler.decode(ours.codes)
    np.testing.assert_array_equal(ours.images, images)


def test_noise_is_in_the_order_of_the_draws(sampler):
    """Overwhelming noise chooses the codes: noise row t decides the cell order[t]."""
    length, batch = sampler.system.schedule.length, 2
    wanted = np.random.default_rng(1).integers(0, 8, (batch, length))
    noise = 1e6 * jax.nn.one_hot(wanted, 8)
    orders = np.stack([np.random.default_rng(i).permutation(length) for i in range(batch)])
    drawn = sampler(
        toy_labels(batch), image_keys(0, 0, batch), knobs=Knobs(), noise=noise, order=orders
    )
    np.testing.assert_array_equal(np.take_along_axis(drawn.codes, orders, axis=1), wanted)


@pytest.mark.parametrize(
    "order",
    [np.zeros((2, 16), int), np.arange(15)[None].repeat(2, 0), np.arange(16)[None]],
    ids=["no permutation", "too short", "one of two"],
)
def test_wrong_orders_are_refused(sampler, order):
    with pytest.raises(ValueError, match=r"order.*\(2, 16\).*permutation"):
        sampler(toy_labels(2), image_keys(0, 0, 2), order=order)


def test_other_positions_know_no_order():
    sampler = CachedSampler.create(*toy_system("raster", backbone=dict(depth=1)))
    with pytest.raises(ValueError, match="positions='rope'.*target_aware"):
        sampler(toy_labels(1), image_keys(0, 0, 1), order=jnp.arange(16)[None])
