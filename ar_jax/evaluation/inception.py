"""FID's Inception-v3 over many images: batches of one size, split over this process's devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.evaluation.batches import apply_in_batches, shardings
from ar_jax.io.network_file import FAMILY, check_network, read_network
from ar_jax.nn.inception import Features, inception_features, param_shapes

HOW = (
    "convert pt_inception-2015-12-05-6726825d.pth (of the releases of "
    "github.com/mseitzer/pytorch-fid) with experiments/convert.py --family=inception"
)


@dataclasses.dataclass(frozen=True)
class InceptionNetwork:
    """Call it on uint8 images.

    Attributes:
        params: of `ar_jax.nn.inception.Inception`.
        about: what their file says of itself: the SHA-256 of the official file among it.
        devices: that share a batch.
    """

    params: Any
    about: dict[str, Any]
    devices: tuple[jax.Device, ...]

    def __call__(self, images: np.ndarray, batch_size: int = 64) -> Features:
        """`Features` of images uint8 [N, H, W, 3], as numpy arrays; memory grows with N alone.

        Args:
            images: of any size; with one channel, it is taken three times.
            batch_size: images at a time, rounded up to a multiple of the devices.

        Raises:
            ValueError: images of another type or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"images: {images.dtype} {images.shape}, but Inception takes uint8 [N, H, W, 3]"
            )
        return apply_in_batches(
            inception_features, self.params, images, batch_size=batch_size, devices=self.devices
        )


def load_inception(path: str | Path) -> InceptionNetwork:
    """Reads a converted Inception network and puts it on all local devices.

    Raises:
        ValueError: no such file, or none of this network; says where it comes from.
    """
    try:
        about, params = read_network(path)
    except ValueError as error:
        raise ValueError(f"{error}: {HOW}") from error
    if about.get(FAMILY) != "inception":
        raise ValueError(f"{path} is of the family {about.get(FAMILY)!r}, not 'inception': {HOW}")
    check_network(path, params, param_shapes())
    devices = tuple(jax.local_devices())
    return InceptionNetwork(jax.device_put(params, shardings(devices)[0]), about, devices)
