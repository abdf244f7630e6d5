"""Joining the processes of a pod or cluster into one program."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import jax

log = logging.getLogger(__name__)

HINT = (
    "still waiting for the other hosts after %g s: start the same command on all hosts, each of "
    "which must reach the first one"
)
# jax ends a process that waits too long by an abort with a stack trace of C++; `connect` gives up
# before, with a message, so jax must never get there.
LATER = 3600


def connect(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    hint_after: float = 60.0,
    timeout: float = 300.0,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes, before anything else of jax runs; again does nothing.

    Args:
        coordinator_address: 'host:port' of process 0. None on TPUs, SLURM and wherever else jax
            finds out on its own; then the next two are None as well.
        num_processes: of the whole job.
        process_id: this one's number, from 0.
        hint_after: seconds until a waiting process says what it waits for.
        timeout: seconds until it gives up.
        heartbeat_timeout: seconds without a sign of life from a process, once all are joined, after
            which jax ends all others: a dead or frozen host must not leave them waiting for ever.

    Raises:
        ValueError: the three do not go together (names the flag, its value and what would do), or
            none is given where jax does not find out on its own.
        RuntimeError: jax runs already: its devices have been asked for.
        TimeoutError: not all processes were there in time; end this one, it cannot try again.
    """
    check_addresses(coordinator_address, num_processes, process_id)
    check_waits(hint_after, timeout, heartbeat_timeout)
    if jax.distributed.is_initialized():
        return

    def initialize() -> None:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=int(timeout) + LATER,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )

    hint = threading.Timer(hint_after, log.warning, (HINT, hint_after))
    hint.daemon = True
    hint.start()
    try:
        _run_within(timeout, initialize)
    except ValueError as error:
        if coordinator_address is not None:
            raise
        raise ValueError(
            f"jax does not find the other processes on its own here ({error}): give "
            "--coordinator_address=HOST:PORT of process 0, --num_processes and --process_id"
        ) from error
    except TimeoutError:
        where = f" at {coordinator_address}" if coordinator_address else ""
        raise TimeoutError(
            f"gave up after {timeout:g} s: not all {num_processes or ''} processes met{where}. "
            "Start the same command on all hosts, each with its own --process_id where that is "
            "given, and let each reach the first one's port"
        ) from None
    finally:
        hint.cancel()


def _run_within(timeout: float, function: Callable[[], None]) -> None:
    """Calls ``function`` in a thread, for nothing else interrupts C++ code that waits.

    Raises:
        TimeoutError: it has not returned after ``timeout`` seconds; its thread is left to itself.
        Exception: what it raised.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            function()
        except Exception as error:  # raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="connect", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def check_waits(hint_after: float, timeout: float, heartbeat_timeout: int) -> None:
    """Raises ValueError unless all of these arguments of `connect` are positive."""
    values = dict(hint_after=hint_after, timeout=timeout, heartbeat_timeout=heartbeat_timeout)
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be a positive number of seconds")


def check_addresses(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Raises ValueError if these three arguments of `connect` do not go together."""
    values = dict(
        coordinator_address=coordinator_address,
        num_processes=num_processes,
        process_id=process_id,
    )
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return
    if missing:
        given = ", ".join(f"--{name}={v}" for name, v in values.items() if v is not None)
        raise ValueError(
            f"{given} without --{' and --'.join(missing)}: give all three, or none where jax finds "
            "the other processes on its own (TPUs, SLURM)"
        )
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"--coordinator_address={coordinator_address!r} must be HOST:PORT of process 0, with a "
            "free port of it such as 8476"
        )
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} must lie in [0, {num_processes}), of "
            f"--num_processes={num_processes}"
        )
