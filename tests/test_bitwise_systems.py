"""Systems of bits (Infinity): the decoder, the head, flipped bits, guidance between blocks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_system
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.heads.bitwise import BitwiseHead
from ar_jax.nn.blocks import mixed
from ar_jax.objectives.likelihood import Likelihood, scale_weights
from ar_jax.sampling.edit import edit
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.invert import invert
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import p_value
from tests.toy_systems import toy_captions, toy_codes, toy_config, toy_labels, toy_system

BATCH = 3
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def toy() -> tuple[Any, Any]:
    return toy_system("bitwise")


@pytest.fixture(scope="module")
def forced(toy) -> Any:
    return jax.jit(functools.partial(teacher_forced, *toy))


def test_cached_logits_equal_teacher_forced_ones(toy, forced):
    system, params = toy
    cond, codes = toy_labels(BATCH), toy_codes(system, BATCH)
    null = system.backbone.conditioner.null(cond)
    given, other = forced(cond, codes), forced(null, codes)
    scales = np.array([1.5, 2.0, 3.0], np.float32)
    cached, _ = stepwise_logits(system, params, cond, codes, scales)
    scale = scales[system.schedule.step_id][None, :, None, None]
    assert given.shape == (BATCH, system.schedule.length, 4, 2)
    assert np.abs(given - other).max() > 1e-2  # the condition is heard
    np.testing.assert_allclose(cached, other + scale * (given - other), atol=2e-4)


def test_a_scale_does_not_see_itself_or_finer_ones(toy, forced):
    system, _ = toy
    cond, codes = toy_labels(BATCH), toy_codes(system, BATCH)
    plain = np.asarray(forced(cond, codes))
    for step in range(system.schedule.num_steps - 1):
        start = system.schedule.starts[step]
        after = np.asarray(forced(cond, codes.at[:, start].set(1 - codes[:, start])))
        end = start + system.schedule.sizes[step]
        np.testing.assert_array_equal(after[:, :end], plain[:, :end])
        assert np.abs(after[:, end:] - plain[:, end:]).max() > 1e-4


@pytest.mark.slow  # beside the conditions by class
def test_a_caption_is_read_where_it_is_real_and_a_dropped_one_is_not_read():
    condition = dict(condition="text", num_classes=0, caption_length=3, caption_features=5)
    system, params = toy_system("bitwise", backbone=condition)
    forced = jax.jit(functools.partial(teacher_forced, system, params))
    codes, cond = toy_codes(system, BATCH), toy_captions(BATCH, 3, 5)  # padded on the left
    plain = np.asarray(forced(cond, codes))
    noise = jnp.where(cond["caption_mask"][..., None], 0.0, 7.0)
    again = forced({**cond, "caption": cond["caption"] + noise}, codes)
    np.testing.assert_array_equal(again, plain)
    heard = np.asarray(forced({**cond, "caption": 1 + cond["caption"]}, codes))
    changed = np.abs(heard - plain).max((1, 2, 3)) > 1e-4
    np.testing.assert_array_equal(changed, ~np.asarray(cond["dropped"]))
    # The side of the padding is of no account: a caption's n-th row is what a null one replaces.
    padding = 3 - np.asarray(cond["caption_mask"]).sum(1)
    rows = (np.arange(3)[None] + padding[:, None]) % 3  # the real ones first
    names = ("caption", "caption_mask")
    moved = {name: cond[name][jnp.arange(BATCH)[:, None], rows] for name in names}
    moved["dropped"] = cond["dropped"]
    np.testing.assert_allclose(forced(moved, codes), plain, atol=1e-5)


def test_probabilities_of_a_code_sum_to_one():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
    codes = jnp.asarray(list(itertools.product((0, 1), repeat=3)), jnp.int8)
    log_p = BitwiseHead.log_prob(jnp.broadcast_to(logits, (8, 3, 2)), codes)
    assert float(jnp.exp(log_p).sum()) == pytest.approx(1, abs=1e-6)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [np.log(p[range(3), code]).sum() for code in np.asarray(codes)]
    np.testing.assert_allclose(log_p, expected, rtol=1e-5)
    loss = BitwiseHead.loss(jnp.broadcast_to(logits, (8, 3, 2)), codes)
    np.testing.assert_allclose(loss, -np.array(expected) / 3, rtol=1e-5)
    likely = jnp.argmax(logits, -1).astype(jnp.int8)
    wrong = likely.at[0].set(1 - likely[0])
    assert BitwiseHead.correct(logits, likely) == 1
    assert BitwiseHead.correct(logits, wrong) == pytest.approx(2 / 3)


TEMPERATURE = 1.5


@pytest.mark.parametrize("broken", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_samples_follow_the_joint(broken):
    """All 32 images of five codes of one bit; drawn at another temperature they do not."""
    count, scales = 20_000, (1, 2)
    system, params = toy_system(
        "bitwise",
        tokenizer=dict(scales=scales),
        schedule=dict(scales=scales),
        autoencoder=dict(image_size=4, code_width=1),
    )
    params = params | {"head": jax.tree.map(lambda a: 0.5 * a, params["head"])}
    images = jnp.asarray(list(itertools.product((0, 1), repeat=5)), jnp.int8)[..., None]
    guidance = Guidance(scale=2.0)
    cond = {"label": jnp.ones(len(images), jnp.int32)}
    logits = stepwise_logits(system, params, cond, images, np.full(2, 2, np.float32))[0]
    expected = np.exp(BitwiseHead.log_prob(logits / TEMPERATURE, images).sum(1))
    assert expected.sum() == pytest.approx(1, abs=1e-4) and (expected * count > 5).sum() > 8
    drawn = CachedSampler.create(system, params)(
        {"label": jnp.ones(count, jnp.int32)},
        image_keys(0, 0, count),
        knobs=Knobs(temperature=1.2 if broken else TEMPERATURE),
        guidance=guidance,
    ).codes
    assert drawn.dtype == jnp.int8
    counts = np.bincount(np.asarray(drawn)[..., 0] @ 2 ** np.arange(4, -1, -1), minlength=32)
    p = p_value(counts, expected)
    assert (p < 1e-6) if broken else (p > 1e-3)


@pytest.mark.slow  # two samplers
def test_guidance_between_blocks(toy):
    """The last block's mixed state is that of both conditions; no other is scale 1's."""
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((4, 1, 2)), jnp.float32)
    np.testing.assert_array_equal(mixed(rows, jnp.float32(1)), rows)
    guided = rows[2:] + 3 * (rows[:2] - rows[2:])
    np.testing.assert_allclose(mixed(rows, jnp.float32(3)), np.concatenate([guided, guided]))
    sampler, cond = CachedSampler.create(*toy), toy_labels(BATCH)
    keys = image_keys(0, 0, BATCH)
    drawn = {
        layers: np.asarray(sampler(cond, keys, guidance=Guidance(scale=4.0, layers=layers)).codes)
        for layers in ((0,), (-1,))
    }
    assert (drawn[0,] != drawn[-1,]).any()
    with pytest.raises(ValueError, match=r"layers is \(-3,\), but what leaves the last 2 blocks"):
        sampler(cond, keys, guidance=Guidance(scale=4.0, layers=(-3,)))
    with pytest.raises(ValueError, match=r"layers is \(1,\); it must be 0"):
        Guidance(layers=(1,))
    other = CachedSampler.create(*toy_system("next_scale"))
    with pytest.raises(ValueError, match="what leaves none of its blocks can be mixed"):
        other(cond, keys, guidance=Guidance(scale=4.0, layers=(-1,)))


@pytest.mark.slow  # programs of every kind of edit
def test_kept_bits_stay_and_noise_gives_an_image_again(toy):
    sampler, cond, keys = CachedSampler.create(*toy), toy_labels(BATCH), image_keys(1, 0, BATCH)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (BATCH, 8, 8, 1)), jnp.float32)
    mask = np.zeros((8, 8), bool)
    mask[:, 4:] = True
    edited = edit(sampler, image, mask, cond, keys)
    keep = np.asarray(edited.keep)
    drawn, given = np.asarray(edited.samples.codes), np.asarray(edited.given)
    assert 0 < keep.mean() < 1
    np.testing.assert_array_equal(drawn[keep], given[keep])
    assert (drawn[~keep] != given[~keep]).any()
    noise = invert(sampler, edited.given, cond, keys)
    assert noise.shape == (*given.shape, 2)
    np.testing.assert_array_equal(sampler(cond, noise=noise).codes, given)
    with pytest.raises(ValueError, match=r"sampling\.smooth=True mixes code vectors"):
        sampler(cond, keys, knobs=Knobs(smooth=True))


@pytest.mark.slow  # six programs
def test_training_flips_bits_and_evaluation_does_not(toy):
    system, params = toy
    trained = {name: params[name] for name in ("backbone", "head")}
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, 8, 8, 1)), jnp.uint8)
    batch = {"image": images, **toy_labels(BATCH)}
    tokenizer = {"params": params["tokenizer"]}
    codes = system.tokenizer.apply(tokenizer, images / 127.5 - 1.0, method="encode")
    plain = Likelihood(system=system, label_dropout=0.0)
    flipping = dataclasses.replace(plain, bit_flips=0.5)

    @functools.partial(jax.jit, static_argnames=("objective", "train"))
    def loss(objective: Any, batch: Any, train: bool) -> Any:
        value, aux = objective.loss(trained, {}, params, batch, jax.random.key(3), train)
        return value, aux.metrics["nll"]

    kept = {"codes": codes, **toy_labels(BATCH)}
    assert loss(plain, batch, False) == loss(flipping, batch, False)
    np.testing.assert_allclose(loss(plain, batch, True), loss(plain, kept, True), rtol=1e-5)
    assert abs(loss(flipping, batch, True)[0] - loss(plain, batch, True)[0]) > 1e-4
    assert abs(loss(flipping, kept, True)[0] - loss(plain, kept, True)[0]) > 1e-4
    # Nats of a code are the sum over its bits, the head's loss is their mean.
    value, nll = loss(plain, batch, False)
    assert float(nll) == pytest.approx(4 * float(value), rel=1e-5)
    weights = scale_weights(system.schedule)
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    by_scale = [weights[system.schedule.step_id == step] for step in range(3)]
    np.testing.assert_allclose([w[0] / by_scale[0][0] for w in by_scale], [1, 1 / 2, 1 / 4])


def test_codes_that_are_known_stay_right_until_a_bit_is_flipped():
    grids = ((1, 1), (2, 2), (4, 4))
    quantizer = MultiScaleBitwiseQuantizer(grids=grids, code_width=3)
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 21, 3)), jnp.int8)
    flips = jnp.zeros(codes.shape, bool).at[1, 0].set(True)
    right, contexts = quantizer.correct(quantizer.lookup(codes), flips, codes)
    np.testing.assert_array_equal(right[0], codes[0])
    np.testing.assert_array_equal(contexts[0], quantizer.contexts(codes)[0])
    np.testing.assert_array_equal(right[1, 0], codes[1, 0])
    assert (right[1, 1:] != codes[1, 1:]).any()
    used = codes.at[1].set(right[1].at[0].set(1 - right[1, 0]))
    np.testing.assert_allclose(contexts, quantizer.contexts(used), atol=1e-6)


def test_codes_of_patches_are_those_of_their_cells():
    """The same bits and the same sums, four cells to a code; and back."""
    fine = MultiScaleBitwiseQuantizer(grids=((2, 2), (4, 6)), code_width=3)
    coarse = MultiScaleBitwiseQuantizer(grids=((1, 1), (2, 3)), code_width=3, patch=2)
    assert (coarse.bits, coarse.cells) == (12, fine.grids)
    features = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 6, 3)), jnp.float32)
    ours, theirs = coarse.quantize(features), fine.quantize(features)
    np.testing.assert_array_equal(ours.features, theirs.features)
    cells = np.asarray(theirs.codes[:, 4:]).reshape(2, 4, 6, 3)
    code = np.asarray(ours.codes[:, 1 + 5])  # the last patch: rows 2 and 3, columns 4 and 5
    for channel, row, column in itertools.product(range(3), range(2), range(2)):
        expected = cells[:, 2 + row, 4 + column, channel]
        np.testing.assert_array_equal(code[:, channel * 4 + row * 2 + column], expected)
    np.testing.assert_array_equal(coarse.lookup(ours.codes), fine.lookup(theirs.codes))
    np.testing.assert_array_equal(coarse.unfolded(ours.codes[:, 1:], 1), cells)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(head=dict(bits=3)), "head.bits is 3, but config.tokenizer makes codes of 4 bits"),
        (dict(backbone=dict(feature_width=3)), "backbone.feature_width is 3, but .* is 4"),
        (dict(backbone=dict(pool_heads=3)), "backbone.width 16 is not a multiple of .*pool_heads"),
        (
            dict(backbone=dict(caption_length=0)),
            "caption_length is 0; it must be at least 1",
        ),
        (
            dict(backbone=dict(caption_null_rows=1)),
            "caption_null_rows is 1; it is of condit",
        ),
        (dict(tokenizer=dict(patch=2)), "last scale times the patch 2 must be"),
    ],
)
def test_errors_name_the_field(changes, words):
    with pytest.raises(ValueError, match=words):
        build_system(toy_config("bitwise", **changes))
