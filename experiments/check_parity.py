"""Runs our code on golden cases of the official code, and compares every recorded array.

    python experiments/check_parity.py tests/golden/var/tiny_a tests/golden/llamagen/tiny

A case is a folder with spec.json, io.npz and README.md. Its weights are regenerated, converted as a
released file is, and run in float32 at highest matmul precision. One line an array: name, kind,
greatest absolute difference, relative norm, tolerance and where that comes from, ok or FAIL. Inputs
have a line that says so. What cannot be computed is a FAIL with the reason, and the rest goes on.
Exits 1 on any FAIL, an output that was not checked among them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from absl import app

from ar_jax.convert.networks import NETWORK_FAMILIES
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case
from ar_jax.convert.release import FAMILIES as RELEASES
from ar_jax.io.console import configure_logging

# Beside the systems: what evaluation computes, and losses, which have no released files.
FAMILIES = (*RELEASES, *NETWORK_FAMILIES, "adm_metrics", "vq_losses", "maskgit")


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        raise app.UsageError("name at least one folder of a golden case")
    configure_logging()
    failed = [folder for folder in argv[1:] if not _check(folder)]
    return int(bool(failed))


def _check(folder: str) -> bool:
    """Prints the lines of a case, and says whether all are right."""
    print(folder)
    lines = []
    try:
        case = Case.load(folder)
        name = case.spec.get("family")
        if name not in FAMILIES:
            raise ValueError(f"family {name!r} is none of {', '.join(FAMILIES)}")
        family: Any = importlib.import_module(f"ar_jax.convert.parity.{name}")
        for line in check_case(family, case):
            print(line, flush=True)
            lines.append(line)
    except Exception as error:  # whatever it is, the other cases are still to be checked
        print(f"{folder}: {type(error).__name__}: {error}  FAIL\n")
        return False
    wrong = sum(not line.ok for line in lines)
    print(f"{folder}: {len(lines)} arrays, {wrong} FAIL\n")
    return not wrong


if __name__ == "__main__":
    app.run(main)
