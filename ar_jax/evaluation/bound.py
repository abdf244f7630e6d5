"""What reconstructions score: no generator on a tokenizer's codes can be expected to do better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ar_jax.evaluation.frechet import Floor, frechet_floor
from ar_jax.evaluation.generation import Judge, LabelledImages, check_labelled


@dataclass(frozen=True)
class BoundResult:
    """What a tokenizer's reconstructions of the test images score: the best of its generators.

    Attributes:
        bound: `Floor` of the reconstructions.
        floor: `Floor` of the same draws of the test images themselves.
        class_accuracy: of the reconstructions of all test images.
        test_class_accuracy: of the test images.
        test_count: test images.
        train_count: images of the reference.
    """

    bound: Floor
    floor: Floor
    class_accuracy: float
    test_class_accuracy: float
    test_count: int
    train_count: int


def judge_reconstructions(
    judge: Judge, reconstructions: np.ndarray, count: int, draws: int = 10, seed: int = 0
) -> BoundResult:
    """Frechet distance of ``count`` balanced reconstructions, mean over the floor's own draws.

    Args:
        judge: of the real images.
        reconstructions: of all its test images in order, uint8 [N, H, W, C].
        count: images in a draw.
        draws: draws.
        seed: of the draws.

    Raises:
        ValueError: not as many images as there are test images, or too few of a class.
    """
    labels = judge.test.labels
    check_labelled("reconstructions", LabelledImages(reconstructions, labels), judge.num_classes)
    out = judge.classifier(reconstructions)
    bound = frechet_floor(
        judge.reference, out.features, labels, count, judge.num_classes, draws, seed
    )
    return BoundResult(
        bound=bound,
        floor=judge.floor(count, draws, seed),
        class_accuracy=float((out.predictions == labels).mean()),
        test_class_accuracy=judge.test_class_accuracy,
        test_count=len(judge.test),
        train_count=len(judge.train),
    )
