"""Codes of a whole data set, computed once by a trained tokenizer and kept on disk.

A generator that trains on them (`config.data.source='codes:DIR'`) does not run the encoder at every
step. Augmentation is cached too: each training image is encoded in ``copies`` versions, of which
training draws one at every visit.

Every batch is split over the devices of this process; it alone encodes, on a pod as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.api import Params
from ar_jax.build import AnyTokenizer
from ar_jax.data import CodesSource, CodesWriter, Data, from_config
from ar_jax.data.codes_writer import SHARD_SIZE
from ar_jax.data.manifest import META
from ar_jax.evaluation.coding import encode_images
from ar_jax.evaluation.load import image_section, load_tokenizer
from ar_jax.io.checkpoint import tree_digest
from ar_jax.io.progress import Progress
from ar_jax.io.run_info import config_dict

log = logging.getLogger(__name__)
SPLITS = ("train", "test")


def cache_codes(
    workdir: str | Path,
    directory: str | Path,
    *,
    source: str | None = None,
    copies: int = 1,
    batch_size: int = 500,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = True,
) -> Path:
    """Encodes the train and the test split; the same call again returns at once.

    A call that was interrupted is gone on with by the same one, after the last file that was whole:
    with the same codes, on any devices and in batches of any size.

    Args:
        workdir: of a trained tokenizer; its newest parameters are used, the EMA if there is one:
            the same that a generator takes.
        directory: gets ``train`` and ``test``; a split counts once it is complete.
        source: of the images, as `config.data.source`; None: the tokenizer's.
        copies: versions of each training image. The first is the plain one, the others are cut and
            flipped as the tokenizer's `config.data` says.
        batch_size: images encoded at a time, by all devices together; rounded up to a multiple of
            their number.
        seed: of the copies.
        shard_size: images per file.
        devices: that encode; None: all of this process.
        progress: show a bar.

    Returns:
        ``directory``, for `config.data.source=f'codes:{directory}'`.

    Raises:
        ValueError: names what is wrong; a split that holds other codes is left as it is.
    """
    config, tokenizer, params = load_tokenizer(workdir)
    section = config_dict(image_section(config, source))
    data = {split: from_config(section, split) for split in SPLITS}
    _check(section, data["train"], tokenizer, copies, batch_size)
    made_by = {"digest": tree_digest(params), "data": section, "seed": seed}
    directory = Path(directory)
    mesh = Mesh(np.asarray(jax.local_devices() if devices is None else devices), ("data",))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    with jax.default_matmul_precision(config["precision"]):
        for split in SPLITS:
            count = copies if split == "train" else 1
            if (directory / split / META).exists():
                _check_finished(directory, split, made_by, count)
                continue
            writer = CodesWriter(
                directory / split,
                split,
                sizes=step_sizes(tokenizer),
                copies=count,
                **kind_of_codes(tokenizer),
                num_classes=data[split].source.num_classes,
                tokenizer=made_by,
                image_size=tokenizer.image_shape[0],
                channels=tokenizer.image_shape[2],
                class_names=data[split].source.class_names,
                shard_size=shard_size,
            )
            title = f"encoding {split} images" if progress else ""
            _encode(writer, data[split], tokenizer, params, count, seed, batch_size, mesh, title)
    return directory


def step_sizes(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """Codes of every step: a scale each, or one by one where there is a single grid.

    Of latents the finest scale is kept, which has all others in it.
    """
    cells = tuple(rows * columns for rows, columns in tokenizer.trained.grids)
    return cells if len(cells) > 1 else (1,) * cells[0]


def kind_of_codes(tokenizer: AnyTokenizer) -> dict[str, int]:
    """What a code is kept as: one of vocabulary_size, width (floats) and bits is not 0."""
    kinds = dict(vocabulary_size=0, width=0, bits=0)
    if tokenizer.codebook_size is None:
        return kinds | {"width": tokenizer.encoding_shape[1]}
    if bits := getattr(tokenizer, "bits", 0):
        return kinds | {"bits": bits}
    return kinds | {"vocabulary_size": tokenizer.codebook_size}


def _encode(
    writer: CodesWriter,
    data: Data,
    tokenizer: AnyTokenizer,
    params: Params,
    copies: int,
    seed: int,
    batch_size: int,
    mesh: Mesh,
    title: str,
) -> None:
    """Writes the codes of all images that ``writer`` does not have yet."""
    begin, total, parts = writer.written, len(data.source), mesh.devices.size
    if begin:
        log.info("going on after %s of %s images", f"{begin:,}", f"{total:,}")
    options = {
        "batch_size": -(-batch_size // parts) * parts,
        "first": begin,
        "process_index": 0,
        "process_count": 1,
    }
    versions = [data.eval_batches(**options)]
    versions += [
        data.eval_batches(**options, augment_seed=seed + copy) for copy in range(1, copies)
    ]
    rows = NamedSharding(mesh, P("data"))
    bar = Progress(total, initial=begin, title=title, unit="image", enabled=bool(title))
    with bar, writer:
        pending = None
        for batches in zip(*versions, strict=True):
            images = [jax.device_put(batch["image"], rows) for batch in batches]
            codes = [encode_images(tokenizer, params, version) for version in images]
            if pending is not None:  # written while the devices work on the next batch
                bar.advance(_store(writer, *pending))
            pending = codes, batches[0]
        if pending is not None:
            bar.advance(_store(writer, *pending))


def _store(writer: CodesWriter, codes: list[jax.Array], batch: dict[str, np.ndarray]) -> int:
    """Writes the real rows of codes, each [B, L(, W)], and returns how many there are."""
    real = batch["mask"] > 0
    writer.write(np.stack(jax.device_get(codes), axis=1)[real], batch["label"][real])
    return int(real.sum())


def _check(
    section: dict[str, Any], data: Data, tokenizer: AnyTokenizer, copies: int, batch_size: int
) -> None:
    if data.source.kind != "image":
        raise ValueError(f"--source={section['source']} holds codes; name the images")
    shape = (section["image_size"], section["image_size"], section["channels"])
    if shape != tuple(tokenizer.image_shape):
        raise ValueError(
            f"--source={section['source']} gives images {shape}, but the tokenizer is for "
            f"{tuple(tokenizer.image_shape)}"
        )
    for name, value in (("copies", copies), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    crop, flip = section.get("crop", "none"), section.get("flip", False)
    if copies > 1 and crop in ("none", "center") and not flip:
        raise ValueError(
            f"--copies={copies} would be equal: the tokenizer's config.data has crop={crop!r} and "
            f"flip={flip}; use --copies=1"
        )


def _check_finished(directory: Path, split: str, made_by: dict[str, Any], copies: int) -> None:
    """Raises ValueError unless the finished split holds what would be written now."""
    there = CodesSource(str(directory), split)
    wanted = made_by | {"copies": copies}
    have = there.tokenizer | {"copies": there.copies}
    for field, value in wanted.items():
        if have.get(field) != value:
            raise ValueError(
                f"{directory / split} holds codes of another {field}: {have.get(field)!r} there, "
                f"{value!r} now; remove it or name another directory"
            )
