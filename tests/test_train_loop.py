"""The loop: runs that are killed, stopped, finished, diverged, or given another's workdir."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.io.checkpoint import list_steps, load_params
from ar_jax.io.metrics import JSONL, read_jsonl
from ar_jax.train.loop import TrainingDiverged, train
from ar_jax.train.state import INIT
from tests.toy_training import CLASSES, ToyObjective, toy_config, toy_data, toy_eval, toy_train

ROOT = Path(__file__).resolve().parent.parent
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of everything but rates, in the order of the file."""
    return [
        (int(record["step"]), name, value)
        for record in read_jsonl(workdir / JSONL)
        for name, value in record.items()
        if name.startswith(("train/", "eval/"))
    ]


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    for which in ("params", "ema"):
        one, two = load_params(a, which), load_params(b, which)
        assert str(jax.tree.structure(one)) == str(jax.tree.structure(two))
        jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    outcome = toy_train(toy_config(**MESH), workdir)
    assert outcome.finished and outcome.step == 40 and int(outcome.state.step) == 40
    return workdir


def start(workdir: Path, delay: float = 0.0) -> subprocess.Popen:
    """The toy's training in a process of its own; ``delay`` seconds a batch row."""
    command = [sys.executable, "-m", "tests.toy_training", str(workdir), f"--delay={delay}"]
    # The parent's caches of compiled programs must not matter.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns once ``step`` is in the metrics file."""
    path = workdir / JSONL
    for _ in range(6000):
        if path.exists():
            records = read_jsonl(path)
            if records and records[-1]["step"] >= step:
                return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"never reached step {step}: {process.communicate()[0].decode()[-3000:]}")


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output[-3000:]
    return output


def test_killed_and_stopped_runs_go_on_exactly(uninterrupted, tmp_path):
    """SIGKILL at a random step, then SIGTERM at another, then to the end."""
    first = random.SystemRandom().randrange(3, 20)
    process = start(tmp_path, delay=0.004)
    wait_for_step(process, tmp_path, first)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert max(list_steps(tmp_path), default=0) < 40, f"killed too late, at {first}"

    second = random.SystemRandom().randrange(22, 30)
    process = start(tmp_path, delay=0.004)
    wait_for_step(process, tmp_path, second)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    saved = max(list_steps(tmp_path))
    assert second <= saved < 40
    assert f"told to stop: saved step {saved}" in output
    assert max(step for step, _, _ in losses(tmp_path)) == saved

    finish(start(tmp_path))
    assert_same_run(uninterrupted, tmp_path)
    assert len((tmp_path / "environment.jsonl").read_text().splitlines()) == 3


def test_metrics_of_a_run(uninterrupted):
    records = read_jsonl(uninterrupted / JSONL)
    trained = [record for record in records if "train/loss" in record]
    evaluated = [record for record in records if "eval/loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 41))
    assert [record["step"] for record in evaluated] == [10, 20, 30, 40]
    assert trained[-1]["train/loss"] < 0.5 * trained[0]["train/loss"]
    assert evaluated[-1]["eval/accuracy"] > 0.9
    last = trained[-1]
    ratio = last["speed/tokens_per_second"] / last["speed/images_per_second"]
    assert ratio == pytest.approx(ToyObjective.tokens_per_image)
    assert list_steps(uninterrupted) == [35, 40]
    table = (uninterrupted / "parameters.txt").read_text()
    assert "blocks/mlp/up/kernel" in table and "no decay" in table
    assert json.loads((uninterrupted / "config.json").read_text())["train"]["steps"] == 40


def test_a_finished_run_does_nothing_more(uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.name == JSONL}
    outcome = toy_train(toy_config(**MESH), uninterrupted)
    assert outcome.finished and outcome.step == 40
    assert {path: path.read_bytes() for path in before} == before


def test_another_configuration_is_refused_and_changes_nothing(uninterrupted):
    def stamps():
        return {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}

    before = stamps()
    config = toy_config(optimizer__learning_rate=1e-3, train__log_every=2, **MESH)
    with pytest.raises(ValueError, match=r"learning_rate=0.001 \(there: 0.01\)") as error:
        toy_train(config, uninterrupted)
    assert "log_every=2" not in str(error.value)
    assert "may change: config.train.log_every" in str(error.value)
    assert stamps() == before


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


def test_previews_are_drawn_from_the_ema(tmp_path):
    seen = []

    def preview(params, frozen):
        seen.append(jax.device_get(params))
        return {"shade": np.full((4, 6, 1), 7, np.uint8)}

    config = toy_config(train__steps=5, train__preview_every=3, train__eval_every=0)
    outcome = toy_train(config, tmp_path, preview=preview)
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
