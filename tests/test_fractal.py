"""Fractal generators: exact likelihood, what each pixel may depend on, masks, checked fields."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.io.checkpoint import load_tree, save_tree
from ar_jax.schedules import nested
from ar_jax.tokenizers.pixels import PixelTokenizer
from ar_jax.tokenizers.tokenizer import to_float, to_uint8
from ar_jax.train.run import load_tokenizer
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_fractal import fractal_config, fractal_objective

pytestmark = pytest.mark.usefixtures("quick_compilation")

LABEL = 1


def all_images(length: int, values: int, channels: int = 1) -> np.ndarray:
    """Every image there is, int32 [V^(L C), L, C]."""
    found = list(itertools.product(range(values), repeat=length * channels))
    return np.array(found, np.int32).reshape(-1, length, channels)


def logits_of(objective: Any, params: Any, codes: Any, label: int = LABEL) -> jax.Array:
    """Teacher forcing: logits [N, L, C, V] of every pixel at its place, not in the steps' order."""
    backbone, head = objective.system.backbone, objective.system.head
    none = (None,) * len(objective.system.schedule.levels)

    @jax.jit
    def run(codes: jax.Array) -> jax.Array:
        cond = {"label": jnp.full(len(codes), label, jnp.int32)}
        rows, _ = backbone.apply({"params": params["backbone"]}, codes, cond, none, none)
        logits = head.apply({"params": params["head"]}, rows.hidden, rows.codes)
        places = jnp.argsort(jnp.asarray(objective.system.schedule.cells))
        return logits.reshape(*codes.shape[:2], *logits.shape[1:])[:, places]

    return run(jnp.asarray(codes))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(sizes=(4, 2, 1)), id="two levels", marks=pytest.mark.slow),
        pytest.param(dict(sizes=(2, 1), iterations=(0,), channels=2, values=3), id="channels"),
    ],
)
def test_the_likelihood_is_that_of_a_density(options):
    """All images together have the probability one, and single ones what the loss says."""
    objective, params = fractal_objective(**options)
    backbone = objective.system.backbone
    codes = all_images(objective.system.schedule.length, backbone.values, backbone.channels)
    logits = logits_of(objective, params, codes)
    nll = np.asarray(objective.system.head.loss(logits, jnp.asarray(codes)), np.float64)
    p = np.exp(-nll.sum((1, 2)))
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert p.max() > 5 / len(p)  # far from uniform
    some = codes[[3, len(codes) // 2]]
    batch = {"codes": jnp.asarray(some), "label": jnp.full(2, LABEL)}
    loss, aux = objective.loss(params, {}, params, batch, jax.random.key(0), False)
    expected = -np.log(p[[3, len(codes) // 2]]).mean() / some[0].size
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(aux.metrics["bits_per_dim"]) == pytest.approx(expected / math.log(2), rel=1e-5)
    assert "exact" in objective.remark


def test_a_pixel_depends_on_those_before_it_alone():
    """In the nested order: a change of a pixel leaves all earlier logits as they are."""
    objective, params = fractal_objective(values=4)
    cells = np.array(objective.system.schedule.cells)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (1, 16, 1)).repeat(17, 0)
    for step, cell in enumerate(cells):
        codes[step, cell] = (codes[16, cell] + 1) % 4
    logits = np.asarray(logits_of(objective, params, codes))
    changed = np.abs(logits[:16] - logits[16:]).max((2, 3))[:, cells] > 1e-6  # [changed, step]
    assert not changed[np.tril_indices(16)].any()
    assert changed[np.triu_indices(16, 1)].mean() > 0.9


def test_orders_of_nested_patches():
    schedule = nested(sizes=(4, 2, 1), iterations=(0, 0))
    assert schedule.cells == (0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)
    assert schedule.sizes == (4, 4, 4, 4) and schedule.num_steps == 4
    sets = nested(sizes=(8, 2, 1), iterations=(3, 0))
    assert [level.name for level in sets.levels] == ["masked", "raster"]
    assert sets.sizes == tuple(4 * n for n in sets.levels[0].sizes)


@functools.cache
def masked(colour: bool = False) -> Any:
    return fractal_objective(
        sizes=(8, 4, 1),
        iterations=(3, 2),
        values=16,
        channels=3,
        backbone=dict(colour=colour),
    )


def test_known_patches_count_nothing_and_hidden_ones_are_not_seen():
    objective, params = masked()
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(0, 16, (2, 64, 3)), jnp.int32)
    draws = objective.draw(jax.random.key(3), 2, train=True)
    backbone, cond = objective.system.backbone, {"label": jnp.array([0, 2])}

    @jax.jit
    def hidden_states(codes: jax.Array) -> Any:
        arguments = codes, cond, draws.shares, draws.noise
        return backbone.apply({"params": params["backbone"]}, *arguments)[0]

    rows = hidden_states(codes)
    first, second = draws.shares
    assert 0 < first.mean() < 1 and first.shape == (2, 4) and second.shape == (8, 16)
    wanted = (np.asarray(first).reshape(-1, 1) * np.asarray(second)).reshape(-1)
    np.testing.assert_array_equal(rows.weights, wanted)
    # Other pixels where they are hidden on both levels: nothing is different but the targets.
    places = jnp.argsort(jnp.asarray(objective.system.schedule.cells))
    unseen = rows.weights.reshape(2, 64)[:, places] > 0
    other = jnp.where(unseen[..., None], (codes + 5) % 16, codes)
    again = hidden_states(other)
    np.testing.assert_array_equal(again.hidden, rows.hidden)
    assert (again.codes != rows.codes).any()


def test_evaluation_counts_every_patch_once_on_average():
    """With counts that are uniform, n of L patches hidden count L / n each."""
    objective, _ = masked()
    for share in objective.draw(jax.random.key(0), 500, train=False).shares:
        np.testing.assert_allclose(share.sum(1), share.shape[1], rtol=1e-5)
        counts = np.bincount(np.asarray((share > 0).sum(1)), minlength=share.shape[1] + 1)
        assert counts[0] == 0 and (counts[1:] > 0.5 * len(share) / share.shape[1]).all()
        np.testing.assert_allclose(share.mean(0), 1, atol=0.25)
    assert "upper bound" in objective.remark


@pytest.mark.slow  # a colour head compiles long
def test_red_and_mean_colours_count_as_asked():
    objective, params = masked(colour=True)
    heavy = dataclasses.replace(
        objective, channel_weights=(5.0, 1.0, 1.0), colour_weights=(2.0, 1.0, 1.0)
    )
    rng = np.random.default_rng(1)
    codes = jnp.asarray(rng.integers(0, 16, (2, 64, 3)), jnp.int32)
    cond, draws = {"label": jnp.array([0, 2])}, objective.draw(jax.random.key(3), 2, train=True)
    loss, aux = heavy.loss_of(params, codes, cond, draws, train=True)
    plain, same = objective.loss_of(params, codes, cond, draws, train=True)
    assert float(plain) == pytest.approx(float(same.metrics["bits_per_dim"]) * math.log(2))
    assert float(aux.metrics["bits_per_dim"]) == float(same.metrics["bits_per_dim"])
    backbone, head = objective.system.backbone, objective.system.head
    rows, (colours,) = backbone.apply(
        {"params": params["backbone"]}, codes, cond, draws.shares, draws.noise
    )
    logits = head.apply({"params": params["head"]}, rows.hidden, rows.codes)
    expected = 0.0
    for nll, weights, shares in (
        (head.loss(logits, rows.codes), rows.weights, [5, 1, 1]),
        (head.loss(colours.hidden, colours.codes), colours.weights, [2, 1, 1]),
    ):
        expected += np.average(np.average(nll, axis=1, weights=shares), weights=weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss) != pytest.approx(float(plain), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(schedule=dict(sizes=(4, 3, 1))), r"schedule.sizes is \(4, 3, 1\)"),
        (dict(schedule=dict(iterations=(0,))), r"schedule.iterations is \(0,\)"),
        (dict(schedule=dict(iterations=(0, 2)), backbone=dict(conditions=5)), "one condition"),
        (dict(schedule=dict(sizes=(2, 1), iterations=(0,))), "schedule covers the grids"),
        (dict(backbone=dict(widths=(16,))), r"backbone.widths is \(16,\)"),
        (dict(backbone=dict(heads=(3, 2))), r"backbone.widths\[0\] is 16"),
        (dict(backbone=dict(conditions=6)), "backbone.conditions is 6"),
        (dict(backbone=dict(std=(0.0,))), "backbone.std"),
        (dict(backbone=dict(values=3)), "backbone.values is 3, but .* 2"),
        (dict(head=dict(channels=3)), "head.channels is 3, but .* 1"),
        (dict(objective=dict(channel_weights=(1.0, 2.0))), "objective.channel_weights"),
        (dict(objective=dict(name="likelihood")), "trained by 'nested'"),
        (dict(schedule=dict(name="raster", grid=4, sizes=None, iterations=None)), "unknown"),
    ],
)
def test_fields_that_do_not_fit_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        build_objective(fractal_config(**change))


def test_pixels_are_codes_exactly():
    """Every uint8 image comes back; of a part of the pixels the others are grey."""
    tokenizer: Any = PixelTokenizer(image_size=16, image_channels=2)
    images = jnp.asarray(np.arange(512, dtype=np.uint8).reshape(1, 16, 16, 2))
    assert tokenizer.init(jax.random.key(0), to_float(images)) == {}
    codes = tokenizer.apply({}, to_float(images), method="encode")
    np.testing.assert_array_equal(codes, images.reshape(1, 256, 2))
    back = tokenizer.apply({}, codes, method="decode")
    np.testing.assert_array_equal(to_uint8(back), images)
    for known in (16, jnp.arange(256)[None] < 16):
        part = tokenizer.apply({}, codes, known, method="decode")
        np.testing.assert_array_equal(part[:, :1], back[:, :1])
        assert (part[:, 1:] == 0).all()


def test_a_tokenizer_without_parameters_is_not_asked_for(tmp_path):
    objective, _ = fractal_objective()
    config: Any = dict(tokenizer_checkpoint="")
    assert load_tokenizer(config, tmp_path, objective.system) == {}
    with pytest.raises(ValueError, match="tokenizer_checkpoint=runs/a, but .* no parameters"):
        load_tokenizer(dict(tokenizer_checkpoint="runs/a"), tmp_path, objective.system)
    for _ in range(2):  # by whoever comes first
        save_tree(tmp_path / "empty", {})
    assert load_tree(tmp_path / "empty") == load_tree(tmp_path / "empty", {}) == {}
    with pytest.raises(ValueError, match="holds no saved parameters"):
        load_tree(tmp_path / "empty", {"a": jax.ShapeDtypeStruct((1,), jnp.float32)})
