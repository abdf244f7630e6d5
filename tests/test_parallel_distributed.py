"""Joining other processes: arguments, the hint of one that waits, a job of two."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from ar_jax.parallel.distributed import check_addresses, check_waits, connect
from tests.local_processes import free_address

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
from ar_jax.parallel.distributed import connect
for _ in range(2):  # again does nothing
    connect(coordinator_address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]),
            hint_after=float(sys.argv[3]), timeout=float(sys.argv[4]))
from jax.experimental import multihost_utils
print("sum", multihost_utils.process_allgather(jax.process_index() + 1).sum())
"""


def start(
    address: str, process: int, *, hint_after: float, timeout: float
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, address, str(process), str(hint_after), str(timeout)],
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_join_without_a_hint():
    address = free_address()
    jobs = [start(address, process, hint_after=60, timeout=120) for process in range(2)]
    ended = [job.communicate(timeout=60) for job in jobs]  # none is left where one is wrong
    for job, (out, err) in zip(jobs, ended, strict=True):
        assert job.returncode == 0, err[-2000:]
        assert out.splitlines()[-1] == "sum 3"
        assert "still waiting" not in err


@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_alone_says_what_it_waits_for_and_gives_up(process):
    """Process 0 without others, and another one without process 0."""
    address = free_address()
    job = start(address, process, hint_after=1, timeout=3)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "still waiting for the other hosts after 1 s: start the same command on all" in err
    assert f"TimeoutError: gave up after 3 s: not all 2 processes met at {address}. Start" in err
    assert "stack trace" not in err  # of C++


def test_devices_must_not_have_been_asked_for():
    assert jax.device_count() == 8
    with pytest.raises(RuntimeError, match="must be called before"):
        connect(coordinator_address=free_address(), num_processes=1, process_id=0)


def test_where_jax_finds_no_processes_the_flags_are_named(monkeypatch):
    def initialize(*arguments, **more):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="on its own here .*: give --coordinator_address=HOST"):
        connect()


@pytest.mark.parametrize("name", ["hint_after", "timeout", "heartbeat_timeout"])
def test_waits_must_be_positive(name):
    waits = dict(hint_after=60, timeout=300, heartbeat_timeout=100)
    with pytest.raises(ValueError, match=f"{name}=0 must be a positive"):
        check_waits(**(waits | {name: 0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "--coordinator_address=host:1 without --num_processes and"),
        ((None, 2, 0), "--num_processes=2, --process_id=0 without --coordinator_address"),
        ((None, None, 1), "--process_id=1 without --coordinator_address and --num_processes"),
        (("host", 2, 0), "--coordinator_address='host' must be HOST:PORT"),
        (("host:port", 2, 0), "--coordinator_address='host:port' must be HOST:PORT"),
        (("host:99999", 2, 0), "must be HOST:PORT"),
        (("host:1", 0, 0), "--num_processes=0 must be at least 1"),
        (("host:1", 2, -1), "--process_id=-1 must lie in"),
        (("host:1", 2, 2), r"--process_id=2 must lie in \[0, 2\)"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_addresses(*arguments)


def test_none_at_all_is_fine():
    check_addresses(None, None, None)
