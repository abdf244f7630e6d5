"""Official files to a configuration and parameters of ours, and back."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.api import Params
from ar_jax.build import build_schedule, build_system, build_tokenizer, trains_tokenizer
from ar_jax.convert import weight_file
from ar_jax.convert.options import (
    check_options,
    downsample,
    generator_options,
    tokenizer_options,
)
from ar_jax.convert.part import (
    GENERATOR,
    TOKENIZER,
    Part,
    empty_params,
    shapes_of,
    to_params,
    unread,
)
from ar_jax.convert.places import Tensors
from ar_jax.convert.release import Family

log = logging.getLogger(__name__)

# What a configuration says of training only, beside which a file cannot be checked.
TRAINING_FIELDS = {
    *("token_dropout", "attention_dropout", "residual_dropout", "mlp_dropout", "drop_path"),
    *("mlp_hidden_dropout", "init_std", "depth_scaled_init", "gate_init", "modulation_init"),
    *("dropout", "sampling_steps", "sampler", "last", "alpha", "train_temperature"),
    *("remat", "scan", "dtype", "codebook_update", "entropy", "entropy_group", "temperature"),
    *("parent", "name"),
}
# Sections of a run that no file says anything of: float32 as the official code in float32, and
# gentle settings for going on from a release. `--config` takes them from a configuration.
DEFAULTS: dict[str, Any] = dict(
    seed=0,
    dtype="float32",
    precision="highest",
    data=dict(
        source="folder:data/imagenet",
        image_size=256,
        channels=3,
        num_classes=1000,
        crop="margin",
        margin=1.125,
        flip=True,
        num_workers=8,
    ),
    train=dict(
        steps=10_000,
        batch_size=256,
        log_every=100,
        eval_every=1_000,
        eval_batches=20,
        preview_every=1_000,
        checkpoint_every=1_000,
    ),
    optimizer=dict(
        name="adamw",
        learning_rate=1e-5,
        schedule="constant",
        warmup_steps=100,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
    ),
    ema=dict(decay=0.0),
    mesh=dict(data=-1, fsdp=1, tensor=1, slices=1),
)
GENERATOR_ONLY = ("schedule", "backbone", "head", "sampling", "tokenizer_checkpoint")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A tokenizer, or a generator with its tokenizer.

    Attributes:
        config: of a run, plain dicts.
        params: of the tokenizer; or ``{'tokenizer', 'backbone', 'head'}``.
        kind: 'tokenizer' or 'generator'.
        unread: keys of what training left in the files beside the model.
    """

    config: dict[str, Any]
    params: Params
    kind: str
    unread: tuple[str, ...] = ()


def convert_files(
    family: Family,
    tokenizer: str | Path | None,
    transformer: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Converted:
    """What official files are to us.

    Args:
        family: see `release.choose`.
        tokenizer, transformer: files; without a transformer, the tokenizer alone. No tokenizer,
            where the family's has no tensors.
        options: what the files cannot say: 'image_size', 'scales', 'heads', ...
        config: a configuration of ours, for what only training needs. What it says of the model
            must be what the files say.

    Raises:
        ValueError: names the file, and the key, field or value that is wrong.
        OSError: a file cannot be opened.
    """
    said = {**(tokenizer_options(config) if config else {}), **(options or {})}
    tensors: Tensors = {}
    if tokenizer is None:
        tokenizer = "no file of a tokenizer"
    else:
        tensors = _tensors(tokenizer, family.unwrap_tokenizer)
    if transformer is None:
        part = _part(tokenizer, family.tokenizer, tensors, said)
        full = _merge(config, part.section, TOKENIZER)
        _check_tokenizer(full, part.section, tokenizer)
        check_options(options, full)
        params = to_params(part, tensors, empty_params(full, TOKENIZER), str(tokenizer))
        return Converted(full, params, TOKENIZER, _unread(part, tensors, tokenizer))
    # The transformer's file says for which image size and scales the tokenizer is taken.
    first = {name: value for name, value in said.items() if name not in ("image_size", "scales")}
    part = _part(tokenizer, family.tokenizer, tensors, first)
    drawn = _tensors(transformer, family.unwrap_generator)
    asked = {**(generator_options(config) if config else {}), **(options or {})}
    asked = {"downsample": downsample(part.section), **asked}
    generator = _part(transformer, family.generator, drawn, asked, drawn)
    part = _fitting_tokenizer(family, part, generator, tensors, said, tokenizer)
    section = {**part.section, **generator.section}
    full = _merge(config, section, GENERATOR)
    _check_tokenizer(full, part.section, tokenizer)
    _check_generator(full, section, transformer)
    check_options(options, full)
    params = to_params(generator, drawn, empty_params(full, GENERATOR), str(transformer))
    left = _unread(part, tensors, tokenizer) + _unread(generator, drawn, transformer)
    del drawn
    gc.collect()
    params[TOKENIZER] = to_params(part, tensors, empty_params(full, TOKENIZER), str(tokenizer))
    return Converted(full, params, GENERATOR, left)


def _tensors(path: str | Path, unwrap: Any) -> Tensors:
    container = weight_file.read(path)
    try:
        if not isinstance(container, Mapping):
            raise ValueError(f"it holds a {type(container).__name__}, not named tensors")
        tensors = unwrap(container)
        for key, value in tensors.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"{key!r} is a {type(value).__name__}, not a tensor")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors


def _unread(part: Part, tensors: Tensors, path: str | Path) -> tuple[str, ...]:
    keys = unread(part, tensors)
    if keys:
        log.info("%s: %d tensors of training are not read: %s", path, len(keys), ", ".join(keys))
    return keys


def _part(path: str | Path, make: Any, tensors: Tensors, *args: Any) -> Part:
    try:
        return make(shapes_of(tensors), *args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fitting_tokenizer(
    family: Family,
    part: Part,
    generator: Part,
    tensors: Tensors,
    said: Mapping[str, Any],
    path: str | Path,
) -> Part:
    """The tokenizer for images of the size that the generator makes."""
    scales = generator.section["schedule"].get("scales")
    rows, columns = build_schedule(generator.section).grids[-1]
    cell = downsample(part.section)
    size = rows * cell if rows == columns else (rows * cell, columns * cell)
    fitted = {**said, "image_size": size} | ({"scales": scales} if scales else {})
    if said.get("image_size") not in (None, size):
        raise ValueError(
            f"image_size is {said['image_size']}, but the transformer makes {rows}x{columns} "
            f"codes, which are images of {rows * cell}x{columns * cell}"
        )
    return _part(path, family.tokenizer, tensors, fitted)


def _merge(
    config: Mapping[str, Any] | None, section: Mapping[str, Any], kind: str
) -> dict[str, Any]:
    """The whole configuration of a run."""
    full: dict[str, Any] = copy.deepcopy(dict(DEFAULTS if config is None else config))
    # To be filled by who fine-tunes: flags only set fields that are there.
    full.setdefault("init_from", dict(workdir="", reinitialise=(), interpolate=()))
    if kind == TOKENIZER:
        section = {"objective": dict(name="tokenizer"), **section}
        if config is not None and not trains_tokenizer(config):
            full.pop("objective")
        full = {name: value for name, value in full.items() if name not in GENERATOR_ONLY}
    else:
        full.setdefault("tokenizer_checkpoint", "")
    for name, fields in section.items():
        full[name] = _update(fields, full.get(name, {}))
    if config is None:
        height, _, channels = build_tokenizer(full).image_shape
        full["data"] |= {"image_size": height, "channels": channels}
        if kind == GENERATOR and section["backbone"].get("num_classes"):
            full["data"]["num_classes"] = section["backbone"]["num_classes"]
    return full


def _update(fields: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with what the configuration says in their place, section in section."""
    merged = copy.deepcopy(dict(fields))
    for name, value in said.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _update(merged[name], value) if deeper else value
    return merged


def _check_tokenizer(full: Mapping[str, Any], section: Mapping[str, Any], path: Any) -> None:
    wanted = build_tokenizer({"dtype": "float32", "tokenizer": section["tokenizer"]})
    _check("tokenizer", build_tokenizer(full), wanted, path)


def _check_generator(full: Mapping[str, Any], section: Mapping[str, Any], path: Any) -> None:
    ours, wanted = build_system(full), build_system({"dtype": "float32", **section})
    for name in ("schedule", "backbone", "head"):
        _check(name, getattr(ours, name), getattr(wanted, name), path)


def _check(name: str, ours: Any, wanted: Any, path: Any) -> None:
    """Compares the fields of two modules."""
    if type(ours) is not type(wanted):
        raise ValueError(
            f"config.{name} is a {type(ours).__name__}, but {path} is a {type(wanted).__name__}"
        )
    for field in dataclasses.fields(wanted):
        if field.name in TRAINING_FIELDS:
            continue
        here, there = getattr(ours, field.name), getattr(wanted, field.name)
        if dataclasses.is_dataclass(there) and not isinstance(there, type):
            _check(f"{name}.{field.name}", here, there, path)
        elif here != there:
            raise ValueError(f"config.{name}.{field.name} is {here!r}, but {path} has {there!r}")
