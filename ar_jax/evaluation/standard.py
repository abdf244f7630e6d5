"""Sections of a report on standard metrics: the number, of what, against what, by whose code."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from ar_jax.evaluation.adm import Comparison, ReconstructionDistance
from ar_jax.evaluation.report import metric
from ar_jax.io.run_info import git_revision

Section = dict[str, Any]


def code_version() -> str:
    """'ar_jax 0.1.0, commit abc (with local changes)'."""
    version = f"ar_jax {importlib.metadata.version('ar_jax')}"
    revision = git_revision()
    if revision is None:
        return version
    return f"{version}, commit {revision['commit']}" + " (with local changes)" * revision["dirty"]


def record_samples(npz: str | Path, made_by: str) -> None:
    """Writes how the images of an npz were drawn beside it, as json."""
    path = Path(npz).with_suffix(".json")
    path.write_text(json.dumps({"made_by": made_by, "code": code_version()}, indent=2) + "\n")


def recorded_samples(npz: str | Path) -> str:
    """How the images of an npz were drawn, as far as it is known."""
    path = Path(npz).with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"{record['made_by']}; drawn by {record['code']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "how they were drawn is not recorded"


def comparison_section(result: Comparison, made_by: str) -> Section:
    """Section on samples against a reference; ``made_by`` says how the samples were drawn."""
    own = result.prefix != ""
    of = f"{result.count:,} samples ({result.balance})"
    features = f"features of {result.extractor}"
    warning = " These are not Inception's features: no number here is FID." * own
    distance = "frechet_distance" if own else "fid"
    metrics = {
        result.name(distance): metric(
            result.frechet, f"Frechet distance in {features}; {of} against the reference"
        )
    }
    if result.spatial_frechet is not None:
        metrics[result.name("sfid")] = metric(
            result.spatial_frechet, f"the same in spatial {features}; {of}"
        )
    metrics[result.name("score" if own else "inception_score")] = metric(
        result.inception_score,
        f"exp of the mean divergence of its class probabilities, splits of 5,000; {of}",
    )
    if result.precision is not None and result.recall is not None:
        against = f"manifolds of 3 neighbours, {result.reference_count:,} reference images"
        metrics[result.name("precision")] = metric(
            result.precision, f"share of samples inside the reference's manifold; {of}; {against}"
        )
        metrics[result.name("recall")] = metric(
            result.recall, f"share of reference images inside the samples' manifold; {of}"
        )
    left_out = f" Left out: {'; '.join(result.left_out)}." if result.left_out else ""
    return {
        "title": "Samples against a reference, as ADM measures them",
        "about": f"Samples: {result.samples}; {made_by}. Reference: {result.reference}. Measured "
        f"on uint8 images by {code_version()}.{warning}{left_out}",
        "metrics": metrics,
    }


def distance_metrics(result: ReconstructionDistance) -> Section:
    """Metrics of reconstructions against their originals."""
    own = result.prefix != ""
    of = f"{result.count:,} reconstructions against {result.reference}"
    metrics = {
        result.name("reconstruction_distance" if own else "rfid"): metric(
            result.frechet, f"Frechet distance in features of {result.extractor}; {of}"
        )
    }
    if result.spatial_frechet is not None:
        metrics[result.name("rsfid")] = metric(
            result.spatial_frechet, f"the same in spatial features; {of}"
        )
    return metrics
