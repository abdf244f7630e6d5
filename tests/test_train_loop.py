"""The loop: changes between restarts, divergence, pictures, fields that are wrong."""

from __future__ import annotations

import json
import os
import signal
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.io.best_checkpoint import best_step
from ar_jax.io.checkpoint import list_steps, load_params
from ar_jax.io.metrics import JSONL, read_jsonl
from ar_jax.train.loop import TrainingDiverged, train
from ar_jax.train.state import INIT
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_training import CLASSES, ToyObjective, toy_config, toy_data, toy_eval, toy_train

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.mark.slow
def test_cadence_and_mesh_may_change_between_restarts(tmp_path):
    """Saved on 2x2x2 at step 7, finished on fsdp 8 with another log cadence."""
    config = toy_config(train__steps=8, **MESH)

    class Stopping(list):
        """Batches after which the process is asked to stop, as a platform would."""

        def __iter__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__iter__()

    config.train.eval_every = 6
    objective = ToyObjective(noise=0.1)
    outcome = train(config, objective, {}, tmp_path, toy_data(config), Stopping(toy_eval()))
    assert not outcome.finished and outcome.step == 7 == max(list_steps(tmp_path))

    moved = toy_config(train__steps=8, train__log_every=8, mesh__data=1, mesh__fsdp=8)
    outcome = toy_train(moved, tmp_path)
    assert outcome.finished and max(list_steps(tmp_path)) == 8
    whole = tmp_path / "whole"
    reference = toy_train(toy_config(train__steps=8, **MESH), whole)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(outcome.state.params),
        jax.device_get(reference.state.params),
    )
    assert json.loads((tmp_path / "config.json").read_text())["train"]["log_every"] == 8


def test_a_diverged_run_stops_with_its_last_finite_parameters(tmp_path):
    config = toy_config(train__max_bad_steps=3, train__checkpoint_every=0)
    objective = ToyObjective(poison=CLASSES - 1)  # every batch of this data has such a row
    with pytest.raises(TrainingDiverged) as error:
        toy_train(config, tmp_path, objective=objective)
    message = str(error.value)
    assert "not finite in 3 steps in a row" in message
    assert "config.optimizer.learning_rate" in message and str(tmp_path) in message
    (saved,) = list_steps(tmp_path)
    assert f"saved as step {saved}" in message
    assert saved == 4  # the count is read while the next step runs
    initial = objective.init(jax.random.fold_in(jax.random.key(config.seed), INIT))
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, "params"), initial)
    assert [r["train/bad_steps"] for r in read_jsonl(tmp_path / JSONL)] == [1, 2, 3]
    # The same command again neither trains on silently nor loses the checkpoint.
    with pytest.raises(TrainingDiverged):
        toy_train(config, tmp_path, objective=objective)
    assert saved in list_steps(tmp_path)


def test_evaluations_draw_previews_of_the_ema_write_counts_and_keep_the_best(tmp_path):
    seen = []

    def preview(params, frozen):
        seen.append(jax.device_get(params))
        return {"shade": np.full((4, 6, 1), 7, np.uint8)}

    config = toy_config(train__steps=5, train__preview_every=3, train__eval_every=3)
    # 'max' of a loss that falls: the first evaluation's, which no cadence saves, outlives step 4's.
    config.train.update(best_metric="eval/loss", best_mode="max")
    config.train.update(checkpoint_every=4, keep_checkpoints=1)
    counted, scored = iter([1.0, 4.0]), iter([0.25, 0.5])
    outcome = toy_train(
        config,
        tmp_path,
        preview=preview,
        measure=lambda params, frozen: {"class_accuracy": next(scored)},
        counts=lambda: {"data/skipped": next(counted)},
    )
    records = [r for r in read_jsonl(tmp_path / JSONL) if "eval/loss" in r]
    assert [(r["step"], r["data/skipped"]) for r in records] == [(3, 1.0), (5, 4.0)]
    assert [r["samples/class_accuracy"] for r in records] == [0.25, 0.5]
    assert records[0]["eval/loss"] > records[1]["eval/loss"]
    assert list_steps(tmp_path) == [3, 5] and best_step(tmp_path, config.train) == 3
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["shade_00000003.png", "shade_00000005.png"]
    assert np.asarray(Image.open(tmp_path / "previews" / names[0])).tolist() == [[7] * 6] * 4
    jax.tree.map(np.testing.assert_array_equal, seen[1], jax.device_get(outcome.state.ema))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train__steps", 0, "config.train.steps=0 must be at least 1"),
        ("train__log_every", 0, "config.train.log_every=0 must be at least 1"),
        ("train__batch_size", 12, "config.train.batch_size=12 must be a multiple of 16"),
        ("mesh__fsdp", 3, "config.mesh.data=-1 cannot take the rest"),
        ("mesh__tensor", 5, "config.mesh.data=-1 cannot take the rest"),
        ("ema__decay", 1.0, "config.ema.decay=1.0"),
        ("precision", "low", "config.precision='low' is none of"),
        ("optimizer__name", "lion", "config.optimizer.name='lion'"),
    ],
)
def test_bad_fields_are_named_and_nothing_is_written(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        toy_train(toy_config(**{field: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train\.wandb=True .*pip install 'ar_jax\[wandb\]'"):
        toy_train(toy_config(train__wandb=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["train", "optimizer", "ema", "mesh"])
def test_unknown_and_missing_fields_are_named(tmp_path, section):
    config = toy_config()
    with config.unlocked():
        config[section].spelt_wrong = 1
    with pytest.raises(ValueError, match=rf"config.{section}.spelt_wrong=1 is no field; .*takes"):
        toy_train(config, tmp_path / "run")
    if section == "train":
        config = toy_config()
        del config.train.steps
        with pytest.raises(ValueError, match="config.train.steps is missing"):
            toy_train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
