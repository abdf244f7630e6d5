r"""Measures what a core of the host reads for training, and how many cores a compiled step needs.

    python experiments/compile_ahead.py --config=configs/imagenet256/var.py:d16 \
        --topology=v5e:4x4 --batch_size=256 --out=var_d16.json
    python experiments/benchmarks/loader.py --config=configs/imagenet256/var.py:d16 \
        --workers=0,2 --report=var_d16.json --out=loader.json

The pipeline is the one of training, with the crop and flip of config.data. Unless --source names
data, three kinds are written to a temporary folder: synthetic JPEGs as files in folders, the same
as ArrayRecord, and random codes of the config's schedule, as ArrayRecord. All of it stays in the
page cache, so the disk is not in the numbers. Several sources are measured one after the other, and
--repeats times so, for comparisons on a machine that is busy.

"Of a core" is by CPU seconds, this process's and its workers': other programs on the machine take
wall time from the measurement, and of CPU time only what they cost the caches. A report whose step
reads images is set against the images, one of codes against the codes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image

from ar_jax.build import build_objective, trains_tokenizer
from ar_jax.data import CodesWriter, Data, from_config, open_source
from ar_jax.data.benchmark import measure
from ar_jax.data.records import source_items, write_records
from ar_jax.io.console import configure_logging
from ar_jax.io.progress import Progress
from ar_jax.io.run_info import config_dict

CLASSES = 10  # of what is written here
QUALITY, NOISE = 95, 13.0  # of the JPEGs: 0.6 bytes a pixel, as ImageNet's training images
PLACEHOLDER = {"format": "synthetic codes of experiments/benchmarks/loader.py"}
SHARED_HOST = ("v5e", "v6e")  # whose slices of up to 8 chips are one host's

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
SOURCE = flags.DEFINE_list("source", [], "Data to read, each as config.data.source.")
REPEATS = flags.DEFINE_integer("repeats", 1, "Measurements of each.")
WORKERS = flags.DEFINE_list("workers", ["0"], "Worker processes: one measurement for each number.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Items of a batch of this host.")
SECONDS = flags.DEFINE_float("seconds", 10.0, "Least length of a measurement.")
IMAGES = flags.DEFINE_integer("images", 256, "Synthetic JPEGs.")
SIDES = flags.DEFINE_list("sides", ["256", "500"], "Their shortest and longest side, pixels.")
CODES = flags.DEFINE_integer("codes", 16384, "Synthetic images' codes.")
REPORT = flags.DEFINE_list("report", [], "Files that experiments/compile_ahead.py --out wrote.")
CHIPS = flags.DEFINE_integer(
    "chips_per_host", None, "Default: 8 where a v5e or v6e has no more than 8 chips, else 4."
)
OUT = flags.DEFINE_string("out", None, "JSON file; default prints the table only.")


def write_photos(directory: Path, count: int, sides: tuple[int, int]) -> None:
    """Writes ``directory``/train/synthetic_<class>/<number>.jpg: smooth colours under noise."""
    rng = np.random.default_rng(0)
    for index in range(count):
        width, height = (int(n) for n in rng.integers(sides[0], sides[1] + 1, 2))
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noise = rng.standard_normal((height, width, 1), np.float32) * np.float32(NOISE)
        folder = directory / "train" / f"synthetic_{index % CLASSES:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
        photo.save(folder / f"{index:06d}.jpg", quality=QUALITY)


def write_codes(directory: Path, config: Any, count: int) -> None:
    """Writes ``directory``/train: random codes in the order and vocabulary of a generator."""
    objective: Any = build_objective(config)
    system = objective.system
    size, sizes = system.tokenizer.codebook_size or 0, system.schedule.stored_sizes
    width = 0 if size else system.tokenizer.encoding_shape[1]
    rng, shape = np.random.default_rng(0), (count, sum(sizes))
    codes = rng.standard_normal((*shape, width), np.float32) if width else None
    with CodesWriter(
        directory / "train",
        "train",
        sizes=sizes,
        copies=1,
        vocabulary_size=size,
        width=width,
        num_classes=CLASSES,
        tokenizer=PLACEHOLDER,
        image_size=config.data.image_size,
        channels=config.data.channels,
    ) as writer:
        writer.write(
            rng.integers(0, size, shape) if codes is None else codes, np.arange(count) % CLASSES
        )


def write_data(folder: Path, config: Any, images: int, sides: tuple[int, int], codes: int) -> dict:
    """Writes every kind that ``config`` can train on: name -> spec of the source."""
    write_photos(folder / "photos", images, sides)
    specs = {"folder": f"folder:{folder / 'photos'}", "arrayrecord": f"arrayrecord:{folder / 'r'}"}
    photos = open_source(specs["folder"], "train", channels=3)
    write_records(folder / "r" / "train", source_items(photos), class_names=photos.class_names)
    if not trains_tokenizer(config):
        write_codes(folder / "codes", config, codes)
        specs["codes"] = f"codes:{folder / 'codes'}"
    return specs


def open_data(section: Mapping[str, Any], spec: str) -> Data:
    """The train split of ``spec``, read as the section `config.data` says.

    Raises:
        ValueError: names the field that does not suit the data.
    """
    classes = open_source(spec, "train", channels=section["channels"]).num_classes
    fields = {**section, "source": spec, "num_classes": classes}
    if spec.startswith("codes:"):
        fields |= {"crop": "none", "flip": False}
    return from_config(fields, "train")


def read_demand(path: str, chips_per_host: int | None) -> dict[str, Any]:
    """What the step of a report of compile_ahead.py consumes.

    Returns:
        {'report', 'topology', 'inputs', 'batch_size', 'step_seconds', 'hosts',
        'images_per_host_second'}.

    Raises:
        ValueError: the file is no report of a train step that fits, or the hosts' number of chips
            does not suit it.
    """
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if report.get("program") != "train" or not report.get("seconds"):
        raise ValueError(
            f"--report={path} is no report of a train step that fits; write one with "
            "experiments/compile_ahead.py --out=FILE"
        )
    devices, rows, seconds = report["devices"], report["batch_size"], report["seconds"]["total"]
    slice_chips = devices // report["mesh"].get("slice", 1)
    kind = report["topology"].partition(":")[0]
    usual = min(slice_chips, 8 if kind in SHARED_HOST and slice_chips <= 8 else 4)
    chips = usual if chips_per_host is None else chips_per_host
    if chips < 1 or devices % chips:
        raise ValueError(
            f"--chips_per_host={chips} does not divide the {devices} chips of {report['topology']}"
        )
    return {
        "report": Path(path).name,
        "topology": report["topology"],
        "inputs": report["inputs"],
        "batch_size": rows,
        "step_seconds": seconds,
        "hosts": devices // chips,
        "images_per_host_second": rows / seconds * chips / devices,
    }


def machine() -> dict[str, Any]:
    """The CPU, and how busy it was before this began."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def table(rows: Sequence[Mapping[str, Any]], demands: Sequence[Mapping[str, Any]]) -> str:
    """The measurements as lines to read, with a column of cores a host for every report."""
    cells = [["data", "workers", "images/s", "images/s a core", "codes/s a core"]]
    cells[0] += [f"cores a host, {demand['report']}" for demand in demands]
    for row in rows:
        codes = row.get("codes_per_core_second")
        cells.append([row["data"], str(row["workers"]), f"{row['images_per_second']:,.0f}"])
        cells[-1] += [f"{row['images_per_core_second']:,.0f}", f"{codes:,.0f}" if codes else "-"]
        needed = [row["cores_per_host"].get(demand["report"]) for demand in demands]
        cells[-1] += ["-" if cores is None else f"{cores:.3g}" for cores in needed]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def benchmark(folder: Path, config: Any, demands: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Writes the data (unless --source names some) below ``folder`` and measures all cases."""
    found: dict[str, Any] = {"machine": machine(), "rows": [], "demands": demands}
    specs = {spec: spec for spec in SOURCE.value}
    if len(specs) == 1:
        specs = {spec.partition(":")[0]: spec for spec in specs}
    elif not specs:
        low, high = (int(side) for side in SIDES.value)
        specs = write_data(folder, config, IMAGES.value, (low, high), CODES.value)
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    found["mean_jpeg_bytes"] = round(sum(sizes) / len(sizes)) if sizes else None
    section, counts = config_dict(config)["data"], [int(n) for n in WORKERS.value]
    cases = [*specs.items()] * REPEATS.value
    with Progress(len(cases) * len(counts), title="loader", unit="measurement") as progress:
        for name, spec in cases:
            data = open_data(section, spec)
            reads = "codes" if data.source.kind == "codes" else "images"
            for workers in counts:
                data = dataclasses.replace(data, num_workers=workers)
                row = measure(data, batch_size=BATCH_SIZE.value, seconds=SECONDS.value)
                rate = row["images_per_core_second"]
                needed = {
                    demand["report"]: demand["images_per_host_second"] / rate
                    for demand in demands
                    if demand["inputs"] == reads
                }
                row = {"data": name, "items": len(data.source), **row, "cores_per_host": needed}
                found["rows"].append(row)
                progress.advance()
    return found


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    jax.config.update("jax_platforms", "cpu")  # reading needs no accelerator: take none
    demands = [read_demand(path, CHIPS.value) for path in REPORT.value]
    with tempfile.TemporaryDirectory(prefix="ar_jax_loader_") as folder:
        found = benchmark(Path(folder), CONFIG.value, demands)
    print(table(found["rows"], demands))
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
