"""The launch scripts: they parse, and the restart loop restarts and gives up."""

from __future__ import annotations

import os
import subprocess
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
