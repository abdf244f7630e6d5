"""The search over meshes, rematerialisation and batch sizes, without and with the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ar_jax.compilation.search import (
    FITS,
    REFUSED,
    REMATS,
    TOO_LARGE,
    Candidate,
    Row,
    best_first,
    default_batch_sizes,
    duration,
    fitting_row,
    left_to_try,
    make_candidates,
    mesh_sizes,
    read_rows,
    refused_row,
    search,
    table,
    too_large_row,
    write_rows,
)
from ar_jax.nn.blocks import REMAT_POLICIES
from tests.tpu_compiler import needs_compiler

ROOT = Path(__file__).resolve().parent.parent
MESH = {"data": 4, "fsdp": 1, "tensor": 1}


def row(batch_size: int = 8, outcome: str = FITS, **changed: Any) -> Row:
    figures = {"seconds": 0.1, "seconds_per_image": 0.1 / batch_size, "mfu": 0.5}
    figures |= {
        "exposed": 0.01,
        "collective_bytes": 2**20,
        "dcn_bytes": 0,
        "needed": 2**33,
        "capacity": 2**34,
    }
    found = {"mesh": MESH, "remat": "none", "batch_size": batch_size, "outcome": outcome}
    return found | (figures if outcome == FITS else {"needed": 2**35}) | changed


def test_policies_are_those_of_the_blocks():
    assert set(REMATS) == set(REMAT_POLICIES)


def test_meshes_are_few_and_fill_a_slice():
    assert [tuple(mesh.values()) for mesh in mesh_sizes(16, heads=2)] == [
        *((16, 1, 1), (4, 4, 1), (1, 16, 1)),
        *((8, 1, 2), (2, 4, 2), (1, 8, 2)),
    ]
    assert [tuple(mesh.values()) for mesh in mesh_sizes(1, heads=4)] == [(1, 1, 1)]
    assert {mesh["tensor"] for mesh in mesh_sizes(8, heads=12)} == {1, 2, 4}


def test_candidates_divide_among_the_devices():
    found = make_candidates([MESH], ("none", "block"), [32, 8, 12], slices=2, accumulation=1)
    assert [(one.remat, one.batch_size) for one in found] == [
        *(("none", 8), ("none", 32)),
        *(("block", 8), ("block", 32)),
    ]
    with pytest.raises(ValueError, match=r"--batch_sizes=4,6: none is a multiple of any of \[8\]"):
        make_candidates([MESH], ("none",), [4, 6], slices=2)
    assert default_batch_sizes(256) == [128, 256, 512] and default_batch_sizes(1) == [1, 2]


def candidates(*sizes: int, remats: tuple[str, ...] = ("none",)) -> list[Candidate]:
    return make_candidates([MESH], remats, sizes)


def test_what_is_larger_than_what_did_not_fit_is_not_tried():
    waiting = candidates(4, 8, 16, 32, remats=("none", "block"))
    rows = [row(8, TOO_LARGE), row(4)]
    assert [(one.remat, one.batch_size) for one in left_to_try(waiting, rows)] == [
        ("block", size) for size in (4, 8, 16, 32)
    ]
    assert left_to_try(waiting[:4], [row(8, REFUSED, reason="r")]) == [
        *waiting[:1],
        *waiting[2:4],
    ]


def attempt(candidate: Candidate) -> Row:
    """Fits up to 8 images without rematerialisation and 16 with."""
    limit = 8 if candidate.remat == "none" else 16
    found = row(candidate.batch_size, FITS if candidate.batch_size <= limit else TOO_LARGE)
    return {name: found[name] for name in found if name not in ("mesh", "remat", "batch_size")}


def test_search_saves_every_row_and_says_the_time_left():
    waiting = candidates(4, 8, 16, 32, remats=("none", "block"))
    saved: list[int] = []
    said: list[str] = []
    rows = search(
        waiting,
        attempt,
        save=lambda rows: saved.append(len(rows)),
        say=said.append,
        clock=iter(range(0, 2000, 50)).__next__,
    )
    tried = [(one["remat"], one["batch_size"], one["outcome"] == FITS) for one in rows]
    assert tried == [
        *(("none", 4, True), ("none", 8, True), ("none", 16, False)),
        *(("block", 4, True), ("block", 8, True), ("block", 16, True), ("block", 32, False)),
    ]
    assert saved == list(range(1, 8))
    assert said[0].startswith("data 4, remat none, 4 images: fits, 25000.0 us an image (7 left")
    assert said[0].endswith("about 6 min)") and "does not fit: 32.00 GiB (4 left" in said[2]
    text = table(rows, waiting)
    assert "5 fit, 2 do not, 1 larger ones were left out" in text and "none" in text


def test_an_interrupted_search_goes_on_from_its_file(tmp_path):
    waiting, path, settings = candidates(4, 8, 16), tmp_path / "rows" / "a.json", {"c": (1, 2)}
    tried: list[int] = []

    def interrupted(candidate: Candidate) -> Row:
        if len(tried) == 1:
            raise KeyboardInterrupt
        tried.append(candidate.batch_size)
        return attempt(candidate)

    def save(rows):
        write_rows(path, settings, rows)

    assert read_rows(path, settings) == []
    with pytest.raises(KeyboardInterrupt):
        search(waiting, interrupted, save=save, say=lambda line: None)
    rows = read_rows(path, settings)
    assert [one["batch_size"] for one in rows] == [4]
    rows = search(waiting, attempt, rows, save=save, say=lambda line: None)
    assert rows == read_rows(path, settings)
    assert [one["batch_size"] for one in rows] == [4, 8, 16]
    assert search(waiting, interrupted, rows, save=save, say=lambda line: None) == rows
    with pytest.raises(ValueError, match="is of a search with another c, topology: name another"):
        read_rows(path, {"c": [1], "topology": "v5e:2x4"})
    path.write_text("[]")
    with pytest.raises(ValueError, match="is there and no search's file"):
        read_rows(path, settings)


def test_best_comes_first_and_the_rest_is_counted():
    rows = [row(4), row(16), row(8, collective_bytes=0), row(8), row(32, TOO_LARGE)]
    rows += [{**row(64, REFUSED), **refused_row(ValueError("fsdp=5 does not divide"))}]
    found = best_first(rows)
    assert [one["batch_size"] for one in found] == [16, 8, 8, 4]
    assert found[1]["collective_bytes"] == 0
    text = table(rows, candidates(4, 8, 16, 32, 128))
    assert text.splitlines()[1].split()[0] == "6250.0"
    assert text.endswith(
        "4 fit, 1 do not, 1 larger ones were left out, 1 are refused:\n  fsdp=5 does not divide"
    )
    assert "  none\n0 fit" in table([], candidates(4))


def test_rows_of_reports_and_verdicts():
    report = {
        "fits": True,
        "batch_size": 8,
        "seconds": {"total": 0.3, "with_collectives": 0.4, "collectives_exposed": 0.1},
        "memory": {"peak": 3, "capacity": 2},
        "mfu": 0.5,
        "mfu_with_collectives": 0.4,
        "collectives": [
            {"over_dcn": True, "bytes_per_run": 5},
            {"over_dcn": False, "bytes_per_run": 7},
        ],
    }
    found = fitting_row(report)
    assert found["seconds_per_image"] == 0.05
    assert (found["exposed"], found["mfu"]) == (0.1, 0.4)
    assert (found["collective_bytes"], found["dcn_bytes"]) == (7, 5)
    assert fitting_row({**report, "fits": False})["outcome"] == TOO_LARGE
    assert too_large_row({"needed": None, "capacity": 2, "of": "program"})["needed"] is None


def test_durations_are_short():
    assert [duration(s) for s in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "experiments/compile_ahead.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )


@pytest.mark.slow  # compiles four times
@needs_compiler
def test_a_search_compiles_and_resumes(tmp_path):
    out = tmp_path / "search.json"
    arguments = ["--config=configs/fashion_mnist/var.py:smoke", "--topology=v5e:1x1", "--search"]
    arguments += ["--program=sample", "--batch_sizes=2", f"--out={out}"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(out.read_text())["rows"]
    assert found["outcome"] == FITS and found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert "1 fit, 0 do not" in done.stdout and "one chip" in done.stdout
    again = run(*arguments)
    assert again.returncode == 0 and "1 of 1 are in" in again.stdout
    assert json.loads(out.read_text())["rows"] == [found]
