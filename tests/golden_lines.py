"""That ours gives every array of a golden case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Line, check_case


def check(family: Any, case: Case) -> dict[str, Line]:
    """Name -> line; fails unless every array has one, and all that are no inputs are compared."""
    lines = list(check_case(family, case))
    wrong = "\n".join(str(line) for line in lines if not line.ok)
    assert not wrong, f"\n{wrong}"
    assert sorted(line.name for line in lines) == sorted(case.io)
    left_out = [line for line in lines if line.largest is None]
    assert all(line.origin == "input" for line in left_out), left_out
    return {line.name: line for line in lines}


def part_of(case: Case, names: Sequence[str], spec: Mapping[str, Any], readme: bool = True) -> Case:
    """A case of some of the arrays of another, and of another specification."""
    io = {name: case.io[name] for name in names}
    tables = (case.measured, case.selected, case.roles) if readme else ({}, {}, {})
    return Case(case.name, dict(spec), io, *tables)
