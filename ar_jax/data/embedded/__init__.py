"""The Fashion-MNIST subset that ships with the package; built by experiments/build_embedded.py.

The first 20,000 training and the first 4,000 test images. MIT licence, see LICENSE beside it.
"""

from __future__ import annotations

import importlib.resources

import numpy as np

from ar_jax.data.arrays import ArraySource

FILE = "fashion_mnist.npz"
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def open_embedded(split: str, *, channels: int | None = None) -> ArraySource:
    """Opens the split ('train' or 'test'): uint8 28x28x1, 10 classes."""
    resource = importlib.resources.files(__name__) / FILE
    with resource.open("rb") as file, np.load(file) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return ArraySource(
        f"embedded ({split})",
        images[..., None],
        labels,
        class_names=CLASS_NAMES,
        channels=channels,
    )
