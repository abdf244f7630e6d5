"""Checks that the parts of a tokenizer and its objective fit each other; errors name a field."""

from __future__ import annotations

import math
from typing import Any

from ar_jax.nn.conv import SPARE_GROUPS
from ar_jax.tokenizers.autoencoder import Autoencoder
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.contract import Quantizer
from ar_jax.tokenizers.kl import KLTokenizer
from ar_jax.tokenizers.lookup_free import LookupFreeQuantizer
from ar_jax.tokenizers.pixels import PixelTokenizer
from ar_jax.tokenizers.pooled_autoencoder import PooledAutoencoder

MAX_INDEX_BITS = 24  # a histogram of all codes is kept
MAX_ENTROPY_GROUP = 16


def check_projection(autoencoder: Autoencoder) -> None:
    """config.tokenizer.autoencoder: what is not projected is as wide as the codes."""
    if not autoencoder.projection and autoencoder.latent != autoencoder.code_width:
        raise ValueError(
            f"tokenizer.autoencoder.latent is {autoencoder.latent} and code_width "
            f"{autoencoder.code_width}, but projection=0 puts nothing between them: make them equal"
        )


def check_losses(config: Any, quantizer: Quantizer) -> None:
    """config.objective asks of the quantiser only for what it has."""
    objective, name = config["objective"], config["tokenizer"]["name"]
    for term in ("codebook", "commitment", "entropy"):
        if objective.get(term) and term not in quantizer.losses:
            raise ValueError(
                f"objective.{term} is {objective[term]}, but tokenizer.name={name!r} has no such "
                f"loss, only {list(quantizer.losses)}: leave it out"
            )
    if quantizer.codebook_update is None:
        for field in ("restart_below", "ema_decay", "kmeans_vectors"):
            if objective.get(field):
                raise ValueError(
                    f"objective.{field} is {objective[field]}, but tokenizer.name={name!r} has no "
                    "codebook to move: leave it out"
                )
    if objective.get("entropy") and not quantizer.entropy:
        raise ValueError(
            f"objective.entropy is {objective['entropy']}, but tokenizer.entropy is False, so that "
            "the term is not computed: set tokenizer.entropy=True"
        )
    vectors = objective.get("kmeans_vectors")
    if vectors and vectors < quantizer.codebook_size:
        raise ValueError(
            f"objective.kmeans_vectors is {vectors}, from which no {quantizer.codebook_size} "
            "centres can be found: it must be at least tokenizer.codebook_size"
        )
    source = config.get("init_from", {}).get("workdir")
    if vectors and source:
        raise ValueError(
            f"objective.kmeans_vectors is {vectors}, but init_from.workdir={source!r} has a "
            "codebook, which these would replace: set it to 0"
        )


def check_scalar_levels(levels: tuple[int, ...], code_width: int) -> None:
    """config.tokenizer of name 'fsq': a level list for the channels."""
    if len(levels) != code_width:
        raise ValueError(
            f"tokenizer.levels has {len(levels)} numbers, but tokenizer.autoencoder.code_width is "
            f"{code_width}: give every channel its levels"
        )
    if min(levels) < 2:
        raise ValueError(f"tokenizer.levels is {levels}; a channel needs at least 2 levels")
    if math.prod(levels) > 2**MAX_INDEX_BITS:
        raise ValueError(
            f"tokenizer.levels is {levels}, which are {math.prod(levels)} codes; a code is one "
            f"number and there may be at most 2^{MAX_INDEX_BITS}"
        )


def check_bits(quantizer: LookupFreeQuantizer | MultiScaleBitwiseQuantizer) -> None:
    """config.tokenizer of codes that are bits."""
    bits, group = quantizer.code_width, quantizer.entropy_group
    if isinstance(quantizer, LookupFreeQuantizer) and bits > MAX_INDEX_BITS:
        raise ValueError(
            f"tokenizer.autoencoder.code_width is {bits}, which are 2^{bits} codes; a code is one "
            f"number and there may be at most 2^{MAX_INDEX_BITS}: tokenizer.name="
            "'multiscale_bitwise' keeps bits"
        )
    if group < 1 or bits % group or group > MAX_ENTROPY_GROUP:
        raise ValueError(
            f"tokenizer.entropy_group is {group}; it must divide tokenizer.autoencoder.code_width "
            f"{bits} and be at most {MAX_ENTROPY_GROUP}, as 2^group numbers are computed for "
            "every vector"
        )
    if not quantizer.temperature > 0:
        raise ValueError(f"tokenizer.temperature is {quantizer.temperature}; it must be positive")


def check_levels(autoencoder: Autoencoder) -> None:
    """config.tokenizer.autoencoder: both sides have the same levels, and those with attention."""
    ours, theirs = autoencoder.multipliers, autoencoder.decoder_multipliers
    if theirs is not None and len(theirs) != len(ours):
        raise ValueError(
            f"tokenizer.autoencoder.decoder_multipliers is {theirs}; it must be as many as the "
            f"multipliers {ours}, or images would not come back at their size"
        )
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


def check_groups(autoencoder: Autoencoder | PooledAutoencoder) -> None:
    """config.tokenizer.autoencoder: group norms of the first level, and so of all, are even."""
    groups, channels = autoencoder.groups, autoencoder.channels
    if groups < 1 or (channels % groups and channels % SPARE_GROUPS):
        raise ValueError(
            f"tokenizer.autoencoder.groups is {groups}, which does not divide "
            f"tokenizer.autoencoder.channels {channels}, and nor does {SPARE_GROUPS}"
        )


def check_latents(tokenizer: KLTokenizer) -> None:
    """config.tokenizer of name 'kl'."""
    if tokenizer.patch < 1:
        raise ValueError(f"tokenizer.patch is {tokenizer.patch}; it must be at least 1")
    if not tokenizer.scale > 0:
        raise ValueError(f"tokenizer.scale is {tokenizer.scale}; it must be positive")
    tokenizer.grids  # noqa: B018  raises where the patch does not divide the latent


def check_pixels(part: str, module: Any, tokenizer: PixelTokenizer) -> None:
    """config.backbone or config.head, the ``part``, is for the pixels of config.tokenizer."""
    for field, wanted in (("channels", tokenizer.image_channels), ("values", tokenizer.values)):
        if getattr(module, field) != wanted:
            raise ValueError(
                f"{part}.{field} is {getattr(module, field)}, but the tokenizer's pixels have "
                f"{wanted}: make them equal"
            )
