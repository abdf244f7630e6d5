"""Nested sampling: its law by enumeration, cached as uncached, guidance, and what edits keep."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.heads.pixels import PixelHead
from ar_jax.sampling import nested as sampling
from ar_jax.sampling.edit import edit
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.nested import NestedNoise, NestedSampler
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.test_fractal import LABEL, all_images, logits_of
from tests.toy_fractal import fractal_objective
from tests.toy_joint import p_value
from tests.toy_systems import CLASSES, toy_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWS, BATCH = 40_000, 8_000
GUIDED = Guidance(scale=3.0, kind="linear_after")


@functools.cache
def causal() -> Any:
    return fractal_objective()


@functools.cache
def masked(colour: bool = False) -> Any:
    values = dict(sizes=(4, 2, 1), iterations=(2, 0), values=6, channels=3)
    if colour:
        values |= dict(iterations=(2, 2), backbone=dict(colour=True))
    return fractal_objective(**values)


def drawn(objective: Any, params: Any, knobs: Knobs, guidance: Guidance) -> np.ndarray:
    """int32 [DRAWS, L, C] of one class."""
    sampler = NestedSampler.create(objective.system, params)
    cond = {"label": jnp.full(BATCH, LABEL, jnp.int32)}
    parts = [
        sampler(cond, image_keys(0, start, BATCH), knobs=knobs, guidance=guidance).codes
        for start in range(0, DRAWS, BATCH)
    ]
    return np.concatenate(parts)


def counted(codes: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """How many images of two values have each pattern in every other pixel, [256]."""
    number = codes.reshape(len(codes), -1)[:, ::2] @ 2 ** np.arange(8)
    return np.bincount(number, weights, minlength=256)


def joint(guidance: Guidance, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(all images, their probabilities) of the causal toy."""
    objective, params = causal()
    schedule, codes = objective.system.schedule, all_images(16, 2)
    given, null = (
        np.asarray(logits_of(objective, params, codes, label)) / temperature
        for label in (LABEL, CLASSES)
    )
    scales = guidance.scales(schedule.num_steps, schedule.levels[0].known)
    by_cell = scales[schedule.step_id][np.argsort(schedule.cells)]
    logits = objective.system.head.guide(given, null, by_cell[None, :, None, None])
    log_p = objective.system.head.log_prob(jnp.asarray(logits), jnp.asarray(codes))
    return codes, np.exp(np.asarray(log_p, np.float64).sum((1, 2)))


@pytest.mark.slow  # of 65,536 images
@pytest.mark.parametrize(
    ("knobs", "guidance"),
    [(Knobs(), Guidance()), (Knobs(temperature=1.4), GUIDED)],
    ids=["plain", "guided"],
)
def test_samples_follow_the_enumerated_joint(knobs, guidance, monkeypatch):
    """Two levels of patches one by one. Patches of a wrong place, or no guidance, are found out."""
    objective, params = causal()
    codes, p = joint(guidance, float(knobs.temperature))
    assert p.sum() == pytest.approx(1, abs=1e-5)
    expected = counted(codes, p)
    samples = drawn(objective, params, knobs, guidance)
    assert p_value(counted(samples), expected) > 1e-3
    turned = samples.reshape(-1, 4, 4, 1).swapaxes(1, 2).reshape(samples.shape)
    assert p_value(counted(turned), expected) < 1e-6
    _, other = joint(GUIDED if guidance.scale == 1 else Guidance(), float(knobs.temperature))
    assert p_value(counted(samples), counted(codes, other)) < 1e-6


def test_masked_sets_follow_their_law():
    """Two sets of two pixels in a random order, each drawn at once given what is known."""
    objective, params = fractal_objective(sizes=(2, 1), iterations=(2,), values=3)
    system = objective.system
    assert system.schedule.sizes == (2, 2)
    codes = all_images(4, 3)

    @jax.jit
    def log_p(known: jax.Array) -> jax.Array:
        shares = jnp.broadcast_to(1.0 - known, (len(codes), 4))
        cond = {"label": jnp.full(len(codes), LABEL, jnp.int32)}
        backbone = {"params": params["backbone"]}
        rows, _ = system.backbone.apply(backbone, jnp.asarray(codes), cond, (shares,), (None,))
        logits = system.head.apply({"params": params["head"]}, rows.hidden, rows.codes)
        return system.head.log_prob(logits, rows.codes).reshape(len(codes), 4)

    pairs = list(itertools.combinations(range(4), 2))
    total, at_once = np.zeros(len(codes)), np.asarray(log_p(jnp.zeros(4)), np.float64)
    blind = np.exp(at_once.sum(1))
    for pair in pairs:
        known = np.isin(np.arange(4), pair)
        later = np.asarray(log_p(jnp.asarray(known, jnp.float32)), np.float64)
        total += np.exp(np.where(known[None], at_once, later).sum(1)) / len(pairs)
    assert total.sum() == pytest.approx(1, abs=1e-5)
    samples = drawn(objective, params, Knobs(), Guidance())
    number = samples.reshape(len(samples), -1) @ 3 ** np.arange(3, -1, -1)
    counts = np.bincount(number, minlength=len(codes))
    assert p_value(counts, total) > 1e-3
    assert p_value(counts, blind) < 1e-6  # as if all were drawn at once


@pytest.mark.parametrize(
    "guidance",
    [
        pytest.param(Guidance(), id="plain", marks=pytest.mark.slow),
        pytest.param(GUIDED, id="guided"),
    ],
)
def test_cached_steps_are_the_uncached_ones(guidance):
    """Given the noise, every pixel is the largest of its teacher-forced logits and the noise."""
    objective, params = causal()
    schedule, backbone = objective.system.schedule, objective.system.backbone
    gumbel = jax.random.gumbel(jax.random.key(5), (6, 4, 4, 1, backbone.values))
    noise = NestedNoise(orders=(None, None), gumbel=(None, None, gumbel))
    cond = {"label": jnp.full(6, LABEL, jnp.int32)}
    sampler = NestedSampler.create(objective.system, params)
    codes = sampler(cond, guidance=guidance, noise=noise).codes
    given, null = (logits_of(objective, params, codes, label) for label in (LABEL, CLASSES))
    scales = guidance.scales(schedule.num_steps, schedule.levels[0].known)
    by_cell = jnp.asarray(scales[schedule.step_id][np.argsort(schedule.cells)])
    logits = objective.system.head.guide(given, null, by_cell[None, :, None, None])
    places = jnp.argsort(jnp.asarray(schedule.cells))
    noisy = logits + gumbel.reshape(6, 16, 1, -1)[:, places]
    np.testing.assert_array_equal(noisy.argmax(-1), codes)


def test_guidance_spares_rare_values():
    head = PixelHead(channels=1, values=3, width=4, depth=1, heads=1, filter_threshold=0.1)
    cond, null = jnp.array([[4.0, 3.0, 0.0]]), jnp.array([[1.0, 2.0, -5.0]])
    # Of the third value the condition says 0.013: its null logit becomes 0 - 4 + 2.
    guided = head.guide(cond, null, jnp.float32(2.0))
    np.testing.assert_allclose(np.asarray(guided), np.array([[7.0, 4.0, 2.0]]), rtol=1e-6)
    never = head.clone(filter_threshold=0.0)
    guided = never.guide(cond, null, jnp.float32(2.0))
    np.testing.assert_allclose(np.asarray(guided), np.array([[7.0, 4.0, 5.0]]), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["causal", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("masked", "colour"))],
)
def test_an_image_depends_on_its_own_key_alone_and_edits_keep_pixels(name):
    objective, params = causal() if name == "causal" else masked(name == "colour")
    sampler, cond = NestedSampler.create(objective.system, params), toy_labels(4)
    keys = image_keys(0, 0, 4)
    samples = sampler(cond, keys, guidance=GUIDED)
    turned = {"label": cond["label"][::-1]}
    again = sampler(turned, keys[::-1], guidance=GUIDED)
    np.testing.assert_array_equal(again.codes[::-1], samples.codes)
    np.testing.assert_array_equal(np.sort(np.asarray(samples.order)), [np.arange(16)] * 4)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 2:] = True
    found = edit(sampler, samples.images, mask, turned, image_keys(1, 0, 4), guidance=GUIDED)
    same: Any = np.equal(found.samples.codes, samples.codes).all(-1)
    assert same[:, ~mask.reshape(-1)].all() and not same[:, mask.reshape(-1)].all()


@pytest.mark.slow
def test_masked_levels_know_whole_patches_that_are_kept():
    """What is drawn first is drawn as if the kept patches had been drawn before it."""
    objective, params = masked()
    sampler, cond = NestedSampler.create(objective.system, params), toy_labels(4)
    rng = np.random.default_rng(0)
    given = jnp.asarray(rng.integers(0, 6, (4, 16, 3)), jnp.int32)
    keep = jnp.asarray(np.arange(16)[None].repeat(4, 0) % 4 >= 2)  # the right half
    orders = jnp.asarray(np.stack([rng.permutation(4) for _ in range(4)]), jnp.int32)
    noise = NestedNoise(orders=(orders, None))
    cold = Knobs(temperature=0.0)
    first = sampler(cond, knobs=cold, noise=noise, given=given, keep=keep).codes
    other = jnp.where(keep[..., None], (given + 3) % 6, given)
    second = sampler(cond, knobs=cold, noise=noise, given=other, keep=keep).codes
    assert np.asarray(first != second)[~np.asarray(keep)].any()
    np.testing.assert_array_equal(first[keep], given[keep])


def test_what_is_missing_is_said():
    objective, params = causal()
    sampler, cond = NestedSampler.create(objective.system, params), toy_labels(2)
    with pytest.raises(ValueError, match="neither keys nor noise"):
        sampler(cond)
    with pytest.raises(ValueError, match="orders alone"):
        sampler(cond, noise=NestedNoise(orders=(None, None)))
    with pytest.raises(ValueError, match="sampling.smooth"):
        sampler(cond, image_keys(0, 0, 2), knobs=Knobs(smooth=True))
    assert objective.system.schedule.length < sampling.CHANNEL
