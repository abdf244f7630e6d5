"""Speculative decoding: against the enumerated joint distribution, and greedy against greedy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.sampling import speculative
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.grouped import Grouping
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, by_step, image_keys
from ar_jax.sampling.speculative import draw_speculative, residual, speculate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import BATCH, DRAWS, FLATTEN, LABEL, SETTINGS, Toy, V, p_value
from tests.toy_systems import toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

GUIDED = Guidance(scale=2.0, kind="linear")


@pytest.fixture(scope="module")
def toy() -> Toy:
    system, params = toy_system(
        "raster",
        vocab_size=V,
        schedule=dict(grid=2),
        autoencoder=dict(image_size=4),
        backbone=dict(depth=1),
    )
    return Toy(system, params | {"head": jax.tree.map(lambda a: FLATTEN * a, params["head"])})


def p_of(
    toy: Toy,
    setting: str,
    window: int,
    redraw: str,
    program: Any = draw_speculative,
    grouping: Grouping | None = None,
) -> float:
    """Of the chi-square test of `DRAWS` images."""
    knobs, guidance = SETTINGS[setting]
    sampler = CachedSampler.create(toy.system, toy.params)
    knob_arrays, scales = by_step(sampler.system.schedule, knobs, guidance)
    counts = np.zeros(len(toy.images))
    for first in range(0, DRAWS, BATCH):
        codes, _ = program(
            *(sampler.system, sampler.params, {"label": jnp.full(BATCH, LABEL)}),
            *(image_keys(0, first, BATCH), knob_arrays, jnp.asarray(scales), toy.orders(BATCH)),
            guided=guidance.scale != 1,
            window=window,
            redraw=redraw,
            grouping=grouping,
        )
        places = np.asarray(codes) @ V ** np.arange(codes.shape[1] - 1, -1, -1)
        counts += np.bincount(places, minlength=len(counts))
    return p_value(counts, toy.joint(knobs, guidance))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("setting", "window", "redraw"),
    [
        pytest.param("guided and filtered", 3, "maximal", marks=SLOW),
        ("plain", 2, "gumbel"),
        pytest.param("plain", 2, "independent", marks=SLOW),
        pytest.param("plain", 2, "maximal", marks=SLOW),
        pytest.param("guided and filtered", 3, "independent", marks=SLOW),
        pytest.param("guided and filtered", 3, "gumbel", marks=SLOW),
        pytest.param("plain", 1, "maximal", marks=SLOW),
    ],
)
def test_samples_follow_the_joint(toy, setting, window, redraw):
    assert p_of(toy, setting, window, redraw) > 1e-3


def test_a_broken_sampler_is_found(toy, monkeypatch):
    """One that draws a rejected draft from p, in place of what p has above q."""
    monkeypatch.setattr(speculative, "residual", lambda log_p, log_q: log_p)
    unjitted: Any = draw_speculative
    # A function of its own: jit remembers traces by function.
    fresh = jax.jit(
        lambda *a, **k: unjitted.__wrapped__(*a, **k),
        static_argnums=0,
        static_argnames=("guided", "window", "redraw"),
    )
    assert p_of(toy, "plain", 2, "gumbel", fresh) < 1e-9


@SLOW
def test_grouped_acceptance_is_lossy(toy):
    """So that nobody takes it for exact."""
    assert p_of(toy, "plain", 2, "maximal", grouping=Grouping()) < 1e-9


@pytest.mark.slow
def test_samples_follow_the_joint_of_their_order(toy):
    system, params = toy_system(
        "random",
        vocab_size=V,
        schedule=dict(grid=2),
        autoencoder=dict(image_size=4),
        backbone=dict(depth=1),
    )
    params = params | {"head": jax.tree.map(lambda a: FLATTEN * a, params["head"])}
    ordered = Toy(system, params, (2, 0, 3, 1))
    assert p_of(ordered, "plain", 2, "maximal") > 1e-3
    raster = Toy(system, params)
    raster.__dict__["joint"] = ordered.joint
    assert p_of(raster, "plain", 2, "maximal") < 1e-9


def test_what_is_left_of_p():
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.2, 0.2, 0.2, 0.4])
    with np.errstate(divide="ignore"):
        left = np.exp(residual(jnp.log(p), jnp.log(q)))
        np.testing.assert_allclose(left, [0.3, 0.1, 0, 0], atol=1e-6)
        np.testing.assert_allclose(np.exp(residual(jnp.log(p), jnp.log(p))), p, atol=1e-6)


@pytest.fixture(scope="module")
def sampler() -> CachedSampler:
    return CachedSampler.create(*toy_system("raster", backbone=dict(depth=1)))


def test_greedy_is_the_plain_greedy_and_one_program_draws_all(sampler):
    """Sequences of 16, whose images settle different numbers of codes in a call."""
    cond, keys = toy_labels(6), image_keys(0, 0, 6)
    settings: Any = dict(knobs=Knobs(temperature=0.0), guidance=GUIDED)
    made = speculate(sampler, cond, keys, window=5, **settings)
    plain = sampler(cond, keys, **settings)
    np.testing.assert_array_equal(made.samples.codes, plain.codes)
    np.testing.assert_allclose(made.samples.images, plain.images, atol=1e-5)
    program: Any = draw_speculative
    size = program._cache_size()
    drawn = []
    for n in range(1, 20):
        other = {"label": (cond["label"] + n) % 3}
        knobs = Knobs(temperature=0.5 + n / 20, top_k=n % 3, top_p=0.9 * (n % 2))
        guidance = Guidance(scale=1 + n / 5)
        result = speculate(
            sampler, other, image_keys(n, 0, 6), window=5, knobs=knobs, guidance=guidance
        )
        assert (result.calls <= 16).all() and (result.calls >= 4).all()
        drawn.append(np.asarray(result.samples.codes))
    assert program._cache_size() == size
    assert len(np.unique(np.concatenate(drawn), axis=0)) > 50
    # An image depends on its own key and condition alone.
    alone = speculate(sampler, cond, keys[jnp.array([3, 1, 2, 0, 4, 5])], window=5, guidance=GUIDED)
    together = speculate(sampler, cond, keys, window=5, guidance=GUIDED)
    moved = np.asarray(alone.samples.codes)  # label 0 for images 0 and 3
    np.testing.assert_array_equal(moved[[3, 1, 2, 0, 4, 5]], together.samples.codes)


def test_a_group_of_one_is_the_exact_rule(sampler):
    cond, keys = toy_labels(6), image_keys(0, 0, 6)
    exact, one = (
        speculate(sampler, cond, keys, window=5, guidance=GUIDED, grouping=grouping)
        for grouping in (None, Grouping(size=1))
    )
    np.testing.assert_array_equal(exact.samples.codes, one.samples.codes)
    np.testing.assert_array_equal(exact.calls, one.calls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(window=16), "window is 16; it must be between 1 and 15"),
        (dict(redraw="never"), "redraw is 'never'"),
        (dict(knobs=Knobs(smooth=True)), r"sampling\.smooth"),
        (dict(keys=image_keys(0, 0, 2)), "2 keys for 3 conditions"),
        (dict(order=jnp.zeros((3, 16), jnp.int32)), "permutation of the cells 0 to 15"),
    ],
)
def test_what_does_not_fit_is_refused(sampler, change, message):
    arguments: Any = dict(keys=image_keys(0, 0, 3), window=5) | change
    with pytest.raises(ValueError, match=message):
        speculate(sampler, toy_labels(3), **arguments)


def test_scales_are_refused():
    scales = CachedSampler(*toy_system("next_scale", backbone=dict(depth=1)))
    with pytest.raises(ValueError, match=r"schedule\.name='next_scale'"):
        speculate(scales, toy_labels(3), image_keys(0, 0, 3))
