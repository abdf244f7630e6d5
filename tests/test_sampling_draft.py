"""Drafts of a smaller model: against the enumerated joint, and greedy against greedy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.api import Samples
from ar_jax.backbones.tree_decoder import TreeDecoder
from ar_jax.build import create_draft_sampler
from ar_jax.nn.draft_tree import DraftTree
from ar_jax.sampling import candidates
from ar_jax.sampling.candidates import choose, draw_candidates
from ar_jax.sampling.draft import draw_drafted
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, by_step, image_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import BATCH, DRAWS, FLATTEN, LABEL, SETTINGS, Toy, V, p_value
from tests.toy_systems import toy_labels, toy_params, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

SLOW = pytest.mark.slow
BRANCHES = (2, 1)
SMALL: dict[str, Any] = dict(
    vocab_size=V, schedule=dict(grid=2), autoencoder=dict(image_size=4), backbone=dict(depth=1)
)


def flat(params: Any) -> Any:
    """Of a head so flat that many images are likely."""
    return params | {"head": jax.tree.map(lambda a: FLATTEN * a, params["head"])}


def toys(name: str, order: tuple[int, ...] | None) -> tuple[Toy, CachedSampler]:
    """A model, and the sampler of another that drafts for it."""
    system, params = toy_system(name, **SMALL)
    draft = CachedSampler.create(system, flat(toy_params(system, 1)))
    return Toy(system, flat(params), order), draft


def p_of(
    toy: Toy, draft: CachedSampler, setting: str, branches: tuple, program: Any = draw_drafted
) -> float:
    """Of the chi-square test of `DRAWS` images."""
    knobs, guidance = SETTINGS[setting]
    made = create_draft_sampler(CachedSampler.create(toy.system, toy.params), draft, branches)
    knob_arrays, scales = by_step(toy.system.schedule, knobs, guidance)
    counts = np.zeros(len(toy.images))
    for first in range(0, DRAWS, BATCH):
        codes, _ = program(
            *(made.system, made.draft_system, made.params, made.draft_params),
            *({"label": jnp.full(BATCH, LABEL)}, image_keys(0, first, BATCH), knob_arrays),
            *(jnp.asarray(scales), toy.orders(BATCH)),
            guided=guidance.scale != 1,
            tree=made.tree,
        )
        places = np.asarray(codes) @ V ** np.arange(codes.shape[1] - 1, -1, -1)
        counts += np.bincount(places, minlength=len(counts))
    return p_value(counts, toy.joint(knobs, guidance))


@pytest.mark.parametrize(
    ("name", "order", "setting", "branches"),
    [
        ("raster", None, "plain", (2, 1)),
        pytest.param("raster", None, "guided and filtered", (2, 2), marks=SLOW),
        pytest.param("raster", None, "plain", (1, 1), marks=SLOW),
        pytest.param("raster", None, "plain", (4, 1, 1), marks=SLOW),
        pytest.param("random", (2, 0, 3, 1), "plain", (2, 1), marks=SLOW),
    ],
)
def test_samples_follow_the_joint(name, order, setting, branches):
    assert p_of(*toys(name, order), setting, branches) > 1e-3


@pytest.mark.slow  # what is broken here is found by `test_one_code_has_its_distribution` too
def test_a_broken_sampler_is_found(monkeypatch):
    """One that takes all drafts of a node as drawn from q itself."""
    monkeypatch.setattr(candidates, "without", lambda log_q, tried: log_q)
    unjitted: Any = draw_drafted
    # A function of its own: jit remembers traces by function.
    fresh = jax.jit(
        lambda *a, **k: unjitted.__wrapped__(*a, **k),
        static_argnums=(0, 1),
        static_argnames=("guided", "tree"),
    )
    assert p_of(*toys("raster", None), "plain", (3, 1), fresh) < 1e-9


def codes_of(p: np.ndarray, q: np.ndarray, count: int, draws: int = 40_000) -> np.ndarray:
    """How often each code is what the drafts of one node end in, [V]."""
    with np.errstate(divide="ignore"):
        log_p, log_q = jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q))

    def one(key: jax.Array) -> jax.Array:
        drafting, accepting, last = jax.random.split(key, 3)
        noise = jax.random.gumbel(drafting, (1, len(p)))
        no = jnp.bool_(False)
        drafts, given = draw_candidates(log_q[None], log_q[None], count, noise, no[None])
        uniform = jax.random.uniform(accepting, (count,))
        kept, left = choose(log_p, given[0], drafts[0], uniform, no)
        drawn = jnp.argmax(left + jax.random.gumbel(last, (len(p),)))
        return jnp.where(kept < count, drafts[0, jnp.minimum(kept, count - 1)], drawn)

    return np.bincount(jax.jit(jax.vmap(one))(image_keys(0, 0, draws)), minlength=len(p))


P, Q = np.array([0.1, 0.2, 0.05, 0.25, 0.4, 0.0]), np.array([0.3, 0.4, 0.2, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("count", [1, 3, 6])  # of 6 two are none: q has four codes
def test_one_code_has_its_distribution(count, monkeypatch):
    assert p_value(codes_of(P, Q, count), P) > 1e-3
    if count == 3:
        monkeypatch.setattr(candidates, "without", lambda log_q, tried: log_q)
        assert p_value(codes_of(P, Q, count), P) < 1e-9
    if count == 1:
        monkeypatch.setattr(candidates, "residual", lambda log_p, log_q: log_p)
        assert p_value(codes_of(P, Q, count), P) < 1e-9


@pytest.fixture(scope="module")
def pair() -> tuple[CachedSampler, CachedSampler]:
    system, params = toy_system("raster", backbone=dict(depth=1))
    return tuple(CachedSampler.create(system, p) for p in (params, toy_params(system, 1)))  # type: ignore[return-value]


def calls_of(samples: Samples) -> list[int]:
    assert samples.calls is not None
    return samples.calls.tolist()


def test_greedy_is_the_plain_greedy_and_one_program_draws_all(pair):
    """Sequences of 16, whose images settle different numbers of codes in a call."""
    sampler = create_draft_sampler(pair[0], pair[1], BRANCHES)
    cond, keys = toy_labels(6), image_keys(0, 0, 6)
    settings: Any = dict(knobs=Knobs(temperature=0.0), guidance=Guidance(scale=2.0))
    made, plain = sampler(cond, keys, **settings), pair[0](cond, keys, **settings)
    np.testing.assert_array_equal(made.codes, plain.codes)
    np.testing.assert_allclose(made.images, plain.images, atol=1e-5)
    assert len(set(calls_of(made))) > 1
    program: Any = draw_drafted
    size = program._cache_size()
    drawn = []
    for n in range(1, 20):
        result = sampler(
            {"label": (cond["label"] + n) % 3},
            image_keys(n, 0, 6),
            knobs=Knobs(temperature=0.5 + n / 20, top_k=n % 3, top_p=0.9 * (n % 2)),
            guidance=Guidance(scale=1 + n / 5),
        )
        assert 6 <= min(calls_of(result)) <= max(calls_of(result)) <= 16
        drawn.append(np.asarray(result.codes))
    assert program._cache_size() == size
    assert len(np.unique(np.concatenate(drawn), axis=0)) > 50
    # An image depends on its own key and condition alone.
    mixed = jnp.array([3, 1, 2, 0, 4, 5])  # label 0 for images 0 and 3
    alone, together = (sampler(cond, k, guidance=settings["guidance"]) for k in (keys[mixed], keys))
    np.testing.assert_array_equal(np.asarray(alone.codes)[mixed], together.codes)


def test_all_drafts_of_the_model_itself_are_kept(pair):
    """15 codes behind the first, three of them with every call."""
    sampler = create_draft_sampler(pair[0], pair[0], BRANCHES)
    result = sampler(toy_labels(6), image_keys(3, 0, 6), guidance=Guidance(scale=2.0))
    assert calls_of(result) == [6] * 6


CAPTIONS: dict[str, Any] = dict(condition="text", caption_length=3, caption_features=5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("random", {}),
        pytest.param("raster", CAPTIONS, marks=SLOW),
        pytest.param("raster", dict(positions="learned"), marks=SLOW),
    ],
)
def test_logits_of_a_tree_are_those_of_its_paths(name, changes):
    system, params = toy_system(name, backbone=dict(depth=1) | changes)
    sampler, tree, rng = CachedSampler.create(system, params), DraftTree((2, 2)), np.random
    weights = {"params": sampler.params["backbone"]}
    cond: dict[str, Any] = {"label": jnp.array([2])}
    if changes == CAPTIONS:
        features = jnp.asarray(rng.default_rng(0).standard_normal((1, 3, 5)), jnp.float32)
        mask = jnp.array([[False, True, True]])
        cond = {"caption": features, "caption_mask": mask, "dropped": jnp.array([False])}
    order = None if name == "raster" else jnp.asarray(rng.default_rng(1).permutation(16))[None]
    codes = jnp.asarray(rng.default_rng(2).integers(0, 8, 16))
    step, nodes = 3, jnp.asarray(rng.default_rng(3).integers(0, 8, 7)).at[0].set(codes[2])

    @jax.jit
    def run(step: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array]:
        backbone = TreeDecoder.of(sampler.system.backbone, tree)

        def apply(module: Any, rows: Any, step: Any, cache: Any) -> Any:
            return module.apply(weights, rows, cond, order=order, step=step, cache=cache)

        def ahead(path: tuple[int, ...]) -> Any:
            """The plain decoder, of the codes and then a path's nodes."""
            plain, rows = sampler.system.backbone, codes[:2][None]
            _, cache = apply(plain, None, 0, plain.init_cache(1))
            _, cache = apply(plain, rows, 1, cache)
            return apply(plain, nodes[jnp.array(path)][None], step, cache)[0][0]

        _, cache = apply(backbone, None, 0, backbone.init_cache(1))
        _, cache = apply(backbone, codes[:2][None], 1, cache)
        hidden, cache = apply(backbone.at(0, 7), nodes[None], step, cache)
        # On from the chosen path, the nodes 2 and 6, by another code.
        cache = backbone.keep_path(cache, step, jnp.array([2, 6]))
        after, _ = apply(backbone, nodes[3][None, None], step + 3, cache)
        paths = [ahead((0, 1, 4)), ahead((0, 2, 5)), ahead((0, 2, 6, 3))]
        return hidden[0], paths, after[0, 0], paths[2][3]

    hidden, paths, after, plain = run(jnp.int32(step))
    for path, rows in zip(((0, 1, 4), (0, 2, 5), (0, 2, 6)), paths, strict=True):
        np.testing.assert_allclose(hidden[np.array(path)], rows[:3], atol=1e-5)
    np.testing.assert_allclose(after, plain, atol=1e-5)


def test_the_shape_of_a_tree():
    tree = DraftTree((3, 2))
    assert (tree.size, tree.depth, tree.chain) == (9, 2, False)
    assert tree.levels == ((0, 1), (1, 4), (4, 10))
    assert tree.first_child.tolist() == [1, 4, 6, 8, *(0,) * 6]
    assert np.flatnonzero(tree.sees[7]).tolist() == [0, 2, 7]
    with pytest.raises(ValueError, match=r"branches is \(2, 0\)"):
        DraftTree((2, 0))


def test_what_does_not_fit_is_refused(pair):
    other = CachedSampler.create(
        *toy_system("raster", schedule=dict(grid=2), autoencoder=dict(image_size=4))
    )
    with pytest.raises(ValueError, match="the drafting model's schedule is"):
        create_draft_sampler(pair[0], other, (1,))
    with pytest.raises(ValueError, match=r"branches is \(9, 1\); the image has 16 codes of 8"):
        create_draft_sampler(pair[0], pair[1], (9, 1))
    groups = CachedSampler.create(*toy_system("two_pass", schedule=dict(steps=16)))
    with pytest.raises(ValueError, match="TwoPassDecoder does not"):
        create_draft_sampler(groups, groups, (1,))
    with pytest.raises(ValueError, match="2 keys for 3 conditions"):
        create_draft_sampler(pair[0], pair[1], (1,))(toy_labels(3), image_keys(0, 0, 2))
