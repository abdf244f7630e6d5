"""The tokenizer of LlamaGen's golden cases."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import build_tokenizer
from ar_jax.convert import llamagen
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section
from ar_jax.convert.parity.readings import corner, find_key, nchw, norms, said
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor

# Official defaults.
COMMITMENT, ENTROPY = 0.25, 0.0
GRADIENTS = {"codebook": "quantize.embedding.weight"}


def sections(case: Case) -> tuple[Section, ...]:
    """Of all arrays that begin with 'tok_'."""
    passed = functools.cache(lambda: _passed(case))
    return (
        Section(("tok_grad_*",), lambda: _gradients(case, *passed())),
        Section(("tok_*",), lambda: _outputs(case, *passed()[2:])),
    )


def tokenizer_part(case: Case, image_size: Any) -> Part:
    """The part for images of a size; raises ValueError where spec and shapes differ."""
    settings = case.config("tokenizer")
    options = said(
        settings,
        codebook_size="codebook_size",
        l2_norm="codebook_l2_norm",
        latent="z_channels",
        code_width="codebook_embed_dim",
        channels="ch",
        multipliers="encoder_ch_mult",
        decoder_multipliers="decoder_ch_mult",
        encoder_blocks="num_res_blocks",
    )
    if "encoder_blocks" in options:
        options["decoder_blocks"] = options["encoder_blocks"] + 1
    options["entropy"] = settings.get("entropy_loss_ratio", ENTROPY) > 0
    return llamagen.tokenizer(case.shapes("tokenizer"), options | {"image_size": image_size})


def load_tokenizer(case: Case, image_size: Any) -> tuple[Any, Any, Part]:
    """(our module, its parameters, the part) for images of a size."""
    part = tokenizer_part(case, image_size)
    config = {"dtype": "float32", **part.section}
    params = case.params("tokenizer", part, empty_params(config, "tokenizer"))
    return build_tokenizer(config), params, part


def decoded(case: Case, codes: jax.Array, grid: int) -> np.ndarray:
    """Unclamped images [B, C, H, W] of codes [B, grid * grid]."""
    levels = tokenizer_part(case, grid).section["tokenizer"]["autoencoder"]["multipliers"]
    module, params, _ = load_tokenizer(case, grid * 2 ** (len(levels) - 1))

    def decode(module: Any, codes: jax.Array) -> jax.Array:
        return module.autoencoder.decode(module.quantizer.lookup(codes))

    run = jax.jit(functools.partial(module.apply, method=decode))
    return nchw(run({"params": params}, codes))


def _passed(case: Case) -> tuple:
    """(part, gradient of the loss, what the passes give, images) for the recorded images."""
    height, width = case["tok_images"].shape[-2:]
    size = height if height == width else (height, width)
    tokenizer, params, part = load_tokenizer(case, size)
    images = jnp.asarray(np.moveaxis(case["tok_images"], 1, -1))
    beta, ratio = _weights(case)

    def passes(module: Any, images: jax.Array) -> tuple:
        autoencoder = module.autoencoder
        reconstruction, quantized = module(images)
        decoded = autoencoder.decode(module.quantizer.lookup(quantized.codes))
        features = autoencoder.encoder(images), autoencoder.encode(images)
        return *features, quantized, reconstruction, decoded

    def total(params: Any) -> tuple:
        applied: Any = tokenizer.apply({"params": params}, images, method=passes)
        quantized, reconstruction = applied[2], applied[3]
        loss = (
            jnp.square(reconstruction - images).mean()
            + quantized.codebook_loss.mean()
            + beta * quantized.commitment_loss.mean()
            + ratio * quantized.entropy_loss
        )
        return loss, applied

    gradient, applied = jax.jit(jax.grad(total, has_aux=True))(params)
    return part, gradient, applied, images


def _weights(case: Case) -> tuple[float, float]:
    """(of the commitment loss, of the entropy loss)."""
    settings = case.config("tokenizer")
    return (
        settings.get("commit_loss_beta", COMMITMENT),
        settings.get("entropy_loss_ratio", ENTROPY),
    )


def _outputs(case: Case, applied: tuple, images: jax.Array) -> Outputs:
    encoded, features, quantized, reconstruction, decoded = applied
    beta, ratio = _weights(case)
    yield "tok_encoder_out", nchw(encoded)
    yield "tok_prequant", nchw(features)
    yield "tok_ids", quantized.codes
    yield "tok_quant", nchw(quantized.features)
    yield "tok_recon", nchw(reconstruction)
    yield "tok_decode_code", nchw(decoded)
    yield "tok_vq_loss", quantized.codebook_loss.mean()
    yield "tok_commit_loss", beta * quantized.commitment_loss.mean()
    yield "tok_entropy_loss", ratio * quantized.entropy_loss
    yield "tok_rec_l2", jnp.square(reconstruction - images).mean()
    # The official usage counts the zeros that its ring buffer starts with as code 0.
    settings = case.config("tokenizer")
    counted = settings.get("codebook_show_usage", True)
    used = {0, *np.asarray(quantized.codes).flat} if counted else ()
    size = case.shapes("tokenizer")["quantize.embedding.weight"][0]
    yield "tok_usage", np.float32(len(used) / size)


def _gradients(case: Case, part: Part, gradient: Any, *_: Any) -> Outputs:
    for name, found in case.names("tok_grad_(?!norms$)(.+)"):
        key = find_key(part.places, found[1], GRADIENTS)
        yield name, corner(official_tensor(part.places, gradient, key), case[name])
    if "tok_grad_norms" in case.io:
        keys = case.spec["tokenizer"]["grad_norm_keys"]
        yield "tok_grad_norms", norms(part.places, gradient, keys)
