"""Joining the processes of a pod or cluster into one program."""

from __future__ import annotations

import logging
import threading

import jax

log = logging.getLogger(__name__)

HINT = (
    "still waiting for the other hosts after %g s: start the same command on all hosts, each of "
    "which must reach the first one"
)


def connect(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    hint_after: float = 60.0,
    timeout: int = 300,
) -> None:
    """Joins the other processes; once, before anything else of jax runs.

    Args:
        coordinator_address: 'host:port' of process 0. None on TPUs, SLURM and wherever else jax
            finds out on its own; then the next two are None as well.
        num_processes: of the whole job.
        process_id: this one's number, from 0.
        hint_after: seconds until a waiting process says what it waits for.
        timeout: seconds until it gives up: jax then ends the process with its own message.

    Raises:
        ValueError: the three do not go together; names the flag, its value and what would do.
    """
    check_addresses(coordinator_address, num_processes, process_id)
    hint = threading.Timer(hint_after, log.warning, (HINT, hint_after))
    hint.daemon = True
    hint.start()
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, initialization_timeout=timeout
        )
    finally:
        hint.cancel()


def check_addresses(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Raises ValueError if the three arguments of `connect` do not go together."""
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
    if (
        not coordinator_address.rpartition(":")[0]
        or not coordinator_address.rsplit(":")[-1].isdigit()
    ):
        raise ValueError(
            f"--coordinator_address={coordinator_address!r} must be HOST:PORT of process 0"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id={process_id} must lie in [0, {num_processes}), of "
            f"--num_processes={num_processes}"
        )
