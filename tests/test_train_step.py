"""The train step: accumulation, meshes, the guard, the EMA, donation, compilation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.api import Aux
from ar_jax.parallel.mesh import make_mesh, put_batch, use_mesh
from ar_jax.train.fields import call_with
from ar_jax.train.optimizer import build_optimizer
from ar_jax.train.program import build_program, evaluate
from ar_jax.train.state import init_state
from ar_jax.train.step import accumulate, ema_rate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_training import CLASSES, ToyObjective, toy_config, toy_data, toy_eval

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = {
    "one device": {"devices": 1},
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def toy_mesh(name: str) -> jax.sharding.Mesh:
    sizes = dict(MESHES[name])
    devices = jax.devices()[: sizes.pop("devices", 8)]
    return make_mesh(**sizes, devices=devices)


def toy_optimizer(**changes: Any):
    config = toy_config(**{f"optimizer__{name}": value for name, value in changes.items()})
    return call_with(build_optimizer, config.optimizer, "optimizer", steps=config.train.steps)


def toy_batches(count: int, rows: int = 16) -> list[dict[str, np.ndarray]]:
    data = toy_data(toy_config(train__batch_size=rows))
    return [next(data) for _ in range(count)]


def run(objective, mesh, batches, **fields):
    """(program, states on the host, metrics): states[n] and metrics[n - 1] after n batches."""
    program = build_program(objective, toy_optimizer(), mesh, seed=0, **fields)
    history = []
    with use_mesh(mesh):
        state = program.init()
        states = [host_copy(state)]
        for batch in batches:
            placed = put_batch(batch, program.rows)
            with jax.transfer_guard("disallow"):
                state, metrics = program.train_step(state, {}, placed, program.key)
            states.append(host_copy(state))
            history.append(jax.device_get(metrics))
    return program, states, history


def host_copy(state):
    """Arrays of their own: on CPUs `device_get` may show memory that is donated later."""
    return jax.tree.map(np.array, jax.device_get(state))


@functools.cache
def on_one_device(accumulation: int):
    batches = toy_batches(6)
    fields = {"accumulation": accumulation, "ema_decay": 0.9}
    _, states, history = run(ToyObjective(noise=0.1), toy_mesh("one device"), batches, **fields)
    return states, history


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, marks=pytest.mark.slow if "8" in m else ()) for m in list(MESHES)[1:]],
)
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_device_equals_eight(mesh, accumulation):
    fields = {"accumulation": accumulation, "ema_decay": 0.9}
    one, expected = on_one_device(accumulation)
    _, many, got = run(ToyObjective(noise=0.1), toy_mesh(mesh), toy_batches(6), **fields)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(
            [m[name] for m in got], [m[name] for m in expected], rtol=2e-6, err_msg=name
        )
    assert len({float(m["loss"]) for m in got}) == 6
    # The statistics are sums over the global batch, not a device's.
    jax.tree.map(np.testing.assert_array_equal, one[-1].stats, many[-1].stats)
    assert int(many[-1].stats["rows"]) == 6 * 16


def test_initial_parameters_do_not_depend_on_the_mesh():
    states = []
    for name in MESHES:
        mesh = toy_mesh(name)
        program = build_program(ToyObjective(), toy_optimizer(), mesh, seed=5, ema_decay=0.5)
        with use_mesh(mesh):
            states.append(jax.device_get(program.init()))
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)
    jax.tree.map(np.testing.assert_array_equal, states[0].ema, states[0].params)


def accumulated(objective, accumulation):
    @jax.jit
    def first_step(batch):
        state = init_state(objective, toy_optimizer(), jax.random.key(0), ema=False)
        return accumulate(objective, state, {}, batch, jax.random.key(1), accumulation)

    return first_step(toy_batches(1, 32)[0])


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_big_batch(accumulation):
    loss, grads, aux = accumulated(ToyObjective(), 1)
    loss_n, grads_n, aux_n = accumulated(ToyObjective(), accumulation)
    np.testing.assert_allclose(loss_n, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads_n, grads)
    np.testing.assert_allclose(aux_n.metrics["accuracy"], aux.metrics["accuracy"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, aux_n.sums, aux.sums)
    assert aux_n.last == aux.last  # row 31 ends the last microbatch


def test_a_sum_in_place_of_the_mean_would_be_seen():
    class Summing(ToyObjective):
        def loss(self, params, stats, frozen, batch, key, train, step=0):
            value, aux = super().loss(params, stats, frozen, batch, key, train)
            return value * len(batch["label"]), aux

    grads = [optax.tree.norm(accumulated(Summing(), n)[1]) for n in (1, 2)]
    assert abs(float(grads[0] / grads[1]) - 2) < 1e-3


def test_every_microbatch_and_step_has_a_key_and_its_number():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recording(ToyObjective):
        def loss(self, params, stats, frozen, batch, key, train, step=0):
            value, _ = super().loss(params, stats, frozen, batch, key, train)
            draw = jax.random.uniform(key)
            metrics = {"draw": draw, "square": draw**2, "step": jnp.float32(step)}
            return value, Aux(metrics=metrics, sums={}, last={})

        def finish(self, params, stats, sums, last, key):
            return params, stats | {"rows": jax.random.bits(key).astype(jnp.int32)}

    with jax.debug_key_reuse(True):
        _, _, history = run(Recording(), toy_mesh("one device"), toy_batches(2), accumulation=4)
    for metrics in history:
        assert metrics["square"] - metrics["draw"] ** 2 > 1e-3  # the four draws differ
    assert history[0]["draw"] != history[1]["draw"]
    assert [metrics["step"] for metrics in history] == [0, 1]


def test_ema_follows_the_formula_with_warm_up():
    _, states, _ = run(ToyObjective(), toy_mesh("one device"), toy_batches(5), ema_decay=0.3)
    expected = states[0].params
    for n, state in enumerate(states[1:]):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new,  # noqa: B023
            expected,
            state.params,
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), state.ema, expected)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), states[5].ema, states[5].params)
    assert max(jax.tree.leaves(gap)) > 1e-3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(states[-1].ema))
    assert float(ema_rate(jnp.int32(100_000), 0.9999, True)) == np.float32(0.9999)
    assert float(ema_rate(jnp.int32(0), 0.9999, True)) == np.float32(0.1)
    assert float(ema_rate(jnp.int32(0), 0.9999, False)) == np.float32(0.9999)


def poisoned(rows: int = 16) -> dict[str, np.ndarray]:
    batch = toy_batches(1, rows)[0]
    return batch | {"label": np.where(np.arange(rows) == 9, CLASSES - 1, 0).astype(np.int32)}


def clean(rows: int = 16) -> dict[str, np.ndarray]:
    return {name: np.copy(x) for name, x in toy_batches(1, rows)[0].items()} | {
        "label": np.arange(rows, dtype=np.int32) % (CLASSES - 1)
    }


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(accumulation):
    objective = ToyObjective(noise=0.1, poison=CLASSES - 1)
    fields = {"accumulation": accumulation, "ema_decay": 0.9}
    batches = [clean(), poisoned(), poisoned(), clean()]
    _, states, history = run(objective, toy_mesh("2x2x2"), batches, **fields)
    assert np.isnan(history[1]["loss"]) and np.isnan(history[2]["loss"])
    for field in ("params", "opt_state", "ema", "stats"):
        before, after = getattr(states[1], field), getattr(states[3], field)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    counts = [(int(s.step), int(s.bad_steps), int(s.bad_total)) for s in states]
    assert counts == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 0, 2)]
    kernels = [state.params["head"]["kernel"] for state in states]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[3], kernels[4])
    # The schedule goes by steps, skipped ones included.
    assert history[2]["learning_rate"] == np.float32(toy_optimizer().learning_rate(2))


def test_an_infinite_gradient_of_a_finite_loss_is_caught():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Steep(ToyObjective):
        def loss(self, params, stats, frozen, batch, key, train, step=0):
            value, aux = super().loss(params, stats, frozen, batch, key, train)
            return value + jnp.sqrt(params["head"]["bias"][0]), aux  # infinite slope at 0

    _, (_, state), history = run(Steep(), toy_mesh("one device"), toy_batches(1))
    assert np.isfinite(history[0]["loss"]) and not np.isfinite(history[0]["grad_norm"])
    assert int(state.bad_total) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_compiles_once_and_donates_the_state():
    mesh = toy_mesh("2x2x2")
    program = build_program(ToyObjective(), toy_optimizer(), mesh, seed=0, ema_decay=0.9)
    with use_mesh(mesh):
        first = state = program.init()
        for batch in toy_batches(3):
            state, _ = program.train_step(state, {}, put_batch(batch, program.rows), program.key)
    assert program.train_step._cache_size() == 1  # type: ignore[attr-defined]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract), strict=True):
        assert leaf.sharding == wanted.sharding
    kernel = state.opt_state[1].mu["backbone"]["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 16)}


@pytest.mark.parametrize("mesh", ["one device", "2x2x2"])
def test_evaluation_is_the_mean_over_real_rows_of_the_ema(mesh):
    placed = toy_mesh(mesh)
    fields: dict[str, Any] = {"ema_decay": 0.9}
    program, states, _ = run(ToyObjective(noise=0.5), placed, toy_batches(4), **fields)
    state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), states[4], program.abstract)
    with use_mesh(placed):
        padded = evaluate(program, state, {}, toy_eval(rows=40, batch_size=16))
        exact = evaluate(program, state, {}, toy_eval(rows=40, batch_size=8))
        raw = evaluate(program, state.replace(ema={}), {}, toy_eval())
        with pytest.raises(ValueError, match="at least one row"):
            evaluate(program, state, {}, [])
    assert padded.keys() == {"loss", "accuracy"}
    for name, value in exact.items():
        np.testing.assert_allclose(padded[name], value, rtol=1e-6)
    assert raw["loss"] != padded["loss"]


def test_metric_names_of_the_step_are_taken():
    class Clashing(ToyObjective):
        def loss(self, params, stats, frozen, batch, key, train, step=0):
            value, aux = super().loss(params, stats, frozen, batch, key, train)
            return value, Aux(metrics={"grad_norm": value}, sums=aux.sums)

    with pytest.raises(ValueError, match=r"\['grad_norm'\] have names that the train step uses"):
        run(Clashing(), toy_mesh("one device"), toy_batches(1))


def test_parameters_must_be_float32():
    class Half(ToyObjective):
        def init(self, key):
            return jax.tree.map(lambda x: x.astype(jnp.bfloat16), super().init(key))

    with pytest.raises(ValueError, match="parameter backbone/.* is bfloat16"):
        build_program(Half(), toy_optimizer(), toy_mesh("one device"), seed=0)


def test_steps_of_large_gradients_are_left_out():
    """After the first: nothing moves but the count of steps, and none of them is a bad one."""
    batches, mesh = toy_batches(3), toy_mesh("one device")
    optimizer = toy_optimizer(clip_norm=0.5, skip_norm=1e-6, skip_from=1)
    program = build_program(ToyObjective(), optimizer, mesh, seed=0, ema_decay=0.9)
    with use_mesh(mesh):
        states, skipped = [host_copy(program.init())], []
        for batch in batches:
            placed = put_batch(batch, program.rows)
            state, metrics = program.train_step(
                jax.tree.map(jnp.asarray, states[-1]), {}, placed, program.key
            )
            states.append(host_copy(state))
            skipped.append(float(metrics["skipped"]))
    assert skipped == [0.0, 1.0, 1.0]
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    assert int(states[-1].bad_total) == 0
    for field in ("params", "opt_state", "ema", "stats"):
        first, *rest = (getattr(state, field) for state in states[1:])
        for other in rest:
            jax.tree.map(np.testing.assert_array_equal, first, other)
    moved = np.abs(states[1].params["head"]["kernel"] - states[0].params["head"]["kernel"])
    assert moved.max() > 0
