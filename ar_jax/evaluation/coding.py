"""Trained models run over images and codes: encode, decode, score."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Batch, Cond, Params, System
from ar_jax.data import Data
from ar_jax.io.progress import Progress
from ar_jax.tokenizers.tokenizer import to_float, to_uint8


@functools.partial(jax.jit, static_argnames="tokenizer")
def encode_images(tokenizer: Any, params: Params, images: Array) -> Array:
    """What images uint8 [B, H, W, C] are encoded into: codes int32 [B, L], or moments of codes."""
    return tokenizer.apply({"params": params}, to_float(images), method="encode")


@functools.partial(jax.jit, static_argnames="tokenizer")
def decode_encoding(tokenizer: Any, params: Params, encoding: Array) -> Array:
    """Images uint8 [B, H, W, C] of what `encode_images` gives; of moments, the mean codes'."""
    codes = tokenizer.apply({"params": params}, encoding, method="codes_of")
    return to_uint8(tokenizer.apply({"params": params}, codes, method="decode"))


@functools.partial(jax.jit, static_argnames=("tokenizer", "stages"))
def decode_stages(tokenizer: Any, params: Params, codes: Array, stages: tuple[int, ...]) -> Array:
    """Images after the first n steps for every n of ``stages``: uint8 [stages, B, H, W, C].

    One program for all stages: compiling them one by one takes three times as long.
    """
    images = [
        tokenizer.apply({"params": params}, codes, steps, method="decode") for steps in stages
    ]
    return to_uint8(jnp.stack(images))


@functools.partial(jax.jit, static_argnames="tokenizer")
def decode_known(tokenizer: Any, params: Params, codes: Array, known: Array) -> Array:
    """Images uint8 [stages, B, H, W, C] of the codes [B, L, C] that bool [stages, B, L] knows."""
    images = jax.vmap(
        lambda mask: tokenizer.apply({"params": params}, codes, mask, method="decode")
    )(known)
    return to_uint8(images)


@functools.partial(jax.jit, static_argnames="objective")
def evaluate_objective(
    objective: Any, params: Params, batch: Batch, key: Array
) -> tuple[Array, dict[str, Array]]:
    """(loss, metrics) of a generator's objective on an evaluation batch, means over its rows."""
    trained = {name: params[name] for name in ("backbone", "head")}
    frozen = {"tokenizer": params["tokenizer"]}
    loss, aux = objective.loss(trained, {}, frozen, batch, key, False)
    return loss, aux.metrics


@functools.partial(jax.jit, static_argnames="system")
def score_codes(system: System, params: Params, codes: Array, cond: Cond) -> tuple[Array, Array]:
    """Teacher forcing: nats [B, L] of codes, and whether each (of bits: how much) is as expected.

    In the schedule's own order, each at its cell.
    """
    cells = np.arange(codes.shape[1])
    if system.schedule.cells is not None:
        cells = np.asarray(system.schedule.cells)
        codes = codes[:, cells]
    context = system.tokenizer.apply({"params": params["tokenizer"]}, codes, method="contexts")
    hidden, _ = system.backbone.apply({"params": params["backbone"]}, context, cond)
    logits = system.head.apply({"params": params["head"]}, hidden)  # [B, L, V]
    found = -system.head.log_prob(logits, codes), system.head.correct(logits, codes)
    nll, correct = (values[:, np.argsort(cells)] for values in found)
    return nll, correct


def coded_batches(
    tokenizer: Any,
    params: Params,
    data: Data,
    *,
    batch_size: int,
    limit: int | None = None,
    title: str = "",
) -> Iterator[dict[str, np.ndarray]]:
    """Evaluation batches of one size with their codes, in order.

    Args:
        tokenizer: and its ``params``: encode the images, unless the data are codes already.
        data: images or codes.
        batch_size: rows of every batch; the last one is filled up and masked.
        limit: items, spread evenly over the data; None for all.
        title: of the progress bar; none if empty.

    Yields:
        {'codes' as of `encode_images`, 'label' int32 [B], 'mask' float32 [B]} and, where the data
        have images, 'image' uint8 [B, H, W, C].
    """
    count = len(data.source) if limit is None else min(limit, len(data.source))
    batch_size = min(batch_size, count)
    batches = data.eval_batches(
        batch_size=batch_size,
        max_batches=-(-count // batch_size),
        process_index=0,
        process_count=1,
    )
    left = count
    with Progress(count, title=title, unit="image", enabled=bool(title)) as progress:
        for batch in batches:
            batch["mask"] = batch["mask"] * (np.arange(batch_size) < left)
            if "codes" not in batch:
                codes = encode_images(tokenizer, params, batch["image"])
                batch["codes"] = np.asarray(jax.device_get(codes))
            done = int(batch["mask"].sum())
            yield batch
            left -= done
            progress.advance(done)


def rows(batch: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """``batch[name]`` without the rows that only fill it up."""
    return batch[name][batch["mask"] > 0]
