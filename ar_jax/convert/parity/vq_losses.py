"""Golden cases of tokenizers' training losses: discriminators, their losses, KL, quantisers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import nchw
from ar_jax.convert.parity.vq_discriminators import (
    load_judge,
    official_adversary,
    patchgan_outputs,
    pooled_outputs,
    stylegan_outputs,
)
from ar_jax.convert.parity.vq_objectives import (
    llamagen_discriminator,
    llamagen_generator,
    load_pieces,
    titok_discriminator,
    titok_generator,
)
from ar_jax.nn.discriminators import PatchDiscriminator
from ar_jax.nn.quantize import entropies
from ar_jax.objectives.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    lecam,
)
from ar_jax.tokenizers.kl import Posterior
from ar_jax.tokenizers.quantizers import VectorQuantizer

NOT_APPLICABLE: Mapping[str, str] = {
    "bn_batches_*": "a count that only norms with a cumulative mean read",
    "kl_bchw_other": "no objective of ours has a divergence between two posteriors",
    "vq_*_cluster_*": "dead codes of ours restart otherwise, see config.objective.restart_below",
    "mg_entropy_argmax*": "the entropy term of ours has soft assignments",
}
INPUTS: tuple[str, ...] = (
    "lf_real",
    "lf_fake",
    "lecam_ema",
    "mg_affinity",
    "aw_*_grad",
    "disc_x",
    "*_ct",
    "style_x",
)
INPUTS += ("img", "last_*", "titok_x", "titok_rec", "kl_moments_*", "kl_noise", "vq_z")
INPUTS += ("vq_codebook", "vq_embed_prob")


def inputs(case: Case) -> Sequence[str]:
    """Where the README has no column of roles."""
    return INPUTS


def limits(case: Case) -> Mapping[str, float]:
    """Of gradients through discriminators: one leaky ReLU that takes its other side moves them so.

    Computed in float64 ours are within the README's differences of those recorded, but an input of
    almost zero has another sign by the rounding of another processor's convolutions.
    """
    return {"style_*grad*": 1e-3, "patch_*grad*": 1e-3, "titok_disc_*grad*": 1e-3}


def sections(case: Case) -> Iterable[Section]:
    """Losses of logits, discriminators, full objectives, KL and quantisers."""
    patch, style, pooled = (
        functools.cache(lambda name=name: load_judge(case, name))  # type: ignore[misc]
        for name in ("patchgan", "stylegan", "titok_discriminator")
    )
    pieces = functools.cache(lambda: load_pieces(case))
    logits = ("lf_*", "mg_hinge*", "mg_non*", "aw_weight", "adopt_weight")
    yield Section(logits, lambda: _losses(case))
    yield Section(("mg_entropy_softmax*",), lambda: _entropy(case))
    yield Section(("patch_*",), with_model(patchgan_outputs, patch))
    yield Section(("style_*",), with_model(stylegan_outputs, style))
    alone = ("titok_disc_out", "titok_disc_grad_x", "titok_disc_param*", "titok_block0")
    yield Section((*alone, "titok_pool*"), with_model(pooled_outputs, pooled))
    generator = ("gen_*", "adaptive_*", "rec_l2", "perceptual", "bn_mean_after_gen_step")
    yield Section(generator, lambda: llamagen_generator(pieces(), patch()))
    yield Section(("disc_*", "bn_*"), lambda: llamagen_discriminator(pieces(), patch()))
    yield Section(("titok_gen_*",), lambda: titok_generator(pieces(), pooled()))
    yield Section(("titok_disc_*",), lambda: titok_discriminator(pieces(), pooled()))
    yield Section(("kl_*",), lambda: _kl(case))
    for name in ("plain", "l2"):
        yield Section((f"vq_{name}_*",), lambda name=name: _quantizer(case, name))  # type: ignore[misc]


def _losses(case: Case) -> Outputs:
    """Of logits."""
    real, fake = jnp.asarray(case["lf_real"]), jnp.asarray(case["lf_fake"])
    # Official name, our name, and how many times ours: maskgit has no half before its hinge loss.
    discriminators = {"lf_d_hinge": ("hinge", 1), "lf_d_vanilla": ("vanilla", 1)}
    discriminators |= {"lf_d_nonsat": ("swapped", 1), "mg_hinge_d": ("hinge", 2)}
    discriminators |= {"mg_non_saturating_d": ("non_saturating", 1)}
    for name, (ours, factor) in discriminators.items():
        loss = DISCRIMINATOR_LOSSES[ours]
        value, grads = jax.value_and_grad(
            lambda real, fake: factor * loss(real, fake),  # noqa: B023
            argnums=(0, 1),
        )(real, fake)
        yield name, value
        yield f"{name}_grad_real", grads[0]
        yield f"{name}_grad_fake", grads[1]
    generators = {"lf_g_hinge": "hinge", "lf_g_nonsat": "swapped"}
    generators |= {"mg_hinge_g": "hinge", "mg_non_saturating_g": "non_saturating"}
    for name, ours in generators.items():
        value, grad = jax.value_and_grad(GENERATOR_LOSSES[ours])(fake)
        yield name, value
        yield f"{name}_grad", grad
    ema = jnp.asarray(case["lecam_ema"])
    means = {"real": real.mean(), "fake": fake.mean()}
    yield "lf_lecam", lecam(means, {"real": ema[0], "fake": ema[1]})
    adversary = official_adversary(case, PatchDiscriminator(), (64, 64, 3))
    pairs = zip(case["aw_nll_grad"], case["aw_g_grad"], strict=True)
    yield "aw_weight", np.array([adversary.balance(*map(jnp.asarray, pair)) for pair in pairs])
    steps = [adversary.start + offset for offset in (-1, 0, 1)]
    yield "adopt_weight", np.array([adversary.weight_at(step) for step in steps])


def _entropy(case: Case) -> Outputs:
    """Of affinities x, as our term has it: of vectors and codes with squared distances c - x.

    The vectors are unit ones, and the codes have half the affinities as their coordinates and one
    more that gives all of them the same length.
    """
    affinity = jnp.asarray(case["mg_affinity"])
    rows = affinity.shape[0]
    radius = 1.01 * float(np.square(case["mg_affinity"] / 2).sum(0).max())

    def loss(affinity: jax.Array) -> jax.Array:
        halves = affinity.T / 2  # [V, N]
        more = jnp.sqrt(radius - jnp.square(halves).sum(1, keepdims=True))
        codebook = jnp.concatenate([halves, more], axis=1)
        vectors = jnp.eye(rows, rows + 1, dtype=jnp.float32)
        each, mean = entropies(vectors, codebook, case.spec["config"]["mg_temperature"])
        return each - mean

    value, grad = jax.jit(jax.value_and_grad(loss))(affinity)
    yield "mg_entropy_softmax", value
    yield "mg_entropy_softmax_grad", grad


def _kl(case: Case) -> Outputs:
    for name, official in (("bcn", "kl_bcn"), ("clamp", "kl_clamp"), ("bchw", "kl_bchw")):
        moments = jnp.moveaxis(jnp.asarray(case[f"kl_moments_{name}"]), 1, -1)
        yield official, Posterior.of(moments).kl()
        grad = jax.grad(lambda moments: Posterior.of(moments).kl().mean())(moments)
        yield f"{official}_grad", np.moveaxis(np.asarray(grad), -1, 1)
    posterior = Posterior.of(moments)
    yield "kl_bchw_std", nchw(posterior.std)[0, :, :2, :2]
    noise = jnp.moveaxis(jnp.asarray(case["kl_noise"]), 1, -1)
    yield "kl_bchw_sample", nchw(posterior.sample(noise))


def _quantizer(case: Case, name: str) -> Outputs:
    """1d-tokenizer's VectorQuantizer is ours, with the losses of an image averaged."""
    z, cotangent = (jnp.moveaxis(jnp.asarray(case[n]), 1, -1) for n in ("vq_z", "vq_ct"))
    codebook = jnp.asarray(case["vq_codebook"])
    module = VectorQuantizer(
        grid=(z.shape[1], z.shape[2]),
        codebook_size=len(codebook),
        code_width=z.shape[-1],
        l2_norm=name == "l2",
    )
    beta = case.spec["config"]["vq_beta"]

    def total(z: jax.Array, codebook: jax.Array) -> tuple[jax.Array, Any]:
        params = {"params": {"codebook": codebook}}
        quantized: Any = module.apply(params, z, method="quantize")
        losses = beta * quantized.commitment_loss.mean(), quantized.codebook_loss.mean()
        value = sum(losses) + (quantized.features * cotangent).sum()
        return value, (losses, quantized)

    run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    grads, ((commitment, pull), quantized) = run(z, codebook)
    yield f"vq_{name}_ids", quantized.codes.reshape(z.shape[:3])
    yield f"vq_{name}_commit", commitment
    yield f"vq_{name}_codebook", pull
    yield f"vq_{name}_zq", nchw(quantized.features)
    yield f"vq_{name}_grad_z", nchw(grads[0])
    yield f"vq_{name}_grad_codebook", grads[1]
