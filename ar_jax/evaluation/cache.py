"""Codes of a whole data set, computed once by a trained tokenizer and kept on disk.

A generator that trains on them (`config.data.source='codes:DIR'`) does not run the encoder at every
step. Augmentation is cached too: each training image is encoded in ``copies`` versions, of which
training draws one at every visit.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.api import Params
from ar_jax.build import AnyTokenizer
from ar_jax.data import CodesSource, CodesWriter, Data, from_config
from ar_jax.data.manifest import META
from ar_jax.evaluation.coding import encode_images
from ar_jax.evaluation.load import image_section, load_tokenizer
from ar_jax.io.checkpoint import tree_digest
from ar_jax.io.progress import Progress
from ar_jax.io.run_info import config_dict

SPLITS = ("train", "test")


def cache_codes(
    workdir: str | Path,
    directory: str | Path,
    *,
    source: str | None = None,
    copies: int = 1,
    batch_size: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Encodes the train and the test split; the same call again returns at once.

    Args:
        workdir: of a trained tokenizer; its newest parameters are used, the EMA if there is one:
            the same that a generator takes.
        directory: gets ``train`` and ``test``; a split appears there when it is complete.
        source: of the images, as `config.data.source`; None: the tokenizer's.
        copies: versions of each training image. The first is the plain one, the others are cut and
            flipped as the tokenizer's `config.data` says.
        batch_size: images encoded at a time.
        seed: of the copies.
        progress: show a bar.

    Returns:
        ``directory``, for `config.data.source=f'codes:{directory}'`.

    Raises:
        ValueError: names what is wrong; a split that holds other codes is left as it is.
    """
    config, tokenizer, params = load_tokenizer(workdir)
    section = config_dict(image_section(config, source))
    data = {split: from_config(section, split) for split in SPLITS}
    _check(section, data["train"], tokenizer, copies)
    made_by = {"digest": tree_digest(params), "data": section, "seed": seed}
    directory = Path(directory)
    with jax.default_matmul_precision(config["precision"]):
        for split in SPLITS:
            count = copies if split == "train" else 1
            if (directory / split).exists():
                _check_finished(directory, split, made_by, count)
                continue
            # Renamed when it is complete, so that a killed process leaves nothing that counts.
            partial = directory / f".{split}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            title = f"encoding {split} images" if progress else ""
            _write(
                partial, split, data[split], tokenizer, params, made_by, count, batch_size, title
            )
            os.replace(partial, directory / split)
    return directory


def step_sizes(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Codes of every step: a scale each, or one by one where there is a single grid."""
    cells = tuple(rows * columns for rows, columns in tokenizer.grids)
    return cells if len(cells) > 1 else (1,) * cells[0]


def encoding_width(tokenizer: AnyTokenizer) -> int:
    """Floats that are kept for every code; 0 where codes are integers."""
    return tokenizer.encoding_shape[1] if tokenizer.codebook_size is None else 0


def _write(
    path: Path,
    split: str,
    data: Data,
    tokenizer: AnyTokenizer,
    params: Params,
    made_by: dict[str, Any],
    copies: int,
    batch_size: int,
    title: str,
) -> None:
    options = {"batch_size": batch_size, "process_index": 0, "process_count": 1}
    versions = [data.eval_batches(**options)]
    versions += [
        data.eval_batches(**options, augment_seed=made_by["seed"] + copy)
        for copy in range(1, copies)
    ]
    writer = CodesWriter(
        path,
        split,
        sizes=step_sizes(tokenizer),
        copies=copies,
        vocabulary_size=tokenizer.codebook_size or 0,
        num_classes=data.source.num_classes,
        tokenizer=made_by,
        image_size=tokenizer.image_shape[0],
        channels=tokenizer.image_shape[2],
        class_names=data.source.class_names,
        width=encoding_width(tokenizer),
    )
    bar = Progress(len(data.source), title=title, unit="image", enabled=bool(title))
    with bar, writer:
        pending = None
        for batches in zip(*versions, strict=True):
            codes = [encode_images(tokenizer, params, batch["image"]) for batch in batches]
            if pending is not None:  # written while the device works on the next batch
                bar.advance(_store(writer, *pending))
            pending = codes, batches[0]
        if pending is not None:
            bar.advance(_store(writer, *pending))


def _store(writer: CodesWriter, codes: list[jax.Array], batch: dict[str, np.ndarray]) -> int:
    """Writes the real rows of codes, each [B, L(, W)], and returns how many there are."""
    real = batch["mask"] > 0
    writer.write(np.stack(jax.device_get(codes), axis=1)[real], batch["label"][real])
    return int(real.sum())


def _check(section: dict[str, Any], data: Data, tokenizer: AnyTokenizer, copies: int) -> None:
    if data.source.kind != "image":
        raise ValueError(f"--source={section['source']} holds codes; name the images")
    shape = (section["image_size"], section["image_size"], section["channels"])
    if shape != tuple(tokenizer.image_shape):
        raise ValueError(
            f"--source={section['source']} gives images {shape}, but the tokenizer is for "
            f"{tuple(tokenizer.image_shape)}"
        )
    if getattr(tokenizer, "bits", 0):
        raise ValueError(
            f"the tokenizer makes codes of {tokenizer.bits} bits, but what is kept are numbers: "
            "codes of bits cannot be cached"
        )
    if copies < 1:
        raise ValueError(f"--copies={copies} must be at least 1")
    crop, flip = section.get("crop", "none"), section.get("flip", False)
    if copies > 1 and crop in ("none", "center") and not flip:
        raise ValueError(
            f"--copies={copies} would be equal: the tokenizer's config.data has crop={crop!r} and "
            f"flip={flip}; use --copies=1"
        )


def _check_finished(directory: Path, split: str, made_by: dict[str, Any], copies: int) -> None:
    """Raises ValueError unless the finished split holds what would be written now."""
    if not (directory / split / META).exists():
        raise ValueError(f"{directory / split} exists and holds no cached codes; name another")
    there = CodesSource(str(directory), split)
    wanted = made_by | {"copies": copies}
    have = there.tokenizer | {"copies": there.copies}
    for field, value in wanted.items():
        if have.get(field) != value:
            raise ValueError(
                f"{directory / split} holds codes of another {field}: {have.get(field)!r} there, "
                f"{value!r} now; remove it or name another directory"
            )
