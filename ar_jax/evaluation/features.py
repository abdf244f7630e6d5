"""Features of images by a network that judges them, streamed into what each metric needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from ar_jax.evaluation.classifier import Classifier
from ar_jax.evaluation.frechet import FeatureAccumulator
from ar_jax.evaluation.inception import InceptionNetwork
from ar_jax.evaluation.inception_score import InceptionScore
from ar_jax.nn.inception import POOL


class Features(NamedTuple):
    """What an extractor says of n images."""

    pool: np.ndarray  # float32 [n, F]
    spatial: np.ndarray | None  # float32 [n, S], of the network's middle
    logits: np.ndarray  # float32 [n, K]


class Extractor(Protocol):
    """A network that judges images.

    Attributes:
        name: of the network, for reports.
        prefix: of its metrics' names: '' for Inception's, whose numbers are FID and its like.
        width: of pool features.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def prefix(self) -> str:
        """See above."""
        ...

    @property
    def width(self) -> int:
        """See above."""
        ...

    def __call__(self, images: np.ndarray, /) -> Features:
        """Of uint8 images [n, H, W, C]; ValueError for images that it does not take."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassifierFeatures:
    """Our own classifier as an extractor; what it says has nothing to do with FID."""

    classifier: Classifier
    prefix: str = "classifier_"

    @property
    def name(self) -> str:
        """The classifier's."""
        return f"our own {self.classifier.name}"

    @property
    def width(self) -> int:
        """Of its penultimate layer."""
        return self.classifier.module.num_features

    def __call__(self, images: np.ndarray, /) -> Features:
        """Penultimate features and logits."""
        out = self.classifier(images)
        return Features(out.features, None, out.logits)


@dataclasses.dataclass(frozen=True)
class InceptionFeatures:
    """FID's Inception-v3 as an extractor: the numbers of its features have no prefix.

    Attributes:
        network: with its weights, on all local devices.
        batch_size: images at a time, shared by the devices.
    """

    network: InceptionNetwork
    batch_size: int = 64
    prefix: str = ""

    @property
    def name(self) -> str:
        """With the official file that its weights are of."""
        files = self.network.about.get("files", {})
        of = ", ".join(f"{name} sha256 {digest}" for name, digest in files.items())
        return f"Inception-v3 ({of or 'weights of no known file'})"

    @property
    def width(self) -> int:
        """Of pool3."""
        return POOL

    def __call__(self, images: np.ndarray, /) -> Features:
        """pool3, the spatial features of sFID, logits without their bias."""
        out = self.network(images, self.batch_size)
        spatial = np.asarray(out.spatial).reshape(len(images), -1)
        return Features(np.asarray(out.pool), spatial, np.asarray(out.logits))


@dataclasses.dataclass
class Gathered:
    """What is kept of a set's features: statistics, and the features themselves if asked for.

    Attributes:
        pool, spatial: streaming mean and covariance; ``spatial`` stays empty without such features.
        score: streaming inception score.
        keep: images whose pool features are kept, for precision and recall, which statistics do
            not give; 0: none.
        kept: these features, float32 [keep, F], in place from the first batch on.
    """

    name: str
    pool: FeatureAccumulator
    spatial: FeatureAccumulator
    score: InceptionScore
    keep: int
    kept: np.ndarray | None = None

    @classmethod
    def empty(cls, name: str, keep: int = 0) -> Gathered:
        """Of no images yet; ``name`` is what errors call the set."""
        return cls(
            name,
            FeatureAccumulator(f"{name}, pool features"),
            FeatureAccumulator(f"{name}, spatial features"),
            InceptionScore(),
            keep,
        )

    def add(self, features: Features) -> None:
        """Takes in a batch; ValueError for NaN."""
        if self.keep:
            if self.kept is None:
                self.kept = np.empty((self.keep, features.pool.shape[1]), np.float32)
            first = self.pool.count
            self.kept[first : first + len(features.pool)] = features.pool
        self.pool.add(features.pool)
        if features.spatial is not None:
            self.spatial.add(features.spatial)
        self.score.add(features.logits)


def gather(
    extractor: Extractor, batches: Iterable[np.ndarray], name: str, keep: int = 0
) -> Gathered:
    """Runs the extractor over batches uint8 [n, H, W, C]; see `Gathered` for ``keep``.

    Raises:
        ValueError: NaN features, or not ``keep`` images where it is not 0.
    """
    gathered = Gathered.empty(name, keep)
    for images in batches:
        gathered.add(extractor(images))
    if keep and gathered.pool.count != keep:
        raise ValueError(f"{name}: {gathered.pool.count:,} images came of {keep:,}")
    return gathered
