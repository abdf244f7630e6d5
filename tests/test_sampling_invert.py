"""Inversion: the noise gives the codes again, and its law is that of the noise that drew them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.build import create_sampler
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.invert import blend_noise, draw_inverse, invert
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.refine import RefineSampler
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_codes, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 96
GUIDED = Guidance(scale=2.0, kind="linear")
COND = toy_labels(BATCH)
OTHER = {"label": (COND["label"] + 1) % 3}


@functools.cache
def sampler_of(name: str) -> Any:
    return create_sampler(*toy_system(name, backbone=dict(depth=1)))


def draw(sampler: Any, noise: Any, cond: Any = COND, **settings: Any) -> np.ndarray:
    """Codes [B, L] under a noise; all tests draw by one program a system."""
    noise = jnp.asarray(noise, jnp.float32)
    return np.asarray(sampler(cond, noise=noise, guidance=GUIDED, **settings).codes)


def fresh_noise(sampler: Any, seed: int) -> np.ndarray:
    shape = (BATCH, sampler.system.schedule.length, 8)
    return np.random.default_rng(seed).gumbel(size=shape)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("next_scale", "random")]


@pytest.mark.parametrize("name", ["raster", *SLOW])
def test_the_noise_of_any_codes_gives_them_again(name):
    """All of them, also of codes that the model would hardly draw."""
    sampler = sampler_of(name)
    length = sampler.system.schedule.length
    order = None
    if name == "random":
        rng = np.random.default_rng(0)
        order = np.stack([rng.permutation(length) for _ in range(BATCH)])
    program: Any = draw_inverse
    before = program._cache_size()
    for seed, knobs in ((0, Knobs()), (1, Knobs(temperature=0.3))):
        codes = toy_codes(sampler.system, BATCH, seed)
        settings: Any = dict(knobs=knobs, order=order)
        keys = image_keys(seed, 0, BATCH)
        noise = invert(sampler, codes, COND, keys, guidance=GUIDED, **settings)
        np.testing.assert_array_equal(draw(sampler, noise, **settings), codes)
        other = draw(sampler, noise, OTHER, **settings)
        assert 0.05 < (other != np.asarray(codes)).mean() < 0.95
    assert program._cache_size() == before + 1


def untruncated(logits: jax.Array, codes: jax.Array, gumbel: jax.Array) -> jax.Array:
    """Codes above the drawn one are pushed just below it: it is drawn, but the law is off."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jax.nn.one_hot(codes, logits.shape[-1], dtype=bool)
    top = jnp.where(chosen, gumbel, 0.0).sum(-1, keepdims=True)
    return jnp.where(chosen, top, jnp.minimum(log_p + gumbel, top - 1e-3)) - log_p


def located(logits: jax.Array, codes: jax.Array, gumbel: jax.Array) -> jax.Array:
    """The largest perturbed logit taken for a Gumbel at the code's own logit."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jax.nn.one_hot(codes, logits.shape[-1], dtype=bool)
    top = jnp.where(chosen, gumbel + log_p, 0.0).sum(-1, keepdims=True)
    below = -jnp.logaddexp(-top, -(log_p + gumbel))
    return jnp.where(chosen, top, below) - log_p


def p_values(invert: Any) -> list[float]:
    """Kolmogorov-Smirnov against the standard Gumbel: of all noise, and of the drawn codes'."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8_000, 6)) * 2, jnp.float32)
    draw, fresh = (jnp.asarray(rng.gumbel(size=logits.shape), jnp.float32) for _ in range(2))
    codes = CategoricalHead.draw(logits, draw)
    noise = np.asarray(invert(logits, codes, fresh))
    np.testing.assert_array_equal(CategoricalHead.draw(logits, jnp.asarray(noise)), codes)
    likely = np.take_along_axis(noise, np.asarray(logits.argmax(-1))[:, None], 1)
    return [stats.kstest(part.ravel(), "gumbel_r").pvalue for part in (noise, likely)]


def test_noise_of_drawn_codes_is_standard_gumbel():
    assert min(p_values(CategoricalHead.invert)) > 1e-3
    rng = np.random.default_rng(1)  # codes that were not drawn from the logits are found
    logits = jnp.asarray(rng.normal(size=(8_000, 6)) * 2, jnp.float32)
    codes = jnp.asarray(rng.integers(0, 6, 8_000))
    noise = CategoricalHead.invert(logits, codes, jnp.asarray(rng.gumbel(size=logits.shape)))
    assert stats.kstest(np.asarray(noise).ravel(), "gumbel_r").pvalue < 1e-9


@pytest.mark.parametrize("broken", [untruncated, located])
def test_a_broken_inversion_is_found(broken):
    assert min(p_values(broken)) < 1e-9


def test_the_noise_of_a_samples_own_codes_is_standard_gumbel():
    """Through the sampler, guided and at a temperature."""
    sampler, knobs = sampler_of("raster"), Knobs(temperature=0.7)
    drawn = draw(sampler, fresh_noise(sampler, 0), knobs=knobs)
    keys = image_keys(1, 0, BATCH)
    noise = invert(sampler, jnp.asarray(drawn), COND, keys, knobs=knobs, guidance=GUIDED)
    assert stats.kstest(np.asarray(noise).ravel(), "gumbel_r").pvalue > 1e-3
    knobs = Knobs(temperature=0.2)  # not what the codes were drawn at
    wrong = invert(sampler, jnp.asarray(drawn), COND, keys, knobs=knobs, guidance=GUIDED)
    assert stats.kstest(np.asarray(wrong).ravel(), "gumbel_r").pvalue < 1e-6


def test_blended_noise_is_standard_gumbel_and_keeps_its_share():
    sampler = sampler_of("raster")
    codes = draw(sampler, fresh_noise(sampler, 0))
    noise = invert(sampler, jnp.asarray(codes), COND, image_keys(1, 0, BATCH), guidance=GUIDED)
    fresh = image_keys(2, 0, BATCH)
    same = []
    for weight in (1.0, 0.7, 0.3, 0.0):
        blended = blend_noise(noise, fresh, weight)
        assert stats.kstest(np.asarray(blended).ravel(), "gumbel_r").pvalue > 1e-3
        same.append((draw(sampler, blended, OTHER) == codes).mean())
    np.testing.assert_array_equal(blend_noise(noise, fresh, 1.0), noise)
    assert same == sorted(same, reverse=True) and same[0] > same[-1] + 0.1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (Knobs(temperature=0.0), r"sampling\.temperature is 0\.0"),
        (Knobs(top_k=1), r"codes were removed by sampling\.top_k"),
        (Knobs(smooth=True), r"sampling\.smooth is True"),
    ],
)
def test_what_no_noise_gives_is_refused(knobs, message):
    sampler = sampler_of("raster")
    codes = toy_codes(sampler.system, BATCH)
    with pytest.raises(ValueError, match=message):
        invert(sampler, codes, COND, image_keys(0, 0, BATCH), knobs=knobs, guidance=GUIDED)


def test_continuous_codes_are_refused():
    refining: Any = RefineSampler(system=None, params=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="RefineSampler are drawn otherwise"):
        invert(refining, jnp.zeros((1, 16, 2)), COND, image_keys(0, 0, 1))
