"""Other models beside the sampled one: what each adds to the logits, held against no cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.sampling.companions import reward, weak
from ar_jax.sampling.continuous import ContinuousBatch
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.invert import invert
from ar_jax.sampling.loop import CachedSampler, draw_codes, image_keys
from ar_jax.sampling.speculative import speculate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_labels, toy_params, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 4
COND = toy_labels(BATCH)
GUIDED = Guidance(scale=2.5, kind="linear_excess")


@dataclasses.dataclass(frozen=True)
class Toy:
    """A system, other parameters of it, and a smaller one."""

    system: Any
    params: Any
    other: Any
    small: Any
    small_params: Any

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        return CachedSampler.create(self.system, self.params)

    @functools.cached_property
    def noise(self) -> jax.Array:
        """Gumbel noise [B, L, V]."""
        shape = (BATCH, self.system.schedule.length, self.system.head.vocab_size)
        return jnp.asarray(np.random.default_rng(0).gumbel(size=shape), jnp.float32)

    def by_step(self, values: Any) -> np.ndarray:
        """[S] as [1, L, 1]."""
        return np.asarray(values)[self.system.schedule.step_id][None, :, None]


_forced = jax.jit(teacher_forced, static_argnums=0)


@pytest.fixture(scope="module", params=["next_scale", "raster"])
def toy(request) -> Toy:
    system, params = toy_system(request.param)
    small, small_params = toy_system(request.param, backbone=dict(width=8, depth=1))
    tokenizer = {"tokenizer": params["tokenizer"]}
    return Toy(system, params, toy_params(system, 1) | tokenizer, small, small_params | tokenizer)


def test_its_own_null_class_as_the_weak_model_is_classifier_free_guidance(toy):
    ordinary = toy.sampler(COND, noise=toy.noise, guidance=GUIDED)
    beside = toy.sampler.beside(weak(toy.system, toy.params, null=True))
    same = beside(COND, noise=toy.noise, guidance=GUIDED)
    np.testing.assert_array_equal(same.codes, ordinary.codes)


@pytest.mark.slow  # two more programs
def test_its_logits_are_those_of_classifier_free_guidance(toy):
    """Noise that gives certain codes is a function of the logits."""
    beside = toy.sampler.beside(weak(toy.system, toy.params, null=True))
    codes, keys = toy.sampler(COND, noise=toy.noise).codes, image_keys(5, 0, BATCH)
    noises = [invert(s, codes, COND, keys, guidance=GUIDED) for s in (beside, toy.sampler)]
    np.testing.assert_allclose(noises[0], noises[1], rtol=1e-5, atol=1e-5)


def test_every_code_is_the_one_that_strong_and_weak_logits_give(toy):
    sampler = toy.sampler.beside(weak(toy.small, toy.small_params))
    codes = sampler(COND, noise=toy.noise, guidance=GUIDED).codes
    strong = _forced(toy.system, toy.params, COND, codes)
    lesser = _forced(toy.small, toy.small_params, COND, codes)
    scale = toy.by_step(GUIDED.scales(toy.system.schedule.num_steps))
    guided = lesser + scale * (strong - lesser)
    np.testing.assert_array_equal(codes, (guided + toy.noise).argmax(-1))
    swapped = strong + scale * (lesser - strong)
    assert (np.asarray(codes) != (swapped + toy.noise).argmax(-1)).any()


def test_scale_one_is_the_strong_model_alone(toy):
    plain = toy.sampler(COND, noise=toy.noise)
    sampler = toy.sampler.beside(weak(toy.system, toy.other))
    same = sampler(COND, noise=toy.noise, guidance=Guidance(scale=1.0))
    np.testing.assert_array_equal(same.codes, plain.codes)
    # Where it runs because of another step, up to the rounding of w + 1 (s - w).
    last = toy.system.schedule.num_steps - 1
    partly = sampler(COND, noise=toy.noise, guidance=Guidance(scale=4.0, start=last))
    before = toy.system.schedule.starts[last]
    np.testing.assert_array_equal(partly.codes[:, :before], plain.codes[:, :before])


def test_rewards_multiply_each_by_its_weight_of_the_step(toy):
    """Beside guidance by the null class, whose logits they are added to."""
    steps = toy.system.schedule.num_steps
    weights = np.linspace(0.0, 2.0, steps)
    rewards = (
        reward(toy.system, toy.other, weight=tuple(weights)),
        reward(toy.small, toy.small_params, weight=0.5, null=True),
    )
    codes = toy.sampler.beside(*rewards)(COND, noise=toy.noise, guidance=GUIDED).codes
    null = toy.system.backbone.conditioner.null(COND)
    given, without = (_forced(toy.system, toy.params, c, codes) for c in (COND, null))
    scale = toy.by_step(GUIDED.scales(steps))
    base = without + scale * (given - without)
    liked = toy.by_step(weights) * jax.nn.log_softmax(_forced(toy.system, toy.other, COND, codes))
    second = 0.5 * jax.nn.log_softmax(_forced(toy.small, toy.small_params, null, codes))
    total = base + liked + second
    np.testing.assert_array_equal(codes, (total + toy.noise).argmax(-1))
    assert (np.asarray(codes) != (base + second + toy.noise).argmax(-1)).any()


def test_a_uniform_reward_changes_no_bit_and_other_weights_no_program(toy):
    uniform = toy.other | {"head": jax.tree.map(jnp.zeros_like, toy.other["head"])}
    plain = toy.sampler(COND, noise=toy.noise)
    same = toy.sampler.beside(reward(toy.system, uniform))(COND, noise=toy.noise)
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    programs: Any = draw_codes
    size = programs._cache_size()
    toy.sampler.beside(reward(toy.system, toy.other, weight=0.3))(COND, noise=toy.noise)
    assert programs._cache_size() == size


def test_models_that_do_not_fit_are_refused(toy):
    sampler, other = toy.sampler, weak(toy.system, toy.other)
    with pytest.raises(ValueError, match="another tokenizer"):
        sampler.beside(reward(toy.system, toy_params(toy.system, 1)))
    with pytest.raises(ValueError, match="several weak models"):
        sampler.beside(other, other)
    name = "raster" if toy.system.schedule.name == "next_scale" else "next_scale"
    with pytest.raises(ValueError, match=f"schedule.name='{name}'.* the same steps"):
        sampler.beside(weak(*toy_system(name)))
    with pytest.raises(ValueError, match=r"weight has the shape \(2,\).* each of the"):
        reward(toy.system, toy.other, weight=(1.0, 2.0))
    if toy.system.schedule.name == "raster":
        with pytest.raises(ValueError, match="speculation is of one model.*: weak"):
            speculate(sampler.beside(other), COND, image_keys(0, 0, BATCH))
        with pytest.raises(ValueError, match="continuous batching is of one model"):
            ContinuousBatch(sampler.beside(other), slots=1)
