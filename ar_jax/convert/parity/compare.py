"""Ours against the recorded arrays of a case, one line an array.

Integers, names and the place of infinities must be equal. Floats may differ, by relative norm
|ours - recorded| / |recorded|, by ten times what the official code's own float32 differs from
float64, which the case's README records. A measured difference below one rounding unit is luck:
the unit counts in its place.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ar_jax.convert.parity.case import Case

FACTOR = 10.0


class Family(Protocol):
    """A module ar_jax/convert/parity/<family>.py.

    ``INPUTS`` are patterns of names in io.npz that are inputs or recorded noise. ``outputs`` gives
    every other array as ours computes it, in the layout of the case. ``NOT_APPLICABLE`` says in one
    line why arrays whose name matches a pattern cannot apply to ours.
    """

    INPUTS: Sequence[str]
    NOT_APPLICABLE: Mapping[str, str]

    def outputs(self, case: Case) -> Iterator[tuple[str, Any]]:
        """(name, array) of every output."""
        ...


@dataclasses.dataclass(frozen=True)
class Line:
    """The comparison of one array.

    Attributes:
        kind: 'integer', 'float', 'text' or '' where nothing was compared.
        largest, relative: greatest absolute difference and relative norm of the difference.
        tolerance: on ``relative``; 0 for equality.
        origin: where the tolerance comes from, or why nothing was compared.
    """

    name: str
    kind: str
    largest: float
    relative: float
    tolerance: float
    origin: str
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAIL"
        if not self.kind:
            return f"{self.name:<44} {'-':<8} {self.origin}  {verdict}"
        return (
            f"{self.name:<44} {self.kind:<8} max {self.largest:.2e}  relative {self.relative:.2e}  "
            f"tolerance {self.tolerance:.2e} ({self.origin})  {verdict}"
        )


def check_case(family: Family, case: Case) -> Iterator[Line]:
    """A line for every output array of the case, as they are computed, at highest precision."""
    checked = set()
    with jax.default_matmul_precision("highest"):
        for name, ours in family.outputs(case):
            if name not in case.io:
                yield Line(name, "", 0, 0, 0, "the case holds no such array", False)
                continue
            checked.add(name)
            yield compare(case, name, ours)
    for name in case.io:
        if name in checked or matches(name, family.INPUTS):
            continue
        reason = next(
            (why for pattern, why in family.NOT_APPLICABLE.items() if matches(name, [pattern])),
            None,
        )
        origin = "not checked" if reason is None else f"does not apply: {reason}"
        yield Line(name, "", 0, 0, 0, origin, reason is not None)


def compare(case: Case, name: str, ours: Any) -> Line:
    """One array of ours against the recorded one."""
    recorded, ours = case.io[name], np.asarray(ours)
    kind = {"f": "float", "U": "text", "S": "text"}.get(recorded.dtype.kind, "integer")
    if ours.shape != recorded.shape:
        origin = f"ours is {ours.shape}, recorded {recorded.shape}"
        return Line(name, kind, np.inf, np.inf, 0.0, origin, False)
    if kind == "text":
        return Line(name, kind, 0, 0, 0, "equal", bool(np.array_equal(ours, recorded)))
    if kind == "integer":
        if ours.dtype.kind not in "iub":
            return Line(name, kind, np.inf, np.inf, 0.0, f"ours is {ours.dtype}", False)
        largest, relative = _difference(ours, recorded)
        return Line(name, kind, largest, relative, 0.0, "equal", largest == 0)
    tolerance, origin = tolerance_of(case, name)
    largest, relative = _difference(ours, recorded)
    return Line(name, kind, largest, relative, tolerance, origin, relative <= tolerance)


def tolerance_of(case: Case, name: str) -> tuple[float, str]:
    """(tolerance on the relative norm, where it comes from) of a float array."""
    unit = float(np.finfo(case.io[name].dtype).eps)
    measured = case.measured_of(name)
    if measured is not None and measured[1] > unit:
        return FACTOR * measured[1], f"{FACTOR:g} x {measured[1]:.1e} measured"
    return FACTOR * unit, f"{FACTOR:g} x {unit:.1e} {case.io[name].dtype} unit"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns with ``*``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _difference(ours: np.ndarray, recorded: np.ndarray) -> tuple[float, float]:
    """(largest, relative norm); infinite if infinities and NaNs are not in the same places."""
    a, b = np.asarray(ours, np.float64).ravel(), np.asarray(recorded, np.float64).ravel()
    finite = np.isfinite(b)
    if (
        not np.array_equal(a[~finite], b[~finite], equal_nan=True)
        or not np.isfinite(a[finite]).all()
    ):
        return np.inf, np.inf
    difference = np.abs(a[finite] - b[finite])
    largest = float(difference.max(initial=0.0))
    norm = float(np.linalg.norm(b[finite]))
    if norm == 0:
        return largest, 0.0 if largest == 0 else np.inf
    return largest, float(np.linalg.norm(difference)) / norm
