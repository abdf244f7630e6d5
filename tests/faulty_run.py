"""The toy's training in a process of its own, on a mesh, a disk and with checkpoints to order."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ar_jax.io import run_checkpoints
from ar_jax.io.checkpoint import list_steps
from ar_jax.train.loop import train
from tests.local_processes import free_address, start_module, start_modules
from tests.toy_training import ToyObjective, toy_config, toy_data, toy_eval

STEPS = 12
EVERY = 3  # steps from checkpoint to checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeavyObjective(ToyObjective):
    """The noisy toy with ``ballast`` MiB of random state, which no checkpoint can compress."""

    noise: float = 0.1
    ballast: int = 0

    def init_stats(self, params: Any) -> Any:
        stats = super().init_stats(params)
        if self.ballast:
            bits = jax.random.bits(jax.random.key(7), (self.ballast << 18,))
            stats["ballast"] = bits
        return stats

    def finish(self, params: Any, stats: Any, sums: Any, last: Any, key: Any) -> tuple[Any, Any]:
        params, fresh = super().finish(params, stats, sums, last, key)
        return params, dict(stats) | fresh


class FailedSave(logging.Handler):
    """Its event ``seen`` is set once a save was reported as failed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("saving step"):
            self.seen.set()


class Events:
    """Evaluation batches; what is to happen after step N happens when they are asked for then.

    Saves are written in the background. The disk is filled once all that are due are there, and
    freed once one has failed: a save that is late would find another disk than it is meant to.
    """

    def __init__(
        self, workdir: Path, first: int, stop_at: int, fill: str, fill_at: int, free_at: int
    ) -> None:
        self._workdir, self._step, self._stop_at = workdir, first, stop_at
        self._filler, self._fill_at, self._free_at = Path(fill), fill_at, free_at
        self._failed = FailedSave()
        logging.getLogger("ar_jax.io.run_checkpoints").addHandler(self._failed)

    def __iter__(self) -> Iterator[Any]:
        self._step += 1
        if self._step == self._fill_at:
            wait_for_checkpoint(self._workdir, (self._step - 1) // EVERY * EVERY)
            fill_disk(self._filler) if self._filler.name else limit_files(1 << 20)
        if self._step == self._free_at:
            assert self._failed.seen.wait(timeout=60), "no save failed while the disk was full"
            self._filler.unlink() if self._filler.name else limit_files(resource.RLIM_INFINITY)
        if self._step == self._stop_at - 1:  # it ends after the next one
            os.kill(os.getpid(), signal.SIGTERM)
        return iter(toy_eval(rows=16))


def wait_for_checkpoint(workdir: Path, step: int) -> None:
    """Returns once ``step`` is on disk."""
    deadline = time.monotonic() + 60
    while step not in list_steps(workdir):
        assert time.monotonic() < deadline, f"step {step} was never saved"
        time.sleep(0.02)


def fill_disk(path: Path) -> None:
    """Writes zeros until no byte is free."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            logging.getLogger(__name__).error("filled the disk: %s", error)


def limit_files(size: int) -> None:
    """Lets this process write no file of more bytes: a full disk that no other process has."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run_toy(
    workdir: Path,
    *,
    mesh: tuple[int, int, int],
    first: int = 0,
    stop_at: int = 0,
    ballast: int = 0,
    skip_damaged: bool = False,
    fill: str = "",
    fill_at: int = 0,
    free_at: int = 0,
    full_on: int = 0,
    hang_at: int = 0,
    stuck_after: int = 1800,
) -> Any:
    """Trains to `STEPS`, or from step ``first`` on to ``stop_at``, evaluating after every step.

    From step ``fill_at`` to ``free_at`` a file ``fill`` fills the disk; '': process ``full_on``
    alone can write no large file.
    """
    if not fill and jax.process_index() != full_on:
        fill_at = free_at = 0
    config = toy_config(
        train__steps=STEPS,
        train__eval_every=1,
        train__checkpoint_every=EVERY,
        **dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True)),
    )
    config.train.skip_damaged_checkpoints = skip_damaged
    config.train.stuck_after_seconds = stuck_after
    config.train.keep_checkpoints = 3
    events = Events(workdir, first, stop_at, fill, fill_at, free_at)
    data = toy_data(config, hang_at=hang_at)
    return train(config, HeavyObjective(ballast=ballast), {}, workdir, data, events)


def start(workdir: Path, arguments: str, *, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """`main` with ``arguments`` in a process of its own; its output goes to a pipe."""
    return start_module(
        "tests.faulty_run", [str(workdir), *arguments.split()], prefix=prefix, quick=True
    )


def start_pair(workdir: Path, arguments: str, logs: Path) -> list[subprocess.Popen]:
    """Two processes of one job; process N writes ``logs``/N.log."""
    logs.mkdir()
    flags = [*arguments.split(), "--processes=2", f"--address={free_address()}"]
    return start_modules("tests.faulty_run", [str(workdir), *flags], 2, logs, quick=True)


def main() -> None:
    """Flags are the arguments of `run_toy`, and where to run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--mesh", default="2,2,2", help="data,fsdp,tensor")
    counts = ("first", "stop_at", "ballast", "fill_at", "free_at", "full_on", "hang_at", "process")
    for name in counts:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--hosts_wait", type=int, default=1200)
    parser.add_argument("--stuck_after", type=int, default=1800)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--address", default="")
    parser.add_argument("--fill", default="")
    parser.add_argument("--skip_damaged", action="store_true")
    given = vars(parser.parse_args())
    jax.config.update("jax_num_cpu_devices", given.pop("devices"))
    processes, process, address = (given.pop(n) for n in ("processes", "process", "address"))
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, process)
    run_checkpoints.HOSTS_WAIT = given.pop("hosts_wait")
    given["mesh"] = tuple(int(size) for size in given["mesh"].split(","))
    run_toy(given.pop("workdir"), **given)


if __name__ == "__main__":
    main()
