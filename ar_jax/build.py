"""From a config to a system: one plain dict for every axis, and errors that name the field."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import ml_collections

from ar_jax import schedules
from ar_jax.api import Objective, Params, System, matches_any
from ar_jax.axes import (
    AUTOENCODERS,
    BACKBONES,
    DISCRIMINATORS,
    HEADS,
    NOT_ANNEALED,
    OBJECTIVES,
    SAMPLERS,
    SCHEDULES,
    TOKENIZER_OBJECTIVES,
    TOKENIZERS,
    AnySampler,
)
from ar_jax.backbones.tree_decoder import TreeDecoder
from ar_jax.consistency import (
    AnyTokenizer,
    check_bit_flips,
    check_label_dropout,
    check_objective,
    check_self_correction,
    check_system,
    check_tokenizer_objective,
)
from ar_jax.field_types import check_types
from ar_jax.heads.checks import check_repeats
from ar_jax.heads.flow import VelocityHead
from ar_jax.nn.blocks import REMAT_POLICIES
from ar_jax.nn.draft_tree import DraftTree
from ar_jax.nn.splash import KERNELS
from ar_jax.objectives.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, Adversary
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.masked import Masked
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.draft import DraftSampler, check_drafts
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.flow import FlowSampler
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler
from ar_jax.schedules import Schedule
from ar_jax.tokenizers.autoencoder import Autoencoder
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.checks import (
    check_bits,
    check_groups,
    check_latents,
    check_levels,
    check_projection,
    check_scalar_levels,
)
from ar_jax.tokenizers.finite_scalar import FiniteScalarQuantizer
from ar_jax.tokenizers.kl import KLTokenizer
from ar_jax.tokenizers.lookup_free import LookupFreeQuantizer
from ar_jax.tokenizers.pixels import PixelTokenizer
from ar_jax.tokenizers.pooled_autoencoder import PooledAutoencoder
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer
from ar_jax.tokenizers.tokenizer import Tokenizer

Config: TypeAlias = ml_collections.ConfigDict | Mapping[str, Any]

CODEBOOK = "quantizer/codebook"  # the parameter that objectives move outside of the gradient
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
    "objective.adversarial.loss": tuple(DISCRIMINATOR_LOSSES),
    "objective.adversarial.generator_loss": tuple(GENERATOR_LOSSES),
}


def build_tokenizer(config: Config, dtype: Any = None) -> AnyTokenizer:
    """The tokenizer of ``config.tokenizer``, computing in ``dtype`` (default ``config.dtype``).

    Raises:
        ValueError: for an unknown or inconsistent field, with its name and value.
    """
    section = _plain(config["tokenizer"])
    form = _choose(TOKENIZERS, section, "tokenizer")
    if form is PixelTokenizer:
        pixels: PixelTokenizer = _call(form, section, "tokenizer")
        return pixels
    autoencoder = _build_autoencoder(
        _required(section, "autoencoder", "tokenizer"),
        dtype=_dtype(config) if dtype is None else dtype,
        moments=form is KLTokenizer,
    )
    if form is KLTokenizer:
        tokenizer: KLTokenizer = _call(form, section, "tokenizer", autoencoder=autoencoder)
        check_latents(tokenizer)
        return tokenizer
    grid = autoencoder.grid
    if form in (MultiScaleQuantizer, MultiScaleBitwiseQuantizer):
        grids = schedules.as_grids(_required(section, "scales", "tokenizer"))
        patch = section.get("patch", 1) if form is MultiScaleBitwiseQuantizer else 1
        if (grids[-1][0] * patch, grids[-1][1] * patch) != grid:
            raise ValueError(
                f"tokenizer.scales ends at {grids[-1]}, but the latent of image_size "
                f"{autoencoder.image_size} downsampled {autoencoder.downsample} times is {grid}: "
                f"the last scale{f' times the patch {patch}' if patch != 1 else ''} must be {grid}"
            )
        placed: dict[str, Any] = {"grids": grids}
    else:
        placed = {"grid": grid}
    placed |= {"code_width": autoencoder.code_width}
    quantizer = _call(form, section, "tokenizer", **placed)
    if isinstance(quantizer, FiniteScalarQuantizer):
        check_scalar_levels(quantizer.levels, autoencoder.code_width)
    elif isinstance(quantizer, LookupFreeQuantizer | MultiScaleBitwiseQuantizer):
        check_bits(quantizer)
    return Tokenizer(autoencoder=autoencoder, quantizer=quantizer)


def _build_autoencoder(
    section: dict[str, Any], *, dtype: Any, moments: bool
) -> Autoencoder | PooledAutoencoder:
    """Without a name the section is a 'strided' one."""
    form = _choose(AUTOENCODERS, {"name": "strided"} | section, "tokenizer.autoencoder")
    fields = {name: value for name, value in section.items() if name != "name"}
    if form is PooledAutoencoder:
        if moments:
            raise ValueError(
                "tokenizer.autoencoder.name is 'pooled', which has no posterior: tokenizer.name="
                "'kl' needs 'strided'"
            )
        pooled = _call(form, fields, "tokenizer.autoencoder", dtype=dtype)
        check_groups(pooled)
        return pooled
    autoencoder = _call(form, fields, "tokenizer.autoencoder", dtype=dtype, moments=moments)
    check_levels(autoencoder)
    check_groups(autoencoder)
    check_projection(autoencoder)
    return autoencoder


def build_schedule(config: Config) -> Schedule:
    """The schedule of ``config.schedule``."""
    section = _plain(config["schedule"])
    if "anneal" in section and (reason := NOT_ANNEALED.get(section.get("name", ""))):
        raise ValueError(
            f"schedule.anneal is {section['anneal']}, but schedule.name is {section['name']!r}: "
            f"{reason}"
        )
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
        attention=_attention(config),
        dtype=_dtype(config),
    )
    section = _plain(config["head"])
    head = _call(_choose(HEADS, section, "head"), section, "head", dtype=_dtype(config))
    check_system(tokenizer, backbone, head)
    return System(tokenizer=tokenizer, schedule=schedule, backbone=backbone, head=head)


def build_objective(config: Config) -> Objective:
    """The objective of ``config.objective`` around the tokenizer or the system it trains."""
    section = _plain(config["objective"])
    objective = _choose(OBJECTIVES, section, "objective")
    if objective in TOKENIZER_OBJECTIVES.values():
        tokenizer = build_tokenizer(config)
        check_tokenizer_objective(config, tokenizer)
        adversary = _build_adversary(section.pop("adversarial", None), tokenizer, _dtype(config))
        placed: dict[str, Any] = {"tokenizer": tokenizer, "adversary": adversary}
        if objective is TokenizerObjective:
            freeze = config.get("optimizer", {}).get("freeze", ())
            placed["fixed_codebook"] = matches_any(CODEBOOK, freeze)
        return _call(objective, section, "objective", **placed)
    system = build_system(config)
    check_objective(config["objective"]["name"], system.backbone, system.head)
    built: Any = _call(objective, section, "objective", system=system)
    check_label_dropout(built.label_dropout, system.backbone)
    if isinstance(built, Masked):
        check_repeats(built.repeats, system.head)
    if isinstance(built, Likelihood):
        check_self_correction(built.self_correction, system.tokenizer)
        check_bit_flips(built.bit_flips, built.flipped_scales, system.tokenizer)
    return built


def _build_adversary(
    section: dict[str, Any] | None, tokenizer: AnyTokenizer, dtype: Any
) -> Adversary | None:
    """Of ``config.objective.adversarial``: None where there is none or its weight is 0."""
    if section is None:
        return None
    axis = "objective.adversarial"
    fields = _required(section, "discriminator", axis)
    form = _choose(DISCRIMINATORS, fields, f"{axis}.discriminator")
    discriminator = _call(form, fields, f"{axis}.discriminator", dtype=dtype)
    placed = {"discriminator": discriminator, "image_shape": tokenizer.image_shape}
    adversary: Adversary = _call(Adversary, section, axis, **placed)
    return adversary if adversary.weight else None


def build_sampling(config: Config) -> tuple[Knobs, Guidance]:
    """The sampling defaults of ``config.sampling``."""
    section = _plain(config["sampling"])
    guidance = _call(Guidance, section.pop("guidance", {}), "sampling.guidance")
    knobs = _call(Knobs, section, "sampling")
    knobs.as_arrays()  # checks the ranges
    return knobs, guidance


def create_sampler(system: System, params: Params) -> AnySampler:
    """The sampler of a system as it was trained and its parameters, all three parts of them."""
    return sampler_of(system).create(system, params)


def create_draft_sampler(
    sampler: CachedSampler, draft: CachedSampler, branches: Sequence[int]
) -> DraftSampler:
    """The sampler of a large model that a small one drafts for.

    Args:
        sampler, draft: of the large and of the small model, of one tokenizer and schedule.
        branches: see `DraftTree`.

    Raises:
        ValueError: models that do not fit each other or this way of drawing, or bad branches.
    """
    tree = DraftTree(tuple(branches))
    check_drafts(sampler, draft, tree)
    large, small = (
        dataclasses.replace(one.system, backbone=TreeDecoder.of(one.system.backbone, tree))
        for one in (sampler, draft)
    )
    return DraftSampler(
        system=large,
        params=sampler.params,
        draft_system=small,
        draft_params=draft.params,
        tree=tree,
    )


def sampler_of(system: System) -> Any:
    """The class of its sampler: heads of velocities have one for any backbone."""
    return FlowSampler if isinstance(system.head, VelocityHead) else SAMPLERS[type(system.backbone)]


def trains_tokenizer(config: Config) -> bool:
    """Whether the config trains a tokenizer (else a generator).

    Raises:
        ValueError: ``config.objective`` has no name.
    """
    if "name" not in config["objective"]:
        raise ValueError(f"objective.name is missing; it must be one of {sorted(OBJECTIVES)}")
    return config["objective"]["name"] in TOKENIZER_OBJECTIVES


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
    """Calls ``function(**fields, **placed)`` after checking the fields against its signature.

    Raises:
        ValueError: names the field that is unknown, missing, of another type or none of `CHOICES`.
    """
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
    check_types(axis, fields, function)
    try:
        return function(**fields, **placed)
    except TypeError as error:
        raise ValueError(f"{axis}: {error}") from error


def _dtype(config: Config) -> Any:
    if config["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {config['dtype']!r}; it must be one of {sorted(DTYPES)}")
    return DTYPES[config["dtype"]]


def _attention(config: Config) -> str:
    """``config.attention``, 'auto' where a config has none."""
    kernel = config.get("attention", "auto")
    if kernel not in KERNELS:
        raise ValueError(f"attention is {kernel!r}; it must be one of {KERNELS}")
    return kernel


def check_trained_tokenizer(config: ml_collections.ConfigDict, tokenizer: Config) -> None:
    """Raises if ``config.tokenizer`` differs from a trained tokenizer's section ``tokenizer``."""
    trained = {"dtype": config["dtype"], "tokenizer": tokenizer}
    if build_tokenizer(config).trained == build_tokenizer(trained).trained:
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
