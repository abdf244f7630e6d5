"""Evaluation of stored images, whoever made them: samples, or reconstructions and originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.evaluation.adm import (
    Standard,
    check_balance,
    check_number,
    check_originals,
    check_rank,
    check_resolution,
    compare,
    measure_reference,
    reconstruction_distance,
)
from ar_jax.evaluation.features import Gathered
from ar_jax.evaluation.image_set import open_images
from ar_jax.evaluation.lpips import load_lpips
from ar_jax.evaluation.reconstruction import ReconstructionMeter
from ar_jax.evaluation.reference import open_reference
from ar_jax.evaluation.report import REPORT_JSON, metric, read_report, write_report
from ar_jax.evaluation.sections import reconstruction_section
from ar_jax.evaluation.standard import (
    code_version,
    comparison_section,
    distance_metrics,
    recorded_samples,
)


def check_free(directory: Path, overwrite: bool) -> None:
    """Raises ValueError if there is a report already."""
    if (directory / REPORT_JSON).exists() and not overwrite:
        raise ValueError(f"{directory / REPORT_JSON} exists: name another --out, or --overwrite")


def evaluate_samples(
    samples: str | Path, directory: str | Path, standard: Standard, *, overwrite: bool = False
) -> dict[str, Any]:
    """Compares stored samples with a reference and writes the report.

    Args:
        samples: npz or folder, see `open_images`.
        directory: gets report.json and report.md.

    Raises:
        ValueError: names what is wrong.
    """
    directory = Path(directory)
    check_free(directory, overwrite)
    images = open_images(samples)
    reference = open_reference(standard.reference, images.shape)
    extractor, rules = standard.extractor, standard.rules
    count = check_number(images.name, images.count, rules.num_images)
    check_rank(extractor, images.name, count, rules)
    check_balance(images, count, rules)  # before the reference, which takes long
    real = measure_reference(extractor, images.shape, reference, rules)
    result = compare(extractor, images, real, rules)
    section = comparison_section(result, recorded_samples(samples))
    write_report(directory, f"Samples of {Path(samples).name}", {"standard": section})
    return read_report(directory)


def evaluate_reconstructions(
    reconstructions: str | Path,
    directory: str | Path,
    standard: Standard,
    *,
    lpips: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compares stored reconstructions with their originals, image by image and as sets.

    Args:
        reconstructions: npz or folder, in the order of the originals.
        directory: gets report.json and report.md.
        lpips: converted weights, for their LPIPS too.

    Raises:
        ValueError: names what is wrong; statistics in the place of originals, for one.
    """
    directory, rules = Path(directory), standard.rules
    check_free(directory, overwrite)
    images = open_images(reconstructions)
    reference = open_reference(standard.reference, images.shape)
    originals = check_originals(reference)
    check_resolution(images.shape, reference)
    if originals.count != images.count:
        raise ValueError(
            f"{images.name} holds {images.count:,} reconstructions of {originals.count:,} "
            f"originals in {originals.name}"
        )
    count = check_number(images.name, images.count, rules.num_images)
    check_rank(standard.extractor, images.name, count, rules)
    perceptual = None if lpips is None else load_lpips(lpips, images.shape)
    meter, distances = ReconstructionMeter(), [np.zeros(0)]
    sets = Gathered.empty("originals"), Gathered.empty("reconstructions")
    for pair in zip(
        originals.first(count, rules.batch_size),
        images.first(count, rules.batch_size),
        strict=True,
    ):
        meter.add(*pair)
        if perceptual is not None:
            distances.append(perceptual(*pair))
        for gathered, batch in zip(sets, pair, strict=True):
            gathered.add(standard.extractor(batch))
    distance = reconstruction_distance(standard.extractor, *sets, reference=originals.identity)
    section = reconstruction_section(meter.result(), "images")
    section["about"] += f" Reconstructions: {images.identity}. Measured by {code_version()}."
    section["metrics"] |= distance_metrics(distance)
    if perceptual is not None:
        mean = float(np.concatenate(distances).mean(dtype=np.float64))
        section["metrics"][perceptual.name] = metric(
            mean, f"{perceptual.measured}; {count:,} images"
        )
    write_report(
        directory, f"Reconstructions of {Path(reconstructions).name}", {"reconstruction": section}
    )
    return read_report(directory)
