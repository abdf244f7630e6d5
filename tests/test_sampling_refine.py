"""The refinement sampler: noise, batches, devices, padding, and the law of what it draws."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.build import create_sampler
from ar_jax.sampling import refine
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.refine import RefineNoise, RefineSampler, draw_codes, draw_noise, groups
from ar_jax.sampling.set_likelihood import log_prob
from tests.objective_calls import replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import CLASSES, ENERGY, MIXTURE, masked_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

GUIDANCE = Guidance(scale=2.0, kind="linear_known")
LABELS = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1], jnp.int32)
KEYS = image_keys(0, 0, len(LABELS))


@pytest.fixture(scope="module")
def sampler(quick_compilation) -> RefineSampler:  # noqa: F811
    made = create_sampler(*masked_system())
    assert isinstance(made, RefineSampler)
    return made


@pytest.fixture(scope="module")
def drawn(sampler) -> Any:
    return sampler({"label": LABELS}, KEYS, guidance=GUIDANCE)


def test_keys_and_their_noise_draw_the_same(sampler, drawn):
    with jax.debug_key_reuse(True):
        noise = jax.jit(draw_noise, static_argnums=0)(sampler.system, KEYS)
    again = sampler({"label": LABELS}, guidance=GUIDANCE, noise=noise)
    np.testing.assert_array_equal(again.order, drawn.order)
    np.testing.assert_allclose(again.codes, drawn.codes, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.sort(drawn.order, axis=1), [np.arange(16)] * len(LABELS))
    assert len(np.unique(drawn.order, axis=0)) == len(LABELS)
    for part in noise.head.values():
        assert len(np.unique(part)) == part.size
        assert abs(float(part.mean())) < 0.2 and abs(float(part.std()) - 1) < 0.2


def test_an_image_depends_on_its_own_key_and_label(sampler, drawn):
    turned = [3, 6, 1, 0, 2, 5, 4, 7]  # with label changes elsewhere
    labels = LABELS[jnp.asarray(turned)].at[0].set(2)
    other = sampler({"label": labels}, KEYS[jnp.asarray(turned)], guidance=GUIDANCE)
    expected = np.asarray(drawn.codes)[turned]
    np.testing.assert_allclose(other.codes[1:], expected[1:], rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(other.codes[0]) - expected[0]).max() > 1e-3


@pytest.mark.slow  # compiles for eight devices
@pytest.mark.parametrize("changes", [{}, ENERGY, MIXTURE], ids=["diffusion", "energy", "mixture"])
def test_eight_devices_draw_as_one(changes):
    sampler: Any = create_sampler(*masked_system(**changes))
    drawn = sampler({"label": LABELS}, KEYS, guidance=GUIDANCE)
    spread = dataclasses.replace(sampler, params=replicated(sampler.params))
    other = spread({"label": sharded(LABELS)}, sharded(KEYS), guidance=GUIDANCE)
    assert len(other.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(other.order, drawn.order)
    np.testing.assert_allclose(other.codes, drawn.codes, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(sampler, drawn, monkeypatch):
    """Two padded groups of iterations against one group for each."""
    schedule = sampler.system.schedule
    assert groups(schedule) == ((0, 1), (1, 2), (2, 3))
    monkeypatch.setattr(refine, "MAX_GROUPS", 2)
    assert groups(schedule) == ((0, 2), (2, 3))
    assert schedule.sizes == (3, 5, 8)
    program: Any = draw_codes
    fresh = jax.jit(program.__wrapped__, static_argnames=("system", "guided"))
    monkeypatch.setattr(refine, "draw_codes", fresh)
    other = sampler({"label": LABELS}, KEYS, guidance=GUIDANCE)
    np.testing.assert_allclose(other.codes, drawn.codes, rtol=1e-4, atol=1e-5)


def test_the_program_is_given_to_benchmarks(sampler):
    lower, arguments = sampler.program({"label": LABELS}, KEYS, guidance=GUIDANCE)
    shapes = jax.tree.map(lambda leaf: leaf.shape, lower().out_info)
    assert shapes == ((8, 16, 2), (8, 16)) and len(arguments) == 6


@pytest.mark.slow  # two more programs
def test_guidance_of_the_null_class_is_none(sampler, drawn):
    null = {"label": jnp.full_like(LABELS, CLASSES)}
    guided, plain = (sampler(null, KEYS, guidance=g) for g in (GUIDANCE, None))
    np.testing.assert_allclose(guided.codes, plain.codes, rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(plain.codes - drawn.codes)).max() > 1e-3


def test_images_are_those_of_the_codes(sampler, drawn):
    assert drawn.images.shape == (len(LABELS), 8, 8, 1)
    np.testing.assert_array_equal(sampler.decode(drawn.codes), drawn.images)
    unknown = sampler.decode(drawn.codes, jnp.zeros((len(LABELS), 16), bool))
    np.testing.assert_array_equal(unknown, sampler.decode(jnp.zeros_like(drawn.codes)))


def test_what_does_not_fit_is_refused(sampler):
    cond = {"label": LABELS}
    with pytest.raises(ValueError, match="7 keys for 8 conditions"):
        sampler(cond, KEYS[:7])
    with pytest.raises(ValueError, match="neither keys nor noise are given: give one key an image"):
        sampler(cond)
    with pytest.raises(ValueError, match=r"sampling\.top_k is 5, which means nothing"):
        sampler(cond, KEYS, knobs=Knobs(top_k=5))
    head = {"start": jnp.zeros((8, 16, 2)), "steps": jnp.zeros((8, 16, 3, 2))}
    noise = RefineNoise(jnp.zeros((8, 16), int), head)
    with pytest.raises(ValueError, match=r"they must be .*\(8, 16, 4, 2\)"):
        sampler(cond, KEYS, noise=noise)


# A law whose conditionals are known: unit normals that all correlate by CORRELATION.
CORRELATION, LENGTH, COUNT = 0.6, 10, 20_000


@dataclasses.dataclass(frozen=True)
class Exchangeable:
    """A backbone whose hidden states are mean and deviation of a code given those it knows."""

    looks_away: bool  # it counts the rows that are no codes yet: a broken backbone
    hidden_width = 2
    conditioner = types.SimpleNamespace(null=lambda cond: cond)

    def apply(self, variables: Any, x: Any, *rest: Any, method: str | None = None) -> Any:
        if method is None:
            encoded = self.apply(variables, x, *rest, None, method="encode")
            return self.apply(variables, encoded, method="decode")
        if method == "encode":
            _, known, _ = rest
            if known is None or self.looks_away:
                known = jnp.ones(x.shape[:2], bool)
            total = jnp.where(known[..., None], x, 0.0).sum(1)  # [B, 1]
            return jnp.concatenate([total, known.sum(1, keepdims=True)], axis=1)
        total, count = x[:, :1], x[:, 1:]
        below = 1 + (count - 1) * CORRELATION
        mean = CORRELATION * total / below
        std = jnp.sqrt(1 - count * CORRELATION**2 / below)
        hidden = jnp.concatenate([mean, std], axis=1)[:, None]
        return jnp.broadcast_to(hidden, (len(x), LENGTH, 2))


@dataclasses.dataclass(frozen=True)
class Normal:
    """A head that draws from the mean and deviation it is given."""

    code_width = 1

    def noise(self, key: Any) -> Any:
        return jax.random.normal(key, (1,))

    def draw(self, params: Any, hidden: Any, noise: Any, **knobs: Any) -> Any:
        return hidden[:, :1] + hidden[:, 1:] * noise

    def apply(self, variables: Any, hidden: Any, codes: Any, method: str) -> Any:
        assert method == "log_prob"
        return jax.scipy.stats.norm.logpdf(codes[:, 0], hidden[:, 0], hidden[:, 1])


def drawn_codes(looks_away: bool, kept: Kept | None = None) -> np.ndarray:
    """[COUNT, LENGTH], drawn one by one, in groups that are padded."""
    schedule = schedules.masked(grid=(1, LENGTH), iterations=LENGTH)
    assert max(end - first for first, end in groups(schedule)) > 1
    backbone = Exchangeable(looks_away)
    system = System(tokenizer=None, schedule=schedule, backbone=backbone, head=Normal())
    cond = {"label": jnp.zeros(COUNT, jnp.int32)}
    codes, _ = draw_codes(
        system,
        {"backbone": {}, "head": {}},
        cond,
        image_keys(3, 0, COUNT),
        jnp.float32(1.0),
        jnp.ones(LENGTH),
        None,
        kept,
        guided=False,
    )
    return np.asarray(codes)[..., 0]


EXPECTED = np.where(np.eye(LENGTH, dtype=bool), 1.0, CORRELATION)


def test_what_is_drawn_has_the_joint_law():
    np.testing.assert_allclose(np.cov(drawn_codes(looks_away=False).T), EXPECTED, atol=0.04)


def test_a_broken_backbone_is_found():
    assert np.abs(np.cov(drawn_codes(looks_away=True).T) - EXPECTED).max() > 0.04


@pytest.mark.parametrize("looks_away", [False, True])
def test_the_likelihood_of_codes_one_by_one_is_their_joint_one(looks_away):
    """In any order."""
    schedule = schedules.masked(grid=(1, LENGTH), iterations=LENGTH)
    rng = np.random.default_rng(0)
    codes = rng.multivariate_normal(np.zeros(LENGTH), EXPECTED, 6)
    order = np.stack([rng.permutation(LENGTH) for _ in codes])
    backbone = Exchangeable(looks_away)
    found = log_prob(
        System(tokenizer=None, schedule=schedule, backbone=backbone, head=Normal()),
        {"backbone": {}, "head": {}},
        {"label": jnp.zeros(6, jnp.int32)},
        jnp.asarray(codes[..., None], jnp.float32),
        jnp.asarray(order, jnp.int32),
    )
    expected = stats.multivariate_normal(np.zeros(LENGTH), EXPECTED).logpdf(codes)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4) != looks_away


@pytest.mark.parametrize("looks_away", [False, True])
def test_what_is_drawn_has_the_law_given_what_is_kept(looks_away):
    """Every second image keeps four codes, the others nothing."""
    places, values = np.array([1, 4, 5, 8]), np.array([2.0, 0.5, 1.0, 1.5])
    given, keep = np.full((COUNT, LENGTH, 1), 7.0), np.zeros((COUNT, LENGTH), bool)
    given[:, places, 0], keep[::2, places] = values, True
    codes = drawn_codes(looks_away, Kept(jnp.asarray(given, jnp.float32), jnp.asarray(keep)))
    np.testing.assert_array_equal(codes[::2, places], np.tile(values, (COUNT // 2, 1)))
    free = np.setdiff1d(np.arange(LENGTH), places)
    # Of normals: the rest given the kept ones.
    weights = EXPECTED[np.ix_(free, places)] @ np.linalg.inv(EXPECTED[np.ix_(places, places)])
    spread = EXPECTED[np.ix_(free, free)] - weights @ EXPECTED[np.ix_(places, free)]
    errors = [
        np.abs(codes[::2, free].mean(0) - weights @ values).max(),
        np.abs(np.cov(codes[::2, free].T) - spread).max(),
        np.abs(np.cov(codes[1::2].T) - EXPECTED).max(),
    ]
    assert max(errors) > 0.1 if looks_away else max(errors) < 0.05, errors
