"""Sampled images against the enumerated joint distribution, in a chi-square test.

Every test that accepts the sampler also rejects deliberately broken ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ar_jax.heads.categorical import CategoricalHead
from ar_jax.sampling import loop, step
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from tests.toy_joint import DRAWS, FLATTEN, KNOBS, SETTINGS, Toy, V, p_value
from tests.toy_systems import toy_system


@pytest.fixture(scope="module", params=["next_scale", "raster"])
def toy(request) -> Toy:
    scales: dict[str, Any] = dict(scales=(1, 2)) if request.param == "next_scale" else {}
    schedule = scales or dict(grid=2)
    system, params = toy_system(
        request.param,
        vocab_size=V,
        tokenizer=scales,
        schedule=schedule,
        autoencoder=dict(image_size=4),
    )
    # Flat enough for many images to be likely.
    return Toy(system, params | {"head": jax.tree.map(lambda a: FLATTEN * a, params["head"])})


@pytest.mark.parametrize("name", SETTINGS)
def test_the_joint_is_a_distribution(toy, name):
    joint = toy.joint(*SETTINGS[name])
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    assert (joint * DRAWS > 5).sum() > 40


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_follow_the_joint(toy, name):
    knobs, guidance = SETTINGS[name]
    assert p_value(toy.counts(knobs, guidance), toy.joint(knobs, guidance)) > 1e-3


def broken_noise(kind: str, toy: Toy) -> Any:
    """Gumbel noise of keys [B] with a fault, [B, L, V]."""
    shape = (toy.system.schedule.length, V)

    @jax.jit
    def draw(keys: jax.Array) -> jax.Array:
        if kind == "one noise for all codes":
            noise = jax.vmap(lambda key: jax.random.gumbel(key, (1, V)))(keys)
            return jnp.broadcast_to(noise, (len(keys), *shape))
        if kind == "one noise for pairs of images":
            keys = keys[jnp.arange(len(keys)) // 2]
            return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
        if kind == "normal noise":
            return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)

    return draw


NOISES = ["one noise for all codes", "one noise for pairs of images", "normal noise"]


@pytest.mark.parametrize("kind", [*NOISES, "sound"])
def test_broken_noise_is_found(toy, kind):
    knobs, guidance = SETTINGS["plain"]
    counts = toy.counts(knobs, guidance, noise=broken_noise(kind, toy))
    p = p_value(counts, toy.joint(knobs, guidance))
    assert p > 1e-3 if kind == "sound" else p < 1e-9


@pytest.mark.parametrize(
    "change",
    [
        (dataclasses.replace(KNOBS, temperature=1.35), None),
        (dataclasses.replace(KNOBS, top_k=2), None),
        (dataclasses.replace(KNOBS, top_p=0.7), None),
        (None, Guidance(scale=1.8, kind="linear_excess")),
        (None, Guidance(scale=2.0, kind="linear")),
        (None, Guidance(scale=2.0, kind="linear_excess", stop=1)),
    ],
    ids=["temperature", "top_k", "top_p", "scale", "schedule", "interval"],
)
def test_wrong_settings_are_found(toy, change):
    knobs, guidance = SETTINGS["guided and filtered"]
    counts = toy.counts(change[0] or knobs, change[1] or guidance)
    assert p_value(counts, toy.joint(knobs, guidance)) < 1e-9


def filter_first(logits: jax.Array, knobs: Knobs) -> jax.Array:
    kept = truncate(logits, dataclasses.replace(knobs, temperature=jnp.float32(1.0)))
    return kept / knobs.temperature


def test_a_broken_sampler_is_found(toy, monkeypatch):
    knobs, guidance = SETTINGS["guided and filtered"]
    if toy.system.schedule.name == "raster":
        monkeypatch.setattr(step, "truncate", filter_first)
    else:
        right = CategoricalHead.guide
        swapped = staticmethod(lambda cond, null, scale: right(null, cond, scale))
        monkeypatch.setattr(CategoricalHead, "guide", swapped)
    draw_codes: Any = loop.draw_codes
    # A function of its own: jit remembers traces by function.
    untraced = functools.update_wrapper(lambda *a, **k: draw_codes.__wrapped__(*a, **k), draw_codes)
    fresh = jax.jit(untraced, static_argnums=0, static_argnames="guided")
    monkeypatch.setattr(loop, "draw_codes", fresh)
    assert p_value(toy.counts(knobs, guidance), toy.joint(knobs, guidance)) < 1e-9
