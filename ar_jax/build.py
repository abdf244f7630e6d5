"""From a config to a system: one plain dict for every axis, and errors that name the field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import ml_collections

from ar_jax import schedules
from ar_jax.api import Objective, System
from ar_jax.backbones.decoder import Decoder
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.nn.blocks import REMAT_POLICIES
from ar_jax.objectives.kl_tokenizer import KLTokenizerObjective
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.schedules import Schedule
from ar_jax.tokenizers.autoencoder import Autoencoder
from ar_jax.tokenizers.kl import KLTokenizer
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer, VectorQuantizer
from ar_jax.tokenizers.tokenizer import Tokenizer

AnyTokenizer: TypeAlias = Tokenizer | KLTokenizer
Config: TypeAlias = ml_collections.ConfigDict | Mapping[str, Any]

QUANTIZERS = {"vq": VectorQuantizer, "multiscale_vq": MultiScaleQuantizer}
TOKENIZERS = {**QUANTIZERS, "kl": KLTokenizer}
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "raster": schedules.raster,
    "random": schedules.random,
    "next_scale": schedules.next_scale,
}
BACKBONES = {"decoder": Decoder}
HEADS = {"categorical": CategoricalHead}
TOKENIZER_OBJECTIVES = {"tokenizer": TokenizerObjective, "kl_tokenizer": KLTokenizerObjective}
OBJECTIVES = {**TOKENIZER_OBJECTIVES, "likelihood": Likelihood}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Values that modules only compare with, and would otherwise pass over in silence.
CHOICES = {
    "backbone.condition": ("class", "text"),
    "backbone.context": ("codes", "features"),
    "backbone.positions": ("learned", "rope", "target_aware"),
    "backbone.norm": ("layernorm", "affine_layernorm", "rmsnorm"),
    "backbone.modulation": ("none", "own", "shared"),
    "backbone.qk_norm": ("none", "cosine", "layernorm"),
    "backbone.attention_bias": ("none", "qv", "qkv"),
    "backbone.activation": ("gelu_tanh", "gelu", "silu", "relu"),
    "backbone.remat": tuple(REMAT_POLICIES),
    "tokenizer.codebook_update": ("gradient", "ema"),
}


def build_tokenizer(config: Config, dtype: Any = None) -> AnyTokenizer:
    """The tokenizer of ``config.tokenizer``, computing in ``dtype`` (default ``config.dtype``).

    Raises:
        ValueError: for an unknown or inconsistent field, with its name and value.
    """
    section = _plain(config["tokenizer"])
    form = _choose(TOKENIZERS, section, "tokenizer")
    autoencoder = _call(
        Autoencoder,
        _required(section, "autoencoder", "tokenizer"),
        "tokenizer.autoencoder",
        dtype=_dtype(config) if dtype is None else dtype,
        moments=form is KLTokenizer,
    )
    _check_attention(autoencoder)
    if form is KLTokenizer:
        tokenizer: KLTokenizer = _call(form, section, "tokenizer", autoencoder=autoencoder)
        _check_latents(tokenizer)
        return tokenizer
    grid = autoencoder.grid
    if form is MultiScaleQuantizer:
        grids = schedules.as_grids(_required(section, "scales", "tokenizer"))
        if grids[-1] != grid:
            raise ValueError(
                f"tokenizer.scales ends at {grids[-1]}, but the latent of image_size "
                f"{autoencoder.image_size} downsampled {autoencoder.downsample} times is {grid}: "
                f"the last scale must be {grid}"
            )
        placed: dict[str, Any] = {"grids": grids}
    else:
        placed = {"grid": grid}
    placed |= {"code_width": autoencoder.code_width}
    return Tokenizer(autoencoder=autoencoder, quantizer=_call(form, section, "tokenizer", **placed))


def build_schedule(config: Config) -> Schedule:
    """The schedule of ``config.schedule``."""
    section = _plain(config["schedule"])
    return _call(_choose(SCHEDULES, section, "schedule"), section, "schedule")


def build_system(config: Config) -> System:
    """The generator that ``config`` describes, its parts checked against each other.

    Its tokenizer is frozen and computes in float32 whatever ``config.dtype`` is, as the official
    code does: the codes of an image must not depend on the generator's precision.
    """
    tokenizer, schedule = build_tokenizer(config, jnp.float32), build_schedule(config)
    if schedule.grids != tokenizer.grids:
        raise ValueError(
            f"schedule covers the grids {schedule.grids}, but the tokenizer's codes lie on "
            f"{tokenizer.grids}: make config.schedule match config.tokenizer"
        )
    section = _plain(config["backbone"])
    backbone = _call(
        _choose(BACKBONES, section, "backbone"),
        section,
        "backbone",
        schedule=schedule,
        dtype=_dtype(config),
    )
    section = _plain(config["head"])
    head = _call(_choose(HEADS, section, "head"), section, "head", dtype=_dtype(config))
    _check_backbone(backbone, tokenizer)
    _check_vocabulary("head.vocab_size", head.vocab_size, tokenizer)
    return System(tokenizer=tokenizer, schedule=schedule, backbone=backbone, head=head)


def build_objective(config: Config) -> Objective:
    """The objective of ``config.objective`` around the tokenizer or the system it trains."""
    section = _plain(config["objective"])
    objective = _choose(OBJECTIVES, section, "objective")
    if objective in TOKENIZER_OBJECTIVES.values():
        tokenizer = build_tokenizer(config)
        _check_tokenizer_objective(config, tokenizer)
        if section.get("entropy") and not tokenizer.quantizer.entropy:
            raise ValueError(
                f"objective.entropy is {section['entropy']}, but tokenizer.entropy is False, so "
                "that the term is not computed: set tokenizer.entropy=True"
            )
        return _call(objective, section, "objective", tokenizer=tokenizer)
    return _call(objective, section, "objective", system=build_system(config))


def build_sampling(config: Config) -> tuple[Knobs, Guidance]:
    """The sampling defaults of ``config.sampling``."""
    section = _plain(config["sampling"])
    guidance = _call(Guidance, section.pop("guidance", {}), "sampling.guidance")
    knobs = _call(Knobs, section, "sampling")
    knobs.as_arrays()  # checks the ranges
    return knobs, guidance


def trains_tokenizer(config: Config) -> bool:
    """Whether the config trains a tokenizer (else a generator)."""
    return config["objective"]["name"] in TOKENIZER_OBJECTIVES


def _check_tokenizer_objective(config: Config, tokenizer: AnyTokenizer) -> None:
    fits = "tokenizer" if isinstance(tokenizer, Tokenizer) else "kl_tokenizer"
    if config["objective"]["name"] != fits:
        raise ValueError(
            f"objective.name is {config['objective']['name']!r}, but tokenizer.name="
            f"{config['tokenizer']['name']!r} is trained by {fits!r}"
        )


def _check_attention(autoencoder: Autoencoder) -> None:
    for part in ("encoder", "decoder"):
        field = f"tokenizer.autoencoder.{part}_attention"
        levels = getattr(autoencoder, f"{part}_attention")
        if levels is None:
            continue
        count = len(autoencoder.multipliers)
        if not autoencoder.attention and levels:
            raise ValueError(f"{field} is {levels}, but tokenizer.autoencoder.attention is False")
        if any(not 0 <= level < count for level in levels):
            raise ValueError(f"{field} is {levels}; there are the levels 0 to {count - 1}")


def _check_latents(tokenizer: KLTokenizer) -> None:
    if tokenizer.patch < 1:
        raise ValueError(f"tokenizer.patch is {tokenizer.patch}; it must be at least 1")
    if not tokenizer.scale > 0:
        raise ValueError(f"tokenizer.scale is {tokenizer.scale}; it must be positive")
    tokenizer.grids  # noqa: B018  raises where the patch does not divide the latent


def _check_backbone(backbone: Decoder, tokenizer: Tokenizer) -> None:
    if backbone.width % backbone.heads:
        raise ValueError(
            f"backbone.width {backbone.width} is not a multiple of backbone.heads {backbone.heads}"
        )
    features = isinstance(tokenizer.quantizer, MultiScaleQuantizer)
    wanted = "features" if features else "codes"
    if backbone.context != wanted:
        raise ValueError(
            f"backbone.context is {backbone.context!r}, but this tokenizer gives {wanted!r}"
        )
    if features and backbone.feature_width != tokenizer.autoencoder.code_width:
        raise ValueError(
            f"backbone.feature_width is {backbone.feature_width}, but the tokenizer's "
            f"autoencoder.code_width is {tokenizer.autoencoder.code_width}: make them equal"
        )
    if not features:
        _check_vocabulary("backbone.vocab_size", backbone.vocab_size, tokenizer)
    if backbone.condition == "class" and backbone.num_classes < 1:
        raise ValueError(f"backbone.num_classes is {backbone.num_classes}; it must be positive")
    if backbone.positions == "learned" and backbone.lead:
        raise ValueError(
            "backbone.positions='learned' has no place for caption rows or a start_row; use "
            "positions='rope' with condition='text' or start_row=True"
        )
    _check_order(backbone)
    if backbone.shared_embedding and (backbone.condition, backbone.context) != ("class", "codes"):
        raise ValueError(
            "backbone.shared_embedding=True is one table of codes and classes: it needs "
            f"context='codes' and condition='class', not {backbone.context!r} and "
            f"{backbone.condition!r}"
        )
    if backbone.step_embedding and backbone.modulation == "none":
        raise ValueError(
            "backbone.step_embedding=True is a part of the adaptive norms' condition, but "
            "backbone.modulation is 'none': use 'own' or 'shared', or step_embedding=False"
        )
    first = backbone.schedule.sizes[0]
    if backbone.positions != "learned" and backbone.conditioner.rows < first:
        raise ValueError(
            f"backbone.positions is {backbone.positions!r}, but the first step predicts {first} "
            f"codes at once and the condition has {backbone.conditioner.rows} rows to tell them "
            "apart: use positions='learned', or a first scale of 1"
        )


def _check_order(backbone: Decoder) -> None:
    schedule = backbone.schedule
    if schedule.random and backbone.positions != "target_aware":
        raise ValueError(
            f"backbone.positions is {backbone.positions!r}, but schedule.name={schedule.name!r} "
            "draws random orders: only positions='target_aware' say which cell comes next"
        )
    if backbone.positions == "target_aware" and set(schedule.sizes) != {1}:
        raise ValueError(
            "backbone.positions='target_aware' takes one code a step; the steps of "
            f"schedule.name={schedule.name!r} have {sorted(set(schedule.sizes))}: use 'learned'"
        )


def _check_vocabulary(field: str, value: int, tokenizer: Tokenizer) -> None:
    if value != tokenizer.codebook_size:
        raise ValueError(
            f"{field} is {value}, but the tokenizer's codebook_size is "
            f"{tokenizer.codebook_size}: make them equal"
        )


def _plain(section: Config) -> dict[str, Any]:
    """A section as a dict whose lists are tuples (modules must be hashable)."""

    def convert(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(convert(item) for item in value)
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            return {name: convert(value[name]) for name in value}
        return value

    return convert(section)


def _choose(table: Mapping[str, Callable], section: dict[str, Any], axis: str) -> Callable:
    """Takes ``name`` out of the section and looks it up."""
    name = section.pop("name", None)
    if name not in table:
        raise ValueError(f"{axis}.name is {name!r}; it must be one of {sorted(table)}")
    return table[name]


def _required(section: dict[str, Any], field: str, axis: str) -> Any:
    if field not in section:
        raise ValueError(f"{axis}.{field} is missing")
    return section.pop(field)


def _call(function: Callable, fields: dict[str, Any], axis: str, **placed: Any) -> Any:
    """Calls ``function(**fields, **placed)`` after checking the fields against its signature."""
    signature = inspect.signature(function).parameters
    known = [name for name in signature if name not in {*placed, "parent", "name"}]
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{axis}.{name} = {value!r} is unknown; {axis} takes {sorted(known)}")
        options = CHOICES.get(f"{axis}.{name}")
        if options and value not in options:
            raise ValueError(f"{axis}.{name} is {value!r}; it must be one of {list(options)}")
    for name in known:
        if signature[name].default is inspect.Parameter.empty and name not in fields:
            raise ValueError(f"{axis}.{name} is missing")
    try:
        return function(**fields, **placed)
    except TypeError as error:
        raise ValueError(f"{axis}: {error}") from error


def _dtype(config: Config) -> Any:
    if config["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {config['dtype']!r}; it must be one of {sorted(DTYPES)}")
    return DTYPES[config["dtype"]]


def check_trained_tokenizer(config: ml_collections.ConfigDict, tokenizer: Config) -> None:
    """Raises if ``config.tokenizer`` differs from a trained tokenizer's section ``tokenizer``."""
    trained = {"dtype": config["dtype"], "tokenizer": tokenizer}
    if build_tokenizer(config) == build_tokenizer(trained):
        return
    ours, theirs = _flatten(_plain(config["tokenizer"])), _flatten(_plain(tokenizer))
    for path in ours | theirs:
        value, other = (repr(flat[path]) if path in flat else "unset" for flat in (ours, theirs))
        if value != other:
            raise ValueError(
                f"tokenizer.{path} is {value}, but the trained tokenizer has {other}: "
                f"set config.tokenizer.{path} to it, or point tokenizer_checkpoint elsewhere"
            )


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
