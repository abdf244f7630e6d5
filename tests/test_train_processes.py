"""Two processes of four devices train as one of eight, and stop together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from ar_jax.io.checkpoint import list_steps
from ar_jax.io.metrics import JSONL, read_jsonl
from tests.test_train_loop import MESH, ROOT, finish, losses, start, wait_for_step
from tests.toy_training import toy_config, toy_train


def start_pair(workdir: Path, logs: Path, delay: float) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.toy_training", str(workdir), "--processes=2"]
    command += ["--devices=4", f"--port={port}", f"--delay={delay}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pair = []
    for index in range(2):
        with (logs / f"{index}.log").open("w") as log:
            pair.append(
                subprocess.Popen(
                    [*command, f"--process={index}"],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return pair


def test_two_processes_stop_together_and_go_on_as_one(tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "pair"
    toy_train(toy_config(**MESH), whole)

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
    expected, got = losses(whole), losses(workdir)
    assert [entry[:2] for entry in got] == [entry[:2] for entry in expected]
    for name in ("train/loss", "eval/loss"):
        np.testing.assert_allclose(
            [value for _, key, value in got if key == name],
            [value for _, key, value in expected if key == name],
            rtol=1e-5,
        )
