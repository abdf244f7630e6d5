"""The flow sampler: noise, batches, guidance, what is kept, and the joint law of what it draws."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.build import create_sampler
from ar_jax.nn.flow import Flow
from ar_jax.sampling.edit import edit
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.flow import FlowNoise, FlowSampler, draw_codes, draw_noise, runs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from tests.objective_calls import replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_flow import flow_system
from tests.toy_systems import CLASSES, toy_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")

GUIDANCE = Guidance(scale=2.0, kind="linear")
COND, KEYS = toy_labels(8), image_keys(0, 0, 8)


@pytest.fixture(scope="module")
def sampler(quick_compilation) -> FlowSampler:  # noqa: F811
    made = create_sampler(*flow_system(backbone=dict(depth=1)))
    assert isinstance(made, FlowSampler)
    return made


@pytest.fixture(scope="module")
def drawn(sampler) -> Any:
    return sampler(COND, KEYS, guidance=GUIDANCE)


def test_keys_and_their_noise_draw_the_same(sampler, drawn):
    with jax.debug_key_reuse(True):
        noise = jax.jit(draw_noise, static_argnums=0)(sampler.system, KEYS)
    again = sampler(COND, guidance=GUIDANCE, noise=noise)
    np.testing.assert_allclose(again.codes, drawn.codes, rtol=1e-4, atol=1e-4)
    for part in (noise.start, noise.steps):
        assert len(np.unique(part)) == part.size
        assert abs(float(part.mean())) < 0.2 and abs(float(part.std()) - 1) < 0.2


def test_guided_euler_maruyama_by_hand(sampler, drawn):
    """Cell after cell without a cache: all cells at once, those to come being of no influence."""
    system, params = sampler.system, sampler.params
    schedule, flow = system.schedule, system.head.flow
    noise = jax.jit(draw_noise, static_argnums=0)(system, KEYS)
    null = {"label": jnp.full(8, CLASSES)}

    @jax.jit
    def velocity(x: Any, times: Any) -> Any:
        def of(cond: Any) -> Any:
            fed = {"params": params["backbone"]}, x, cond, times
            hidden, _ = system.backbone.apply(*fed)
            return system.head.apply({"params": params["head"]}, hidden, x, times)

        return of(COND), of(null)

    x, rows = np.array(noise.start), np.split(np.arange(16), 4)
    for cell, own in enumerate(rows):
        scale = 1 + cell / 3  # 1 + (w - 1) k / (S - 1)
        for n, (t, after) in enumerate(zip(flow.times, flow.times[1:], strict=False)):
            times = np.where(np.arange(4) < cell, 0.0, t).astype(np.float32)
            found, plain = (np.asarray(v)[:, own] for v in velocity(x, times[None].repeat(8, 0)))
            guided = plain + scale * (found - plain)
            score = -((1 - t) * guided + x[:, own]) / t
            moved = (guided - t * score) * (after - t)
            if n + 1 < flow.steps:
                moved += np.sqrt(2 * t * (t - after)) * np.asarray(noise.steps)[n][:, own]
            x[:, own] += moved
    cells = np.asarray(schedule.cells)
    np.testing.assert_allclose(np.asarray(drawn.codes)[:, cells], x, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(drawn.order, np.tile(cells, (8, 1)))


def test_an_image_depends_on_its_own_key_and_label(sampler, drawn):
    turned = jnp.asarray([3, 6, 1, 0, 2, 5, 4, 7])
    labels = COND["label"].at[0].set(2)  # its own was 0
    other = sampler({"label": labels}, KEYS[turned].at[0].set(KEYS[0]), guidance=GUIDANCE)
    same = sampler(COND, KEYS, guidance=GUIDANCE)
    np.testing.assert_array_equal(same.codes, drawn.codes)
    np.testing.assert_allclose(other.codes[7], drawn.codes[7], rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(other.codes[:1] - drawn.codes[:1])).max() > 1e-3


@pytest.mark.slow  # compiles for eight devices
def test_eight_devices_draw_as_one(sampler, drawn):
    spread = dataclasses.replace(sampler, params=replicated(sampler.params))
    other = spread({"label": sharded(COND["label"])}, sharded(KEYS), guidance=GUIDANCE)
    assert len(other.codes.sharding.device_set) == 8
    np.testing.assert_allclose(other.codes, drawn.codes, rtol=1e-4, atol=1e-4)


def test_images_are_those_of_the_codes(sampler, drawn):
    assert drawn.images.shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(sampler.decode(drawn.codes), drawn.images)


def test_what_is_kept_is_kept_bit_for_bit_by_one_program(sampler):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 1)), jnp.float32)
    sizes = set()
    for seed in range(3):
        mask = np.random.default_rng(seed).random((8, 8, 8)) < 0.1
        made = edit(sampler, images, mask, COND, KEYS, guidance=GUIDANCE)
        keep, codes = np.asarray(made.keep), np.asarray(made.samples.codes)
        assert codes[keep].tobytes() == np.asarray(made.given)[keep].tobytes()
        assert 0.2 < keep.mean() < 0.9 and (codes != np.asarray(made.given))[~keep].all()
        program: Any = draw_codes
        sizes.add(program._cache_size())
    assert len(sizes) == 1


def test_what_does_not_fit_is_refused(sampler):
    with pytest.raises(ValueError, match="7 keys for 8 conditions"):
        sampler(COND, KEYS[:7])
    with pytest.raises(ValueError, match="neither keys nor noise are given"):
        sampler(COND)
    with pytest.raises(ValueError, match=r"sampling\.top_k is 5, which means nothing"):
        sampler(COND, KEYS, knobs=Knobs(top_k=5))
    noise = FlowNoise(jnp.zeros((8, 16, 2)), jnp.zeros((3, 8, 16, 2)))
    with pytest.raises(ValueError, match=r"they must be .*\(4, 8, 16, 2\)"):
        sampler(COND, KEYS, noise=noise)


def test_steps_of_one_program():
    def of(*sizes: int) -> tuple[tuple[int, int], ...]:
        grids = ((1, sum(sizes)),)
        return runs(schedules.Schedule(name="next_entity", grids=grids, sizes=sizes))

    assert of(4, 4, 4, 4) == ((0, 1), (1, 4))
    assert of(4, 3, 3, 3, 2) == ((0, 1), (1, 2), (2, 4), (4, 5))
    assert of(9) == ((0, 1),)
    assert runs(schedules.next_scale(scales=[(1, 4), (2, 2), (4, 1)])) == ((0, 1), (1, 2), (2, 3))


# A law whose conditionals are known: unit normals that all correlate by CORRELATION.
CORRELATION, LENGTH, COUNT, WAY = 0.6, 6, 20_000, 100


@dataclasses.dataclass(frozen=True)
class Exchangeable:
    """A backbone of the exact velocity: of two codes a step, given those that its cache has."""

    forgets: bool  # it does not write clean codes into the cache: a broken backbone
    conditioner = types.SimpleNamespace(null=lambda cond: cond)

    def init_cache(self, batch: int) -> Any:
        return jnp.zeros((batch, LENGTH, 1))

    def apply(self, variables: Any, x: Any, cond: Any, t: Any, *, step: Any, cache: Any) -> Any:
        first, t = 2 * step, t[:, :, None]
        seen = jnp.where(jnp.arange(LENGTH)[None, :, None] < first, cache, 0.0).sum(1)[:, None]
        below = 1 + (first - 1) * CORRELATION
        mean = jnp.where(first == 0, 0.0, CORRELATION * seen / below)
        shared = CORRELATION - jnp.where(first == 0, 0.0, first * CORRELATION**2 / below)
        # Sum and difference of the two are independent.
        total, apart = x.sum(1, keepdims=True) / 2 - (1 - t) * mean, (x[:, :1] - x[:, 1:]) / 2

        def velocity(rest: Any, variance: Any) -> Any:
            return (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2) * rest

        spread = 1 - CORRELATION
        middle = velocity(total, spread + 2 * shared) - mean
        half = velocity(apart, spread)
        if not self.forgets:
            cache = jax.lax.dynamic_update_slice_in_dim(cache, x, first, axis=1)
        return jnp.concatenate([middle + half, middle - half], axis=1), cache


@dataclasses.dataclass(frozen=True)
class Given:
    """A head that is told the velocity."""

    code_width = 1
    sampling_steps = WAY
    noisy_context = True
    sampler: str

    @property
    def flow(self) -> Flow:
        return Flow(sampler=self.sampler, steps=WAY, last=0.02)

    def apply(self, variables: Any, hidden: Any, noisy: Any, times: Any) -> Any:
        return hidden


def covariance(forgets: bool, sampler: str) -> np.ndarray:
    grids = ((1, LENGTH),)
    schedule = schedules.Schedule(name="next_entity", grids=grids, sizes=(2, 2, 2))
    parts: dict[str, Any] = dict(backbone=Exchangeable(forgets), head=Given(sampler))
    system = System(tokenizer=None, schedule=schedule, **parts)
    cond, keys = {"label": jnp.zeros(COUNT, jnp.int32)}, image_keys(3, 0, COUNT)
    params: dict[str, Any] = {"backbone": {}, "head": {}}
    rest = (jnp.float32(1.0), jnp.ones(3), None)
    codes = draw_codes(system, params, cond, keys, *rest, guided=False)
    return np.cov(np.asarray(codes)[..., 0].T)


EXPECTED = np.where(np.eye(LENGTH, dtype=bool), 1.0, CORRELATION)


@pytest.mark.parametrize(
    "sampler", [pytest.param("euler", marks=pytest.mark.slow), "euler_maruyama"]
)
def test_what_is_drawn_has_the_joint_law(sampler):
    np.testing.assert_allclose(covariance(False, sampler), EXPECTED, atol=0.06)


def test_a_broken_backbone_is_found():
    assert np.abs(covariance(True, "euler") - EXPECTED).max() > 0.3
