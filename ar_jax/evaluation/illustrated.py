"""Sections of a report together with the pictures they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.api import Params, System
from ar_jax.build import AnySampler, AnyTokenizer
from ar_jax.evaluation import sections
from ar_jax.evaluation.bound import judge_reconstructions
from ar_jax.evaluation.generation import LabelledImages, judge_generation
from ar_jax.evaluation.grids import class_grid, reconstruction_pairs, save_tiles
from ar_jax.evaluation.measure import (
    Evaluation,
    Reconstructions,
    group_names,
    measure_likelihood,
    measure_objective,
    scale_names,
)
from ar_jax.evaluation.memorisation import evaluate_memorisation
from ar_jax.evaluation.plots import save_bars, save_memorisation, save_training_curves
from ar_jax.evaluation.report import metric
from ar_jax.evaluation.samples import Generated, save_strip
from ar_jax.evaluation.standard import code_version, distance_metrics
from ar_jax.io.images import PICTURE_CHANNELS
from ar_jax.io.metrics import JSONL

CHECKED = 100  # samples whose nearest training images are looked for
HELD_OUT = 1000  # real test images that are looked for beside them
ROWS = 20  # classes in the grid of samples
CURVES = (
    r"(train|eval)/(loss|accuracy|psnr|usage|perplexity)(/(scale|quarter)_\d+)?",
    r"train/(learning_rate|grad_norm)",
)


def draw_samples(
    sampler: AnySampler, drawn: Generated, classes: int, directory: Path
) -> dict[str, str]:
    """Writes the grid of samples and the strip of images that form; caption -> file.

    Images that no picture holds (see `PICTURE_CHANNELS`) give none.
    """
    if drawn.images.shape[-1] not in PICTURE_CHANNELS:
        return {}
    grid = class_grid(drawn.images, drawn.labels, min(classes, ROWS))
    save_tiles(directory / "samples.png", grid)
    save_strip(directory / "formation.png", sampler, drawn)
    return {
        f"The first samples of {'every class' if classes <= ROWS else f'{ROWS} classes'}, one row "
        "each; not selected.": "samples.png",
        "Images as they form, from the first step to the last, one row each.": "formation.png",
    }


def generation_sections(
    drawn: Generated, evaluation: Evaluation, sampling: str, pictures: dict[str, str]
) -> dict[str, Any]:
    """Generated images, and whether they are copies, as far as they can be judged."""
    judge, directory = evaluation.judge, evaluation.directory
    if judge is None:
        about = f"{len(drawn.images):,} generated images in samples.npz; {sampling}."
        return {"generation": {"title": "Generated images", "about": about, "pictures": pictures}}
    result = judge_generation(
        judge,
        LabelledImages(drawn.images, drawn.labels),
        floor_count=evaluation.draw_count,
        seed=evaluation.seed,
    )
    names = judge.classifier.class_names
    save_bars(
        {"class accuracy": result.class_accuracy_per_class},
        names,
        directory / "class_accuracy.png",
        references={"class accuracy": ("real test images", result.test_class_accuracy)},
    )
    known = f"accuracy {judge.test_class_accuracy:.3f} on these {len(judge.test):,} test images"
    pictures = pictures | {"Class accuracy of every class.": "class_accuracy.png"}
    copies = evaluate_memorisation(
        drawn.images[:CHECKED],
        judge.train.images,
        judge.test.images[:HELD_OUT],
        lambda images: (
            judge.train_features
            if images is judge.train.images
            else judge.classifier(images).features
        ),
    )
    save_memorisation(copies, directory / "memorisation.png")
    shown = {"The samples nearest to training images, above these images.": "memorisation.png"}
    return {
        "generation": sections.generation_section(result, sampling, names, known, pictures),
        "memorisation": sections.memorisation_section(copies, shown),
    }


def likelihood_section(system: System, params: Params, evaluation: Evaluation) -> dict[str, Any]:
    """Test and, on as many images, train likelihood."""
    test, train = (evaluation.data[split].source for split in ("test", "train"))
    count = min(evaluation.likelihood_images or len(test), len(test), len(train))
    result, seen = (
        measure_likelihood(system, params, evaluation, split, count) for split in ("test", "train")
    )
    grids = system.schedule.grids
    names = group_names(grids)
    save_bars(
        {"nats per code": result.nll_per_step, "token accuracy": result.accuracy_per_step},
        names,
        evaluation.directory / "likelihood.png",
        references={"nats per code": ("uniform", float(np.log(system.tokenizer.codebook_size)))},
        xlabel="scale" if len(grids) > 1 else "row of the grid",
    )
    pictures = {"Nats and accuracy of the codes, part by part.": "likelihood.png"}
    return sections.likelihood_section(result, names, "test images", pictures, seen)


def held_out_section(
    objective: Any, system: System, params: Params, evaluation: Evaluation
) -> dict[str, Any]:
    """The training loss on test and, on as many images, training images."""
    test, train = (evaluation.data[split].source for split in ("test", "train"))
    count = min(evaluation.likelihood_images or len(test), len(test), len(train))
    result, seen = (
        measure_objective(objective, system, params, evaluation, split, count)
        for split in ("test", "train")
    )
    return sections.held_out_section(result, seen, objective.METRICS, count, objective.remark)


def reconstruction_section(seen: Reconstructions, evaluation: Evaluation) -> dict[str, Any]:
    """Reconstructions, with their picture, where one holds such images."""
    pictures = {}
    if seen.images.shape[-1] in PICTURE_CHANNELS:
        pairs = reconstruction_pairs(seen.originals, seen.images)
        save_tiles(evaluation.directory / "reconstructions.png", pairs)
        pictures = {"Test images, each above its reconstruction.": "reconstructions.png"}
    section = sections.reconstruction_section(seen.result, "test images", pictures)
    if seen.distance is not None:
        section["about"] += f" Measured by {code_version()}."
        section["metrics"] |= distance_metrics(seen.distance)
    if evaluation.lpips is not None:
        of = f"{evaluation.lpips.measured}; {seen.result.count:,} test images"
        section["metrics"][evaluation.lpips.name] = metric(seen.lpips, of)
    return section


def bound_section(seen: Reconstructions, evaluation: Evaluation) -> dict[str, Any]:
    """What the reconstructions score; {} where nobody can judge them."""
    if evaluation.judge is None or seen.all is None:
        return {}
    result = judge_reconstructions(
        evaluation.judge, seen.all, evaluation.draw_count, seed=evaluation.seed
    )
    return {"bound": sections.bound_section(result)}


def model_section(weights: str, params: Params, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Which parameters, how many, and the shape of the codes."""
    whole = params if "backbone" in params else {"tokenizer": params}
    codes = sum(height * width for height, width in tokenizer.grids)
    metrics = {
        f"{name}_parameters": metric(
            sum(leaf.size for leaf in jax.tree.leaves(tree)), f"numbers in the {name}"
        )
        for name, tree in whole.items()
    }
    grids = " + ".join(scale_names(tokenizer.grids))
    if tokenizer.codebook_size is None:
        kind = f"of {tokenizer.codes_shape[1]:,} numbers each"
    else:
        kind = f"of {tokenizer.codebook_size:,} entries"
    metrics["codes_per_image"] = metric(codes, f"{grids}, {kind}")
    return {"title": "Model", "about": f"{weights}.", "metrics": metrics}


def closing_sections(workdir: Path, evaluation: Evaluation, channels: int) -> dict[str, Any]:
    """Training curves, where the workdir has metrics, and what had to be left out.

    ``channels`` are those of the images.
    """
    closing: dict[str, Any] = {}
    missing = []
    if (workdir / JSONL).exists():
        save_training_curves(
            workdir / JSONL, evaluation.directory / "training_curves.png", include=CURVES
        )
        pictures = {"Metrics over the training step.": "training_curves.png"}
        closing["training"] = {"title": "Training", "pictures": pictures}
    else:
        missing.append(f"Training curves: the workdir holds no {JSONL}.")
    if evaluation.judge is None:
        missing.append(
            "Class accuracy, Frechet distances and the search for memorised images: "
            + evaluation.no_judge
        )
    if channels not in PICTURE_CHANNELS:
        missing.append(f"Pictures of images: these have {channels} channels, a picture 1 or 3.")
    if missing:
        closing["left_out"] = {"title": "Left out", "about": " ".join(missing)}
    return closing
