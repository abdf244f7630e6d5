"""Pictures of a run while it trains: reconstructions of a tokenizer, samples of a generator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Params
from ar_jax.build import build_sampling, create_sampler, trains_tokenizer
from ar_jax.data import Data
from ar_jax.io.images import PICTURE_CHANNELS, image_grid
from ar_jax.parallel.mesh import fetch
from ar_jax.sampling.loop import image_keys
from ar_jax.tokenizers.tokenizer import to_float, to_uint8

# (params, frozen) -> name -> picture, uint8 [H, W, C]
Preview = Callable[[Params, Params], Mapping[str, np.ndarray]]

COLUMNS = 8
ROWS = 10

log = logging.getLogger(__name__)


def build_preview(config: Mapping[str, Any], objective: Any, test: Data) -> Preview | None:
    """The pictures of this objective; None where there is nothing to draw or no way to."""
    tokenizer = getattr(objective, "tokenizer", None) or objective.system.tokenizer
    channels = tokenizer.image_shape[-1]
    if channels not in PICTURE_CHANNELS:
        log.warning("no preview: images of config.data.channels=%d; a picture has 1 or 3", channels)
        return None
    if trains_tokenizer(config):
        if test.source.kind != "image":
            return None
        return reconstructions(objective, test)
    return class_samples(config, objective)


def reconstructions(objective: Any, test: Data) -> Preview:
    """Held-out images spread over the test split, each row above its reconstructions."""
    tokenizer = objective.tokenizer
    # The same on every process: a picture is no part of the batch.
    batches = test.eval_batches(
        batch_size=COLUMNS * ROWS // 2, max_batches=1, process_index=0, process_count=1
    )
    batch = next(iter(batches))
    images = batch["image"][batch["mask"] > 0]

    @jax.jit
    def reconstruct(params: Params, images: jax.Array) -> jax.Array:
        encoding = tokenizer.apply({"params": params}, to_float(images), method="encode")
        codes = tokenizer.apply({"params": params}, encoding, method="codes_of")
        return to_uint8(tokenizer.apply({"params": params}, codes, method="decode"))

    def preview(params: Params, frozen: Params) -> dict[str, np.ndarray]:
        shown = fetch(reconstruct(params, images))
        rows = range(0, len(images), COLUMNS)
        pairs = [part[i : i + COLUMNS] for i in rows for part in (images, shown)]
        return {"reconstructions": image_grid(np.concatenate(pairs), columns=COLUMNS)}

    return preview


def class_samples(config: Mapping[str, Any], objective: Any) -> Preview | None:
    """A row of samples for each of up to ten classes, always of the same keys."""
    system = objective.system
    if system.backbone.conditioner.fields != ("label",):
        log.warning("no preview: config.backbone.condition is not 'class'")
        return None
    knobs, guidance = build_sampling(config)
    classes = system.backbone.num_classes
    shown = np.unique(np.arange(ROWS) * classes // ROWS)  # at most ROWS of them, spread evenly
    labels = jnp.asarray(shown.repeat(COLUMNS), jnp.int32)
    keys = image_keys(config["seed"], 0, len(labels))

    def preview(params: Params, frozen: Params) -> dict[str, np.ndarray]:
        sampler = create_sampler(system, {**frozen, **params})
        samples = sampler({"label": labels}, keys, knobs=knobs, guidance=guidance)
        images = fetch(to_uint8(samples.images))
        return {"samples": image_grid(images, columns=COLUMNS)}

    return preview
