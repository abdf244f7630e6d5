"""Joining other processes: arguments, the hint of one that waits, a job of two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from ar_jax.parallel.distributed import check_addresses

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from ar_jax.parallel.distributed import connect
connect(coordinator_address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]),
        hint_after=float(sys.argv[3]), timeout=6)
from jax.experimental import multihost_utils
print("sum", multihost_utils.process_allgather(jax.process_index() + 1).sum())
"""


def start(address: str, process: int, hint_after: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, address, str(process), str(hint_after)],
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_two_processes_join_without_a_hint():
    address = free_address()
    jobs = [start(address, process, hint_after=60) for process in range(2)]
    for job in jobs:
        out, err = job.communicate(timeout=60)
        assert job.returncode == 0, err[-2000:]
        assert out.splitlines()[-1] == "sum 3"
        assert "still waiting" not in err


def test_a_process_alone_says_what_it_waits_for_and_gives_up():
    job = start(free_address(), 0, hint_after=1)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "still waiting for the other hosts after 1 s: start the same command on all" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "--coordinator_address=host:1 without --num_processes and"),
        ((None, 2, 0), "--num_processes=2, --process_id=0 without --coordinator_address"),
        (("host", 2, 0), "must be HOST:PORT"),
        (("host:1", 2, 2), r"--process_id=2 must lie in \[0, 2\)"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_addresses(*arguments)


def test_none_at_all_is_fine():
    check_addresses(None, None, None)
