"""A judge of tiny images that needs no weights, and trained systems in name only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.build import build_objective
from ar_jax.convert.conversion import Converted
from ar_jax.convert.directory import write_directory
from ar_jax.evaluation.adm import Rules, Standard
from ar_jax.evaluation.features import Features
from tests.tiny_runs import tiny_generator, tiny_tokenizer
from tests.toy_systems import toy_params


class Brightness:
    """An extractor of the brightness of three rows of the image."""

    name, prefix, width = "brightness", "toy_", 3

    def __call__(self, images: np.ndarray, /) -> Features:
        rows = images[:, :3].mean(axis=(2, 3)).astype(np.float32)
        return Features(rows, None, rows)


def brightness_against(folder: Path, num_images: int | None) -> Standard:
    """Brightness against twenty images of noise, which are written."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    rules = Rules(num_images=num_images, precision_recall=False, batch_size=50)
    path = str(folder / "reference.npz")
    return Standard(extractor=Brightness(), reference=path, rules=rules)


def write_untrained(folder: Path) -> None:
    """A 'tokenizer' and a 'generator' of 8x8 images, as if they had been trained."""
    config, own = tiny_generator(""), tiny_tokenizer()
    config.ema.decay = own.ema.decay = 0.0
    objective: Any = build_objective(config)
    params = toy_params(objective.system)
    write_directory(
        Converted(own.to_dict(), params["tokenizer"], "tokenizer"), folder / "tokenizer"
    )
    write_directory(Converted(config.to_dict(), params, "generator"), folder / "generator")
