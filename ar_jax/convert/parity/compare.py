"""Ours against the recorded arrays of a case, one line an array.

Integers, names and the place of infinities must be equal. Floats may differ, by relative norm
|ours - recorded| / |recorded|, by ten times what the official code's own float32 differs from
float64, which the case's README records. A measured difference below one rounding unit is luck:
the unit counts in its place. So does, for means and other summaries, what was measured of the array
that they sum up, in which errors cancel by luck. Where a family's READMEs name a limit for a
correct port beside that, it decides about what is farther off.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from ar_jax.convert.parity.case import Case

FACTOR = 10.0
# For float32 arrays of which the README says nothing.
UNMEASURED = 5e-6

Outputs = Iterable[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Section:
    """Outputs that are computed together: the failure of one section leaves the others alone.

    Attributes:
        outputs: patterns of their names. A section is computed if one of them was recorded.
        compute: (name, array) of each as ours computes it, in the layout of the case; names that
            were not recorded are passed by.
    """

    outputs: Sequence[str]
    compute: Callable[[], Outputs]


def with_model(
    compute: Callable[..., Outputs], model: Callable[[], Any], *arguments: Any
) -> Callable[[], Outputs]:
    """``compute(model(), *arguments)`` to be called: the first section to need it makes a model."""
    return lambda: compute(model(), *arguments)


class Family(Protocol):
    """A module ar_jax/convert/parity/<family>.py.

    ``NOT_APPLICABLE`` says in one line why arrays whose name matches a pattern cannot apply to
    ours. The module may have, besides what is below,

        summarised(name)   the array that this one sums up, or None
        limits(case)       pattern -> tolerance that the READMEs name for a correct port
        absolute(case)     pattern -> greatest absolute difference that the READMEs allow
        flips(case)        pattern -> share of a boolean array that the READMEs let differ
        ADDED              what the READMEs add to ten times the measured difference of float32
    """

    @property
    def NOT_APPLICABLE(self) -> Mapping[str, str]:
        """Pattern -> reason."""
        ...

    def inputs(self, case: Case) -> Sequence[str]:
        """Patterns of the arrays that are inputs or recorded noise."""
        ...

    def sections(self, case: Case) -> Iterable[Section]:
        """Of all outputs; nothing is computed yet."""
        ...


@dataclasses.dataclass(frozen=True)
class Line:
    """What is said of one array.

    Attributes:
        kind: 'integer', 'float' or 'text'.
        origin: where the tolerance comes from, or why nothing was compared.
        largest, relative: greatest absolute difference and relative norm of the difference; None
            where nothing was compared.
        tolerance: on ``relative``; 0 for equality.
    """

    name: str
    kind: str
    origin: str
    ok: bool
    largest: float | None = None
    relative: float = 0.0
    tolerance: float = 0.0

    def __str__(self) -> str:
        start, verdict = f"{self.name:<44} {self.kind:<8}", "ok" if self.ok else "FAIL"
        if self.largest is None:
            return f"{start} {self.origin}  {verdict}"
        return (
            f"{start} max {self.largest:.2e}  relative {self.relative:.2e}  "
            f"tolerance {self.tolerance:.2e} ({self.origin})  {verdict}"
        )


def check_case(family: Family, case: Case) -> Iterator[Line]:
    """A line for every array of the case, as they are computed, at highest precision."""
    done: set[str] = set()
    given = _inputs(family, case)
    with jax.default_matmul_precision("highest"):
        for section in _sections(family, case):
            wanted = [n for n in case.io if matches(n, section.outputs) and n not in given]
            if set(wanted) <= done:
                continue
            try:
                for name, ours in section.compute():
                    if name in case.io and name not in done:
                        done.add(name)
                        yield compare(family, case, name, ours)
            except Exception as error:  # whatever it is, other sections may be right
                said = f"not computed: {type(error).__name__}: {' '.join(str(error).split())}"
                for name in wanted:
                    if name not in done:
                        done.add(name)
                        yield Line(name, kind_of(case.io[name]), said, False)
    for name, array in case.io.items():
        if name in done:
            continue
        reason = _find(family.NOT_APPLICABLE, name)
        if name in given:
            yield Line(name, kind_of(array), "input", True)
        elif reason is not None:
            yield Line(name, kind_of(array), f"does not apply: {reason}", True)
        else:
            yield Line(name, kind_of(array), "not checked", False)


def _inputs(family: Family, case: Case) -> set[str]:
    """Names of the inputs: as the README says; where it does not, by the family's patterns."""
    try:
        patterns = family.inputs(case)
    except Exception:  # spec.json makes no sense, which every section will say
        patterns = ()
    roles = {name: case.role_of(name) for name in case.io}
    return {n for n, role in roles.items() if role == "in" or (not role and matches(n, patterns))}


def _sections(family: Family, case: Case) -> Sequence[Section]:
    """The family's; where spec.json leaves it at a loss, one that says so of all arrays."""
    try:
        return [*family.sections(case)]
    except Exception as error:
        reason = error

        def fail() -> Outputs:
            raise reason

        return [Section(("*",), fail)]


def compare(family: Family, case: Case, name: str, ours: Any) -> Line:
    """One array of ours against the recorded one, or the part of ours that was recorded."""
    recorded, ours = case.io[name], case.select(name, ours)
    kind = kind_of(recorded)
    if ours.shape != recorded.shape:
        origin = f"ours is {ours.shape}, recorded {recorded.shape}"
        return Line(name, kind, origin, False, np.inf, np.inf)
    if kind == "text":
        return Line(name, kind, "equal", bool(np.array_equal(ours, recorded)), 0.0)
    if kind == "integer":
        if ours.dtype.kind not in "iub":
            return Line(name, kind, f"ours is {ours.dtype}", False, np.inf, np.inf)
        largest, relative = _difference(ours, recorded)
        bound = _hook(family, "absolute", case, name)
        if largest and bound is not None:
            origin = "on max, the README's limit"
            return Line(name, kind, origin, largest <= bound, largest, relative, bound)
        if recorded.dtype == bool and (share := _hook(family, "flips", case, name)) is not None:
            differing = float((ours != recorded).mean())
            origin = "share that may differ, the README's"
            return Line(name, kind, origin, differing <= share, largest, differing, share)
        return Line(name, kind, "equal", largest == 0, largest, relative)
    largest, relative = _difference(ours, recorded)
    allowed = tolerances(family, case, name)
    tolerance, origin = next((t for t in allowed if relative <= t[0]), allowed[-1])
    bound = _hook(family, "absolute", case, name)
    if relative > tolerance and bound is not None:
        origin = "on max, the README's limit"
        return Line(name, kind, origin, largest <= bound, largest, relative, bound)
    return Line(name, kind, origin, relative <= tolerance, largest, relative, tolerance)


def tolerances(family: Family, case: Case, name: str) -> list[tuple[float, str]]:
    """(tolerance on the relative norm, where it comes from) of a float array, ascending."""
    found = [_measured_tolerance(family, case, name)]
    limit = _hook(family, "limits", case, name)
    if limit is not None:
        found.append((limit, "the README's limit"))
    return sorted(found)


def _measured_tolerance(family: Family, case: Case, name: str) -> tuple[float, str]:
    dtype = case.io[name].dtype
    unit = float(np.finfo(dtype).eps)
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
    added = getattr(family, "ADDED", 0.0) if dtype == np.float32 else 0.0
    more = f" + {added:g} of the README" if added else ""
    return FACTOR * base + added, f"{FACTOR:g} x {base:.1e} {origin}{more}"


def kind_of(array: np.ndarray) -> str:
    """'float', 'text' or 'integer'."""
    return {"f": "float", "U": "text", "S": "text"}.get(array.dtype.kind, "integer")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the patterns with ``*``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _hook(family: Family, hook: str, case: Case, name: str) -> Any:
    """What a table that the family may have says of an array, or None."""
    return _find(getattr(family, hook, lambda case: {})(case), name)


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
