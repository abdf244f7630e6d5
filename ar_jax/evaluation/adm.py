"""Samples against a reference by the ADM protocol, or reconstructions against their originals.

What was measured is part of a metric's name: `fid` is of 50,000 samples with balanced labels, of
any other number it is `fid@N`. What cannot be compared is refused.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ar_jax.evaluation.features import Extractor, Gathered, gather
from ar_jax.evaluation.frechet import GaussianStats, frechet_distance
from ar_jax.evaluation.image_set import ImageSet
from ar_jax.evaluation.manifold import precision_recall
from ar_jax.evaluation.reference import Reference

STANDARD_COUNT = 50_000  # of ADM's protocol
STANDARD_CLASSES = 1000  # of ImageNet, 50 of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What a comparison asks of its samples.

    Attributes:
        num_images: samples that are measured; None: `STANDARD_COUNT`, as all protocols have it.
        num_classes: classes that the labels are balanced over; None: ImageNet's of the standard
            number, those up to the greatest label of others.
        allow_unbalanced: labels that are unbalanced or not known; the report says so.
        allow_rank_deficient: covariances of fewer images than features are wide.
        precision_recall: measure them too; all pool features are in memory for it.
        batch_size: images at a time.
    """

    num_images: int | None = None
    num_classes: int | None = None
    allow_unbalanced: bool = False
    allow_rank_deficient: bool = False
    precision_recall: bool = True
    batch_size: int = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standard:
    """What standard metrics are measured with.

    Attributes:
        extractor: whose features.
        reference: path or source of the reference, see `open_reference`; None where the originals
            of reconstructions are at hand.
        rules: what is asked of the samples.
    """

    extractor: Extractor
    reference: str | None
    rules: Rules


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured; None where it does not apply, with the reason in ``left_out``.

    Attributes:
        count: samples.
        balance: of their labels, in words.
        samples, reference: what they are.
        reference_count: images of precision and recall.
        extractor: whose features.
        prefix: of the metrics' names.
    """

    count: int
    balance: str
    samples: str
    reference: str
    reference_count: int
    extractor: str
    prefix: str
    frechet: float
    spatial_frechet: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    left_out: tuple[str, ...]

    def name(self, metric: str) -> str:
        """'fid' of 50,000 samples, 'fid@1000' of others."""
        return named(self.prefix + metric, self.count)


def named(metric: str, count: int) -> str:
    """A metric with its number of images, unless that is the standard one."""
    return metric if count == STANDARD_COUNT else f"{metric}@{count}"


@dataclasses.dataclass(frozen=True)
class Real:
    """What a comparison needs of a reference, for one comparison or many.

    Attributes:
        reference: of which.
        pool, spatial: statistics; ``spatial`` None: there are none.
        features: pool features of its images, for precision and recall; None: not asked for.
    """

    reference: Reference
    pool: GaussianStats
    spatial: GaussianStats | None
    features: np.ndarray | None


def measure_reference(
    extractor: Extractor, shape: tuple[int, int, int], reference: Reference, rules: Rules
) -> Real:
    """Statistics that the reference brings, or those of its images.

    Raises:
        ValueError: samples of this shape cannot be compared with it; see `check_reference`.
    """
    check_reference(extractor, shape, reference, rules)
    images, keep = reference.images, rules.precision_recall
    if images is None or not (keep or reference.pool is None):
        assert reference.pool is not None
        return Real(reference, reference.pool, reference.spatial, None)
    batches = images.read(rules.batch_size)
    real = gather(extractor, batches, reference.name, images.count if keep else 0)
    if reference.pool is not None:
        return Real(reference, reference.pool, reference.spatial, real.kept)
    return Real(reference, real.pool.stats(), spatial_stats(real), real.kept)


def compare(extractor: Extractor, samples: ImageSet, real: Real, rules: Rules) -> Comparison:
    """Frechet distances, inception score, precision and recall of samples.

    Raises:
        ValueError: too few samples, unbalanced ones, another resolution, NaN features; says what
            would be right.
    """
    count = check_number(samples.name, samples.count, rules.num_images)
    balance = check_balance(samples, count, rules)
    check_rank(extractor, samples.name, count, rules)
    reference = real.reference
    check_resolution(samples.shape, reference)
    keep = 0 if real.features is None else count
    drawn = gather(extractor, samples.first(count, rules.batch_size), samples.name, keep)
    left_out = []
    spatial_frechet = None
    if (ours := spatial_stats(drawn)) is None:
        left_out.append("sFID: these features have no spatial part")
    elif real.spatial is None:
        left_out.append("sFID: the reference has no mu_s and sigma_s")
    else:
        spatial_frechet = frechet_distance(ours, real.spatial)
    precision = recall = None
    if real.features is not None and drawn.kept is not None:
        precision, recall = precision_recall(real.features, drawn.kept)
    elif not rules.precision_recall:
        left_out.append("precision and recall: not asked for")
    else:
        left_out.append("precision and recall: the reference holds no images")
    return Comparison(
        count=count,
        balance=balance,
        samples=samples.identity,
        reference=reference.identity,
        reference_count=0 if reference.images is None else reference.images.count,
        extractor=extractor.name,
        prefix=extractor.prefix,
        frechet=frechet_distance(drawn.pool.stats(), real.pool),
        spatial_frechet=spatial_frechet,
        inception_score=drawn.score.result(),
        precision=precision,
        recall=recall,
        left_out=tuple(left_out),
    )


@dataclasses.dataclass(frozen=True)
class ReconstructionDistance:
    """Frechet distance of reconstructions to their originals: rFID, in Inception's features.

    Attributes:
        count: images of each.
        reference: the originals, in words.
        extractor, prefix: see `Comparison`.
    """

    count: int
    reference: str
    extractor: str
    prefix: str
    frechet: float
    spatial_frechet: float | None

    def name(self, metric: str) -> str:
        """'rfid' of 50,000 images, 'rfid@1000' of others."""
        return named(self.prefix + metric, self.count)


def reconstruction_distance(
    extractor: Extractor, originals: Gathered, reconstructions: Gathered, reference: str
) -> ReconstructionDistance:
    """Of two sets that were gathered side by side; ``reference`` says what the originals are."""
    spatial = [spatial_stats(gathered) for gathered in (originals, reconstructions)]
    return ReconstructionDistance(
        count=reconstructions.pool.count,
        reference=reference,
        extractor=extractor.name,
        prefix=extractor.prefix,
        frechet=frechet_distance(originals.pool.stats(), reconstructions.pool.stats()),
        spatial_frechet=None
        if spatial[0] is None or spatial[1] is None
        else frechet_distance(spatial[0], spatial[1]),
    )


def check_originals(reference: Reference) -> ImageSet:
    """The images of a reference that reconstructions are compared with.

    Raises:
        ValueError: it brings statistics of other images.
    """
    if reference.pool is not None or reference.images is None:
        raise ValueError(
            f"{reference.name} holds statistics (mu, sigma) of training images, as ADM's reference "
            "batches do: rFID is of reconstructions against the validation images themselves; "
            "name those, as an npz with arr_0, a folder of PNG or a source folder:PATH"
        )
    return reference.images


def spatial_stats(gathered: Gathered) -> GaussianStats | None:
    """Statistics of spatial features; None where there are none."""
    return gathered.spatial.stats() if gathered.spatial.count else None


def check_number(name: str, there: int, num_images: int | None) -> int:
    """The number of images to measure, of those that are there.

    Raises:
        ValueError: not the standard number, and no other was asked for; or more than there are.
    """
    if num_images is None and there != STANDARD_COUNT:
        raise ValueError(
            f"{name} holds {there:,} images, but FID is defined on {STANDARD_COUNT:,} and falls "
            f"with their number: say --num_images={there} to measure so many, under the name "
            f"fid@{there}"
        )
    count = there if num_images is None else num_images
    if not 1 <= count <= there:
        raise ValueError(f"--num_images={count}, but {name} holds {there:,} images")
    return count


def check_balance(samples: ImageSet, count: int, rules: Rules) -> str:
    """The balance of the labels of the first ``count`` samples, in words.

    Raises:
        ValueError: they are unbalanced or not known, which was not allowed.
    """
    remedy = "--allow_unbalanced measures them all the same, and says so"
    if samples.labels is None:
        if not rules.allow_unbalanced:
            raise ValueError(
                f"{samples.name} does not say the classes of its images (an npz has them in "
                f"arr_1), so that they may be unbalanced; {remedy}"
            )
        return "labels not known, balance NOT checked"
    labels = np.asarray(samples.labels[:count])
    classes = rules.num_classes or (STANDARD_CLASSES if rules.num_images is None else 0)
    counts = np.bincount(labels, minlength=classes)
    if classes and len(counts) > classes:
        raise ValueError(f"{samples.name}: label {labels.max()} is none of {classes:,} classes")
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[low] == counts[high]:
        return f"{counts[low]:,} of each of {len(counts):,} classes"
    said = f"{counts[low]:,} images of class {low} and {counts[high]:,} of class {high}"
    if not rules.allow_unbalanced:
        raise ValueError(
            f"{samples.name}: the first {count:,} samples are unbalanced, {said}; FID is of as "
            f"many of every class; {remedy}"
        )
    return f"UNBALANCED, {said}"


def check_reference(
    extractor: Extractor, shape: tuple[int, int, int], reference: Reference, rules: Rules
) -> None:
    """Raises ValueError unless samples of a shape can be compared with a reference."""
    check_resolution(shape, reference)
    if reference.pool is None:
        assert reference.images is not None
        check_rank(extractor, reference.name, reference.images.count, rules)
    elif (width := len(reference.pool.mean)) != extractor.width:
        raise ValueError(
            f"{reference.name} has statistics of {width:,} features, but {extractor.name} gives "
            f"{extractor.width:,}: they are another network's"
        )


def check_resolution(shape: tuple[int, int, int], reference: Reference) -> None:
    """Raises ValueError if the reference's images have another shape than the samples."""
    if reference.images is not None and reference.images.shape != shape:
        raise ValueError(
            f"{reference.name} holds images {reference.images.shape}, but the samples are {shape}: "
            "a reference must be of the samples' resolution"
        )


def check_rank(extractor: Extractor, name: str, count: int, rules: Rules) -> None:
    """Raises ValueError if ``count`` images give no covariance of full rank."""
    if count <= extractor.width and not rules.allow_rank_deficient:
        raise ValueError(
            f"{name}: {count:,} images give no covariance of full rank of {extractor.width:,} "
            f"features; use at least {extractor.width + 1:,}, or --allow_rank_deficient for a "
            "distance that says little"
        )
