"""Merged windows of codes (Token-Shuffle): rows, causality, cache, the joint, the decoder's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.backbones.shuffled_decoder import ShuffledDecoder
from ar_jax.build import build_objective
from ar_jax.compilation.estimate import model_flops
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.modules import apply
from tests.objective_calls import loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import FLATTEN, SETTINGS, Toy, V, p_value
from tests.toy_systems import toy_codes, toy_config, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BACKBONE: dict[str, Any] = dict(name="shuffled_decoder", fusion_blocks=1)
WINDOWS: dict[str, Any] = dict(
    schedule=dict(window=(2, 1), grid=(4, 6)),
    backbone=BACKBONE,
    autoencoder=dict(image_size=(8, 12)),
)
_forced = jax.jit(teacher_forced, static_argnums=0)


@pytest.fixture(scope="module")
def made() -> tuple[System, Any]:
    return toy_system("raster", **WINDOWS)


def test_a_step_of_the_schedule_is_a_window():
    schedule = schedules.raster(grid=(2, 4), window=2)
    assert schedule.cells == (0, 1, 4, 5, 2, 3, 6, 7) and schedule.sizes == (4, 4)
    assert schedule.segments == ((0, 1), (1, 2))
    assert schedules.raster(grid=3, window=1) == schedules.raster(grid=3)
    with pytest.raises(ValueError, match=r"schedule.window is 2; its sides must divide .*\(7, 7\)"):
        schedules.raster(grid=7, window=2)


def test_windows_of_one_code_are_the_decoder_s_own():
    """Parameters, logits and cached logits, whatever the blocks."""
    system, params = toy_system("raster", backbone=BACKBONE)
    plain, expected = toy_system("raster")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    cond, codes = toy_labels(2), toy_codes(system, 2)
    logits = [_forced(one, params, cond, codes) for one in (system, plain)]
    np.testing.assert_array_equal(*logits)


def test_cached_logits_equal_teacher_forced_ones(made):
    system, params = made
    assert system.backbone.rows == 12 and system.backbone.init_cache(2).k[0].shape[2] == 12
    cond, codes = toy_labels(2), toy_codes(system, 2)
    full = _forced(system, params, cond, codes)
    null = _forced(system, params, system.backbone.conditioner.null(cond), codes)
    scales = Guidance(scale=3.0, kind="linear").scales(system.schedule.num_steps)
    guided = null + scales[system.schedule.step_id][None, :, None] * (full - null)
    cached, _ = stepwise_logits(system, params, cond, codes, scales)
    assert np.linalg.norm(cached - guided) < 1e-5 * np.linalg.norm(guided)
    assert np.linalg.norm(full - null) > 0.05 * np.linalg.norm(full)


def influence(system: System, params: Any) -> np.ndarray:
    """[L, L]: size of the gradient of every hidden state in every embedded code."""
    codes, cond = toy_codes(system, 1), toy_labels(1)
    length = system.schedule.length

    def hidden(delta: jax.Array) -> jax.Array:  # of all codes but the last window's
        def shift(call: Any, args: Any, kwargs: Any, info: Any) -> Any:
            out = call(*args, **kwargs)
            embeds = info.module.name == "token_embed" and info.method_name == "__call__"
            return out + delta[:, : out[..., 0].size].reshape(out.shape) if embeds else out

        with nn.intercept_methods(shift):
            variables = {"params": params["backbone"]}
            out: Any = system.backbone.apply(variables, codes[:, :-1], cond)
        return out[0][0]

    jacobian = jax.jit(jax.jacrev(hidden))(jnp.zeros((1, length, system.backbone.width)))
    return np.sqrt(np.square(jacobian).sum((1, 2, 4)))


def sees_windows_before(system: System, matrix: np.ndarray) -> bool:
    """Whether a state depends on exactly the codes of the windows before its own."""
    steps = system.schedule.step_id
    seen = steps[:, None] > steps[None, :]
    return not matrix[~seen].any() and bool((matrix[seen] > 1e-7).all())


def test_a_code_sees_the_windows_before_and_its_own_not(made, monkeypatch):
    """Windows that are cut a code too late, which would be seen by their own codes, are found."""
    system, params = made
    assert sees_windows_before(system, influence(system, params))
    cut = ShuffledDecoder._by_window
    late = lambda self, context: cut(self, jnp.roll(context, -1, axis=1))  # noqa: E731
    monkeypatch.setattr(ShuffledDecoder, "_by_window", late)
    context = toy_codes(system, 1)[:, :-1]
    contexts = jnp.concatenate([context, context.at[0, 2].add(1)])
    cond = jax.tree.map(lambda a: a.repeat(2, axis=0), toy_labels(1))
    states = apply(system.backbone, params["backbone"], contexts, cond)[0]
    assert np.abs(states[0] - states[1])[2].max() > 1e-7  # the state of code 2 itself


@dataclasses.dataclass(frozen=True)
class WindowToy(Toy):
    """The order is the schedule's own, of which the sampler is told nothing."""

    def orders(self, count: int) -> None:
        return None


@pytest.fixture(scope="module")
def toy() -> WindowToy:
    """Two windows of two codes, one above the other."""
    system, params = toy_system(
        "raster",
        vocab_size=V,
        schedule=dict(grid=2, window=(2, 1)),
        backbone=BACKBONE,
        autoencoder=dict(image_size=4),
    )
    params["head"] = jax.tree.map(lambda a: FLATTEN * a, params["head"])
    return WindowToy(system, params, system.schedule.cells)


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_follow_the_joint_of_the_loss(toy, name):
    """Not that of other cells, and not with one noise for the codes of a window."""
    knobs, guidance = SETTINGS[name]
    joint = toy.joint(knobs, guidance)
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    counts = toy.counts(knobs, guidance)
    assert p_value(counts, joint) > 1e-3
    other = dataclasses.replace(toy, order=(0, 1, 2, 3))
    assert p_value(counts, other.joint(knobs, guidance)) < 1e-9
    if name == "plain":
        shared = jax.jit(
            jax.vmap(lambda key: jax.random.gumbel(key, (2, V)).repeat(2, axis=0))
        )  # [B, L, V]
        assert p_value(toy.counts(knobs, guidance, noise=shared), joint) < 1e-9
        batch = {"label": jnp.full(len(toy.images), 1), "codes": jnp.asarray(toy.images)}
        params = {part: toy.params[part] for part in ("backbone", "head")}
        objective = Likelihood(system=toy.system, label_dropout=0.0)
        frozen = {"tokenizer": toy.params["tokenizer"]}
        loss, _ = loss_of(objective, params, {}, frozen, batch)
        np.testing.assert_allclose(loss, -np.log(joint).mean() / 4, rtol=1e-5)


def test_one_device_and_eight_have_one_loss(made):
    system, params = made
    frozen = {"tokenizer": params["tokenizer"]}
    trained = {part: params[part] for part in ("backbone", "head")}
    batch = toy_labels(16) | {"codes": toy_codes(system, 16)}
    objective = Likelihood(system=system, label_dropout=0.0)
    loss, _ = loss_of(objective, trained, {}, frozen, batch)
    eight, _ = loss_of(objective, replicated(trained), {}, replicated(frozen), sharded(batch))
    np.testing.assert_allclose(eight, loss, rtol=1e-5)


@pytest.mark.slow  # a sampler
def test_kept_codes_stay_as_they_are(made):
    system, params = made
    sampler = CachedSampler.create(system, params)
    codes = toy_codes(system, 2)
    keep = jnp.arange(24)[None] % 6 < jnp.asarray([[3], [2]])  # left parts, across a window
    keys = image_keys(0, 0, 2)
    made_of = sampler(toy_labels(2), keys, given=codes, keep=keep).codes
    np.testing.assert_array_equal(made_of[keep], codes[keep])
    assert (made_of[~keep] != codes[~keep]).any()


def test_operations_are_counted_by_rows_and_by_codes(made):
    system, params = made
    width, length = 16, 24
    backbone, head = params["backbone"], params["head"]
    found = [
        model_flops({"backbone": {"reduce": backbone["reduce"]}}, system, 1, passes=1),
        model_flops({"head": head}, system, 1, passes=1),
    ]
    pairs = 4.0 * 2 * width * (12 * 13 // 2)
    expected = [2.0 * width * (width // 2) * length, 2.0 * width * 8 * length]
    np.testing.assert_allclose(found, np.add(expected, pairs))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(schedule=dict(window=(1, 3), grid=(4, 6))), "backbone.width is 16; the 3 codes"),
        (dict(backbone=BACKBONE | dict(fusion_blocks=-1)), "backbone.fusion_blocks is -1"),
        (dict(backbone=BACKBONE | dict(positions="learned")), "backbone.positions is 'learned'"),
        (dict(backbone=dict(name="decoder")), "predicts 2 codes at once"),
        (dict(backbone=BACKBONE | dict(context="features")), "this tokenizer gives 'codes'"),
        (
            dict(schedule=dict(name="random", grid=(4, 6))),
            "schedule.name is 'random'; .* use 'raster' with a window",
        ),
        (
            dict(objective=dict(name="likelihood", patches=((2, 5),))),
            r"objective.patches is .* of single codes .* windows \(2, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_said_when_it_is_built(changes, said):
    config = toy_config("raster", **WINDOWS)
    for section, fields in changes.items():
        config[section] = fields if section == "schedule" else config[section] | fields
    config["schedule"].setdefault("name", "raster")
    if changes.get("backbone", {}).get("name") == "decoder":
        del config["backbone"]["fusion_blocks"]
    with pytest.raises(ValueError, match=said):
        build_objective(config)
