"""Measured results as sections of a report: each number with what exactly was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ar_jax.evaluation.bound import BoundResult
from ar_jax.evaluation.codebook import CodebookResult
from ar_jax.evaluation.generation import GenerationResult
from ar_jax.evaluation.likelihood import LikelihoodResult
from ar_jax.evaluation.memorisation import MemorisationResult
from ar_jax.evaluation.reconstruction import SSIM_SIGMA, SSIM_WINDOW, ReconstructionResult
from ar_jax.evaluation.report import metric, table

Section = dict[str, Any]
Pictures = Mapping[str, str]  # caption -> file, relative to the report


def _section(
    title: str, about: str, metrics: Section, tables: Section, pictures: Pictures | None
) -> Section:
    return {
        "title": title,
        "about": about,
        "metrics": metrics,
        "tables": tables,
        "pictures": dict(pictures or {}),
    }


def reconstruction_section(
    result: ReconstructionResult, images: str, pictures: Pictures | None = None
) -> Section:
    """Section on a tokenizer's reconstructions; `images` names the split ("test images")."""
    of = f"{result.count:,} {images}"
    window = f"{SSIM_WINDOW}x{SSIM_WINDOW}"
    similarity = f"{window} Gaussian window, sigma {SSIM_SIGMA}, mean over channels; {of}"
    if result.ssim is None:
        similarity = f"left out: the images are smaller than its window of {window} pixels"
    return _section(
        "Reconstruction",
        f"Encoded and decoded again: {of}. Measured on images rounded to uint8.",
        {
            "mse": metric(result.mse, f"mean squared error, pixel values in [0, 1]; {of}"),
            "psnr": metric(result.psnr, f"dB, data range 1, mean over images; {of}"),
            "psnr_of_mse": metric(result.psnr_of_mse, f"dB, of the mean MSE; {of}"),
            "ssim": metric(result.ssim, similarity),
        },
        {},
        pictures,
    )


def codebook_section(
    result: CodebookResult,
    step_names: Sequence[str],
    images: str,
    pictures: Pictures | None = None,
    entries: str = "entries",
) -> Section:
    """Section on codebook usage; `step_names` are the schedule's steps ("1x1", "2x2", ...).

    ``entries`` says what was counted where that is not the whole code.
    """
    if len(step_names) != len(result.usage):
        raise ValueError(f"step_names: {len(step_names)} for {len(result.usage)} steps")
    total = int(result.codes.sum())
    of = f"all {total:,} codes of the {images}"
    rows = [
        list(row)
        for row in zip(step_names, result.codes, result.usage, result.perplexity, strict=True)
    ]
    return _section(
        "Codebook",
        f"How the {result.vocab_size:,} {entries} are used by {of}. At a step with fewer codes "
        "than there are, usage cannot reach 1.",
        {
            "codebook_usage": metric(
                result.overall_usage, f"fraction of {result.vocab_size:,} {entries} used; {of}"
            ),
            "codebook_perplexity": metric(
                result.overall_perplexity, f"exp of the entropy of the code frequencies; {of}"
            ),
        },
        {"Per step of the schedule": table(["step", "codes", "usage", "perplexity"], rows)},
        pictures,
    )


def likelihood_section(
    result: LikelihoodResult,
    step_names: Sequence[str],
    images: str,
    pictures: Pictures | None = None,
    train: LikelihoodResult | None = None,
) -> Section:
    """Section on likelihood and token accuracy under teacher forcing, without guidance.

    Args:
        result: on held-out images, which ``images`` names.
        step_names: the schedule's steps, or groups of them.
        images: "test images".
        pictures: caption -> file.
        train: the same on training images, for the gap between the two.
    """
    if len(step_names) != len(result.nll_per_step):
        raise ValueError(f"step_names: {len(step_names)} for {len(result.nll_per_step)} steps")
    gap = {}
    if train is not None:
        on = f"{train.count:,} training images, spread over the split"
        gap = {
            "train_nats_per_image": metric(train.nats_per_image, f"the same; {on}"),
            "overfit_gap": metric(
                result.nats_per_image / train.nats_per_image - 1,
                "nats_per_image divided by train_nats_per_image, minus 1; near 0 is healthy, a gap "
                "that grows while training says that training images are learned by heart",
            ),
            "train_token_accuracy": metric(train.accuracy, f"token_accuracy; {on}"),
        }
    of = f"{result.count:,} {images}"
    rows = [
        list(row)
        for row in zip(step_names, result.nll_per_step, result.accuracy_per_step, strict=True)
    ]
    return _section(
        "Likelihood",
        f"Teacher forcing on {of} with their classes, no guidance, no augmentation.",
        {
            "nats_per_image": metric(
                result.nats_per_image, f"negative log-likelihood of the code stream; {of}"
            ),
            "bits_per_code": metric(
                result.bits_per_code,
                f"bits per dimension of the code stream: the same divided by the codes; {of}",
            ),
            "token_accuracy": metric(
                result.accuracy, f"fraction of codes that are the most probable one; {of}"
            ),
            **gap,
        },
        {"Part by part of the codes": table(["codes", "nats per code", "token accuracy"], rows)},
        pictures,
    )


def held_out_section(
    result: Mapping[str, float],
    train: Mapping[str, float],
    about: Mapping[str, str],
    count: int,
    remark: str,
) -> Section:
    """Section on a training loss.

    Args:
        result: name -> mean over held-out images.
        train: the same over training images.
        about: name -> what it is.
        count: images of each.
        remark: what the loss has to do with the images' likelihood, for the reader.
    """
    metrics = {}
    for name, said in about.items():
        metrics[name] = metric(result[name], f"{said}; {count:,} test images")
        metrics[f"train_{name}"] = metric(
            train[name], f"the same; {count:,} training images, spread over the split"
        )
    return _section(
        "Held-out loss",
        f"What training minimises, on {count:,} test images with their classes, no guidance, no "
        f"augmentation. {remark}",
        metrics,
        {},
        None,
    )


def bound_section(result: BoundResult, pictures: Pictures | None = None) -> Section:
    """Section on what reconstructions score in the place of generated images."""
    bound, floor = result.bound, result.floor
    of = f"{bound.count:,} class-balanced test images, mean of {bound.draws} draws"
    against = f"against {result.train_count:,} train images"
    return _section(
        "Reconstructions judged as generated images",
        "What a generator that samples the codes of real images perfectly would score: the bound "
        "that this tokenizer sets. The Frechet distance is taken in the features of our own "
        "classifier: it is no FID.",
        {
            "reconstruction_frechet_distance": metric(
                bound.mean,
                f"reconstructions of {of} (standard deviation {bound.std:.2g}), {against}",
            ),
            "frechet_floor": metric(
                floor.mean, f"the same images themselves (deviation {floor.std:.2g}), {against}"
            ),
            "reconstruction_frechet_ratio": metric(
                bound.mean / floor.mean, "reconstruction_frechet_distance divided by frechet_floor"
            ),
            "reconstruction_class_accuracy": metric(
                result.class_accuracy,
                f"reconstructions of {result.test_count:,} test images "
                f"({result.test_class_accuracy:.3f} on the images themselves)",
            ),
        },
        {},
        pictures,
    )


def generation_section(
    result: GenerationResult,
    sampling: str,
    class_names: Sequence[str],
    classifier_accuracy: str,
    pictures: Pictures | None = None,
) -> Section:
    """Section on generated images.

    Args:
        result: of `evaluate_generation`.
        sampling: how they were drawn ("guidance 2 (constant), temperature 1, EMA parameters").
        class_names: one per class.
        classifier_accuracy: the classifier's stated accuracy and on what, for the reader to weigh.
        pictures: caption -> file.
    """
    if len(class_names) != len(result.class_counts):
        raise ValueError(f"class_names: {len(class_names)} for {len(result.class_counts)} classes")
    counts = result.class_counts
    per_class = (
        f"{counts[0]:,} of each class"
        if counts.min() == counts.max()
        else f"UNBALANCED, {counts.min():,} to {counts.max():,} of a class"
    )
    of = f"{result.count:,} generated images"
    floor = result.frechet_floor
    rows = [
        list(row) for row in zip(class_names, counts, result.class_accuracy_per_class, strict=True)
    ]
    same = "" if floor.count == result.count else f" (NOT the {result.count:,} generated)"
    return _section(
        "Generated images",
        f"{of}, {per_class}; {sampling}. Judged by our own {result.classifier} "
        f"({classifier_accuracy}). The Frechet distance is that of Gaussians fitted to this "
        "classifier's penultimate features: it is not FID and not comparable with it.",
        {
            "class_accuracy": metric(
                result.class_accuracy, f"most probable class is the one asked for; {of}"
            ),
            "test_class_accuracy": metric(
                result.test_class_accuracy,
                f"the same on {result.test_count:,} real test images: what to expect of real ones",
            ),
            "confidence": metric(
                result.confidence,
                f"mean probability of the most probable class; {of} "
                f"({result.test_confidence:.3f} on real test images)",
            ),
            "label_probability": metric(
                result.label_probability, f"mean probability of the class asked for; {of}"
            ),
            "classifier_frechet_distance": metric(
                result.classifier_frechet_distance,
                f"{of} against {result.train_count:,} train images",
            ),
            "frechet_floor": metric(
                floor.mean,
                f"{floor.count:,}{same} class-balanced real test images against the same train "
                f"images, mean of {floor.draws} draws (standard deviation {floor.std:.2g}): what a "
                "perfect sampler would score",
            ),
            "frechet_ratio": metric(
                result.frechet_ratio, "classifier_frechet_distance divided by frechet_floor"
            ),
            "frechet_test_all": metric(
                result.frechet_test_all,
                f"all {result.test_count:,} test images against the same train images",
            ),
        },
        {"Per class": table(["class", "images", "class accuracy"], rows)},
        pictures,
    )


def memorisation_section(result: MemorisationResult, pictures: Pictures | None = None) -> Section:
    """Section on nearest training images."""
    count, held_out = len(result.generated), len(result.pixels.held_out_distance)
    rows = [
        [
            name,
            float(np.median(found.distance)),
            float(np.median(found.held_out_distance)),
            found.ratio,
            found.closer_than_usual,
            float(found.percentile.min()),
        ]
        for name, found in (
            ("pixels (root mean square, [0, 1])", result.pixels),
            ("classifier features (Euclidean)", result.features),
        )
    ]
    return _section(
        "Memorisation",
        f"The nearest training image of each of {count:,} generated images, beside that of "
        f"{held_out:,} real test images. A model that copies has distances far below those of "
        "unseen real images; blur alone also lowers the distance in pixels, so look at the pairs.",
        {
            "exact_copies": metric(
                result.exact_copies, f"of {count:,} generated images equal to a training image"
            ),
            "feature_distance_ratio": metric(
                result.features.ratio,
                "median feature distance to the nearest training image, generated divided by test; "
                "1 is usual",
            ),
            "feature_closer_than_usual": metric(
                result.features.closer_than_usual,
                "generated images nearer to a training image than 99% of the test images are; "
                "0.01 is usual",
            ),
        },
        {
            "Distance to the nearest training image": table(
                [
                    "distance",
                    "median, generated",
                    "median, test",
                    "ratio",
                    "nearer than 99% of test",
                    "lowest percentile",
                ],
                rows,
            )
        },
        pictures,
    )
