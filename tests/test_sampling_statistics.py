"""Sampled images against the enumerated joint distribution, in a chi-square test.

Every test that accepts the sampler also rejects deliberately broken ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.api import System
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.sampling import loop
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.toy_systems import toy_system

V, DRAWS, BATCH, LABEL = 4, 40_000, 8_000, 1
KNOBS = Knobs(temperature=1.5, top_k=3, top_p=0.8)
FLATTEN = 0.5
SETTINGS = {
    "plain": (Knobs(), Guidance()),
    "guided and filtered": (KNOBS, Guidance(scale=2.0, kind="linear_excess")),
}


@dataclasses.dataclass(frozen=True)
class Toy:
    """A system whose images can be counted: V^L of them."""

    system: System
    params: Any

    @functools.cached_property
    def images(self) -> np.ndarray:
        """All code sequences [V^L, L]."""
        length = self.system.schedule.length
        return np.array(list(itertools.product(range(V), repeat=length)), np.int32)

    @functools.cached_property
    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Conditional and null, each float64 [V^L, L, V]."""
        cond = {"label": jnp.full(len(self.images), LABEL)}
        run = jax.jit(functools.partial(teacher_forced, self.system, self.params))
        pair = (cond, self.system.backbone.conditioner.null(cond))
        given, null = (np.asarray(run(c, self.images), np.float64) for c in pair)
        return given, null

    def joint(self, knobs: Knobs, guidance: Guidance) -> np.ndarray:
        """Probability of every image, float64 [V^L]."""
        scales = guidance.scales(self.system.schedule.num_steps)
        scale = scales[self.system.schedule.step_id][None, :, None]
        given, null = self.logits
        x = (null + scale * (given - null)) / float(knobs.temperature)
        order = np.argsort(-x, axis=-1)
        rank = np.argsort(order, axis=-1)
        if knobs.top_k:
            x = np.where(rank < knobs.top_k, x, -np.inf)
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if knobs.top_p:
            larger = np.cumsum(np.take_along_axis(p, order, -1), -1)
            larger = np.take_along_axis(larger, rank, -1) - p
            p = np.where(larger <= knobs.top_p, p, 0.0)
            p /= p.sum(-1, keepdims=True)
        return np.take_along_axis(p, self.images[..., None], -1)[..., 0].prod(-1)

    def counts(self, knobs: Knobs, guidance: Guidance, seed: int = 0, noise: Any = None):
        """How often each image was drawn, [V^L]."""
        sampler = CachedSampler.create(self.system, self.params)
        cond = {"label": jnp.full(BATCH, LABEL)}
        weights = V ** np.arange(self.system.schedule.length - 1, -1, -1)
        counts = np.zeros(len(self.images))
        for first in range(0, DRAWS, BATCH):
            keys = image_keys(seed, first, BATCH)
            codes = loop.draw_codes(
                sampler.system,
                sampler.params,
                cond,
                keys,
                knobs.as_arrays(),
                jnp.asarray(guidance.scales(self.system.schedule.num_steps)),
                None if noise is None else noise(keys),
                guided=guidance.scale != 1,
            )
            counts += np.bincount(np.asarray(codes) @ weights, minlength=len(counts))
        return counts


def p_value(counts: np.ndarray, joint: np.ndarray) -> float:
    """Of the chi-square test; images expected less than five times are one bin."""
    expected = joint * counts.sum()
    rare = expected < 5
    bins = [np.append(a[~rare], a[rare].sum()) for a in (counts, expected)]
    if bins[1][-1] == 0:
        if bins[0][-1]:
            return 0.0  # drawn, though impossible
        bins = [a[:-1] for a in bins]
    statistic = (np.square(bins[0] - bins[1]) / np.maximum(bins[1], 1e-9)).sum()
    return float(stats.chi2.sf(statistic, len(bins[0]) - 1))


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
        monkeypatch.setattr(loop, "truncate", filter_first)
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
