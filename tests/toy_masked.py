"""A small masked system of continuous codes, with parameters that let every part speak."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.objectives.masked import Masked

CLASSES = 3
# Changes that make EAR's of it: no encoder, and a head of one pass.
ENERGY: dict[str, Any] = dict(
    backbone=dict(depth=0, width=12, heads=None),
    head=dict(name="energy", code_width=2, width=16, depth=1, noise_width=3),
)
# GIVT's: a head with a density.
MIXTURE: dict[str, Any] = dict(
    backbone=ENERGY["backbone"],
    head=dict(name="mixture", code_width=2, components=3, candidates=4),
)


def masked_config(**changes: Any) -> dict[str, Any]:
    """4 x 4 codes of 2 numbers; ``changes`` are dictionaries that update the section they name.

    One of another 'name' takes the section's place.
    """
    config: dict[str, Any] = dict(
        dtype="float32",
        tokenizer=dict(
            name="kl",
            scale=0.5,
            autoencoder=dict(
                image_size=8,
                image_channels=1,
                latent=4,
                code_width=2,
                channels=4,
                multipliers=(1, 2),
                encoder_blocks=1,
                decoder_blocks=1,
                attention=False,
                middle=False,
                groups=2,
            ),
        ),
        schedule=dict(name="masked", grid=4, iterations=3),
        backbone=dict(
            name="encoder_decoder",
            code_width=2,
            num_classes=CLASSES,
            width=16,
            depth=2,
            heads=2,
            decoder_width=12,
            decoder_depth=1,
            decoder_heads=3,
            buffer=2,
        ),
        head=dict(name="diffusion", code_width=2, width=16, depth=1, sampling_steps="ddim4"),
        objective=dict(name="masked"),
    )
    for section, fields in changes.items():
        old = config[section]
        same = fields.get("name", old.get("name")) == old.get("name")
        config[section] = {**(old if same else {}), **fields}
    return config


def masked_system(**changes: Any) -> tuple[System, dict[str, Any]]:
    """(system, {'tokenizer', 'backbone', 'head'})."""
    system = build_system(masked_config(**changes))

    @jax.jit
    def shapes(key: jax.Array) -> Any:
        return {"tokenizer": init_tokenizer(system, key), **Masked(system=system).init(key)}

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32),
        jax.eval_shape(shapes, jax.random.key(0)),
    )
    return system, params
