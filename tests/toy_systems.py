"""Small systems of both families, with parameters that let every part speak."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.objectives.likelihood import Likelihood, init_tokenizer

CLASSES = 3
AUTOENCODER = dict(
    image_size=8,
    image_channels=1,
    latent=4,
    code_width=4,
    channels=4,
    multipliers=(1, 2),
    encoder_blocks=1,
    decoder_blocks=1,
    attention=False,
    middle=False,
    groups=2,
)


def toy_config(name: str, *, vocab_size: int = 8, **changes: Any) -> dict[str, Any]:
    """The config of a system: 'next_scale' (VAR's layers), 'raster' (LlamaGen's), 'random' (RAR's),
    'instructed' (RandAR's), 'two_pass' (ARPG's), 'bitwise' (Infinity's; its codes have as many bits
    as the autoencoder's code_width).

    ``changes`` are dictionaries that update the section of their name.
    """
    backbone: dict[str, Any] = dict(
        name="decoder", width=16, depth=2, heads=2, num_classes=CLASSES, mlp_hidden=24
    )
    config: dict[str, Any] = dict(
        dtype="float32",
        head=dict(name="categorical", vocab_size=vocab_size, bias=True, init_std=0.5),
        objective=dict(name="likelihood"),
    )
    if name == "next_scale":
        scales = (1, 2, 4)
        config |= dict(
            tokenizer=dict(name="multiscale_vq", scales=scales, codebook_size=vocab_size),
            schedule=dict(name="next_scale", scales=scales),
        )
        backbone |= dict(
            context="features",
            feature_width=4,
            positions="learned",
            norm="layernorm",
            norm_epsilon=1e-6,
            modulation="own",
            qk_norm="cosine",
            attention_bias="qv",
            activation="gelu_tanh",
            mlp_bias=True,
        )
    elif name == "bitwise":
        scales = (1, 2, 4)
        bits = changes.get("autoencoder", {}).get("code_width", AUTOENCODER["code_width"])
        config |= dict(
            tokenizer=dict(name="multiscale_bitwise", scales=scales),
            schedule=dict(name="next_scale", scales=scales),
            head=dict(name="bitwise", bits=bits, bias=True, init_std=0.5),
        )
        backbone |= dict(
            name="cross_decoder",
            caption_length=2,
            caption_features=6,
            pool_heads=2,
            feature_width=bits,
        )
    elif name == "random":
        config |= dict(
            tokenizer=dict(name="vq", codebook_size=vocab_size),
            schedule=dict(name="random", grid=4),
        )
        backbone |= dict(
            context="codes",
            vocab_size=vocab_size,
            shared_embedding=True,
            start_row=True,
            positions="target_aware",
            step_embedding=True,
            norm="affine_layernorm",
            norm_epsilon=1e-6,
            modulation="own",
            qk_norm="layernorm",
            attention_bias="qkv",
            activation="gelu",
            mlp_bias=True,
        )
    elif name == "instructed":
        config |= dict(
            tokenizer=dict(name="vq", codebook_size=vocab_size),
            schedule=dict(name="random_groups", grid=4, steps=7, curve="cosine_ahead"),
        )
        backbone |= dict(name="instructed_decoder", vocab_size=vocab_size)
    elif name == "two_pass":
        config |= dict(
            tokenizer=dict(name="vq", codebook_size=vocab_size),
            schedule=dict(name="random_groups", grid=4, steps=6, curve="arccos"),
        )
        backbone |= dict(name="two_pass_decoder", vocab_size=vocab_size)
    else:
        config |= dict(
            tokenizer=dict(name="vq", codebook_size=vocab_size),
            schedule=dict(name="raster", grid=4),
        )
        backbone |= dict(
            context="codes",
            vocab_size=vocab_size,
            positions="rope",
            norm="rmsnorm",
            norm_epsilon=1e-5,
            activation="silu",
            gated=True,
        )
    config["backbone"] = backbone
    config["tokenizer"]["autoencoder"] = dict(AUTOENCODER)
    autoencoder = changes.pop("autoencoder", {})
    for section, fields in changes.items():
        config[section] = config.get(section, {}) | fields
    config["tokenizer"]["autoencoder"] |= autoencoder
    return config


def toy_system(name: str, **changes: Any) -> tuple[System, dict[str, Any]]:
    """(system, parameters {'tokenizer', 'backbone', 'head'}) of `toy_config`."""
    system = build_system(toy_config(name, **changes))
    return system, toy_params(system)


def toy_params(system: System, seed: int = 0) -> dict[str, Any]:
    """Those of `Likelihood` and of the tokenizer."""

    def init(key: jax.Array) -> Any:
        return Likelihood(system=system).init(key) | {"tokenizer": init_tokenizer(system, key)}

    return loud_params(init, seed)


def loud_params(init: Any, seed: int = 0) -> dict[str, Any]:
    """Normal draws of what ``init(key)`` gives: no gate, bias or scale is at its quiet start."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if path[-1].key in ("scale", "log_scale") else 0.0
        return jnp.asarray(mean + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def toy_codes(system: System, batch: int, seed: int = 0) -> jax.Array:
    """Random codes int32 [B, L], or int8 [B, L, bits]."""
    shape = (batch, *system.tokenizer.codes_shape)
    rng = np.random.default_rng(seed)
    if system.tokenizer.bits:
        return jnp.asarray(rng.integers(0, 2, shape), jnp.int8)
    return jnp.asarray(rng.integers(0, system.tokenizer.codebook_size, shape), jnp.int32)


def toy_labels(batch: int) -> dict[str, jax.Array]:
    """Labels of all classes in turn."""
    return {"label": jnp.arange(batch, dtype=jnp.int32) % CLASSES}


def toy_captions(batch: int, length: int, features: int, seed: int = 0) -> dict[str, jax.Array]:
    """Left-padded captions of different lengths; the last one is dropped."""
    rng = np.random.default_rng(seed)
    real = 1 + np.arange(batch) % length
    return {
        "caption": jnp.asarray(rng.standard_normal((batch, length, features)), jnp.float32),
        "caption_mask": jnp.asarray(np.arange(length)[None] >= length - real[:, None]),
        "dropped": jnp.arange(batch) == batch - 1,
    }
