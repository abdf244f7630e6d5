"""Codes of images by k-means over features that are given, or over our own classifier's.

    python experiments/semantic_codes.py --features=features.npz --count=256 --out=semantic.npz
    python experiments/semantic_codes.py --source=embedded --count=64 --out=semantic.npz

features.npz holds `features`, floats [N, D] or, with n of them for every image, [N, n, D]. Images
(--source, a `config.data.source` of 28x28 grey ones) are seen by the classifier that ships with the
package. The npz that is written holds `codes` int32 [N] or [N, n] and `centres` float32 [K, D]; of
a source, `codes` and `labels` of its train split, on which the centres are found, and `test_codes`
and `test_labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from ar_jax.data import open_source
from ar_jax.evaluation.classifier import load_classifier
from ar_jax.evaluation.semantic_codes import fit, read_features
from ar_jax.io.console import configure_logging

FEATURES = flags.DEFINE_string("features", None, "npz file of features.")
SOURCE = flags.DEFINE_string("source", None, "Images, in place of features.")
OUT = flags.DEFINE_string("out", None, "npz file to write.", required=True)
COUNT = flags.DEFINE_integer("count", 256, "Centres, which are the codes there are.")
ITERATIONS = flags.DEFINE_integer("iterations", 25, "Of k-means.")
L2_NORM = flags.DEFINE_bool("l2_norm", False, "Compare directions of features.")
SEED = flags.DEFINE_integer("seed", 0, "Of the centres' start.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    if (FEATURES.value is None) == (SOURCE.value is None):
        raise app.UsageError("give one of --features=FILE and --source=IMAGES")
    configure_logging()
    held: dict[str, Any] = {}
    if SOURCE.value is not None:
        features, held["labels"] = _seen(SOURCE.value, "train")
    else:
        features = read_features(FEATURES.value or "")
    codebook = fit(
        features,
        COUNT.value,
        seed=SEED.value,
        iterations=ITERATIONS.value,
        l2_norm=L2_NORM.value,
    )
    held |= {"codes": codebook.encode(features), "centres": codebook.centres}
    if SOURCE.value is not None:
        others, held["test_labels"] = _seen(SOURCE.value, "test")
        held["test_codes"] = codebook.encode(others)
    np.savez(OUT.value, **held)
    used = len(np.unique(held["codes"]))
    print(f"{OUT.value}: {held['codes'].size:,} codes, {used} of {COUNT.value} in use")


def _seen(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, D], labels [N]) of a split."""
    images = open_source(source, split)
    items = [images.fetch(index) for index in range(len(images))]
    pixels = np.stack([item["image"] for item in items])
    return load_classifier()(pixels).features, np.array([item["label"] for item in items])


if __name__ == "__main__":
    app.run(main)
