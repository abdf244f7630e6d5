"""The tokenizer of VAR's golden cases."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import build_tokenizer
from ar_jax.convert import var
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import (
    corner,
    named_gradients,
    nchw,
    norms,
    recorded_part,
    said,
)
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.objectives.tokenizer import TokenizerObjective

COMMITMENT = 0.25  # official default


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A case's tokenizer as ours, with its weights."""

    case: Case
    module: Any
    params: Any
    part: Part

    def ask(self, method: Any, *args: Any) -> Any:
        """What a function of our module gives, compiled."""
        apply = functools.partial(self.module.apply, method=method)
        return jax.jit(apply)({"params": self.params}, *args)

    @property
    def ranges(self) -> list[slice]:
        """Of the codes of every scale."""
        sizes = [rows * columns for rows, columns in self.module.grids]
        ends = np.cumsum(sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    @property
    def images(self) -> jax.Array:
        """float32 [B, H, W, C] in [-1, 1]."""
        return jnp.asarray(self.case["image_u8"].transpose(0, 2, 3, 1)) / jnp.float32(127.5) - 1

    @functools.cached_property
    def codes(self) -> jax.Array:
        """int32 [B, L], of the image, as recorded."""
        parts = [self.case.io.get(f"tok.idx_{k}") for k in range(len(self.ranges))]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return self.ask("encode", self.images)
        return jnp.asarray(np.concatenate(found, axis=1), jnp.int32)

    @functools.cached_property
    def features(self) -> jax.Array:
        """float32 [B, h, w, C], of the image, as recorded."""
        if "tok.f" not in self.case.io:
            return self.ask(lambda module, images: module.autoencoder.encode(images), self.images)
        return jnp.asarray(np.moveaxis(self.case["tok.f"], 1, -1))


def load(case: Case) -> Tokens:
    """Ours with the case's weights; raises ValueError where its config and shapes differ."""
    config, settings = case.spec.get("config", {}), case.config("tokenizer")
    options = said(
        settings,
        scales="v_patch_nums",
        codebook_size="vocab_size",
        phis="share_quant_resi",
        phi_ratio="quant_resi",
        l2_norm="using_znorm",
        channels="ch",
        multipliers="ch_mult",
        encoder_blocks="num_res_blocks",
        image_channels="in_channels",
        latent="z_channels",
        code_width="z_channels",
        projection="quant_conv_ks",
    )
    if "phi_ratio" in options:
        options["phi_ratio"] = abs(options["phi_ratio"])
    if "encoder_blocks" in options:
        options["decoder_blocks"] = options["encoder_blocks"] + 1
    if "scales" not in options:
        options |= said(config.get("transformer", {}), scales="patch_nums")
    part = var.tokenizer(case.shapes("tokenizer"), options | said(config, image_size="image_size"))
    built = {"dtype": "float32", **part.section}
    params = case.params("tokenizer", part, empty_params(built, "tokenizer"))
    return Tokens(case, build_tokenizer(built), params, part)


def sections(tokens: Any) -> list[Section]:
    """Of the arrays that begin with 'tok.' and 'vqtrain.'; ``tokens`` gives a `Tokens`."""
    decoded = ("tok.fhat", "tok.var_input", "tok.recon*")
    encoded = ("tok.enc", "tok.f", "tok.idx_*", "vqtrain.recon_unclamped")
    quantised = ("vqtrain.fhat_st", "vqtrain.vq_loss", "vqtrain.dvq_*")
    trained = ("vqtrain.total_loss", "vqtrain.grad_*", "vqtrain.grad.*")
    return [
        Section(encoded, with_model(_encoded, tokens)),
        Section(decoded, with_model(_decoded, tokens)),
        Section(quantised, with_model(_quantised, tokens)),
        Section(trained, with_model(_trained, tokens)),
    ]


def _encoded(tokens: Tokens) -> Outputs:
    def passes(module: Any, images: jax.Array) -> tuple:
        features = module.autoencoder.encode(images)
        return module.autoencoder.encoder(images), features, module(images)

    encoded, features, (reconstruction, quantized) = tokens.ask(passes, tokens.images)
    yield "tok.enc", nchw(encoded)
    yield "tok.f", nchw(features)
    for k, part in enumerate(tokens.ranges):
        yield f"tok.idx_{k}", quantized.codes[:, part]
    name = "vqtrain.recon_unclamped"
    yield name, recorded_part(tokens.case, name, nchw(reconstruction))


def _decoded(tokens: Tokens) -> Outputs:
    def decodes(module: Any, codes: jax.Array) -> tuple:
        sums = [module.quantizer.lookup(codes, n + 1) for n in range(len(module.grids))]
        images = module.decode(codes), module.decode_features(sums[0])
        return jnp.stack(sums), module.contexts(codes), *images

    sums, contexts, image, coarse = tokens.ask(decodes, tokens.codes)
    yield "tok.fhat", nchw(sums)
    yield "tok.var_input", contexts
    image = nchw(image)
    yield "tok.recon", recorded_part(tokens.case, "tok.recon", image)
    yield "tok.recon_mean", image.mean((2, 3), dtype=np.float64)
    yield "tok.recon_std", image.std((2, 3), dtype=np.float64)
    yield "tok.recon_scale0", recorded_part(tokens.case, "tok.recon_scale0", nchw(coarse))


def _commitment(tokens: Tokens) -> float:
    return tokens.case.config("tokenizer").get("beta", COMMITMENT)


def _quantised(tokens: Tokens) -> Outputs:
    """The quantiser alone, from the recorded features, and the gradients of its loss."""
    case, places, beta = tokens.case, tokens.part.places, _commitment(tokens)

    def quantizer_loss(params: Any, features: jax.Array) -> tuple:
        quantized = tokens.module.apply(
            {"params": params}, features, method=lambda m, f: m.quantizer.quantize(f)
        )
        total = (quantized.codebook_loss + beta * quantized.commitment_loss).mean()
        return total, quantized.features

    run = jax.jit(jax.value_and_grad(quantizer_loss, argnums=(0, 1), has_aux=True))
    (loss, f_hat), (dparams, dfeatures) = run(tokens.params, tokens.features)
    yield "vqtrain.fhat_st", nchw(f_hat)
    yield "vqtrain.vq_loss", loss
    yield "vqtrain.dvq_df", nchw(dfeatures)
    key = "quantize.embedding.weight"
    yield "vqtrain.dvq_dcodebook", official_tensor(places, dparams, key)
    phis = [key for key in case.shapes("tokenizer") if "quant_resi" in key]
    name = "vqtrain.dvq_dphi_norms"
    length = norms(places, dparams, phis)
    if len(length) > len(case.io.get(name, length)):
        length = length[length > 0]  # a phi of no scale has no gradient, and officially none is 0
    yield name, length
    if phis and "vqtrain.dvq_dphi0_w" in case.io:
        name, first = "vqtrain.dvq_dphi0_w", official_tensor(places, dparams, phis[0])
        yield name, corner(case.select(name, first), case[name])


def _trained(tokens: Tokens) -> Outputs:
    """Our objective's loss of the images and its gradients."""
    objective = TokenizerObjective(tokenizer=tokens.module, commitment=_commitment(tokens))
    batch = {"image": jnp.asarray(tokens.case["image_u8"].transpose(0, 2, 3, 1))}
    stats = objective.init_stats(tokens.params)

    def loss_of(params: Any) -> tuple:
        return objective.loss(params, stats, {}, batch, jax.random.key(0), True)

    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(tokens.params)
    yield "vqtrain.total_loss", loss
    yield from named_gradients(tokens.case, "vqtrain.grad", tokens.part.places, gradient, "_")
