"""The full losses of the golden cases of tokenizers: LlamaGen's and 1d-tokenizer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ar_jax.convert.parity import lpips as lpips_case
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs
from ar_jax.convert.parity.readings import nchw
from ar_jax.convert.parity.vq_discriminators import Judge, nhwc
from ar_jax.nn.lpips import lpips
from ar_jax.objectives.adversarial import Adversary
from ar_jax.tokenizers.kl import Posterior


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What the full losses of a case are made of; images NHWC in [-1, 1]."""

    case: Case
    perceptual: Callable[[jax.Array], jax.Array]  # batch mean of LPIPS of a reconstruction
    images: jax.Array
    hidden: jax.Array  # before the last layer
    kernel: jax.Array  # of the last layer, HWIO
    bias: jax.Array

    def reconstruct(self, kernel: jax.Array, offset: jax.Array) -> jax.Array:
        """The last layer's output plus ``offset``, whose gradient is the reconstruction's."""
        made = jax.lax.conv_general_dilated(
            self.hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return made + self.bias[None, None, None] + offset

    @property
    def reconstruction(self) -> jax.Array:
        """Without offset."""
        return self.reconstruct(self.kernel, jnp.zeros_like(self.images))


def load_pieces(case: Case) -> Pieces:
    """Of a case; LPIPS is the VGG16 that it names."""
    params, network = lpips_case.load(case, "vgg")
    images = nhwc(case, "img")

    # Compiled by itself, once for all losses, and with arguments: XLA would compute constants.
    @jax.jit
    def distance(params: Any, made: jax.Array, images: jax.Array) -> jax.Array:
        return lpips(params, made, images, network=network).mean()

    def perceptual(reconstruction: jax.Array) -> jax.Array:
        return distance(params, reconstruction, images)

    kernel = jnp.asarray(case["last_w"]).transpose(2, 3, 1, 0)
    hidden = nhwc(case, "last_h")
    return Pieces(case, perceptual, images, hidden, kernel, jnp.asarray(case["last_b"]))


def llamagen_generator(pieces: Pieces, judge: Judge) -> Outputs:
    """Our adversary's part in LlamaGen's generator losses, before and from its start on."""
    case, zeros = pieces.case, jnp.zeros_like(pieces.images)
    # Vector quantisation, commitment, entropy; a usage that is only logged follows.
    codebook = sum(case.spec["config"]["codebook_losses"][:3])
    params, start = judge.variables["params"], case.spec["config"]["disc_start"]

    def make(l1: bool, weights: tuple[float, float], adversary: Adversary) -> Any:
        deceive = jax.jit(adversary.deceive)

        def run(step: Any) -> dict[str, Any]:
            def nll(kernel: Any, offset: Any) -> tuple[jax.Array, Any]:
                made = pieces.reconstruct(kernel, offset)
                error = made - pieces.images
                rec = jnp.abs(error).mean() if l1 else jnp.square(error).mean()
                perceptual = pieces.perceptual(made)
                return weights[0] * rec + weights[1] * perceptual, (rec, perceptual)

            def adverse(kernel: Any, offset: Any) -> tuple[jax.Array, Any]:
                return deceive(params, judge.stats, pieces.reconstruct(kernel, offset))

            (plain, terms), one = jax.value_and_grad(nll, (0, 1), has_aux=True)(
                pieces.kernel, zeros
            )
            (deceit, stats), other = jax.value_and_grad(adverse, (0, 1), has_aux=True)(
                pieces.kernel, zeros
            )
            factor = adversary.balance(one[0], other[0]) if adversary.adaptive else jnp.ones(())
            weight = factor * adversary.weight_at(step)
            total = jax.tree.map(lambda a, b: a + weight * b, one, other)
            if adversary.adaptive:  # recorded is all that went through there, for the weight too
                total = (total[0], total[1] + one[1] + other[1])
            return {
                "loss": plain + weight * deceit + codebook,
                "gradient": total,
                "terms": (*terms, deceit, factor),
                "norms": tuple(optax.tree.norm(g[0]) for g in (one, other)),
                "mean": stats["norms"]["norm1"]["mean"],
            }

        return run

    plain, adaptive = judge.adversary(), judge.adversary(adaptive=True)
    swapped = judge.adversary(generator_loss="swapped")
    usual, scaled, other = (
        make(False, (1.0, 1.0), plain),
        make(False, (1.0, 1.0), adaptive),
        make(True, (0.7, 0.4), swapped),
    )
    runs = {
        "gen_before": (usual, start - 1),
        "gen_after": (usual, start),
        "gen_adaptive": (scaled, start),
        "gen_adaptive_before": (scaled, start - 1),
        "gen_l1_nonsat": (other, start),
    }
    for name, (run, step) in runs.items():
        found = run(step)
        kernel, offset = found["gradient"]
        yield f"{name}_loss", found["loss"]
        yield f"{name}_grad_recon", nchw(offset)[..., ::3, ::3]
        yield f"{name}_grad_recon_norm", np.linalg.norm(np.asarray(offset, np.float64))
        yield f"{name}_grad_last", np.asarray(kernel).transpose(3, 2, 0, 1)
        if name == "gen_adaptive":
            terms = ("rec_l2", "perceptual", "gen_adv_hinge", "adaptive_weight")
            yield from zip(terms, found["terms"], strict=True)
            lengths = ("adaptive_nll_grad_norm", "adaptive_g_grad_norm")
            yield from zip(lengths, found["norms"], strict=True)
            yield "bn_mean_after_gen_step", found["mean"]


def llamagen_discriminator(pieces: Pieces, judge: Judge) -> Outputs:
    """Its losses, times the weight as there; a generator's step comes first."""
    start, params = pieces.case.spec["config"]["disc_start"], judge.variables["params"]
    made = pieces.reconstruction

    def run(loss: str, step: int) -> tuple[Any, ...]:
        adversary = judge.adversary(loss=loss)
        _, stats = jax.jit(adversary.deceive)(params, judge.stats, made)
        learn = jax.jit(jax.value_and_grad(adversary.judge, has_aux=True))
        (value, (stats, _)), grads = learn(params, stats, pieces.images, made)
        weight = np.asarray(adversary.weight_at(step))
        return weight * value, weight * judge.norms(grads), stats["norms"]["norm1"]

    value, lengths, norm = run("hinge", start)
    yield "disc_after_loss", value
    yield "disc_after_param_grad_norms", lengths
    yield "bn_mean_after_disc_step", norm["mean"]
    yield "bn_var_after_disc_step", norm["var"]
    before, vanilla, swapped = run("hinge", start - 1), run("vanilla", start), run("swapped", start)
    for name, found in (("before", before), ("vanilla", vanilla), ("nonsat", swapped)):
        yield f"disc_{name}_loss", found[0]
        yield f"disc_{name}_param_grad_norms", found[1]


def _titok_adversary(judge: Judge) -> Adversary:
    config = judge.case.config("titok_loss")
    return judge.adversary(
        weight=config["discriminator_weight"] * config["discriminator_factor"],
        start=config["discriminator_start"],
        lecam=config["lecam_regularization_weight"],
        lecam_decay=config["lecam_ema_decay"],
    )


def titok_generator(pieces: Pieces, judge: Judge) -> Outputs:
    """1d-tokenizer's generator losses, of images in [0, 1]."""
    case, config = pieces.case, pieces.case.config("titok_loss")
    adversary = _titok_adversary(judge)
    images, given = (pieces.images + 1) / 2, nhwc(case, "titok_rec")
    moments = jnp.moveaxis(jnp.asarray(case["kl_moments_bcn"]), 1, -1)
    deceive = jax.jit(adversary.deceive)

    def run(
        name: str, step: int, l1: bool = False, vae: bool = False, rec_weight: float = 1.0
    ) -> Outputs:
        def total(made: jax.Array) -> tuple[jax.Array, Any]:
            error = made - images
            rec = rec_weight * (jnp.abs(error).mean() if l1 else jnp.square(error).mean())
            perceptual = config["perceptual_weight"] * pieces.perceptual(2 * made - 1)
            deceit, _ = deceive(judge.variables["params"], judge.stats, 2 * made - 1)
            weight = adversary.weight_at(step)
            if vae:
                rec = rec / jnp.exp(config["logvar_init"])
                rest = config["kl_weight"] * Posterior.of(moments).kl().mean()
            else:
                rest = config["quantizer_weight"] * config["quantizer_loss"]
            deceit = jnp.where(weight > 0, deceit, 0.0)  # there it is not even computed before
            parts = jnp.stack([rec, perceptual, weight * deceit, deceit])
            return rec + perceptual + weight * deceit + rest, parts

        (value, parts), grad = jax.value_and_grad(total, has_aux=True)(given)
        yield f"titok_gen_{name}_total", value
        yield f"titok_gen_{name}_parts", parts
        yield f"titok_gen_{name}_grad_norm", np.linalg.norm(np.asarray(grad, np.float64))
        yield f"titok_gen_{name}_grad", nchw(grad)[..., ::5, ::5]

    start = config["discriminator_start"]
    yield from run("before", start - 1)
    yield from run("after", start)
    yield from run("l1", start, l1=True, rec_weight=0.6)
    yield from run("vae", start, vae=True)


def titok_discriminator(pieces: Pieces, judge: Judge) -> Outputs:
    """Three steps of the running means in LeCam's term, the parameters staying as they are."""
    adversary, rows = _titok_adversary(judge), []
    real, fake = pieces.images, 2 * nhwc(pieces.case, "titok_rec") - 1

    learn = jax.jit(jax.value_and_grad(adversary.judge, has_aux=True))
    stats = judge.stats
    for i in range(3):
        # There the images in [0, 1] are what is scaled.
        shown = ((real + 1) * (1 - 0.1 * i) - 1, (fake + 1) * (1 + 0.05 * i) - 1)
        (loss, (stats, metrics)), grads = learn(judge.variables["params"], stats, *shown)
        penalty = adversary.lecam * metrics["discriminator/lecam"]
        if i == 0:
            yield "titok_disc_before", np.array([penalty, penalty])
        logits = [metrics[f"discriminator/{name}_logit"] for name in ("real", "fake")]
        rows.append([loss, *logits, penalty, stats["logits"]["real"], stats["logits"]["fake"]])
    yield "titok_disc_steps", np.array(rows)
    yield "titok_disc_step2_param_grad_norms", judge.norms(grads)
