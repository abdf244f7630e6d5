"""The real images that a model is held against, and whether our classifier can judge them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.data import CodesSource, Data, from_config
from ar_jax.evaluation.classifier import load_classifier
from ar_jax.evaluation.coding import rows
from ar_jax.evaluation.generation import Judge, LabelledImages, make_judge
from ar_jax.io.checkpoint import tree_digest

# The classifier reaches 0.92 on the images it knows; below this it was shown something else.
KNOWN_ACCURACY = 0.8


def open_splits(section: Mapping[str, Any], tokenizer: Any, params: Any) -> dict[str, Data]:
    """The train and test split of a `config.data`, fit for a tokenizer.

    Args:
        section: see `ar_jax.evaluation.load.image_section`.
        tokenizer: and its ``params``.

    Raises:
        ValueError: images of another shape than the tokenizer's, codes of another tokenizer.
    """
    data = {split: from_config(section, split) for split in ("train", "test")}
    shape = (section["image_size"], section["image_size"], section["channels"])
    if shape != tuple(tokenizer.image_shape):
        raise ValueError(
            f"data.source={section['source']} gives images {shape}, but the tokenizer is for "
            f"{tuple(tokenizer.image_shape)}"
        )
    for split in data.values():
        if isinstance(split.source, CodesSource):
            theirs, ours = split.source.tokenizer.get("digest"), tree_digest(params)
            if theirs != ours:
                raise ValueError(
                    f"{split.source.name} was written with the tokenizer of digest {theirs}, this "
                    f"one has {ours}: name the images or codes of this tokenizer"
                )
    return data


def load_images(data: Data, batch_size: int = 1000) -> LabelledImages:
    """All images of a split, as evaluation sees them, in order."""
    batches = data.eval_batches(
        batch_size=min(batch_size, len(data.source)), process_index=0, process_count=1
    )
    parts = [(rows(batch, "image"), rows(batch, "label")) for batch in batches]
    return LabelledImages(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def find_judge(train: Data, test: Data, image_shape: tuple[int, ...]) -> tuple[Judge | None, str]:
    """Our classifier with what it says of the real images, if they are what it was trained on.

    Returns:
        (judge, '') or (None, why there is none, as a sentence).
    """
    classifier = load_classifier()
    known = f"our classifier knows Fashion-MNIST only, {classifier.image_shape}"
    if train.source.kind != "image":
        return None, f"There are codes but no images ({train.source.name})."
    if tuple(image_shape) != classifier.image_shape:
        return None, f"The images are {tuple(image_shape)}: {known}."
    if test.source.num_classes != classifier.module.num_classes:
        return None, f"The images have {test.source.num_classes} classes: {known}."
    held_out = load_images(test)
    accuracy = (classifier(held_out.images).predictions == held_out.labels).mean()
    if accuracy < KNOWN_ACCURACY:
        return None, f"It names the class of only {accuracy:.0%} of the real test images: {known}."
    return make_judge(classifier, load_images(train), held_out), ""
