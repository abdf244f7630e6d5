"""Starting processes of the tests' own modules on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_address() -> str:
    """'host:port' of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start_module(
    module: str,
    arguments: Sequence[str],
    *,
    log: Path | None = None,
    prefix: Sequence[str] = (),
    quick: bool = False,
) -> subprocess.Popen:
    """`python -m module arguments`, both outputs in ``log`` or a pipe, after a command ``prefix``.

    The parent's caches of compiled programs do not matter to it. ``quick``: compile three times as
    fast, for other results in the last bits.
    """
    command = [*prefix, sys.executable, "-m", module, *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if quick:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    output = subprocess.PIPE if log is None else log.open("w")
    try:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    finally:
        if log is not None:  # the child has its own handle
            output.close()  # type: ignore[union-attr]


def start_modules(
    module: str, arguments: Sequence[str], count: int, logs: Path, *, quick: bool = False
) -> list[subprocess.Popen]:
    """``count`` processes of one job, with --process=N; process N writes ``logs``/N.log."""
    return [
        start_module(
            module, [*arguments, f"--process={index}"], log=logs / f"{index}.log", quick=quick
        )
        for index in range(count)
    ]
