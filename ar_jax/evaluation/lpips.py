"""LPIPS of reconstructions, over many images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.evaluation.batches import apply_in_batches
from ar_jax.io.network_file import FAMILY, check_network, read_network
from ar_jax.nn.lpips import check_images, lpips, param_shapes

BATCH = 8  # pairs at a time on a device
NAMES = {"vgg": "VGG16", "alexnet": "AlexNet"}


@dataclasses.dataclass(frozen=True)
class LpipsMetric:
    """Call it on pairs of uint8 images.

    Attributes:
        params: see `ar_jax.nn.lpips`.
        network: 'vgg' or 'alexnet'.
        about: what their file says of itself: the SHA-256 of the official files among it.
    """

    params: Any
    network: str
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the metric in reports: distances of different networks are different numbers."""
        return f"lpips_{self.network}"

    @property
    def measured(self) -> str:
        """What it measures, in words."""
        files = ", ".join(f"{n} {digest[:12]}" for n, digest in self.about["files"].items())
        return f"LPIPS v0.1 with {NAMES[self.network]} (sha256 of {files}), mean over images"

    def __call__(self, originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
        """Distance of each pair of uint8 images [N, H, W, C], float32 [N].

        Raises:
            ValueError: images that the network does not take.
        """
        check_images(originals.shape, network=self.network)
        pairs = np.stack([originals, reconstructions], axis=1)
        devices = tuple(jax.local_devices())
        return apply_in_batches(
            _distances(self.network),
            self.params,
            pairs,
            batch_size=BATCH * len(devices),
            devices=devices,
        )


def load_lpips(path: str | Path, image_shape: tuple[int, ...]) -> LpipsMetric:
    """Reads converted weights, for images [H, W, C].

    Raises:
        ValueError: no such file, one of another network, or images that it does not take.
    """
    how = "experiments/convert.py --family=lpips makes it of official files"
    try:
        about, params = read_network(path)
    except ValueError as error:
        raise ValueError(f"--lpips={error}: {how}") from error
    if about.get(FAMILY) != "lpips":
        raise ValueError(f"--lpips={path} is of the family {about.get(FAMILY)!r}: {how}")
    check_network(path, params, param_shapes(about["network"]))
    try:
        check_images(image_shape, network=about["network"])
    except ValueError as error:
        raise ValueError(f"--lpips={path}: {error}") from error
    return LpipsMetric(params, about["network"], about)


@functools.cache
def _distances(network: str) -> Callable[[Any, jax.Array], jax.Array]:
    def distances(params: Any, pairs: jax.Array) -> jax.Array:
        images = pairs.astype(jnp.float32) / 127.5 - 1.0
        with jax.default_matmul_precision("highest"):
            return lpips(params, images[:, 1], images[:, 0], network=network)

    return distances
