"""The launch scripts: they parse, and the restart loop restarts and gives up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def restart(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / "restart.sh"), "bash", "-c", command],
        env=dict(os.environ, PAUSE="0", **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_ways_to_launch_are_there():
    assert [script.stem for script in SCRIPTS] == ["restart", "tpu_pod", "tpu_vm", "xpk"]
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_explain_themselves(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"experiments/launch/{script.name}" in done.stderr


def test_a_command_is_restarted_until_it_succeeds(tmp_path):
    runs = tmp_path / "runs"
    done = restart(f'echo x >> {runs}; [ "$(wc -l < {runs})" -ge 3 ]', LIMIT="5")
    assert done.returncode == 0
    assert runs.read_text().split() == ["x"] * 3
    assert done.stderr.count("ended with 1; again in 0 s") == 2


def test_quick_failures_in_a_row_end_the_loop(tmp_path):
    runs = tmp_path / "runs"
    done = restart(f"echo x >> {runs}; exit 7", LIMIT="3")
    assert done.returncode == 7
    assert runs.read_text().split() == ["x"] * 3
    assert "gave up: 3 quick failures in a row, the last with 7" in done.stderr


def test_slow_failures_do_not_count(tmp_path):
    runs = tmp_path / "runs"
    command = f'echo x >> {runs}; [ "$(wc -l < {runs})" -ge 4 ]'
    assert restart(command, LIMIT="2", QUICK="0").returncode == 0


def test_sigterm_reaches_the_command_and_ends_the_loop(tmp_path):
    """As on a machine that is taken away: the command saves, and nothing is restarted."""
    runs = tmp_path / "runs"
    command = f"trap 'echo saved >> {runs}; exit 3' TERM; echo started >> {runs}; sleep 60 & wait"
    loop = subprocess.Popen(
        ["bash", str(LAUNCH / "restart.sh"), "bash", "-c", command], start_new_session=True
    )
    try:
        for _ in range(500):
            if runs.exists() and runs.read_text():
                break
            time.sleep(0.02)
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(timeout=20) == 3
    finally:
        os.killpg(loop.pid, signal.SIGKILL)  # the command's sleep is left
    assert runs.read_text().split() == ["started", "saved"]


STUB = """#!/bin/sh
printf '%s\\n' "$@"
"""
PLACES = dict(NAME="tpu", ZONE="zone", CLUSTER="c", PROJECT="p", WORKLOAD="w", TPU_TYPE="v5p-8")


@pytest.mark.parametrize(
    ("script", "program", "expected"),
    [
        ("tpu_vm.sh", "gcloud", "experiments/train.py --config=a\\ b"),
        ("tpu_vm.sh", "gcloud", "--worker=0"),
        ("tpu_pod.sh", "gcloud", "--worker=all"),
        ("tpu_pod.sh", "gcloud", "experiments/train.py --distributed --config=a\\ b"),
        ("xpk.sh", "xpk", "--num-slices=1"),
        ("xpk.sh", "xpk", "experiments/train.py --distributed --config=a\\ b"),
    ],
)
def test_scripts_say_what_runs_where(tmp_path, script, program, expected):
    """With a stand-in for the platform's own program, which shows what it is asked for."""
    stub = tmp_path / program
    stub.write_text(STUB)
    stub.chmod(0o755)
    variables = dict(os.environ, REPOSITORY="https://example.org/r", **PLACES)
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    done = subprocess.run(
        [str(LAUNCH / script), "--config=a b"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
