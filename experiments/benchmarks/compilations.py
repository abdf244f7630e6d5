"""A table of what the TPU's compiler says of the official sizes on four topologies.

    python experiments/benchmarks/compilations.py --out=experiments/benchmarks/compilations.json
    python experiments/benchmarks/compilations.py --only='d16.*v5e' --out=some.json

Every row is one call of experiments/compile_ahead.py in a process of its own, a few minutes and up
to some GB of memory each. Rows that --out has, by whichever libtpu, are not compiled again, so that
an interrupted table goes on; --again compiles them anew. Each says which compiler it is by. The
table is printed and written beside --out as Markdown.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import app, flags

from ar_jax.compilation.chips import dimensions

ROOT = Path(__file__).resolve().parent.parent.parent
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8")
CHIPS = {topology: math.prod(dimensions(topology)) for topology in TOPOLOGIES}
GIB = 2**30

ONLY = flags.DEFINE_string("only", "", "Regular expression: the rows whose names it finds.")
AGAIN = flags.DEFINE_bool("again", False, "Compile what the table has, too.")
OUT = flags.DEFINE_string("out", None, "JSON file, kept up to date after every row.", required=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One compilation: configuration file and argument, what of it, where, and how many images.

    ``size`` is empty for a file that takes no argument.
    """

    system: str
    size: str
    topology: str
    program: str
    batch_size: int
    fsdp: int = 1
    tensor: int = 1
    remat: str = ""  # the configuration's own

    @property
    def label(self) -> str:
        return f"{self.system}-{self.size}" if self.size else self.system

    @property
    def name(self) -> str:
        return f"{self.program} {self.label} {self.topology} {self.batch_size} {self.mesh}"

    @property
    def mesh(self) -> str:
        data = CHIPS[self.topology] // (self.fsdp * self.tensor)
        tensor = f" x tensor {self.tensor}" if self.tensor > 1 else ""
        remat = f", remat {self.remat}" if self.remat else ""
        return f"data {data} x fsdp {self.fsdp}{tensor}{remat}"

    def command(self, out: Path) -> list[str]:
        script = str(ROOT / "experiments" / "compile_ahead.py")
        argument = f":{self.size}" if self.size else ""
        return [
            *(sys.executable, script, f"--out={out}", f"--topology={self.topology}"),
            f"--config={ROOT}/configs/imagenet256/{self.system}.py{argument}",
            *(f"--program={self.program}", f"--batch_size={self.batch_size}"),
            *("--config.mesh.data=-1", f"--config.mesh.fsdp={self.fsdp}"),
            f"--config.mesh.tensor={self.tensor}",
            *([f"--config.backbone.remat={self.remat}"] if self.remat else []),
        ]


def rows() -> Iterator[Row]:
    """What is compiled, in the table's order."""
    for topology in TOPOLOGIES:
        yield from matrix(topology)
    yield from weak_scaling()
    yield from others()


def matrix(topology: str) -> Iterator[Row]:
    """Train steps of 16 or 8 images a chip, of VAR 1,024 in all at most; samplers of 4 a chip.

    A width over fsdp that is no multiple of 16 costs time: 3,200 over 64 made a step of
    LlamaGen-3B 13 % longer than over 16.
    """
    chips = CHIPS[topology]
    for system, size, a_chip, most, split, remat in (
        ("var", "d16", 16, 1024, 16, ""),
        ("var", "d24", 8, 1024, 64, ""),
        ("var", "d30", 8, 1024, 64, ""),
        ("llamagen", "XL", 16, 4096, 16, "dots"),
        ("llamagen", "3B", 16, 4096, 16, "dots"),
    ):
        yield Row(
            system=system,
            size=size,
            topology=topology,
            program="train",
            batch_size=min(most, a_chip * chips),
            fsdp=min(split, chips),
            remat=remat,
        )
    for system, size, tensor in (("var", "d30", 1), ("llamagen", "3B", 4)):
        yield Row(
            system=system,
            size=size,
            topology=topology,
            program="sample",
            batch_size=4 * chips,
            tensor=tensor,
        )


def weak_scaling() -> Iterator[Row]:
    """VAR-d16 with as many images a chip on 256 chips as on 16, parameters whole or split."""
    for topology, images, fsdp in (
        ("v5e:4x4", 256, 1),
        ("v5e:16x16", 4096, 1),
        ("v5e:16x16", 4096, 16),  # beside the matrix's row of v5e:4x4
    ):
        yield Row(
            system="var",
            size="d16",
            topology=topology,
            program="train",
            batch_size=images,
            fsdp=fsdp,
        )


def others() -> Iterator[Row]:
    """The other configurations of configs/imagenet256 on the smallest topology."""
    topology = "v5e:4x4"
    chips = CHIPS[topology]
    for system, size, a_chip in (
        ("var", "d20", 16),
        ("llamagen", "B", 16),
        ("llamagen", "L", 16),
        ("llamagen", "XXL", 8),
        ("rar", "b", 16),
        ("rar", "l", 8),
        ("rar", "xl", 16),
        ("rar", "xxl", 8),
        ("maskgit", "", 16),
        ("randar", "L", 16),
        ("randar", "L_maskgit", 16),
        ("randar", "XL", 16),
        ("arpg", "L", 16),
        ("arpg", "XL", 16),
        ("arpg", "XXL", 8),
        ("par", "XL", 16),
        ("par", "XXL", 8),
        ("par", "3B", 8),
        ("par", "3B_16x", 8),
        ("infinity", "layer12", 16),
        ("infinity", "layer16", 16),
        ("infinity", "layer24", 16),
        ("infinity", "2b", 8),
        ("infinity", "8b", 8),
        # By the compiler, base and large need 19 GiB for 16 images a chip.
        ("mar", "base", 8),
        ("mar", "large", 8),
        ("mar", "huge", 4),
        ("ear", "base", 8),
        ("ear", "large", 8),
        ("ear", "huge", 4),
        ("givt", "base", 8),
        ("givt", "default", 8),
        ("givt", "large", 4),
        ("xar", "base", 8),
        ("xar", "large", 8),
        ("xar", "huge", 4),
        ("fractal", "ar_64", 16),
        ("fractal", "mar_64", 16),
        ("fractal", "base", 4),
        ("fractal", "large", 4),
        ("fractal", "huge", 4),
        ("flowar", "S", 8),
        ("flowar", "B", 8),
        ("flowar", "L", 8),
        ("flowar", "H", 4),
    ):
        yield Row(
            system=system,
            size=size,
            topology=topology,
            program="train",
            batch_size=a_chip * chips,
            fsdp=chips,
        )
    for system, size in (
        *(("tokenizer_bitwise", size) for size in ("d16", "d24", "d32", "d64", "d14_f8")),
        ("tokenizer_kl", ""),
        ("tokenizer_maskgit", ""),
        ("tokenizer_multiscale", ""),
        ("tokenizer_vq", ""),
        ("tokenizer_vq", "vq8"),
    ):
        yield Row(system=system, size=size, topology=topology, program="train", batch_size=128)
    for system, size in (("var", "d16"), ("llamagen", "B")):
        yield Row(
            system=system, size=size, topology=topology, program="decode", batch_size=16 * chips
        )


def compile_row(row: Row) -> dict[str, Any]:
    """The figures of a row, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "report.json", time.monotonic()
        done = subprocess.run(row.command(out), cwd=ROOT, capture_output=True, text=True)
        spent = time.monotonic() - start
        if not out.exists():
            return {"refused": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        report = json.loads(out.read_text(encoding="utf-8"))
    found: dict[str, Any] = {"compile_seconds": round(spent, 1), "fits": report.get("fits", False)}
    if "memory" not in report:  # the compiler gave up
        return {**found, "needed": report.get("needed"), "capacity": report.get("capacity")}
    moved = sum(one["bytes_per_run"] for one in report["collectives"])
    return {
        **found,
        "needed": report["memory"]["peak"],
        "capacity": report["memory"]["capacity"],
        "seconds": report["seconds"],
        "mfu": report["mfu"],
        "mfu_with_collectives": report["mfu_with_collectives"],
        "phases": report["phases"],
        "collective_bytes": moved,
        "in_loop": sorted({c["kind"] for c in report["collectives"] if c["in_loop"]}),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of all rows that have been compiled, in their order."""
    lines = [
        "| program | system | topology | mesh | images | HBM GiB | ms | MFU | "
        "ms with collectives | MFU with them | images/s with them | libtpu |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows():
        figures = found.get(row.name)
        if figures is None:
            continue
        start = f"| {row.program} | {row.label} | {row.topology} | {row.mesh} | "
        libtpu = figures["versions"]["libtpu"]
        lines.append(f"{start}{row.batch_size} | {_figures(row, figures)} | {libtpu} |")
    return "\n".join(lines) + "\n"


def _figures(row: Row, figures: dict[str, Any]) -> str:
    if "refused" in figures:
        return f"{figures['refused']} | | | | |"
    needed = f"{figures['needed'] / GIB:.1f} of {figures['capacity'] / GIB:.0f}"
    if not figures["fits"]:
        return f"does not fit: {needed} | | | | |"
    alone, together = (figures["seconds"][name] for name in ("total", "with_collectives"))
    return (
        f"{needed} | {alone * 1e3:.0f} | {figures['mfu']:.3f} | {together * 1e3:.0f} | "
        f"{figures['mfu_with_collectives']:.3f} | {row.batch_size / together:,.0f}"
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    path = Path(OUT.value)
    versions = {"jax": metadata.version("jax"), "libtpu": metadata.version("libtpu")}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    wanted = [row for row in rows() if re.search(ONLY.value, row.name)]
    for index, row in enumerate(wanted):
        if row.name in kept and not AGAIN.value:
            continue
        print(f"{index + 1}/{len(wanted)} {row.name}", flush=True)
        kept[row.name] = {"versions": versions, **compile_row(row)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(kept), encoding="utf-8")
    print(table(kept))


if __name__ == "__main__":
    app.run(main)
