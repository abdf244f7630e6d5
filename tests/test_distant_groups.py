"""Groups of distant codes (PAR): order, rows, causality, cached groups, devices."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.position_tables import position_tables, resample
from ar_jax.backbones.target_positions import TargetAwarePositions
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler
from tests.objective_calls import KEY, close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_codes, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

SECTION: dict[str, Any] = dict(name="distant_groups", grid=4, regions=4)
_forced = jax.jit(teacher_forced, static_argnums=0)


def test_the_order_goes_through_the_regions():
    """At each cell of a region, over all regions."""
    schedule = schedules.distant_groups(grid=24, regions=4)
    assert schedule.cells is not None and schedule.cells[:4] == (0, 12, 288, 300)
    assert sorted(schedule.cells) == list(range(576)) and schedule.num_steps == 4 + 143
    np.testing.assert_array_equal(schedule.coords[1], (0, 0, 12))
    other = schedules.distant_groups(grid=(2, 6), regions=4)
    assert other.cells == (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)
    assert other.sizes == (1, 1, 1, 1, 4, 4)
    # A code a row is fed, or none where the first group begins.
    np.testing.assert_array_equal(other.fed, [0, 1, 2, 3, -1, -2, -3, 4, 5, 6, 7])
    np.testing.assert_array_equal(schedules.raster(grid=3).fed, np.arange(8))
    for regions in (0, 3, 9):
        with pytest.raises(ValueError, match=f"schedule.regions is {regions}; .* square number"):
            schedules.distant_groups(grid=4, regions=regions)
    with pytest.raises(ValueError, match="schedule.cells must be a permutation of the 4 cells"):
        schedules.Schedule(name="x", grids=((2, 2),), sizes=(1,) * 4, cells=(0, 1, 2, 2))


@pytest.fixture(scope="module")
def made() -> tuple[System, Any]:
    return toy_system("raster", schedule=SECTION)


def test_cached_logits_equal_teacher_forced_ones(made):
    system, params = made
    assert params["backbone"]["transition"].shape == (3, 16)
    cond, codes = toy_labels(2), toy_codes(system, 2)
    full = _forced(system, params, cond, codes)
    null = _forced(system, params, system.backbone.conditioner.null(cond), codes)
    scales = Guidance(scale=3.0, kind="linear").scales(system.schedule.num_steps)
    by_code = scales[system.schedule.step_id]
    guided = null + by_code[None, :, None] * (full - null)
    cached, _ = stepwise_logits(system, params, cond, codes, scales)
    assert np.linalg.norm(cached - guided) < 1e-5 * np.linalg.norm(guided)
    assert np.linalg.norm(full - null) > 0.05 * np.linalg.norm(full)


def influence(system: System, params: Any) -> np.ndarray:
    """[L, L - 1]: size of the gradient of every hidden state in every embedded code."""
    codes, cond = toy_codes(system, 1), toy_labels(1)

    def hidden(delta: jax.Array) -> jax.Array:
        def shift(call: Any, args: Any, kwargs: Any, info: Any) -> Any:
            out = call(*args, **kwargs)
            embeds = info.module.name == "token_embed" and info.method_name == "__call__"
            return out + delta if embeds else out

        with nn.intercept_methods(shift):
            variables = {"params": params["backbone"]}
            out: Any = system.backbone.apply(variables, codes[:, :-1], cond)
        return out[0][0]

    jacobian = jax.jit(jax.jacrev(hidden))(jnp.zeros((1, 15, system.backbone.width)))
    return np.sqrt(np.square(jacobian).sum((1, 2, 4)))


def is_parallel(system: System, matrix: np.ndarray) -> bool:
    """Whether a state depends on exactly the codes of the steps before its own."""
    steps = system.schedule.step_id
    seen = steps[:, None] > steps[None, :-1]
    return not matrix[~seen].any() and bool((matrix[seen] > 1e-7).all())


def test_a_group_sees_the_groups_before_and_itself_not(made, monkeypatch):
    """And its joint is the product of its codes'; a mask by rows, code by code, is found."""
    system, params = made
    assert is_parallel(system, influence(system, params))
    monkeypatch.setattr(Decoder, "row_steps", property(lambda self: tuple(range(self.rows))))
    assert not is_parallel(system, influence(system, params))


@pytest.mark.slow  # a sampler
def test_every_code_is_the_one_its_logits_and_noise_give(made):
    """Codes of a group are drawn independently, and lie where their cells are."""
    system, params = made
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.gumbel(size=(4, 16, system.head.vocab_size)), jnp.float32)
    sampler = CachedSampler.create(system, params)
    drawn = sampler(toy_labels(4), noise=noise)
    cells = np.asarray(system.schedule.cells)
    np.testing.assert_array_equal(drawn.order, np.broadcast_to(cells, (4, 16)))
    sequence = drawn.codes[:, cells]
    logits = _forced(system, params, toy_labels(4), sequence)
    np.testing.assert_array_equal(sequence, (logits + noise).argmax(-1))
    assert len(np.unique(sequence)) > 3
    greedy = sampler(toy_labels(4), knobs=Knobs(temperature=0.0)).codes
    wanted = _forced(system, params, toy_labels(4), greedy[:, cells]).argmax(-1)
    np.testing.assert_array_equal(greedy[:, cells], wanted)


def test_the_loss_is_of_the_codes_in_their_order(made):
    """Training takes codes cell by cell; one device and eight have one loss."""
    system, params = made
    frozen = {"tokenizer": params["tokenizer"]}
    trained = {part: params[part] for part in ("backbone", "head")}
    batch = toy_labels(16) | {"codes": toy_codes(system, 16)}
    objective = Likelihood(system=system, label_dropout=0.0)
    loss, _ = loss_of(objective, trained, {}, frozen, batch)
    sequence = batch["codes"][:, np.asarray(system.schedule.cells)]
    logits = _forced(system, params, toy_labels(16), sequence)
    np.testing.assert_allclose(loss, system.head.loss(logits, sequence).mean(), rtol=1e-5)
    eight, _ = loss_of(objective, replicated(trained), {}, replicated(frozen), sharded(batch))
    np.testing.assert_allclose(eight, loss, rtol=1e-5)


@pytest.mark.slow
def test_one_device_and_eight_have_one_gradient(made):
    system, params = made
    frozen = {"tokenizer": params["tokenizer"]}
    trained = {part: params[part] for part in ("backbone", "head")}
    batch = toy_labels(16) | {"codes": toy_codes(system, 16)}
    run = functools.partial(gradient_of, Likelihood(system=system))
    many = run(replicated(trained), {}, replicated(frozen), sharded(batch))
    close(many, run(trained, {}, frozen, batch), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def annealed() -> tuple[System, Any]:
    """Random groups give way to distant ones; rows are told the cells they hold and predict."""
    schedule = SECTION | dict(anneal=(10, 20))
    return toy_system("random", schedule=schedule, backbone=dict(depth=1))


def test_random_groups_are_cached_too_and_give_way_to_distant_ones(annealed):
    system, params = annealed
    cond, codes = toy_labels(2), toy_codes(system, 2)
    own = jnp.broadcast_to(jnp.asarray(system.schedule.cells)[None], (2, 16))
    rng = np.random.default_rng(5)
    order = jnp.asarray(np.stack([rng.permutation(16) for _ in range(2)]), jnp.int32)
    full = _forced(system, params, cond, codes, order)
    cached, _ = stepwise_logits(system, params, cond, codes, None, order)
    assert np.linalg.norm(cached - full) < 1e-5 * np.linalg.norm(full)
    default = _forced(system, params, cond, codes)
    np.testing.assert_allclose(_forced(system, params, cond, codes, own), default, atol=1e-5)
    assert np.linalg.norm(default - full) > 0.1 * np.linalg.norm(full)


def test_rows_say_the_cells_they_hold_and_predict(annealed):
    """A row of a group that is fed no code holds no cell."""
    system, params = annealed
    backbone, tables = system.backbone, params["backbone"]["cell_positions"]
    schedule, prefix = system.schedule, backbone.prefix_rows
    order = jnp.asarray(np.random.default_rng(5).permutation(16)[None], jnp.int32)
    fields = dict(width=backbone.width, spare=0, init_std=1.0)
    module = TargetAwarePositions(schedule=schedule, prefix_rows=prefix, **fields)
    found = module.apply({"params": tables}, order, prefix, 15)[0]
    predicted = tables["predicted"][prefix + order[0, 1:]]
    fed = schedule.fed
    held = tables["held"][prefix + order[0, fed]]
    np.testing.assert_allclose(found, predicted + np.where(fed[:, None] < 0, 0.0, held), atol=1e-6)


def test_training_anneals_to_the_schedule_s_own_order(annealed):
    """At the end a training batch has the loss of evaluation; at the start it has not."""
    system, params = annealed
    frozen = {"tokenizer": params["tokenizer"]}
    trained = {part: params[part] for part in ("backbone", "head")}
    batch = toy_labels(8) | {"codes": toy_codes(system, 8)}
    objective = Likelihood(system=system, label_dropout=0.0)
    run = jax.jit(objective.loss, static_argnames="train")

    def loss(step: int, train: bool) -> float:
        return float(run(trained, {}, frozen, batch, KEY, train=train, step=step)[0])

    evaluated = loss(0, False)
    np.testing.assert_allclose(loss(20, True), evaluated, rtol=1e-5)
    assert abs(loss(0, True) / evaluated - 1) > 1e-3


def test_tables_of_cells_are_resampled_as_they_lie(annealed):
    """Not in the order of the draws: the same grid gives the same rows, whatever the schedule."""
    system, params = annealed
    kind = position_tables(system.backbone)["cell_positions/held"]
    rows = np.asarray(params["backbone"]["cell_positions"]["held"])
    raster = schedules.random(grid=4)
    np.testing.assert_array_equal(resample(rows, kind, system.schedule, raster), rows)
    np.testing.assert_array_equal(resample(rows, kind, raster, system.schedule), rows)


def test_smaller_steps_than_the_one_before_are_refused():
    groups = dict(name="random_groups", grid=4, steps=5, curve="arccos")
    with pytest.raises(ValueError, match="draws random orders"):
        toy_system("raster", schedule=groups)
