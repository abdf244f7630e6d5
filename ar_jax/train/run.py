"""From a configuration and a directory to a trained system."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from ar_jax.api import Params
from ar_jax.build import (
    build_objective,
    build_sampling,
    check_trained_tokenizer,
    trains_tokenizer,
)
from ar_jax.data import CodesSource, Data, SkipUnreadable, from_config, open_source
from ar_jax.evaluation.cache import kind_of_codes, step_sizes
from ar_jax.io.checkpoint import (
    PARAMS,
    TOKENIZER,
    load_params,
    load_tree,
    tree_digest,
)
from ar_jax.io.run_info import check_workdir, read_config
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.sampling.guidance import mixed_layers
from ar_jax.train.fields import read_settings
from ar_jax.train.loop import Outcome, train
from ar_jax.train.perceptual import load_perceptual
from ar_jax.train.preview import build_preview
from ar_jax.train.sampled import build_measure
from ar_jax.train.start_from import read_init_from

SECTIONS: tuple[str, ...] = ("seed", "dtype", "precision", "data", "tokenizer", "objective")
SECTIONS += ("train", "optimizer", "ema", "mesh")
OPTIONAL: tuple[str, ...] = ("init_from",)
TOKENIZER_OPTIONAL = ("discriminator_optimizer",)
GENERATOR_OPTIONAL = ("attention",)
GENERATOR_SECTIONS = ("tokenizer_checkpoint", "schedule", "backbone", "head", "sampling")


def train_and_evaluate(config: Any, workdir: str | Path) -> Outcome:
    """Trains what ``config`` describes in ``workdir``, going on where it was stopped.

    Args:
        config: a ConfigDict of `configs/`.
        workdir: made if absent; holds checkpoints, metrics, previews, the resolved configuration
            and, for a generator, its tokenizer.

    Raises:
        ValueError: names the field, file or directory that is wrong; nothing is written then.
    """
    check_sections(config)
    check_workdir(config, workdir)
    fields = read_settings(config).train
    objective: Any = build_objective(config)
    splits = {split: from_config(config["data"], split) for split in ("train", "test")}
    tokenizer = getattr(objective, "tokenizer", None) or objective.system.tokenizer
    check_images(config, tokenizer.image_shape)
    for data in splits.values():
        check_captions(config, objective, data)
    frozen: Params = {}
    if trains_tokenizer(config):
        frozen = load_perceptual(objective, workdir)
    else:
        check_classes(config)
        check_sampling(config, objective.system)
        frozen = {"tokenizer": load_tokenizer(config, workdir, objective.system)}
        check_codes(config, objective.system, frozen["tokenizer"])
    test = splits["test"]
    eval_data = test.eval_batches(
        batch_size=fields.batch_size // fields.accumulation,
        max_batches=fields.eval_batches or None,
    )
    measure = None
    if fields.sample_images:
        if trains_tokenizer(config):
            raise ValueError(
                f"config.train.sample_images={fields.sample_images}, but a tokenizer draws none: "
                "set it to 0"
            )
        measure = build_measure(config, objective, frozen["tokenizer"], fields.sample_images)
    preview = build_preview(config, objective, test) if fields.preview_every else None
    with splits["train"].train_iterator(
        batch_size=fields.batch_size, seed=config["seed"]
    ) as train_data:
        return train(
            config,
            objective,
            frozen,
            workdir,
            train_data,
            eval_data,
            preview,
            measure,
            count_skips(splits.values()),
        )


def check_sections(config: Any) -> None:
    """Raises ValueError that names a section of the configuration that is unknown or missing."""
    if "objective" not in config:
        raise ValueError("config.objective is missing")
    wanted, optional = SECTIONS, OPTIONAL + TOKENIZER_OPTIONAL
    if not trains_tokenizer(config):
        wanted, optional = wanted + GENERATOR_SECTIONS, OPTIONAL + GENERATOR_OPTIONAL
    for name in config:
        if name not in wanted + optional:
            known = ", ".join(wanted + optional)
            raise ValueError(f"config.{name} is no section; a config has {known}")
    for name in wanted:
        if name not in config:
            raise ValueError(f"config.{name} is missing; a config has {', '.join(wanted)}")


def check_images(config: Any, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError if data and tokenizer are of different image shapes."""
    data = config["data"]
    shape = (data["image_size"], data["image_size"], data["channels"])
    if shape != tuple(image_shape):
        raise ValueError(
            f"config.data.image_size={shape[0]} and channels={shape[2]} give images {shape}, but "
            f"config.tokenizer is for {tuple(image_shape)}: make them equal"
        )


def check_classes(config: Any) -> None:
    """Raises ValueError if data and backbone disagree on the number of classes."""
    ours, theirs = config["backbone"].get("num_classes", 0), config["data"]["num_classes"]
    if config["backbone"].get("condition", "class") == "class" and ours != theirs:
        raise ValueError(
            f"config.backbone.num_classes={ours}, but config.data.num_classes={theirs}: make them "
            "equal"
        )


def check_captions(config: Any, objective: Any, data: Data) -> None:
    """Raises ValueError if the data have no captions where the generator is told one, or other."""
    directory, shape = config["data"].get("captions", ""), data.source.caption_shape
    backbone = None if trains_tokenizer(config) else objective.system.backbone
    if backbone is None or "caption" not in backbone.conditioner.fields:
        if directory:
            raise ValueError(
                f"config.data.captions={directory}, but nothing here is told a caption: leave it "
                "empty, or set config.backbone.condition to 'text'"
            )
        return
    if shape is None:
        raise ValueError(
            "config.backbone.condition is 'text', but config.data.captions is empty: name the "
            "directory of the captions' features (ar_jax/data/captions.py)"
        )
    wanted = (backbone.caption_length, backbone.caption_features)
    if shape != wanted:
        raise ValueError(
            f"config.data.captions={directory} has {shape[0]} rows of {shape[1]} a caption, but "
            f"config.backbone has caption_length={wanted[0]} and caption_features={wanted[1]}: "
            "make them equal (rows may be padding, see caption_mask)"
        )


def check_sampling(config: Any, system: Any) -> None:
    """Raises ValueError that names a bad field of config.sampling.

    Training itself draws no samples where previews are off, and would end before anyone knew.
    """
    knobs, guidance = build_sampling(config)
    knobs.check_steps(system.schedule.num_steps)
    guidance.scales(system.schedule.num_steps)
    mixed_layers(system.backbone, guidance)


def count_skips(splits: Iterable[Data]) -> Callable[[], dict[str, float]] | None:
    """How to count the unreadable items that this process has met; None where nothing is skipped.

    Returns:
        () -> {'data/skipped': different items of all ``splits`` so far}.
    """
    sources = [data.source for data in splits if isinstance(data.source, SkipUnreadable)]
    if not sources:
        return None
    return lambda: {"data/skipped": float(sum(source.skipped for source in sources))}


def check_codes(config: Any, system: Any, tokenizer: Params) -> None:
    """Raises ValueError if cached codes are not this tokenizer's, in this schedule's order."""
    for split in ("train", "test") if config["data"]["source"].startswith("codes:") else ():
        source = open_source(config["data"]["source"], split)
        assert isinstance(source, CodesSource)
        sizes, tokens = step_sizes(system.tokenizer), system.tokenizer
        kind = kind_of_codes(tokens)
        if source.sizes != sizes:
            raise ValueError(
                f"{source.name} holds steps of {source.sizes} codes, config.schedule makes "
                f"{sizes}: write the codes again with this config"
            )
        if source.bits != kind["bits"]:
            raise ValueError(
                f"{source.name} holds {source.bits} bits for a code, the tokenizer makes "
                f"{kind['bits']}: write the codes again with this tokenizer"
            )
        if source.vocabulary_size != kind["vocabulary_size"]:
            raise ValueError(
                f"{source.name} holds codes below {source.vocabulary_size}, the tokenizer has "
                f"{tokens.codebook_size}: write the codes again with this tokenizer"
            )
        if source.width != kind["width"]:
            raise ValueError(
                f"{source.name} holds {source.width} floats for a code, the tokenizer makes "
                f"{kind['width']}: write the codes again with this tokenizer"
            )
        theirs, ours = source.tokenizer.get("digest"), tree_digest(tokenizer)
        if theirs != ours:
            raise ValueError(
                f"{source.name} was written with the tokenizer of digest {theirs}, this run's has "
                f"{ours}: write the codes again with this tokenizer"
            )


def load_tokenizer(config: Any, workdir: str | Path, system: Any) -> Params:
    """The frozen tokenizer of a generator: the workdir's once it keeps one.

    A run that starts from another one's parameters (``config.init_from``) has its tokenizer.

    Raises:
        ValueError: no tokenizer is named, it differs from ``config.tokenizer``, its parameters do
            not fit, or are not those that the run to start from was trained with.
    """
    folder = Path(workdir) / TOKENIZER
    shapes = jax.eval_shape(lambda key: init_tokenizer(system, key), jax.random.key(0))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    if (folder / PARAMS).exists():
        return load_tree(folder / PARAMS, shapes)
    source, start = config["tokenizer_checkpoint"], read_init_from(config).workdir
    if not jax.tree.leaves(shapes):
        if source:
            raise ValueError(
                f"config.tokenizer_checkpoint={source}, but config.tokenizer has no parameters to "
                "take from there: leave it empty"
            )
        return {}
    if start:
        check_trained_tokenizer(config, _of_our_size(config, read_config(start)["tokenizer"]))
        kept = load_tree(Path(start) / TOKENIZER / PARAMS, shapes)
        if source and tree_digest(load_params(source, "auto")) != tree_digest(kept):
            raise ValueError(
                f"config.tokenizer_checkpoint={source} is not the tokenizer that "
                f"config.init_from.workdir={start} was trained with: leave tokenizer_checkpoint "
                "empty to take that"
            )
        return kept
    if not source:
        raise ValueError(
            "config.tokenizer_checkpoint is empty: train a tokenizer first (its config is one of "
            "configs/*/tokenizer_*.py) and name its workdir with --config.tokenizer_checkpoint=DIR"
        )
    check_trained_tokenizer(config, read_config(source)["tokenizer"])
    params = load_params(source, "auto")
    _check_tree(params, shapes, source)
    return params


def _of_our_size(config: Any, tokenizer: Any) -> dict[str, Any]:
    """The section of a trained tokenizer for images of our size, of which no parameter knows."""
    ours = config["tokenizer"]
    changed = dict(tokenizer) | {name: ours[name] for name in ("scales",) if name in ours}
    size = ours["autoencoder"]["image_size"]
    return changed | {"autoencoder": dict(tokenizer["autoencoder"]) | {"image_size": size}}


def _check_tree(params: Params, shapes: Params, source: str) -> None:
    if jax.tree.map(lambda leaf: leaf.shape, params) != jax.tree.map(lambda s: s.shape, shapes):
        raise ValueError(
            f"config.tokenizer_checkpoint={source}: its parameters do not have the names and "
            "shapes of config.tokenizer; was it trained by another version?"
        )
