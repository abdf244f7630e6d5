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
        kept: pool features [N, F] for precision and recall, which statistics do not give; None if
            they are not wanted.
    """

    name: str
    pool: FeatureAccumulator
    spatial: FeatureAccumulator
    score: InceptionScore
    kept: list[np.ndarray] | None

    @classmethod
    def empty(cls, name: str, keep: bool) -> Gathered:
        """Of no images yet; ``name`` is what errors call the set."""
        return cls(
            name,
            FeatureAccumulator(f"{name}, pool features"),
            FeatureAccumulator(f"{name}, spatial features"),
            InceptionScore(),
            [] if keep else None,
        )

    def add(self, features: Features) -> None:
        """Takes in a batch; ValueError for NaN."""
        self.pool.add(features.pool)
        if features.spatial is not None:
            self.spatial.add(features.spatial)
        self.score.add(features.logits)
        if self.kept is not None:
            self.kept.append(features.pool)

    @property
    def features(self) -> np.ndarray:
        """Those that were kept, [N, F]."""
        assert self.kept is not None
        return np.concatenate(self.kept)


def gather(
    extractor: Extractor, batches: Iterable[np.ndarray], name: str, keep: bool = False
) -> Gathered:
    """Runs the extractor over batches uint8 [n, H, W, C]."""
    gathered = Gathered.empty(name, keep)
    for images in batches:
        gathered.add(extractor(images))
    return gathered
