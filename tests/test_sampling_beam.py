"""Beam search: it finds the best of all that there is, and beams have their own caches."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.sampling import beam
from ar_jax.sampling.beam import BeamSearch, Draft, Found, draw_beams
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.likeliest import likeliest_maps
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import LABEL, Toy, V
from tests.toy_systems import toy_labels, toy_params, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

GUIDED = Guidance(scale=2.0, kind="linear_excess")
KEYS, COND = image_keys(3, 0, 3), toy_labels(3)


def brightness(draft: Draft) -> jax.Array:
    """Of some classes the brightest, of others the darkest."""
    return draft.images.mean((1, 2, 3)) * jnp.where(draft.cond["label"] % 2 == 0, 1.0, -1.0)


@pytest.fixture(scope="module", params=["next_scale", "raster"])
def toy(request) -> Toy:
    """Of 256 images."""
    changes: dict[str, Any] = dict(schedule=dict(grid=2))
    if request.param == "next_scale":
        changes = dict(tokenizer=dict(scales=(1, 2)), schedule=dict(scales=(1, 2)))
    size = dict(image_size=4)
    system, _ = toy_system(request.param, vocab_size=V, autoencoder=size, **changes)
    # Of these parameters the likeliest raster image does not begin with the likeliest code.
    return Toy(system, toy_params(system, seed=5))


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["plain", "guided"])
def test_beams_for_all_beginnings_find_the_likeliest_images(toy, guidance):
    """As many beams as there are beginnings, and candidates as there are maps of a step."""
    sizes = toy.system.schedule.sizes
    width, candidates = V ** sum(sizes[:-1]), V ** max(sizes)
    sampler = CachedSampler.create(toy.system, toy.params)
    search = BeamSearch(sampler=sampler, width=width, candidates=candidates, likeliest=True)
    found = search.search({"label": jnp.array([LABEL])}, guidance=guidance)
    joint = toy.joint(Knobs(), guidance)
    best = np.argsort(-joint)[:width]
    np.testing.assert_array_equal(found.codes[0, 0], toy.images[best[0]])
    np.testing.assert_allclose(found.log_p[0], np.log(joint[best]), atol=1e-4)
    np.testing.assert_array_equal(found.scores, found.log_p)
    assert len(np.unique(found.codes[0], axis=0)) == width
    greedy = sampler({"label": jnp.array([LABEL])}, knobs=Knobs(temperature=0.0), guidance=guidance)
    likelier = joint[best[0]] / joint[(toy.images == np.asarray(greedy.codes[0])).all(-1)][0]
    assert likelier >= 1
    if toy.system.schedule.name == "raster" and guidance.scale == 1:
        assert likelier > 1.5


_forced = jax.jit(teacher_forced, static_argnums=0)


def recomputed_log_p(system: Any, params: Any, cond: Any, found: Found, guidance: Guidance) -> Any:
    """Of all beams, with no fork: float32 [B, W].

    With no cache either, but for groups of codes, which teacher forcing feeds otherwise.
    """
    count, width = found.codes.shape[:2]
    codes = found.codes.reshape(count * width, *found.codes.shape[2:])
    cond = jax.tree.map(lambda leaf: jnp.repeat(leaf, width, axis=0), cond)
    by_step = jnp.asarray(guidance.scales(system.schedule.num_steps))
    if found.order is not None:
        order = jnp.repeat(found.order, width, axis=0)
        codes = codes[jnp.arange(len(codes))[:, None], order]
        logits, _ = stepwise_logits(system, params, cond, codes, by_step, order)
    else:
        null = system.backbone.conditioner.null(cond)
        given, other = (_forced(system, params, c, codes) for c in (cond, null))
        logits = other + by_step[system.schedule.step_id][None, :, None] * (given - other)
    return system.head.log_prob(logits, codes).sum(-1).reshape(count, width)


@pytest.mark.parametrize(
    "name",
    [
        "next_scale",
        "raster",
        pytest.param("instructed", marks=pytest.mark.slow),  # steps with padding, random orders
        pytest.param("two_pass", marks=pytest.mark.slow),
    ],
)
def test_forked_caches_give_what_no_fork_gives(name, monkeypatch):
    system, params = toy_system(name)
    search = BeamSearch(sampler=CachedSampler.create(system, params), width=3, candidates=2)
    guidance = Guidance(scale=1.5)
    found = search.search(COND, KEYS, guidance=guidance)
    expected = recomputed_log_p(system, params, COND, found, guidance)
    np.testing.assert_allclose(found.log_p, expected, rtol=1e-4, atol=1e-4)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert all(len(np.unique(codes, axis=0)) == 3 for codes in found.codes)
    # Without forks beams go on with the caches of others. Another score is another program.
    monkeypatch.setattr(beam, "fork", lambda carry, caches, parents, count: (carry, caches))
    broken = BeamSearch(
        sampler=search.sampler, width=3, candidates=2, score=lambda draft: draft.log_p
    ).search(COND, KEYS, guidance=guidance)
    expected = recomputed_log_p(system, params, COND, broken, guidance)
    assert np.abs(broken.log_p - expected).max() > 0.1


@pytest.mark.parametrize("name", ["next_scale", pytest.param("random", marks=pytest.mark.slow)])
def test_one_beam_of_one_candidate_is_plain_sampling(name):
    sampler = CachedSampler.create(*toy_system(name))
    settings: dict[str, Any] = dict(knobs=Knobs(temperature=1.2, top_k=6), guidance=GUIDED)
    plain = sampler(COND, KEYS, **settings)
    found = BeamSearch(sampler=sampler, width=1, candidates=1)(COND, KEYS, **settings)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.slow  # four programs
def test_a_score_of_images_is_what_is_searched_for():
    sampler = CachedSampler.create(*toy_system("next_scale"))
    search = BeamSearch(sampler=sampler, width=2, candidates=6, score=brightness)
    keep = jnp.zeros((3, 21), bool).at[:, 2:5].set(True)
    given = jnp.full((3, 21), 3, jnp.int32)
    found = search.search(COND, KEYS, given=given, keep=keep)
    assert (found.codes[:, :, 2:5] == 3).all()
    for rank in range(2):
        images = sampler.decode(found.codes[:, rank])
        draft = Draft(found.codes[:, rank], images, COND, found.log_p[:, rank], 2)
        np.testing.assert_allclose(found.scores[:, rank], brightness(draft), atol=1e-5)
    plain = sampler(COND, KEYS, given=given, keep=keep)
    draft = Draft(plain.codes, plain.images, COND, jnp.zeros(3), 2)
    assert (found.scores[:, 0] > brightness(draft)).all()
    # What is kept is no choice: both beams differ, though there is one code to draw.
    last = BeamSearch(sampler=sampler, width=2, candidates=2, likeliest=True)
    most = jnp.arange(21)[None] < jnp.full((3, 1), 20)
    codes = last.search(COND, given=plain.codes, keep=most).codes
    np.testing.assert_array_equal(codes[:, :, :20], np.repeat(plain.codes[:, None, :20], 2, 1))
    assert (codes[:, 0, 20] != codes[:, 1, 20]).all()
    program: Any = draw_beams
    size = program._cache_size()
    others: dict[str, Any] = dict(
        knobs=Knobs(temperature=0.7, step_top_k=(1, 2, 3)), guidance=Guidance()
    )
    search.search(COND, image_keys(0, 0, 3), given=given, keep=~keep, **others)
    assert program._cache_size() == size


@pytest.mark.parametrize("count", [1, 7, 70])
def test_likeliest_maps_against_all_maps(count):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 4, 4)).astype(np.float32)
    logits[:, 1, 2] = -np.inf  # 48 maps are left
    free = jnp.tile(jnp.array([True, True, True, False]), (2, 1))
    made, whether = likeliest_maps(jnp.asarray(logits), free, count)
    codes, valid = np.asarray(made).reshape(2, count, 4), np.asarray(whether).reshape(2, count)
    maps = np.array(list(itertools.product(range(4), repeat=3)))
    assert (codes[valid][:, 3] == 0).all() and codes.dtype == np.int32
    for row in range(2):
        log_p = np.asarray(jax.nn.log_softmax(logits[row, :3]))[np.arange(3), maps].sum(-1)
        best = np.argsort(-log_p)[: min(count, 48)]
        np.testing.assert_array_equal(codes[row, : len(best), :3], maps[best])
        np.testing.assert_array_equal(valid[row], np.arange(count) < 48)
    bits, _ = likeliest_maps(jnp.asarray(logits).reshape(2, 4, 2, 2), free, 2)
    assert bits.shape == (4, 4, 2) and bits.dtype == jnp.int8


def test_what_it_cannot_do_is_refused():
    sampler = CachedSampler.create(*toy_system("raster"))
    with pytest.raises(ValueError, match="width is 0; it must be at least 1"):
        BeamSearch(sampler=sampler, width=0, candidates=2)
    with pytest.raises(ValueError, match="BeamSearch has none"):
        search: Any = BeamSearch(sampler=sampler, width=2, candidates=2)
        BeamSearch(sampler=search, width=2, candidates=2)
    with pytest.raises(ValueError, match="set likeliest=True"):
        search(COND, KEYS, knobs=Knobs(temperature=0.0))
    with pytest.raises(ValueError, match="one key an image"):
        search(COND)
    with pytest.raises(ValueError, match=r"sampling\.smooth is True.* beam search"):
        search(COND, KEYS, knobs=Knobs(smooth=True))
