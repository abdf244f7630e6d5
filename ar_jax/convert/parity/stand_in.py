"""Tokenizers in name only: a transformer's arrays do not depend on how its codes are decoded.

A case may have a transformer without a tokenizer, or one whose codes are none of the case's
tokenizer; our systems have both parts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.convert.part import empty_params
from ar_jax.schedules import Grid

AUTOENCODER = dict(
    image_channels=1,
    latent=1,
    channels=1,
    multipliers=(1,),
    encoder_blocks=1,
    decoder_blocks=1,
    attention=False,
    middle=False,
    groups=1,
)


def stand_in(grid: Grid, **fields: Any) -> dict[str, Any]:
    """The section 'tokenizer' of one that makes images as large as its latent ``grid``.

    ``fields`` are those of the section, and the ``code_width`` of its autoencoder.
    """
    width = fields.pop("code_width", 1)
    autoencoder = AUTOENCODER | {"image_size": grid, "code_width": width}
    return {"tokenizer": fields | {"autoencoder": autoencoder}}


def stand_in_params(config: dict[str, Any]) -> Any:
    """Its parameters, zeros."""
    shapes = empty_params(config, "tokenizer")
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
