"""Metrics of one generator over settings of its sampler: a table, a plot, and a file to go on from.

Every point draws the same images' noise, so that what differs between points is the settings'.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ar_jax.build import create_sampler
from ar_jax.evaluation.adm import Real, Standard, check_rank, compare, measure_reference
from ar_jax.evaluation.generation import score_samples
from ar_jax.evaluation.image_set import of_arrays
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import describe_weights, image_section, load_system
from ar_jax.evaluation.plots import save_sweep
from ar_jax.evaluation.real import find_judge, open_splits
from ar_jax.evaluation.reference import open_reference
from ar_jax.evaluation.report import read_report, table, write_report
from ar_jax.evaluation.samples import (
    Generated,
    check_class_conditional,
    describe_sampling,
    generate,
    sampling_of,
)
from ar_jax.evaluation.standard import code_version, comparison_section
from ar_jax.io.checkpoint import tree_digest
from ar_jax.io.run_info import config_dict

log = logging.getLogger(__name__)

POINTS = "points.json"
Axes = Mapping[str, Sequence[Any]]  # 'guidance.scale' -> values
Settings = dict[str, Any]


def sweep_workdir(
    workdir: str | Path,
    directory: str | Path,
    axes: Axes,
    *,
    num_images: int = 1000,
    batch_size: int = 100,
    source: str | None = None,
    seed: int = 0,
    step: int | None = None,
    standard: Standard | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures samples at every combination of settings; the same call goes on where it stopped.

    Args:
        workdir: of a generator of classes; its EMA is used, if it keeps one.
        directory: gets points.json, which is complete after every point, and at the end the
            report: a table and sweep.png.
        axes: field of `config.sampling` -> the values to try; all combinations are. The first one
            is the plot's horizontal axis.
        num_images: samples of a point, a multiple of the classes.
        source: of the real images, as `config.data.source`; None: the run's.
        standard: FID and its like; None: the judgement of our own classifier.

    Returns:
        The report's sections.

    Raises:
        ValueError: names a field, value or file that is wrong, or how the points that are there
            were measured otherwise.
    """
    directory = Path(directory)
    settings = combinations(axes)
    config, system, params = load_system(workdir, step=step)
    check_class_conditional(system)
    classes = system.backbone.num_classes
    if num_images < 1 or num_images % classes:
        raise ValueError(
            f"--num_images={num_images} is not a positive multiple of {classes} classes"
        )
    drawing = [sampling_of(config, point) for point in settings]  # all of them, before any is drawn
    with jax.default_matmul_precision(config["precision"]):
        judge, real = None, None
        if standard is None:
            section = image_section(config, source)
            data = open_splits(section, system.tokenizer, params["tokenizer"])
            judge, reason = find_judge(data["train"], data["test"], system.tokenizer.image_shape)
            if judge is None:
                raise ValueError(f"nothing judges these samples: {reason} Give --inception=FILE")
            against = f"{len(judge.train):,} train images of {data['train'].source.name}"
        else:
            check_rank(standard.extractor, "the samples", num_images, standard.rules)
            reference = open_reference(standard.reference, system.tokenizer.image_shape)
            against = reference.identity
            real = measure_reference(
                standard.extractor, system.tokenizer.image_shape, reference, standard.rules
            )
        about = {
            "parameters": tree_digest(params),
            "sampling": config_dict(config["sampling"]),
            "num_images": num_images,
            "seed": seed,
            "judge": judge.classifier.name if judge else standard and standard.extractor.name,
            "reference": against,
        }
        points = read_points(directory, about)
        sampler = create_sampler(system, params)
        for number, (point, (knobs, guidance)) in enumerate(zip(settings, drawing, strict=True)):
            if find_point(points, point) is not None:
                continue
            said = describe_sampling(knobs, guidance)
            log.info("point %d of %d: %s", number + 1, len(settings), said)
            drawn = generate(
                sampler,
                balanced_labels(num_images, classes),
                seed=seed,
                batch_size=batch_size,
                knobs=knobs,
                guidance=guidance,
                progress=progress,
            )
            metrics = (
                score_samples(judge, drawn.images, drawn.labels)
                if judge
                else _compared(standard, real, drawn, classes)
            )
            points.append({"settings": point, "metrics": metrics, "code": code_version()})
            write_points(directory, about, points)
    weights = describe_weights(workdir, config, step)
    said = f"{num_images:,} samples a point, {num_images // classes:,} of each class; {weights}, "
    said += f"seed {seed}; judged by {about['judge']} against {against}. What is not in the table "
    said += f"is as in the run: {describe_sampling(*sampling_of(config))}."
    found = [find_point(points, point) for point in settings]
    write_sweep(directory, axes, [point for point in found if point is not None], said)
    return read_report(directory)


def combinations(axes: Axes) -> list[Settings]:
    """Every combination of the axes' values, the last axis fastest.

    Raises:
        ValueError: no axis, or one without values or with one twice.
    """
    if not axes:
        raise ValueError("nothing to sweep: give at least one axis, as --guidance=1,2,3")
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}: {list(values)} must be values that differ, at least one")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def find_point(points: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any] | None:
    """The point of these settings, if it is measured already."""
    return next((point for point in points if point["settings"] == settings), None)


def read_points(directory: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points that are there.

    Raises:
        ValueError: they were measured with another model, reference, number or seed; names which.
    """
    path = directory / POINTS
    if not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    for name, value in about.items():
        if stored["about"].get(name) != value:
            raise ValueError(
                f"{path} holds points of another {name}: {stored['about'].get(name)!r} there, "
                f"{value!r} now; name another --out"
            )
    return stored["points"]


def write_points(directory: Path, about: Mapping[str, Any], points: Sequence[Any]) -> None:
    """Writes all points, or leaves those that were there, whenever the process is killed."""
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f"{POINTS}.tmp"
    text = json.dumps({"about": about, "points": points}, indent=2, allow_nan=False)
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, directory / POINTS)


def write_sweep(
    directory: Path, axes: Axes, points: Sequence[Mapping[str, Any]], about: str
) -> None:
    """The report of points that are all measured: report.md, report.json and sweep.png."""
    metrics = list(points[0]["metrics"])
    save_sweep(points, list(axes), metrics, directory / "sweep.png")
    rows = [
        [*(point["settings"][axis] for axis in axes), *(point["metrics"][m] for m in metrics)]
        for point in points
    ]
    code = ", ".join(sorted({point["code"] for point in points}))
    section = {
        "title": "Sweep of the sampler",
        "about": f"{about} Measured by {code}.",
        "tables": {"Every combination of settings": table([*axes, *metrics], rows)},
        "pictures": {f"Metrics over {next(iter(axes))}.": "sweep.png"},
    }
    write_report(directory, "Sweep", {"sweep": section})


def _compared(
    standard: Standard | None, real: Real | None, drawn: Generated, classes: int
) -> dict[str, float]:
    assert standard is not None and real is not None
    samples = of_arrays("the samples", drawn.images, drawn.labels)
    rules = dataclasses.replace(standard.rules, num_images=len(drawn.images), num_classes=classes)
    section = comparison_section(compare(standard.extractor, samples, real, rules), "")
    return {name: float(entry["value"]) for name, entry in section["metrics"].items()}
