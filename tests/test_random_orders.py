"""Random orders: their draw and annealing, the decoder that takes them, training in them."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.axes import NOT_ANNEALED, SCHEDULES
from ar_jax.build import build_schedule
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.orders import draw_orders, random_share
from ar_jax.sampling.guidance import Guidance
from tests.modules import apply
from tests.objective_calls import BATCH, KEY, close, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_codes, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

START, END = 125_000, 187_500


def share(schedule: schedules.Schedule, *steps: int) -> list[float]:
    run = jax.jit(jax.vmap(functools.partial(random_share, schedule)))
    return np.asarray(run(jnp.asarray(steps, jnp.int32))).tolist()


def test_annealing():
    schedule = schedules.random(grid=4, anneal=(START, END))
    middle = (START + END) // 2
    found = share(schedule, 0, START - 1, START, START + 1, middle, END - 1, END, 2**31 - 1)
    step = 1 / (END - START)
    np.testing.assert_allclose(found, [1, 1, 1, 1 - step, 0.5, step, 0, 0], atol=1e-7)
    assert share(schedules.random(grid=4), 0, 10**9) == [1, 1]
    assert share(schedules.raster(grid=4), 0, 10**9) == [0, 0]
    # Neighbouring steps differ however many there are.
    late = schedules.random(grid=4, anneal=(10**9, 10**9 + 10))
    np.testing.assert_allclose(share(late, 10**9 + 3), [0.7], atol=1e-6)
    # Without a stretch between them, as the official code takes it too.
    assert share(schedules.random(grid=4, anneal=(5, 5)), 0, 5, 6, 7) == [1, 1, 0, 0]


@pytest.mark.parametrize("anneal", [(-1, 3), (7, 2), (1, 2, 3)])
def test_annealing_must_not_end_before_it_starts(anneal):
    with pytest.raises(ValueError, match=r"schedule.anneal is .*0 <= start <= end"):
        schedules.random(grid=4, anneal=anneal)


def test_groups_anneal_too_and_are_then_drawn_in_raster_order():
    groups: dict[str, Any] = dict(grid=4, steps=6, curve="arccos")
    plain = schedules.random_groups(**groups)
    annealed = schedules.random_groups(**groups, anneal=(10, 20))
    assert [float(random_share(annealed, step)) for step in (10, 15, 20)] == [1.0, 0.5, 0.0]
    assert float(random_share(plain, 99)) == 1.0
    assert (plain.shuffled, annealed.shuffled, annealed.random) == (True, False, True)
    assert annealed.sizes == plain.sizes


def test_schedules_of_one_order_say_why_they_do_not_anneal():
    assert set(SCHEDULES) == {*NOT_ANNEALED, "random", "random_groups", "distant_groups"}
    for name, reason in NOT_ANNEALED.items():
        with pytest.raises(
            ValueError, match=rf"schedule.anneal is \(1, 2\), .* '{name}': {reason}"
        ):
            build_schedule(dict(schedule=dict(name=name, anneal=(1, 2))))
    distant = dict(name="distant_groups", grid=4, regions=4, anneal=(1, 2))
    with pytest.raises(
        ValueError, match="'rope', .*'distant_groups' draws random orders: only pos"
    ):
        toy_system("raster", schedule=distant)


def test_a_random_schedule_has_the_raster_grid():
    ours, raster = schedules.random(grid=(2, 3)), schedules.raster(grid=(2, 3))
    assert (ours.grids, ours.sizes, ours.random) == (raster.grids, raster.sizes, True)
    assert not raster.random and ours.name == "random"
    hash(ours)


def test_orders_are_uniform_permutations_of_their_share():
    count, length = 12_000, 4
    draw = jax.jit(draw_orders, static_argnums=(2, 3))
    schedule = schedules.random(grid=2)
    orders = np.asarray(draw(KEY, 1.0, count, schedule))
    np.testing.assert_array_equal(np.sort(orders), np.broadcast_to(np.arange(length), orders.shape))
    _, counts = np.unique(orders @ (length ** np.arange(length)), return_counts=True)
    assert len(counts) == math.factorial(length)
    assert stats.chisquare(counts).pvalue > 1e-3
    raster = np.arange(length)
    np.testing.assert_array_equal(draw(KEY, 0.0, 5, schedule), np.broadcast_to(raster, (5, length)))
    # One in 24 of the permuted samples is in raster order too.
    mixed = (np.asarray(draw(KEY, 0.3, count, schedule)) != raster).any(axis=1)
    expected = 0.3 * (1 - 1 / math.factorial(length))
    assert abs(mixed.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


@pytest.fixture(scope="module")
def system() -> tuple[System, Any]:
    return toy_system("random", backbone=dict(depth=1))


def some_orders(system: System, batch: int) -> jax.Array:
    rng = np.random.default_rng(3)
    length = system.schedule.length
    return jnp.asarray(np.stack([rng.permutation(length) for _ in range(batch)]), jnp.int32)


def test_cached_logits_equal_teacher_forced_ones_in_any_order(system):
    system, params = system
    batch = 3
    cond, codes, order = toy_labels(batch), toy_codes(system, batch), some_orders(system, batch)
    forward = jax.jit(functools.partial(teacher_forced, system))
    full = forward(params, cond, codes, order)
    null = forward(params, system.backbone.conditioner.null(cond), codes, order)
    strength = Guidance(scale=3.0, kind="power_cosine").scales(system.schedule.num_steps)
    guided = null + strength[None, :, None] * (full - null)
    assert np.linalg.norm(full - null) > 0.1 * np.linalg.norm(full)
    cached, _ = stepwise_logits(system, params, cond, codes, strength, order)
    assert np.linalg.norm(cached - guided) < 1e-5 * np.linalg.norm(guided)
    # The order matters, and raster order given is the default.
    raster = jnp.broadcast_to(jnp.arange(codes.shape[1])[None], codes.shape)
    plain = forward(params, cond, codes, raster)
    assert np.linalg.norm(plain - full) > 0.1 * np.linalg.norm(full)
    default = jax.jit(functools.partial(teacher_forced, system))(params, cond, codes)
    np.testing.assert_allclose(plain, default, atol=1e-5)


def influences(system: System, params: Any, order: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Gradient norms of every hidden state: [L, L - 1] in embedded codes, [L, L] in the cells'
    rows of the table of what is predicted."""
    codes, cond = toy_codes(system, 1), toy_labels(1)
    context = apply(system.tokenizer, params["tokenizer"], codes, method="contexts")
    backbone, prefix = params["backbone"], system.backbone.prefix_rows

    def hidden(delta: jax.Array, table: jax.Array) -> jax.Array:
        def shift(call: Any, args: Any, kwargs: Any, info: Any) -> Any:
            out = call(*args, **kwargs)
            # The class comes from the same table.
            embeds = info.module.name == "token_embed" and info.method_name == "__call__"
            return out + delta if embeds and out.ndim == 3 else out

        positions = backbone["cell_positions"] | {"predicted": table}
        with nn.intercept_methods(shift):
            out: Any = system.backbone.apply(
                {"params": backbone | {"cell_positions": positions}}, context, cond, order=order
            )
        return out[0][0]

    zeros = jnp.zeros((1, context.shape[1], system.backbone.width))
    table = backbone["cell_positions"]["predicted"]
    codes_in, cells_in = jax.jit(jax.jacrev(hidden, argnums=(0, 1)))(zeros, table)
    norms = [
        np.sqrt(np.square(np.asarray(j)).sum(axes))
        for j, axes in ((codes_in, (1, 2, 4)), (cells_in, (1, 3)))
    ]
    assert not norms[1][:, :prefix].any()
    return norms[0], norms[1][:, prefix:]


def test_causality_by_gradients_in_the_permuted_order(system):
    """State t sees the codes drawn before it, and the cells asked for up to its own."""
    system, params = system
    order = some_orders(system, 1)
    in_codes, in_cells = influences(system, params, order)
    length = system.schedule.length
    place = np.arange(length)
    visible = place[:, None] > place[None, :-1]
    assert not in_codes[~visible].any() and (in_codes[visible] > 1e-6).all()
    asked = np.argsort(np.asarray(order[0]))[None] <= place[:, None]  # [t, cell]
    assert not in_cells[~asked].any() and (in_cells[asked] > 1e-6).all()
    # In raster order the cells come one after the other: the test can fail.
    raster = influences(system, params, jnp.arange(length)[None])[1]
    assert (raster[~asked] > 1e-6).any()


def test_in_raster_order_one_table_does(system):
    """The table of predicted cells, moved by one, added into that of held cells: same logits."""
    system, params = system
    prefix, tables = system.backbone.prefix_rows, params["backbone"]["cell_positions"]
    moved = jnp.zeros_like(tables["predicted"])
    length = system.schedule.length
    moved = moved.at[prefix - 1 : prefix - 1 + length].set(tables["predicted"][prefix:])
    one = {"held": tables["held"] + moved, "predicted": jnp.zeros_like(moved)}
    merged = params | {"backbone": params["backbone"] | {"cell_positions": one}}
    cond, codes, order = toy_labels(2), toy_codes(system, 2), some_orders(system, 2)
    forward = jax.jit(functools.partial(teacher_forced, system))
    raster = jnp.broadcast_to(jnp.arange(length)[None], codes.shape)
    ours = forward(params, cond, codes, raster)
    np.testing.assert_allclose(forward(merged, cond, codes, raster), ours, atol=2e-5)
    other = forward(merged, cond, codes, order) - forward(params, cond, codes, order)
    assert np.abs(other).max() > 0.1


@functools.partial(jax.jit, static_argnames=("objective", "train", "gradient"))
def evaluate(objective, params, frozen, batch, step, train=True, gradient=False) -> Any:
    def loss(params: Any) -> Any:
        return objective.loss(params, {}, frozen, batch, KEY, train, step=step)

    return jax.value_and_grad(loss, has_aux=True)(params) if gradient else loss(params)


@pytest.fixture(scope="module")
def training() -> tuple[Likelihood, Any, Any, Any]:
    """(objective, params, frozen, batch); orders anneal from step 10 to step 20."""
    system, params = toy_system("random", backbone=dict(depth=1), schedule=dict(anneal=(10, 20)))
    frozen = {"tokenizer": params.pop("tokenizer")}
    batch = toy_labels(BATCH) | {"codes": toy_codes(system, BATCH)}
    return Likelihood(system=system, label_dropout=0.0), params, frozen, batch


@pytest.mark.slow  # a program an order
def test_the_loss_of_given_orders(training):
    """Mean nats per code of the permuted codes, in training and in evaluation."""
    objective, params, frozen, batch = training
    order = some_orders(objective.system, BATCH)
    permuted = jnp.take_along_axis(batch["codes"], order, axis=1)
    forward = jax.jit(functools.partial(teacher_forced, objective.system))
    logits = forward(params | frozen, {"label": batch["label"]}, permuted, order)
    nll = objective.system.head.loss(logits, permuted)
    for train in (True, False):
        loss, aux = evaluate(objective, params, frozen, batch | {"order": order}, 0, train=train)
        np.testing.assert_allclose(loss, nll.mean(), rtol=1e-5)
        quarter = aux.metrics["nll/quarter_1"]
        np.testing.assert_allclose(quarter, nll[:, 4:8].mean(), rtol=1e-5)
        hits = (jnp.argmax(logits, -1) == permuted).mean()
        np.testing.assert_allclose(aux.metrics["accuracy"], hits, rtol=1e-5)


def test_training_anneals_and_evaluation_does_not_know(training):
    objective, params, frozen, batch = training
    trained = {n: evaluate(objective, params, frozen, batch, n) for n in (0, 9, 15, 20, 100)}
    shares = [float(aux.metrics["random_share"]) for _, aux in trained.values()]
    np.testing.assert_allclose(shares, [1, 1, 0.5, 0, 0], atol=1e-6)
    losses = [float(loss) for loss, _ in trained.values()]
    raster, aux = evaluate(objective, params, frozen, batch, 0, train=False)
    assert "random_share" not in aux.metrics
    np.testing.assert_allclose(losses[3:], [raster, raster], rtol=1e-6)
    assert abs(losses[0] - raster) > 1e-4 and losses[0] == losses[1]  # one key, one order
    assert len({losses[0], losses[2], losses[3]}) == 3


@pytest.mark.slow
def test_one_device_and_eight_train_in_the_same_orders(training):
    objective, params, frozen, batch = training
    one = evaluate(objective, params, frozen, batch, 15, gradient=True)
    many = evaluate(
        objective, replicated(params), replicated(frozen), sharded(batch), 15, gradient=True
    )
    close(many, one, rtol=1e-4, atol=1e-5)
