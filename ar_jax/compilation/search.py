"""Which mesh, rematerialisation and batch size to train with: a table of compilations.

The search itself knows no compiler: it is given a function that tries one candidate and returns the
row of it, which ends in a file at once, so that an interrupted search goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # 'mesh', 'remat', 'batch_size', 'outcome' and figures, see `fitting_row`

FITS, TOO_LARGE, REFUSED = "fits", "does not fit", "refused"
TENSOR_SIZES = (1, 2, 4)
REMATS = ("none", "dots", "block")  # keys of `ar_jax.nn.blocks.REMAT_POLICIES`, most memory first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one compilation is of: axis sizes inside a slice, config.backbone.remat, images."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    batch_size: int

    @property
    def mesh(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    def __str__(self) -> str:
        return f"{describe_mesh(self.mesh)}, remat {self.remat}, {self.batch_size} images"


def describe_mesh(mesh: Mapping[str, int]) -> str:
    """'data 4 x tensor 2': the axes of more than one device."""
    wide = [f"{axis} {size}" for axis, size in mesh.items() if size > 1]
    return " x ".join(wide) or "one chip"


def mesh_sizes(chips: int, heads: int) -> list[dict[str, int]]:
    """Axis sizes over the chips of a slice: data alone, fsdp alone, both by halves.

    Each with tensor 1, 2 and 4, where it divides the chips and ``heads``.
    """
    found = []
    for tensor in TENSOR_SIZES:
        if chips % tensor or heads % tensor:
            continue
        rest = chips // tensor
        middle = next(n for n in range(math.isqrt(rest), 0, -1) if rest % n == 0)
        for fsdp in (1, rest // middle, rest):
            sizes = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}
            if sizes not in found:
                found.append(sizes)
    return found


def make_candidates(
    meshes: Sequence[Mapping[str, int]],
    remats: Sequence[str],
    batch_sizes: Sequence[int],
    *,
    slices: int = 1,
    accumulation: int = 1,
) -> list[Candidate]:
    """All combinations whose images divide among the devices; of two alike the smaller batch first.

    Raises:
        ValueError: no batch size divides among any of the meshes.
    """
    found = []
    for mesh in meshes:
        unit = slices * mesh["data"] * mesh["fsdp"] * accumulation
        for remat in remats:
            for batch_size in sorted(set(batch_sizes)):
                if batch_size % unit == 0:
                    found.append(Candidate(**mesh, remat=remat, batch_size=batch_size))
    if not found:
        units = {slices * mesh["data"] * mesh["fsdp"] * accumulation for mesh in meshes}
        raise ValueError(
            f"--batch_sizes={','.join(map(str, batch_sizes))}: none is a multiple of any of "
            f"{sorted(units)}, the images that slices x data x fsdp x accumulation need"
        )
    return found


def default_batch_sizes(batch_size: int) -> list[int]:
    """Half of it, itself and its double."""
    return sorted({max(1, batch_size // 2), batch_size, 2 * batch_size})


def is_row_of(row: Row, candidate: Candidate) -> bool:
    """Whether ``row`` is what came of ``candidate``."""
    own = {"mesh": candidate.mesh, "remat": candidate.remat, "batch_size": candidate.batch_size}
    return all(row[name] == value for name, value in own.items())


def smaller_that_failed(candidate: Candidate, rows: Sequence[Row]) -> Row | None:
    """A row of fewer images, all else equal, that does not fit: ``candidate`` cannot either."""
    for row in rows:
        alike = row["mesh"] == candidate.mesh and row["remat"] == candidate.remat
        if alike and row["outcome"] == TOO_LARGE and row["batch_size"] < candidate.batch_size:
            return row
    return None


def left_to_try(candidates: Sequence[Candidate], rows: Sequence[Row]) -> list[Candidate]:
    """Those without a row that may fit by what ``rows`` say."""
    return [
        candidate
        for candidate in candidates
        if not any(is_row_of(row, candidate) for row in rows)
        and smaller_that_failed(candidate, rows) is None
    ]


def search(
    candidates: Sequence[Candidate],
    attempt: Callable[[Candidate], Row],
    rows: Sequence[Row] = (),
    *,
    save: Callable[[Sequence[Row]], None],
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Rows of ``candidates`` after those that are there already, as far as they may fit.

    Args:
        attempt: gives the figures of a row, 'outcome' among them.
        save: is called with all rows after each.
        say: is called with a line after each.
    """
    done = list(rows)
    taken: list[float] = []
    while waiting := left_to_try(candidates, done):
        candidate, start = waiting[0], clock()
        figures = attempt(candidate)
        taken.append(clock() - start)
        named = {"mesh": candidate.mesh, "remat": candidate.remat}
        done.append({**named, "batch_size": candidate.batch_size, **figures})
        save(done)
        count = len(left_to_try(candidates, done))
        rest = f"{count} left, about {duration(count * sum(taken) / len(taken))}"
        say(f"{candidate}: {_verdict(done[-1])} ({rest})")
    return done


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fitting_row(report: Mapping[str, Any]) -> Row:
    """Figures of a program that compiled (see `ar_jax.compilation.ahead.compile_train_step`).

    Seconds and MFU are with the exposed part of the collectives, which also stands beside them, as
    do the collectives' bytes on one chip.
    """
    seconds, memory = report["seconds"]["with_collectives"], report["memory"]
    moved = {False: 0, True: 0}
    for found in report["collectives"]:
        moved[found["over_dcn"]] += found["bytes_per_run"]
    return {
        "outcome": FITS if report["fits"] else TOO_LARGE,
        "seconds": seconds,
        "seconds_per_image": seconds / report["batch_size"],
        "exposed": report["seconds"]["collectives_exposed"],
        "mfu": report["mfu_with_collectives"],
        "needed": memory["peak"],
        "capacity": memory["capacity"],
        "collective_bytes": moved[False],
        "dcn_bytes": moved[True],
    }


def too_large_row(verdict: Mapping[str, Any]) -> Row:
    """Of a program that the compiler gave up on, see `overflow.read_overflow`."""
    return {"outcome": TOO_LARGE, "needed": verdict["needed"], "capacity": verdict["capacity"]}


def refused_row(error: Exception) -> Row:
    """Of a candidate that the configuration does not allow."""
    return {"outcome": REFUSED, "reason": str(error)}


def best_first(rows: Sequence[Row]) -> list[Row]:
    """The rows that fit, by the predicted time of an image; by what they move where that is equal.

    The time is with the exposed part of the collectives, of which only a lower bound is known: of
    two that are close the one that moves less may win.
    """
    fitting = [row for row in rows if row["outcome"] == FITS]
    return sorted(fitting, key=lambda row: (row["seconds_per_image"], row["collective_bytes"]))


def table(rows: Sequence[Row], candidates: Sequence[Candidate]) -> str:
    """What fits, best first, and how many of ``candidates`` do not."""
    head = (
        "us an image  ms a call  exposed ms    MFU  HBM GiB  ICI MiB  DCN MiB  images  remat  mesh"
    )
    lines = [
        f"{row['seconds_per_image'] * 1e6:11.1f} {row['seconds'] * 1e3:10.2f} "
        f"{row['exposed'] * 1e3:11.2f} {row['mfu']:6.3f} {row['needed'] / 2**30:8.2f} "
        f"{row['collective_bytes'] / 2**20:8.1f} {row['dcn_bytes'] / 2**20:8.1f} "
        f"{row['batch_size']:7d}  {row['remat']:5s}  {describe_mesh(row['mesh'])}"
        for row in best_first(rows)
    ]
    count = {name: sum(row["outcome"] == name for row in rows) for name in (TOO_LARGE, REFUSED)}
    known = [any(is_row_of(row, candidate) for row in rows) for candidate in candidates]
    left_out = sum(
        not tried and smaller_that_failed(candidate, rows) is not None
        for candidate, tried in zip(candidates, known, strict=True)
    )
    said = f"{len(lines)} fit, {count[TOO_LARGE]} do not, {left_out} larger ones were left out"
    refused = [row for row in rows if row["outcome"] == REFUSED]
    reasons = sorted({row["reason"] for row in refused})
    if refused:
        said += f", {len(refused)} are refused:"
    return "\n".join([head, *(lines or ["  none"]), said, *(f"  {reason}" for reason in reasons)])


def read_rows(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    """Rows of an earlier search with the same ``settings``; none where there is no file.

    Raises:
        ValueError: the file is of a search with other settings, or no search's; names them.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, rows = found["settings"], found["rows"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--out={path} is there and no search's file: name another") from error
    ours = json.loads(json.dumps(settings))
    names = {*theirs, *ours}
    other = sorted(name for name in names if theirs.get(name) != ours.get(name))
    if other:
        raise ValueError(
            f"--out={path} is of a search with another {', '.join(other)}: name another file, or "
            "delete it to begin anew"
        )
    return rows


def write_rows(path: Path, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Writes what `read_rows` reads; whoever interrupts it leaves the file before or after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    text = json.dumps({"settings": settings, "rows": rows}, indent=2)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def _verdict(row: Row) -> str:
    if row["outcome"] == FITS:
        return f"fits, {row['seconds_per_image'] * 1e6:.1f} us an image"
    if row["outcome"] == TOO_LARGE and row["needed"]:
        return f"does not fit: {row['needed'] / 2**30:.2f} GiB"
    return f"{row['outcome']}{': ' + row['reason'] if 'reason' in row else ''}"
