"""Passes of a trained model over real images: reconstructions, likelihood, codebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Params, System
from ar_jax.build import AnyTokenizer
from ar_jax.data import Data
from ar_jax.evaluation.adm import ReconstructionDistance, Standard, reconstruction_distance
from ar_jax.evaluation.codebook import CodebookResult, CodeCounter
from ar_jax.evaluation.coding import (
    coded_batches,
    decode_encoding,
    evaluate_objective,
    rows,
    score_codes,
)
from ar_jax.evaluation.features import Gathered
from ar_jax.evaluation.frechet import max_balanced
from ar_jax.evaluation.generation import Judge
from ar_jax.evaluation.likelihood import LikelihoodMeter, LikelihoodResult
from ar_jax.evaluation.lpips import LpipsMetric
from ar_jax.evaluation.reconstruction import ReconstructionMeter, ReconstructionResult
from ar_jax.schedules import Grid

SHOWN = 50  # reconstructions in a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a system is evaluated with.

    Attributes:
        data: 'train' and 'test'.
        judge: None where our classifier does not know the images; ``no_judge`` says why.
        directory: gets the pictures.
        num_images: samples to draw, and reconstructions in a draw of their Frechet distance.
        likelihood_images: test images, and as many training images, that are scored; None: all
            test images.
        batch_size: of everything.
        seed: of the samples and the draws.
        progress: show bars.
        standard: what FID and its like are measured with; None: they are not.
        lpips: also measured on reconstructions; None: no weights were given.
    """

    data: dict[str, Data]
    judge: Judge | None
    no_judge: str
    directory: Path
    num_images: int
    likelihood_images: int | None
    batch_size: int
    seed: int
    progress: bool
    standard: Standard | None = None
    lpips: LpipsMetric | None = None

    def title(self, text: str) -> str:
        """Of a progress bar; empty for none."""
        return text if self.progress else ""

    @property
    def draw_count(self) -> int:
        """Real images in a balanced draw: as many as samples, or as there are."""
        assert self.judge is not None
        return min(self.num_images, max_balanced(self.judge.test.labels, self.judge.num_classes))


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """A tokenizer's pass over the test images.

    Attributes:
        result: how close they are.
        codebook: usage of every scale; None where there is no codebook.
        originals, images: some of the test images and their reconstructions, for a picture, uint8
            [n, H, W, C].
        all: of all test images, where there is a judge of them.
        distance: of the two sets, where there is an extractor of standard metrics.
        lpips: its mean, where it is measured.
    """

    result: ReconstructionResult
    codebook: CodebookResult | None
    originals: np.ndarray
    images: np.ndarray
    all: np.ndarray | None
    distance: ReconstructionDistance | None = None
    lpips: float | None = None


def reconstruct(
    tokenizer: AnyTokenizer, params: Params, evaluation: Evaluation, limit: int | None = None
) -> Reconstructions:
    """Encodes and decodes the test images, or ``limit`` of them spread over the split."""
    data = evaluation.data["test"]
    meter = ReconstructionMeter()
    counter = None
    if tokenizer.codebook_size is not None:
        counter = CodeCounter([h * w for h, w in tokenizer.grids], tokenizer.index_size)
    batches = -(-min(limit or len(data.source), len(data.source)) // evaluation.batch_size)
    a_batch = -(-SHOWN // batches)
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    kept: list[np.ndarray] = []
    standard = evaluation.standard
    sets = Gathered.empty("originals"), Gathered.empty("reconstructions")
    distances: list[np.ndarray] = []
    for batch in coded_batches(
        tokenizer,
        params,
        data,
        batch_size=evaluation.batch_size,
        limit=limit,
        title=evaluation.title("reconstructing test images"),
    ):
        decoded = jax.device_get(decode_encoding(tokenizer, params, batch["codes"]))
        originals, images = rows(batch, "image"), np.asarray(decoded)[batch["mask"] > 0]
        meter.add(originals, images)
        if evaluation.lpips is not None:
            distances.append(evaluation.lpips(originals, images))
        if counter is not None:
            counter.add(np.asarray(tokenizer.index(jnp.asarray(rows(batch, "codes")))))
        shown.append((originals[:a_batch], images[:a_batch]))
        if standard is not None:
            for gathered, part in zip(sets, (originals, images), strict=True):
                gathered.add(standard.extractor(part))
        if evaluation.judge is not None:
            kept.append(images)
    first, second = (np.concatenate(part)[:SHOWN] for part in zip(*shown, strict=True))
    return Reconstructions(
        result=meter.result(),
        codebook=None if counter is None else counter.result(),
        originals=first,
        images=second,
        all=np.concatenate(kept) if kept else None,
        distance=None
        if standard is None
        else reconstruction_distance(
            standard.extractor, *sets, reference=f"the same images of {data.source.name}"
        ),
        lpips=float(np.concatenate(distances).mean(dtype=np.float64)) if distances else None,
    )


def measure_likelihood(
    system: System, params: Params, evaluation: Evaluation, split: str, count: int
) -> LikelihoodResult:
    """Teacher forcing on ``count`` items of a split with their classes, spread over it."""
    meter = LikelihoodMeter(group_sizes(system.schedule.grids))
    for batch in coded_batches(
        system.tokenizer,
        params["tokenizer"],
        evaluation.data[split],
        batch_size=evaluation.batch_size,
        limit=count,
        title=evaluation.title(f"scoring {split} images"),
    ):
        scores = score_codes(system, params, batch["codes"], {"label": batch["label"]})
        nll, correct = jax.device_get(scores)
        meter.add(nll, correct, batch["mask"])
    return meter.result()


def measure_objective(
    objective: Any,
    system: System,
    params: Params,
    evaluation: Evaluation,
    split: str,
    count: int,
) -> dict[str, float]:
    """The objective's loss ('loss') and metrics on ``count`` items of a split, spread over it."""
    key = jax.random.key(evaluation.seed)
    sums: dict[str, float] = {}
    total = 0.0
    for index, batch in enumerate(
        coded_batches(
            system.tokenizer,
            params["tokenizer"],
            evaluation.data[split],
            batch_size=evaluation.batch_size,
            limit=count,
            title=evaluation.title(f"scoring {split} images"),
        )
    ):
        fed = {name: batch[name] for name in ("codes", "label", "mask")}
        fetched = evaluate_objective(objective, params, fed, jax.random.fold_in(key, index))
        loss, metrics = jax.device_get(fetched)
        weight = float(batch["mask"].sum())
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + weight * float(value)
        total += weight
    return {name: value / total for name, value in sums.items()}


def group_sizes(grids: Sequence[Grid]) -> list[int]:
    """Numbers of codes that a report tells apart: every scale's, or every row's of one grid."""
    if len(grids) > 1:
        return [height * width for height, width in grids]
    height, width = grids[0]
    return [width] * height


def group_names(grids: Sequence[Grid]) -> list[str]:
    """Names of `group_sizes`: '1x1', '2x2', ..., or 'row 1', 'row 2', ..."""
    if len(grids) > 1:
        return scale_names(grids)
    return [f"row {row + 1}" for row in range(grids[0][0])]


def scale_names(grids: Sequence[Grid]) -> list[str]:
    """'1x1', '2x2', ..."""
    return [f"{height}x{width}" for height, width in grids]
