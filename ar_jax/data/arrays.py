"""Sources held in memory, and the synthetic one."""

from __future__ import annotations

import numpy as np

from ar_jax.data.decode import to_channels
from ar_jax.data.source import Item, Source, check_labels

SYNTHETIC_ITEMS = {"train": 65536, "test": 4096}


class ArraySource(Source):
    """Images and labels in two arrays."""

    def __init__(
        self,
        name: str,
        images: np.ndarray,  # uint8 [N, H, W, C]
        labels: np.ndarray,  # integers [N]
        *,
        class_names: tuple[str, ...],
        channels: int | None = None,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{name}: images must be uint8 [N, H, W, C], these are {images.dtype} "
                f"{list(images.shape)}"
            )
        if len(images) == 0:
            raise ValueError(f"{name}: holds no images")
        if labels.shape != (len(images),):
            raise ValueError(
                f"{name}: {len(images)} images but labels of shape {list(labels.shape)}; one "
                "label per image is needed"
            )
        check_labels(name, labels, len(class_names))
        self.name = name
        self.num_classes = len(class_names)
        self.class_names = tuple(class_names)
        self._images = to_channels(images, channels, name)
        self._labels = labels.astype(np.int32)
        self.channels = self._images.shape[-1]
        self.image_size = (images.shape[1], images.shape[2])

    def __len__(self) -> int:
        return len(self._images)

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        return {"image": self._images[index], "label": self._labels[index]}

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"


class SyntheticSource(Source):
    """Deterministic noise images for benchmarks; label = index modulo `num_classes`."""

    def __init__(
        self, split: str, *, image_size: int, channels: int | None, num_classes: int | None
    ) -> None:
        self.name = f"synthetic ({split})"
        self.num_classes = 10 if num_classes is None else num_classes
        self.class_names = tuple(str(label) for label in range(self.num_classes))
        self.channels = 3 if channels is None else channels
        self.image_size = (image_size, image_size)
        self._split = split

    def __len__(self) -> int:
        return SYNTHETIC_ITEMS[self._split]

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        assert self.image_size is not None
        noise = np.random.Generator(np.random.Philox(key=[index, self._split == "test"]))
        shape = (*self.image_size, self.channels)
        image = np.frombuffer(noise.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
        return {"image": image, "label": np.int32(index % self.num_classes)}

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"
