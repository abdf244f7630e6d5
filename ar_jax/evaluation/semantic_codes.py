"""Semantic codes: which of a few k-means centres the features of an image are nearest to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.kmeans import assign, kmeans
from ar_jax.nn.quantize import normalise


@dataclasses.dataclass(frozen=True)
class SemanticCodebook:
    """Centres of features.

    Attributes:
        centres: float32 [K, D].
        l2_norm: features are compared by their direction.
    """

    centres: np.ndarray
    l2_norm: bool = False

    def encode(self, features: np.ndarray) -> np.ndarray:
        """int32 [...], the codes of features [..., D].

        Raises:
            ValueError: they are of another width than the centres.
        """
        width = self.centres.shape[1]
        if features.shape[-1] != width:
            raise ValueError(f"features of {features.shape[-1]} numbers, but centres of {width}")
        flat = jnp.asarray(features.reshape(-1, width), jnp.float32)
        index = jax.jit(assign)(normalise(flat, self.l2_norm), jnp.asarray(self.centres))
        return np.asarray(index).reshape(features.shape[:-1])


def fit(
    features: np.ndarray, count: int, *, seed: int = 0, iterations: int = 25, l2_norm: bool = False
) -> SemanticCodebook:
    """``count`` centres of features [..., D], one feature or several an image.

    Raises:
        ValueError: there are fewer features than centres, or they are not finite.
    """
    flat = np.asarray(features, np.float32).reshape(-1, features.shape[-1])
    if not 1 <= count <= len(flat):
        raise ValueError(f"{count} centres of {len(flat)} features: there must be 1 to {len(flat)}")
    if not np.isfinite(flat).all():
        raise ValueError("the features hold NaN or infinity")
    key = jax.random.key(seed)
    centres = kmeans(jnp.asarray(flat), count, key, iterations=iterations, l2_norm=l2_norm)
    return SemanticCodebook(np.asarray(centres), l2_norm)


def read_features(path: str | Path) -> np.ndarray:
    """``features`` of an npz file, floats [N, D] or [N, n, D] with n for every image.

    Raises:
        ValueError: there is no such array.
    """
    with np.load(path) as stored:
        if "features" not in stored.files:
            raise ValueError(f"{path} has no array 'features', only {stored.files}")
        features = stored["features"]
    if features.ndim < 2 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(
            f"{path}: features are {features.dtype} {list(features.shape)}; they must be floats "
            "[N, D] or [N, n, D]"
        )
    return features
