"""Runs our code on golden cases of the official code, and compares every recorded array.

    python experiments/check_parity.py tests/golden/var/tiny_a tests/golden/llamagen/tiny

A case is a folder with spec.json, io.npz and README.md. Its weights are regenerated, converted as a
released file is, and run in float32 at highest matmul precision. One line an array: name, kind,
greatest absolute difference, relative norm, tolerance and where that comes from, ok or FAIL. Exits
1 on any FAIL and on an output that was not checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from absl import app

from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case
from ar_jax.convert.release import FAMILIES
from ar_jax.io.console import configure_logging


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        raise app.UsageError("name at least one folder of a golden case")
    configure_logging()
    failed = 0
    for folder in argv[1:]:
        case = Case.load(folder)
        name = case.spec.get("family")
        if name not in FAMILIES:
            raise app.UsageError(f"{folder}: family {name!r} is none of {', '.join(FAMILIES)}")
        family = importlib.import_module(f"ar_jax.convert.parity.{name}")
        print(folder)
        lines = []
        for line in check_case(family, case):
            print(line, flush=True)
            lines.append(line)
        wrong = sum(not line.ok for line in lines)
        failed += wrong
        print(f"{folder}: {len(lines)} arrays, {wrong} FAIL\n")
    return int(failed > 0)


if __name__ == "__main__":
    app.run(main)
