"""Continuous codes of a batch, drawn from what the tokenizer encodes images into."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Batch, Params


def draw_latent_codes(tokenizer: Any, frozen: Params, batch: Batch, key: Array) -> Array:
    """Codes float32 [B, L, C], drawn from cached moments or from those of the batch's images.

    Args:
        tokenizer: of continuous codes, its parameters in ``frozen['tokenizer']``.
        key: of the draw from the posterior.
    """
    variables = {"params": frozen["tokenizer"]}
    if "codes" in batch:
        encoding = batch["codes"]
    else:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        encoding = tokenizer.apply(variables, images, method="encode")
    noise = jax.random.normal(key, (len(encoding), *tokenizer.latents_shape))
    codes = tokenizer.apply(variables, encoding, noise, method="codes_of")
    return jax.lax.stop_gradient(codes)
