"""Training against an adversary: devices, accumulation, the start, the guards, resuming."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from ar_jax.io.checkpoint import load_params
from ar_jax.parallel.mesh import put_batch, use_mesh
from ar_jax.train.fields import call_with, read_settings
from ar_jax.train.loop import TrainingDiverged, train
from ar_jax.train.optimizer import build_optimizer
from ar_jax.train.program import build_program
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.test_train_step import MESHES, host_copy, toy_mesh, toy_optimizer
from tests.toy_adversary import ToyGenerator, toy_adversary
from tests.toy_training import toy_config, toy_data

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batches(count: int, rows: int = 16) -> list[dict[str, Any]]:
    """Images, of which the first pixel of the first is dark."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 250, (count, rows, 4, 4, 1)).astype(np.uint8)
    return [{"image": batch} for batch in images]


def run(adversary: Any, data: Any, mesh: str = "one device", steps: str = "full", **fields: Any):
    """(states, metrics): states[n] and metrics[n - 1] after n batches.

    ``steps`` 'full': the program that is right at every step; 'loop': what the loop takes.
    """
    placed = toy_mesh(mesh)
    program = build_program(
        ToyGenerator(adversary=adversary),
        toy_optimizer(clip_norm=0.0),
        placed,
        seed=0,
        adversary_optimizer=toy_optimizer(learning_rate=0.02, clip_norm=0.0),
        **fields,
    )
    history = []
    with use_mesh(placed):
        state = program.init()
        states = [host_copy(state)]
        for i, batch in enumerate(data):
            step = program.step_at(i) if steps == "loop" else program.train_step
            rows = put_batch(batch, program.rows)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, {}, rows, program.key)
            states.append(host_copy(state))
            history.append(jax.device_get(metrics))
    return states, history


ADAPTIVE = toy_adversary(adaptive=True, lecam=0.1, warmup_steps=3)


@functools.cache
def on_one_device():
    return run(ADAPTIVE, batches(4))


def close(a: Any, b: Any, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("mesh", [pytest.param("data 8", marks=pytest.mark.slow), "2x2x2"])
def test_one_device_equals_eight(mesh):
    states, history = on_one_device()
    others, theirs = run(ADAPTIVE, batches(4), mesh)
    close(history, theirs)
    close(states[-1].params, others[-1].params)
    close(states[-1].adversary["params"], others[-1].adversary["params"])
    close(states[-1].adversary["stats"], others[-1].adversary["stats"])
    assert len({float(m["adversarial/adaptive"]) for m in history}) == 4
    assert mesh in MESHES


def test_the_adaptive_weight_of_microbatches_is_the_whole_batch_s():
    plain = toy_adversary(adaptive=True)
    one, history = run(plain, batches(2))
    two, theirs = run(plain, batches(2), accumulation=4)
    close(history, theirs)
    close(one[-1].params, two[-1].params)
    close(one[-1].adversary["params"], two[-1].adversary["params"])


def test_both_updates_are_the_gradients_of_their_losses():
    """Of the same images, made before the step."""
    states, history = on_one_device()
    before, after, metrics = states[1], states[2], history[1]
    objective, data = ToyGenerator(adversary=ADAPTIVE), batches(4)[1]
    branch = before.adversary

    def parts(params: Any) -> tuple[jax.Array, jax.Array]:
        value, aux = objective.loss(params, {}, {}, data, jax.random.key(0), True)
        assert aux.judged is not None
        deceit, _ = ADAPTIVE.deceive(branch["params"], branch["stats"], aux.judged[1])
        return value, deceit

    grads = jax.jit(jax.jacrev(parts))(before.params)
    lengths = [np.linalg.norm(g["decoder"]["conv_out"]["kernel"]) for g in grads]
    factor = lengths[0] / (lengths[1] + 1e-4)
    weight = 0.5 * 2 / 3 * factor  # the second of three steps of warm-up
    np.testing.assert_allclose(metrics["adversarial/adaptive"], factor, rtol=1e-4)
    np.testing.assert_allclose(metrics["adversarial/weight"], weight, rtol=1e-4)
    value, deceit = parts(before.params)
    np.testing.assert_allclose(metrics["loss"], value + weight * deceit, rtol=1e-4)
    total = jax.tree.map(lambda plain, adverse: plain + weight * adverse, *grads)
    optimizer = toy_optimizer(clip_norm=0.0).transform
    updates, _ = optimizer.update(total, before.opt_state, before.params, step=before.step)
    close(after.params, optax.apply_updates(before.params, updates), rtol=1e-3, atol=1e-5)

    _, aux = objective.loss(before.params, {}, {}, data, jax.random.key(0), True)
    assert aux.judged is not None
    learn = jax.jit(jax.grad(ADAPTIVE.judge, has_aux=True))
    grads, (stats, _) = learn(branch["params"], branch["stats"], *aux.judged)
    optimizer = toy_optimizer(learning_rate=0.02, clip_norm=0.0).transform
    updates, _ = optimizer.update(grads, branch["opt_state"], branch["params"], step=before.step)
    moved = optax.apply_updates(branch["params"], updates)
    close(after.adversary["params"], moved, rtol=1e-3, atol=1e-5)
    close(after.adversary["stats"], stats)


@pytest.mark.slow  # compiles three steps
def test_before_the_start_nothing_is_different_and_nothing_of_it_computed():
    late = toy_adversary(start=2)
    states, history = run(late, batches(3))
    lean, short = run(late, batches(3), steps="loop")
    without, _ = run(None, batches(2))
    jax.tree.map(np.testing.assert_array_equal, lean[2].params, without[2].params)
    jax.tree.map(np.testing.assert_array_equal, lean[2].opt_state, without[2].opt_state)
    for n in (1, 2):
        jax.tree.map(np.testing.assert_array_equal, states[n].adversary, states[0].adversary)
        jax.tree.map(np.testing.assert_array_equal, lean[n].adversary, states[0].adversary)
        close(states[n].params, lean[n].params)
        assert "discriminator/loss" not in short[n - 1]
        assert history[n - 1]["adversarial/weight"] == 0
    close(history[2], short[2])
    close(states[3], lean[3])
    assert short[2]["adversarial/weight"] == 0.5
    hidden = [s.adversary["params"]["hidden"]["kernel"] for s in lean]
    assert np.abs(hidden[3] - hidden[2]).max() > 1e-3
    count = lean[3].adversary["opt_state"][1].count
    assert int(count) == 1  # its optimiser starts with it


def poisoned(batch: dict[str, Any]) -> dict[str, Any]:
    """One real image that the discriminator chokes on; the generator's images are harmless."""
    image = batch["image"].copy()
    image[3, 0, 0] = 255
    return {"image": image}


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_discriminator_s_bad_step_is_undone_and_the_tokenizer_goes_on(accumulation):
    fragile = toy_adversary(poison=0.995, lecam=0.1)
    first, second = batches(2)
    states, history = run(fragile, [first, poisoned(second)], accumulation=accumulation)
    assert np.isfinite(history[0]["discriminator/loss"])
    assert np.isnan(history[1]["discriminator/loss"]) and np.isfinite(history[1]["loss"])
    jax.tree.map(np.testing.assert_array_equal, states[1].adversary, states[2].adversary)
    kernels = [state.params["encoder"]["kernel"] for state in states]
    assert np.isfinite(kernels[2]).all() and not np.array_equal(kernels[1], kernels[2])
    assert (int(states[2].bad_steps), int(states[2].bad_total)) == (1, 1)


def test_a_tokenizer_s_bad_step_is_undone():
    """Where the discriminator has no answer to what was made."""
    deaf = toy_adversary(poison=-3.0)
    states, history = run(deaf, batches(1))
    assert np.isnan(history[0]["loss"])
    for part in ("params", "opt_state", "adversary"):
        before, after = (getattr(state, part) for state in states)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert int(states[1].bad_total) == 1


def test_the_bound_keeps_the_adaptive_weight_from_exploding():
    """A discriminator that says almost the same of everything has almost no gradient."""

    def moved(bound: float) -> float:
        quiet = toy_adversary(adaptive=True, max_adaptive=bound)
        objective = ToyGenerator(adversary=quiet)
        params = objective.init(jax.random.key(0))
        rival, stats = quiet.init(jax.random.key(1))
        rival["output"]["kernel"] *= 1e-6
        images = batches(1)[0]["image"].astype(np.float32) / 127.5 - 1

        def parts(params: Any) -> tuple[jax.Array, jax.Array]:
            value, aux = objective.loss(params, {}, {}, batches(1)[0], jax.random.key(0), True)
            assert aux.judged is not None and len(images) == 16
            return value, quiet.deceive(rival, stats, aux.judged[1])[0]

        plain, adverse = jax.jit(jax.jacrev(parts))(params)
        last = [g["decoder"]["conv_out"]["kernel"] for g in (plain, adverse)]
        return float(quiet.balance(*last))

    assert moved(10.0) == 10
    assert moved(1e9) > 1000


def adversarial_config(**overrides: Any) -> Any:
    config = toy_config(
        train__steps=6,
        train__checkpoint_every=3,
        train__eval_every=0,
        train__accumulation=1,
        **overrides,
    )
    config.discriminator_optimizer = config.optimizer.copy_and_resolve_references()
    config.discriminator_optimizer.learning_rate = 0.02
    return config


@pytest.mark.slow
def test_a_run_goes_on_exactly(tmp_path):
    """Stopped after the start, with its discriminator, optimiser and means of logits."""
    config = adversarial_config()
    objective = ToyGenerator(adversary=toy_adversary(start=1, adaptive=True, lecam=0.1))
    whole = train(config, objective, {}, tmp_path / "whole", toy_data(config))
    assert whole.finished
    path = tmp_path / "parts"
    train(config, objective, {}, path, toy_data(config))
    for step in (path / "checkpoints").iterdir():
        if int(step.name) > 3:
            for file in sorted(step.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            step.rmdir()
    again = train(config, objective, {}, path, toy_data(config))
    jax.tree.map(np.testing.assert_array_equal, host_copy(again.state), host_copy(whole.state))
    assert float(again.state.adversary["stats"]["logits"]["real"]) != 0
    assert "adversary" not in load_params(path, "params")


@pytest.mark.slow
def test_bad_steps_of_the_discriminator_end_a_run(tmp_path):
    config = adversarial_config(train__max_bad_steps=2)
    objective = ToyGenerator(adversary=toy_adversary(poison=-3.0))
    with pytest.raises(TrainingDiverged, match=r"not finite in \d steps in a row"):
        train(config, objective, {}, tmp_path, toy_data(config))


def test_its_optimiser_s_fields_are_checked(tmp_path):
    config = adversarial_config()
    assert read_settings(config).discriminator_optimizer is not None
    config.discriminator_optimizer.name = "lion"
    with pytest.raises(ValueError, match=r"config\.discriminator_optimizer\.name='lion'"):
        read_settings(config)
    config.discriminator_optimizer.name = "adam"
    with pytest.raises(ValueError, match=r"config\.discriminator_optimizer\.weight_decay=0\.05"):
        read_settings(config)
    del config["discriminator_optimizer"]
    assert read_settings(config).discriminator_optimizer is None
    objective = ToyGenerator(adversary=toy_adversary())
    with pytest.raises(ValueError, match=r"config\.discriminator_optimizer is missing"):
        train(config, objective, {}, tmp_path / "new", toy_data(config))
    assert not (tmp_path / "new").exists()
    assert call_with(build_optimizer, config.optimizer, "optimizer", steps=6)
