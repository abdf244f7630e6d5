"""Generated images with known classes, judged by the small classifier beside real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ar_jax.evaluation.classifier import Classifier, ClassifierOutput
from ar_jax.evaluation.frechet import (
    Floor,
    GaussianStats,
    frechet_distance,
    frechet_floor,
    gaussian_stats,
)


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int [N].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class GenerationResult:
    """What `evaluate_generation` measured.

    Attributes:
        count: generated images.
        train_count: real images the reference statistics come from.
        test_count: real images held out from them.
        classifier: name of the classifier.
        class_accuracy: fraction of generated images whose most probable class is the one asked for.
        class_accuracy_per_class: the same for every class, [num_classes].
        class_counts: generated images of every class, [num_classes].
        confidence: mean probability of the most probable class.
        label_probability: mean probability of the class asked for.
        test_class_accuracy: class accuracy of the real test images.
        test_confidence: confidence on the real test images.
        classifier_frechet_distance: of the generated images to the train images.
        frechet_floor: of as many real test images (`floor.count`) to the train images.
        frechet_ratio: the distance divided by the floor's mean.
        frechet_test_all: of all test images to the train images.
    """

    count: int
    train_count: int
    test_count: int
    classifier: str
    class_accuracy: float
    class_accuracy_per_class: np.ndarray
    class_counts: np.ndarray
    confidence: float
    label_probability: float
    test_class_accuracy: float
    test_confidence: float
    classifier_frechet_distance: float
    frechet_floor: Floor
    frechet_ratio: float
    frechet_test_all: float


@dataclass(frozen=True)
class Judge:
    """A classifier and what it says of the real images, computed once for several comparisons.

    Attributes:
        classifier: judges.
        train: the reference of the Frechet distance: the images the models were trained on.
        test: images held out from training.
        train_features: float32 [N, F].
        reference: statistics of ``train_features``.
        test_output: of the test images.
    """

    classifier: Classifier
    train: LabelledImages
    test: LabelledImages
    train_features: np.ndarray
    reference: GaussianStats
    test_output: ClassifierOutput

    @property
    def num_classes(self) -> int:
        """Classes the classifier knows."""
        return self.classifier.module.num_classes

    @property
    def test_class_accuracy(self) -> float:
        """Class accuracy on the real test images."""
        return float((self.test_output.predictions == self.test.labels).mean())

    def floor(self, count: int, draws: int = 10, seed: int = 0) -> Floor:
        """What ``count`` real test images score against the train images."""
        features = self.test_output.features
        return frechet_floor(
            self.reference, features, self.test.labels, count, self.num_classes, draws, seed
        )


def make_judge(classifier: Classifier, train: LabelledImages, test: LabelledImages) -> Judge:
    """Runs the classifier over the real images; ValueError if they are none it takes."""
    for name, data in (("train", train), ("test", test)):
        check_labelled(name, data, classifier.module.num_classes)
    features = classifier(train.images).features
    reference = gaussian_stats(features, "train features")
    return Judge(classifier, train, test, features, reference, classifier(test.images))


def score_samples(judge: Judge, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What generated images uint8 [N, H, W, C] of the classes ``labels`` [N] score, in short."""
    out = judge.classifier(images)
    stats = gaussian_stats(out.features, "features of the samples")
    asked = np.take_along_axis(out.probabilities, labels[:, None].astype(np.int64), 1)
    return {
        "classifier_frechet_distance": frechet_distance(stats, judge.reference),
        "class_accuracy": float((out.predictions == labels).mean()),
        "label_probability": float(asked.mean()),
    }


def check_labelled(name: str, data: LabelledImages, num_classes: int) -> None:
    """Raises ValueError unless `data` is N uint8 images [N, H, W, C] with N labels in range."""
    images, labels = np.asarray(data.images), np.asarray(data.labels)
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"{name}.images: shape {images.shape}, expected [N, H, W, C], N > 0")
    if images.dtype != np.uint8:
        raise ValueError(
            f"{name}.images: dtype {images.dtype}, expected uint8 0..255 as it is stored in files; "
            "round before you measure"
        )
    if labels.shape != (len(images),):
        raise ValueError(
            f"{name}.labels: shape {labels.shape} for {len(images)} images, "
            f"expected ({len(images)},)"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}.labels: dtype {labels.dtype}, expected integers")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"{name}.labels: {outside[0]} is out of range for {num_classes} classes (0 to "
            f"{num_classes - 1})"
        )


def check_balanced(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError unless every class has equally many labels [N]."""
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() != counts.max():
        low, high = int(counts.argmin()), int(counts.argmax())
        raise ValueError(
            f"{name}.labels: unbalanced, class {low} has {counts[low]} images and class {high} "
            f"has {counts[high]}; a Frechet distance of unbalanced samples is not comparable "
            f"(generate a multiple of {num_classes} images, or pass allow_unbalanced=True)"
        )


def class_accuracies(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of every class (NaN for one without images) and its image count, [num_classes]."""
    counts = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[predictions == labels], minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return hits / counts, counts


def evaluate_generation(
    classifier: Classifier,
    generated: LabelledImages,
    train: LabelledImages,
    test: LabelledImages,
    *,
    allow_unbalanced: bool = False,
    floor_count: int | None = None,
    floor_draws: int = 10,
    seed: int = 0,
) -> GenerationResult:
    """Class accuracy and Frechet distance of generated images, beside the floor of real ones.

    Args:
        classifier: judges all three sets.
        generated: N generated images and the classes that were asked for.
        train: the reference of the Frechet distance: the images the generator was trained on.
        test: images held out from training.
        allow_unbalanced: accept generated labels with unequal counts.
        floor_count: images in a draw of the floor, by default N. Say it when the test set cannot
            give N balanced images; the floor of fewer images is higher, the ratio to it flatters.
        floor_draws: draws of the floor.
        seed: of the floor's draws.

    Raises:
        ValueError: counts, shapes or dtypes that disagree, unbalanced labels, too few test images.
    """
    return judge_generation(
        make_judge(classifier, train, test),
        generated,
        allow_unbalanced=allow_unbalanced,
        floor_count=floor_count,
        floor_draws=floor_draws,
        seed=seed,
    )


def judge_generation(
    judge: Judge,
    generated: LabelledImages,
    *,
    allow_unbalanced: bool = False,
    floor_count: int | None = None,
    floor_draws: int = 10,
    seed: int = 0,
) -> GenerationResult:
    """`evaluate_generation` with what was computed of the real images before."""
    num_classes = judge.num_classes
    check_labelled("generated", generated, num_classes)
    for name, data in (("train", judge.train), ("test", judge.test)):
        if data.images.shape[1:] != generated.images.shape[1:]:
            raise ValueError(
                f"{name}.images: {data.images.shape[1:]} an image, but the generated ones have "
                f"{generated.images.shape[1:]}"
            )
    if not allow_unbalanced:
        check_balanced("generated", generated.labels, num_classes)
    out, test_out = judge.classifier(generated.images), judge.test_output
    stats = gaussian_stats(out.features, "generated features")
    distance = frechet_distance(stats, judge.reference)
    floor = judge.floor(len(generated) if floor_count is None else floor_count, floor_draws, seed)
    per_class, counts = class_accuracies(out.predictions, generated.labels, num_classes)
    probabilities = out.probabilities
    asked = generated.labels[:, None].astype(np.int64)
    return GenerationResult(
        count=len(generated),
        train_count=len(judge.train),
        test_count=len(judge.test),
        classifier=judge.classifier.name,
        class_accuracy=float((out.predictions == generated.labels).mean()),
        class_accuracy_per_class=per_class,
        class_counts=counts,
        confidence=float(probabilities.max(axis=1).mean()),
        label_probability=float(np.take_along_axis(probabilities, asked, 1).mean()),
        test_class_accuracy=judge.test_class_accuracy,
        test_confidence=float(test_out.probabilities.max(axis=1).mean()),
        classifier_frechet_distance=distance,
        frechet_floor=floor,
        frechet_ratio=distance / floor.mean,
        frechet_test_all=frechet_distance(
            gaussian_stats(test_out.features, "test features"), judge.reference
        ),
    )
