"""Ours against the recorded arrays of a case, one line an array.

Integers, names and the place of infinities must be equal. Floats may differ, by relative norm
|ours - recorded| / |recorded|, by ten times what the official code's own float32 differs from
float64, which the case's README records. A measured difference below one rounding unit is luck:
the unit counts in its place. So does, for means and other summaries, what was measured of the array
that they sum up, in which errors cancel by luck.
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
# For float32 arrays of which the README says nothing.
UNMEASURED = 5e-6


class Family(Protocol):
    """A module ar_jax/convert/parity/<family>.py.

    ``INPUTS`` are patterns of names in io.npz that are inputs or recorded noise. ``outputs`` gives
    every other array as ours computes it, in the layout of the case. ``NOT_APPLICABLE`` says in one
    line why arrays whose name matches a pattern cannot apply to ours.

    It may have ``summarised``, name -> the array that this one sums up or None, and ``LIMITS``,
    pattern -> tolerance that the cases' README names for these arrays in place of the factor.
    """

    @property
    def INPUTS(self) -> Sequence[str]:
        """Patterns."""
        ...

    @property
    def NOT_APPLICABLE(self) -> Mapping[str, str]:
        """Pattern -> reason."""
        ...

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
            if name in case.io:  # some cases record less
                checked.add(name)
                yield compare(family, case, name, ours)
    for name in case.io:
        if name in checked or matches(name, family.INPUTS):
            continue
        reason = _find(family.NOT_APPLICABLE, name)
        origin = "not checked" if reason is None else f"does not apply: {reason}"
        yield Line(name, "", 0, 0, 0, origin, reason is not None)


def compare(family: Family, case: Case, name: str, ours: Any) -> Line:
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
    tolerance, origin = tolerance_of(family, case, name)
    largest, relative = _difference(ours, recorded)
    return Line(name, kind, largest, relative, tolerance, origin, relative <= tolerance)


def tolerance_of(family: Family, case: Case, name: str) -> tuple[float, str]:
    """(tolerance on the relative norm, where it comes from) of a float array."""
    limit = _find(getattr(family, "LIMITS", {}), name)
    if limit is not None:
        return limit, "the README's limit"
    unit = float(np.finfo(case.io[name].dtype).eps)
    dtype = case.io[name].dtype
    measured = case.measured_of(name)
    if measured is None:
        # float64 arrays are tables that both compute in float64.
        base = UNMEASURED if dtype == np.float32 else unit
        return FACTOR * base, f"{FACTOR:g} x {base:.1e}, nothing measured"
    base, origin = max((measured[1], "measured"), (unit, f"{dtype} unit"))
    whole = getattr(family, "summarised", lambda name: None)(name)
    summed = None if whole is None else case.measured_of(whole)
    if summed is not None and summed[1] > base:
        base, origin = summed[1], f"measured of {whole}"
    return FACTOR * base, f"{FACTOR:g} x {base:.1e} {origin}"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns with ``*``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _find(table: Mapping[str, Any], name: str) -> Any:
    """Value of the first pattern that fits, or None."""
    return next((value for pattern, value in table.items() if matches(name, [pattern])), None)


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
