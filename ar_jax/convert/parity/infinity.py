"""Infinity's golden cases: every recorded output as our code computes it.

What is here is of the tokenizer; of the transformer see `infinity_transformer`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import build_tokenizer
from ar_jax.convert import infinity
from ar_jax.convert.parity import infinity_transformer
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import nchw, said
from ar_jax.convert.part import empty_params
from ar_jax.nn.bits import bit_entropies, bit_logits
from ar_jax.nn.quantize import normalise
from ar_jax.nn.resize import shrink
from ar_jax.schedules import Grid

NOT_APPLICABLE = {"aux_losses": "zeros, as the public code has no losses of its quantiser"}
# Recorded summaries -> what they sum up.
SUMS = {
    "bit_loss_per_token": "logits",
    "train_loss": "logits",
    "train_grad_total_norm": "train_grad_norms",
}
SMALL = 0.05  # of a residual, over the size of the numbers in code vectors
ENTROPY_TEMPERATURE = 0.01


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return (
        *("image", "features", "text_features", "text_lengths", "cond_drop_uniform"),
        *("bsc_*_strength_percent", "bsc_*_uniform_scale*"),
    )


def sections(case: Case) -> list[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    tokens = functools.cache(lambda: load(case))
    quantised = ("quantized_sum", "residual_small_fraction", "bits_scale*", "next_input_scale*")
    decoded = ("dequantized_sum", "decoded_image_*")
    return [
        Section(("encoder_features",), with_model(_encoded, tokens)),
        Section(quantised, with_model(_quantised, tokens)),
        Section(decoded, with_model(_decoded, tokens)),
        Section(("entropy_*",), with_model(_entropies, tokens)),
        *(
            Section((f"bsc_{run}_*",), with_model(_corrected, tokens, run, settings))
            for run, settings in case.spec.get("config", {}).get("bsc", {}).items()
        ),
        *infinity_transformer.sections(case, tokens),
    ]


def summarised(name: str) -> str | None:
    """The array that a recorded loss or norm sums up."""
    return SUMS.get(name)


def absolute(case: Case) -> dict[str, float]:
    """A truncated pixel may be one off, the READMEs say."""
    return {"*_image_uint8_bgr": 1.0}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A case's tokenizer as ours, with its weights."""

    case: Case
    section: dict[str, Any]
    module: Any
    params: Any

    def ask(self, method: Any, *args: Any) -> Any:
        """What a function of our module gives, compiled."""
        apply = functools.partial(self.module.apply, method=method)
        return jax.jit(apply)({"params": self.params}, *args)

    @property
    def features(self) -> jax.Array:
        """float32 [B, h, w, C], recorded."""
        return jnp.asarray(np.moveaxis(self.case["features"], 1, -1))

    @property
    def ranges(self) -> list[slice]:
        """Of the codes of every scale."""
        ends = np.cumsum(self.module.quantizer.sizes).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def grid(self, scale: int) -> Grid:
        """(h, w) of a scale."""
        return self.module.grids[scale]


def load(case: Case) -> Tokens:
    """Ours with the case's weights; raises ValueError where its config and shapes differ."""
    settings = case.config("vae")
    options = said(
        settings,
        channels="base_ch",
        multipliers="ch_mult",
        encoder_blocks="num_res_blocks",
        code_width="d",
        downsample="patch_size",
    )
    scales = case.spec["config"].get("vae_scale_schedule", case.spec["config"]["scale_schedule"])
    rows, columns = scales[-1][-2:]
    cell = settings["patch_size"]
    options |= {
        "scales": tuple(tuple(grid[-2:]) for grid in scales),
        "image_size": (rows * cell, columns * cell),
    }
    part = infinity.tokenizer(case.shapes("vae"), options)
    config = {"dtype": "float32", **part.section}
    params = case.params("vae", part, empty_params(config, "tokenizer"))
    return Tokens(case, part.section, build_tokenizer(config), params)


def _encoded(tokens: Tokens) -> Outputs:
    images = jnp.asarray(np.moveaxis(tokens.case["image"], 1, -1))
    features = tokens.ask(lambda module, images: module.autoencoder.encode(images), images)
    yield "encoder_features", nchw(features)


def _quantised(tokens: Tokens) -> Outputs:
    """The quantiser alone, from the recorded features."""

    def passes(module: Any, features: jax.Array) -> tuple:
        quantized = module.quantizer.quantize(features)
        count = len(module.grids)
        sums = [module.quantizer.lookup(quantized.codes, n) for n in range(1, count)]
        seen = [shrink(f_hat, module.grids[n + 1]) for n, f_hat in enumerate(sums)]
        return quantized, seen

    quantized, seen = tokens.ask(passes, tokens.features)
    width = tokens.module.quantizer.code_width
    yield "quantized_sum", nchw(quantized.features)
    rest = [np.abs(quantized.vectors[:, part]) for part in tokens.ranges]
    small = [(part < SMALL * width**-0.5).mean(dtype=np.float64) for part in rest]
    yield "residual_small_fraction", np.array(small)
    for k, part in enumerate(tokens.ranges):
        bits = quantized.codes[:, part]
        yield f"bits_scale{k}", bits.reshape(len(bits), 1, *tokens.grid(k), width)
    for k, f_hat in enumerate(seen, start=1):
        yield f"next_input_scale{k}", nchw(f_hat)[:, :, None]


def _decoded(tokens: Tokens) -> Outputs:
    parts = [tokens.case[f"bits_scale{k}"] for k in range(len(tokens.ranges))]
    flat = [part.reshape(len(part), -1, part.shape[-1]) for part in parts]
    codes = jnp.asarray(np.concatenate(flat, axis=1), jnp.int8)

    def decodes(module: Any, codes: jax.Array) -> tuple:
        f_hat = module.quantizer.lookup(codes)
        return f_hat, module.autoencoder.decode(f_hat), module.decode(codes)

    f_hat, raw, image = tokens.ask(decodes, codes)
    yield "dequantized_sum", nchw(f_hat)[:, :, None]
    yield "decoded_image_raw", nchw(raw)
    yield "decoded_image_clamped", nchw(image)


def _entropies(tokens: Tokens) -> Outputs:
    width = tokens.module.quantizer.code_width
    flat = normalise(tokens.features.reshape(-1, width), True)
    logits = bit_logits(flat, width**-0.5, ENTROPY_TEMPERATURE)
    each, mean = bit_entropies(logits)
    yield "entropy_per_sample", each
    yield "entropy_codebook", mean
    p = jax.nn.sigmoid(-logits)  # of a bit 0
    yield "entropy_avg_prob", np.stack([p.mean(0), (1 - p).mean(0)], axis=1)


def _corrected(tokens: Tokens, run: str, settings: tuple[int, float, int]) -> Outputs:
    """Bitwise self-correction with the recorded draws; without one nothing is flipped."""
    case, module = tokens.case, tokens.module
    if case.config("transformer").get("apply_spatial_patchify"):
        halves = tuple((rows // 2, columns // 2) for rows, columns in module.grids)
        module = module.clone(quantizer=module.quantizer.clone(grids=halves, patch=2))
    scales, _, requantize = settings
    quantizer, batch = module.quantizer, len(tokens.features)
    flips = []
    for k, size in enumerate(quantizer.sizes):
        flips.append(np.zeros((batch, size, quantizer.bits), bool))
        if k < scales:
            share = case[f"bsc_{run}_strength_percent"][k] / np.float32(100)
            wrong = case[f"bsc_{run}_uniform_scale{k}"][:, 0] < share
            flips[k] = np.asarray(quantizer.folded(jnp.asarray(wrong)))

    def correct(module: Any, *arrays: jax.Array) -> tuple:
        return module.quantizer.correct(*arrays, requantize=bool(requantize))

    both = tokens.features, jnp.asarray(np.concatenate(flips, axis=1))
    right, contexts = dataclasses.replace(tokens, module=module).ask(correct, *both)
    yield f"bsc_{run}_input", contexts
    yield f"bsc_{run}_target_bits", right
