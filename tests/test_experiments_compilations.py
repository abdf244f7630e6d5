"""The table of compilations: its rows, its text, and what is compiled again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.config_files import CASES
from tests.smoke_runs import ROOT, script

IMAGENET = "configs/imagenet256/"
GIB = 2**30
FITS = {
    "compile_seconds": 60.0,
    "fits": True,
    "needed": 4 * GIB,
    "capacity": 16 * GIB,
    "seconds": {"total": 0.25, "with_collectives": 0.5},
    "mfu": 0.4,
    "mfu_with_collectives": 0.2,
}
VERSIONS = {"jax": "1.0", "libtpu": "2.0"}


def table_rows():
    with script("benchmarks/compilations", "--out=unused.json") as compilations:
        return list(compilations.rows())


def test_rows_have_names_of_their_own():
    names = [row.name for row in table_rows()]
    assert len(set(names)) == len(names)
    assert "train tokenizer_kl v5e:4x4 128 data 16 x fsdp 1" in names
    assert "train tokenizer_vq-vq8 v5e:4x4 128 data 16 x fsdp 1" in names


def test_every_imagenet_configuration_has_a_train_step():
    trained = {(f"{row.system}.py", row.size) for row in table_rows() if row.program == "train"}
    shipped = {
        (Path(case.file).name, case.argument) for case in CASES if case.file.startswith(IMAGENET)
    }
    assert trained == shipped


def test_a_row_is_a_command():
    rows = {row.name: row for row in table_rows()}
    command = rows["train tokenizer_kl v5e:4x4 128 data 16 x fsdp 1"].command(Path("o.json"))
    assert command[:2] == [sys.executable, str(ROOT / "experiments" / "compile_ahead.py")]
    assert command[2:] == [
        *("--out=o.json", "--topology=v5e:4x4", f"--config={ROOT}/{IMAGENET}tokenizer_kl.py"),
        *("--program=train", "--batch_size=128", "--config.mesh.data=-1", "--config.mesh.fsdp=1"),
        "--config.mesh.tensor=1",
    ]
    split = rows["sample llamagen-3B v5e:4x4 64 data 4 x fsdp 1 x tensor 4"].command(Path("o.json"))
    assert f"--config={ROOT}/{IMAGENET}llamagen.py:3B" in split
    assert "--config.mesh.tensor=4" in split and "--program=sample" in split


def test_the_table_has_what_was_compiled_in_the_order_of_the_rows():
    with script("benchmarks/compilations", "--out=unused.json") as compilations:
        first, second, third, *_ = compilations.rows()
        large = {"compile_seconds": 1.0, "fits": False, "needed": 20 * GIB, "capacity": 16 * GIB}
        refused = {"refused": "ValueError: no"}
        by_name: dict[str, dict] = {third.name: refused, first.name: FITS, second.name: large}
        found = {name: {"versions": VERSIONS, **row} for name, row in by_name.items()}
        head, line, *lines = compilations.table(found).splitlines()
    assert head.count("|") == line.count("|") == 13
    start = [f"| train | {row.label} | v5e:4x4 | {row.mesh} | " for row in (first, second, third)]
    rate = f"{first.batch_size / 0.5:,.0f}"
    assert lines == [
        f"{start[0]}{first.batch_size} | 4.0 of 16 | 250 | 0.400 | 500 | 0.200 | {rate} | 2.0 |",
        f"{start[1]}{second.batch_size} | does not fit: 20.0 of 16 | | | | | | 2.0 |",
        f"{start[2]}{third.batch_size} | ValueError: no | | | | | | 2.0 |",
    ]
    assert all(row.count("|") == 13 for row in lines)


def test_an_interrupted_table_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", VERSIONS.__getitem__)  # libtpu is optional
    out = tmp_path / "new" / "rows.json"
    compiled: list[str] = []

    def run(*arguments: str, stop_at: int = 99) -> dict:
        with script("benchmarks/compilations", f"--out={out}", *arguments) as compilations:

            def compile_row(row):
                if len(compiled) == stop_at:
                    raise KeyboardInterrupt
                compiled.append(row.name)
                return FITS

            monkeypatch.setattr(compilations, "compile_row", compile_row)
            compilations.main(["compilations"])
        return json.loads(out.read_text())

    with pytest.raises(KeyboardInterrupt):
        run("--only=llamagen-3B", stop_at=2)
    kept = json.loads(out.read_text())
    assert list(kept) == compiled and len(compiled) == 2
    kept = run("--only=llamagen-3B")
    assert list(kept) == compiled and len(set(compiled)) == len(compiled) > 2
    assert all("llamagen-3B" in name for name in compiled)
    text = out.with_suffix(".md").read_text()
    assert len(text.splitlines()) == 2 + len(compiled) and text in capsys.readouterr().out
    count = len(compiled)
    run("--only=llamagen-3B")
    assert len(compiled) == count
    run("--only=llamagen-3B", "--again")
    assert compiled == 2 * compiled[:count]
    assert kept == {name: {"versions": VERSIONS, **FITS} for name in compiled}
