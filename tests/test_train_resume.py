"""Exact resume: runs that are killed, stopped, finished, or spread over two processes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ar_jax.io.checkpoint import list_steps, load_params
from ar_jax.io.metrics import JSONL, read_jsonl
from tests.local_processes import free_address, start_module, start_modules
from tests.toy_training import ToyObjective, toy_config, toy_train

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
    return start_module("tests.toy_training", [str(workdir), f"--delay={delay}"])


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


def start_pair(workdir: Path, logs: Path, delay: float) -> list[subprocess.Popen]:
    arguments = [str(workdir), "--processes=2", "--devices=4"]
    arguments += [f"--address={free_address()}", f"--delay={delay}"]
    return start_modules("tests.toy_training", arguments, 2, logs)


@pytest.mark.slow  # half a minute
def test_two_processes_stop_together_and_go_on_as_one(uninterrupted, tmp_path):
    """Two processes of four devices train as one of eight does."""
    workdir = tmp_path / "pair"
    pair = start_pair(workdir, tmp_path, delay=0.01)
    try:
        wait_for_step(pair[0], workdir, 8)
        # The platform tells one host of a pod; all save after the same step.
        pair[1].send_signal(signal.SIGTERM)
        for index, process in enumerate(pair):
            assert process.wait(timeout=300) == 0, (tmp_path / f"{index}.log").read_text()[-3000:]
    finally:
        for process in pair:
            process.kill()
    saved = max(list_steps(workdir))
    assert 8 <= saved < 40
    # Only the first process writes metrics: no step is there twice.
    trained = [r["step"] for r in read_jsonl(workdir / JSONL) if "train/loss" in r]
    assert trained == list(range(1, saved + 1))

    finish(start(workdir))
    expected, got = losses(uninterrupted), losses(workdir)
    assert [entry[:2] for entry in got] == [entry[:2] for entry in expected]
    for name in ("train/loss", "eval/loss"):
        np.testing.assert_allclose(
            [value for _, key, value in got if key == name],
            [value for _, key, value in expected if key == name],
            rtol=1e-5,
        )


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
