"""FlowAR: scales of latents, what a scale is fed, its flow head, and its sampler by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import (
    build_objective,
    build_system,
    build_tokenizer,
    check_trained_tokenizer,
    create_sampler,
)
from ar_jax.nn.resize import enlarge
from ar_jax.sampling.edit import edit
from ar_jax.sampling.flow import draw_codes, draw_noise
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from tests.modules import apply
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_flow import FLOWAR, XAR, flow_config, flow_system
from tests.toy_systems import CLASSES, toy_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
BATCH, LENGTH = 4, 21
SYSTEM, PARAMS = flow_system(FLOWAR)
COND = toy_labels(BATCH)


def some_codes() -> jax.Array:
    """Of all scales, the coarser ones means of the finest."""
    finest = jnp.asarray(RNG.standard_normal((BATCH, 16, 2)), jnp.float32)
    return SYSTEM.tokenizer.all_scales(finest)


def test_scales_are_area_means_and_feed_the_next():
    codes = some_codes()
    assert codes.shape == (BATCH, LENGTH, 2) and SYSTEM.tokenizer.codes_shape == (LENGTH, 2)
    finest = codes[:, 5:].reshape(BATCH, 4, 4, 2)
    np.testing.assert_allclose(codes[:, 0], finest.mean((1, 2)), rtol=1e-4, atol=1e-6)
    blocks = finest.reshape(BATCH, 2, 2, 2, 2, 2).mean((2, 4))
    np.testing.assert_allclose(codes[:, 1:5], blocks.reshape(BATCH, 4, 2), rtol=1e-4, atol=1e-6)
    contexts = SYSTEM.tokenizer.contexts(codes)
    assert contexts.shape == (BATCH, 20, 2)
    np.testing.assert_allclose(contexts[:, :4], codes[:, :1].repeat(4, axis=1), rtol=1e-5)
    wanted = enlarge(blocks, (4, 4)).reshape(BATCH, 16, 2)
    np.testing.assert_allclose(contexts[:, 4:], wanted, rtol=1e-5, atol=1e-6)
    moments = jnp.concatenate([codes[:, 5:] / 0.5, jnp.full((BATCH, 16, 2), -30.0)], axis=-1)
    drawn = apply(SYSTEM.tokenizer, PARAMS["tokenizer"], moments, method="codes_of")
    np.testing.assert_allclose(drawn, codes, rtol=1e-4, atol=1e-6)


def test_what_is_not_known_is_enlarged_from_before():
    codes, decode = some_codes(), functools.partial(apply, SYSTEM.tokenizer, PARAMS["tokenizer"])
    whole = decode(codes, method="decode")
    np.testing.assert_array_equal(
        decode(codes, jnp.ones((BATCH, LENGTH), bool), method="decode"), whole
    )
    half = jnp.broadcast_to(jnp.arange(LENGTH)[None] < 5, (BATCH, LENGTH))
    finer = SYSTEM.tokenizer.next_context(codes[:, 1:5], 1)
    other = jnp.concatenate([codes[:, :5], finer], axis=1)
    np.testing.assert_allclose(
        decode(codes, half, method="decode"), decode(other, method="decode"), atol=1e-5
    )


def test_a_tokenizer_is_trained_without_scales():
    config: Any = flow_config(FLOWAR)
    trained = {name: field for name, field in config["tokenizer"].items() if name != "scales"}
    check_trained_tokenizer(config, trained)
    with pytest.raises(ValueError, match=r"tokenizer\.scale is"):
        check_trained_tokenizer(config, trained | {"scale": 3.0, "scales": (1, 2, 4)})
    with pytest.raises(ValueError, match=r"tokenizer\.scales ends at \(3, 3\)"):
        build_tokenizer(flow_config(FLOWAR, tokenizer={"scales": (1, 3)})).grids  # noqa: B018


@functools.partial(jax.jit, static_argnames="sizes")
def velocity(hidden: Any, noisy: Any, times: Any, sizes: Any = None) -> Any:
    return SYSTEM.head.apply({"params": PARAMS["head"]}, hidden, noisy, times, sizes)


def test_codes_of_a_scale_are_denoised_together_and_of_no_other():
    hidden = jnp.asarray(RNG.standard_normal((BATCH, LENGTH, 16)), jnp.float32)
    noisy = jnp.asarray(RNG.standard_normal((BATCH, LENGTH, 2)), jnp.float32)
    times = jnp.asarray(RNG.random((BATCH, 3)), jnp.float32)
    sizes = SYSTEM.schedule.sizes
    whole = velocity(hidden, noisy, times, sizes)
    moved = velocity(hidden, noisy.at[:, 2].add(1.0), times, sizes)
    own = (np.arange(LENGTH) >= 1) & (np.arange(LENGTH) < 5)
    np.testing.assert_array_equal((moved != whole).any((0, 2)), own)
    alone = velocity(hidden[:, 1:5], noisy[:, 1:5], times[:, 1:2])
    np.testing.assert_allclose(alone, whole[:, 1:5], rtol=1e-4, atol=1e-5)
    # Spatial: a position's own state says what is its own, and others see it by attention.
    said = velocity(hidden.at[:, 2].add(1.0), noisy, times, sizes)
    change = np.abs(np.asarray(said - whole)).max((0, 2))
    np.testing.assert_array_equal(change > 0, own)
    assert change[2] == change.max()


@pytest.mark.slow  # a sampler and its steps
def test_guided_euler_by_hand():
    """Scale after scale from the hidden states of teacher forcing on what was drawn."""
    sampler, keys = create_sampler(SYSTEM, PARAMS), image_keys(0, 0, BATCH)
    drawn = sampler(COND, keys, guidance=Guidance(scale=2.0))
    noise = jax.jit(draw_noise, static_argnums=0)(sampler.system, keys)
    null = {"label": jnp.full(BATCH, CLASSES)}

    @jax.jit
    def states(codes: Any, cond: Any) -> Any:
        contexts = SYSTEM.tokenizer.contexts(codes)
        return SYSTEM.backbone.apply({"params": PARAMS["backbone"]}, contexts, cond)[0]

    codes = drawn.codes
    both = states(codes, COND), states(codes, null)
    for start, size in zip(SYSTEM.schedule.starts, SYSTEM.schedule.sizes, strict=True):
        rows = slice(start, start + size)
        x = noise.start[:, rows]
        for t in (1.0, 0.75, 0.5, 0.25):
            at = jnp.full((1, 1), t)
            found, plain = (velocity(state[:, rows], x, at) for state in both)
            x = x - 0.25 * (plain + 2.0 * (found - plain))
        np.testing.assert_allclose(codes[:, rows], x, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(sampler.decode(codes), drawn.images)


@pytest.mark.slow  # test_sampling_flow.py has xAR's
def test_what_is_kept_is_kept_bit_for_bit_by_one_program():
    sampler, keys = create_sampler(SYSTEM, PARAMS), image_keys(0, 0, BATCH)
    images = jnp.asarray(RNG.uniform(-1, 1, (BATCH, 8, 8, 1)), jnp.float32)
    program: Any = draw_codes
    sizes = set()
    for seed in range(2):
        mask = np.random.default_rng(seed).random((BATCH, 8, 8)) < 0.1
        made = edit(sampler, images, mask, COND, keys)
        keep, codes = np.asarray(made.keep), np.asarray(made.samples.codes)
        assert codes[keep].tobytes() == np.asarray(made.given)[keep].tobytes()
        assert 0.2 < keep.mean() < 0.95 and (codes != np.asarray(made.given))[~keep].all()
        sizes.add(program._cache_size())
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": {"context": "codes", "vocab_size": 8}}, "backbone.context is 'codes'"),
        ({"backbone": {"feature_width": 3}}, "backbone.feature_width is 3"),
        ({"backbone": {"positions": "rope"}}, "backbone.positions is 'rope'"),
        ({"head": {"width": 9}}, "head.width is 9"),
        ({"head": {"code_width": 3}}, "head.code_width is 3"),
        ({"schedule": {"scales": (1, 4)}}, "schedule covers the grids"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, words):
    with pytest.raises(ValueError, match=words):
        build_system(flow_config(FLOWAR, **changes))


def test_heads_and_objectives_of_other_systems_are_refused():
    config = flow_config(FLOWAR) | {"head": XAR["head"]}
    with pytest.raises(ValueError, match="head.name is another one, .*'decoder' goes, .*'flow'"):
        build_system(config)
    config = flow_config(XAR) | {"head": FLOWAR["head"]}
    with pytest.raises(ValueError, match="head.name is another one, .*goes with 'velocity'"):
        build_system(config)
    config = flow_config(FLOWAR) | {"objective": dict(name="likelihood")}
    with pytest.raises(ValueError, match="'likelihood'; this head is trained by 'flow_matching'"):
        build_objective(config)
