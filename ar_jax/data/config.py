"""`config.data` -> data.

Training images are square: ``data.image_size`` is one int, the side to which every ``data.crop``
cuts. Tokenizers and schedules take height and width apart, but no data of other shapes is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ar_jax.data.eval_pipeline import EvalBatches, eval_batches
from ar_jax.data.folder import DEFAULT_HOLDOUT
from ar_jax.data.pipeline import TrainIterator, train_iterator
from ar_jax.data.source import Source
from ar_jax.data.sources import open_source
from ar_jax.data.transforms import ImageTransform

# Fields a config must have, and those that have a default.
REQUIRED: dict[str, type] = {"source": str, "image_size": int, "channels": int, "num_classes": int}
DEFAULTS: dict[str, Any] = {
    "crop": "none",
    "flip": False,
    "min_crop": 0.8,  # for crop='random': smallest and largest part of the shorter side
    "max_crop": 1.0,
    "margin": 1.125,  # for crop='margin': shorter side before the crop, in units of image_size
    "on_error": "raise",
    "num_workers": 0,
    "holdout": DEFAULT_HOLDOUT,  # for folders without held-out images of their own
    "captions": "",  # for generators of captions: directory of train.npz and test.npz
}


@dataclasses.dataclass(frozen=True)
class Data:
    """One split, ready to iterate."""

    source: Source
    transform: ImageTransform | None
    num_workers: int = 0

    def train_iterator(self, *, batch_size: int, seed: int, **options: Any) -> TrainIterator:
        """See `ar_jax.data.pipeline.train_iterator`."""
        return train_iterator(
            self.source,
            self.transform,
            batch_size=batch_size,
            seed=seed,
            num_workers=self.num_workers,
            **options,
        )

    def eval_batches(self, *, batch_size: int, **options: Any) -> EvalBatches:
        """See `ar_jax.data.eval_pipeline.eval_batches`."""
        return eval_batches(self.source, self.transform, batch_size=batch_size, **options)


def from_config(config: Mapping[str, Any], split: str) -> Data:
    """Opens one split as `config.data` says.

    Args:
        config: the section `config.data`; every field is checked. Required: source, image_size,
            channels, num_classes; the others and their defaults are `DEFAULTS`.
        split: 'train' or 'test'.

    Raises:
        ValueError: names the field, its value, and what would be right.
    """
    fields = _read_fields(config)
    source = open_source(
        fields["source"],
        split,
        num_classes=fields["num_classes"],
        channels=fields["channels"],
        image_size=fields["image_size"],
        on_error=fields["on_error"],
        holdout=fields["holdout"],
        captions=fields["captions"],
    )
    transform = ImageTransform(
        size=fields["image_size"],
        **{key: fields[key] for key in ("crop", "flip", "min_crop", "max_crop", "margin")},
    )
    if fields["num_workers"] < 0:
        raise ValueError(f"data.num_workers={fields['num_workers']} must be 0 or more")
    side = (fields["image_size"],) * 2
    if source.kind == "codes":
        if fields["crop"] != "none" or fields["flip"]:
            raise ValueError(
                f"data.crop={fields['crop']!r}, data.flip={fields['flip']}: {source.name} holds "
                "codes of images that are cut already (augmentation is the copy drawn at every "
                "visit); set data.crop='none' and data.flip=False"
            )
        if source.image_size != side:
            raise ValueError(_size_message(fields["image_size"], source, "the codes were made at"))
        return Data(source, None, fields["num_workers"])
    if fields["crop"] == "none" and source.image_size not in (None, side):
        raise ValueError(
            _size_message(fields["image_size"], source, "its images are")
            + ", or data.crop='center' to resize and cut them"
        )
    return Data(source, transform, fields["num_workers"])


def _size_message(image_size: int, source: Source, what: str) -> str:
    assert source.image_size is not None
    height, width = source.image_size
    right = f"; set data.image_size={height}" if height == width else "; set another crop"
    return f"data.image_size={image_size}, but {source.name}: {what} {height}x{width}{right}"


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field with its default, of the right type."""
    known = [*REQUIRED, *DEFAULTS]
    for key in config:
        if key not in known:
            raise ValueError(
                f"data.{key}={config[key]!r} is not a field; known: {', '.join(known)}"
            )
    fields = {}
    for key in known:
        if key not in config and key in REQUIRED:
            raise ValueError(f"data.{key} is missing; it must be of type {REQUIRED[key].__name__}")
        kind = REQUIRED.get(key) or type(DEFAULTS[key])
        value = config[key] if key in config else DEFAULTS[key]
        # An int will do for a float; a bool is not an int.
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"data.{key}={value!r} must be of type {kind.__name__}")
        fields[key] = value
    return fields
