"""The discriminators of the golden cases of tokenizers' losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert import discriminators
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs
from ar_jax.convert.parity.readings import nchw, norms
from ar_jax.convert.places import Places
from ar_jax.nn.discriminators import adaptive_max_pool
from ar_jax.objectives.adversarial import Adversary

FORMS = {
    "patchgan": (discriminators.patchgan, "disc_x"),
    "stylegan": (discriminators.stylegan, "style_x"),
    "titok_discriminator": (discriminators.pooled, "titok_x"),
}


@dataclasses.dataclass(frozen=True)
class Judge:
    """A case's discriminator as ours, with its weights.

    Attributes:
        keys: of the official parameters, running statistics aside, in their order.
    """

    case: Case
    module: Any
    variables: Any
    places: Places
    keys: list[str]
    image_shape: tuple[int, int, int]

    def adversary(self, **fields: Any) -> Adversary:
        """Around it; see `official_adversary`."""
        return official_adversary(self.case, self.module, self.image_shape, **fields)

    @property
    def stats(self) -> dict[str, Any]:
        """The statistics of our adversary before a first step."""
        zeros = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        return {"norms": self.variables.get("batch_stats", {}), "logits": zeros}

    def norms(self, gradient: Any) -> np.ndarray:
        """Of the gradient of each official parameter."""
        return norms(self.places, {"params": gradient}, self.keys)

    def gradients(self, x: jax.Array, cotangent: jax.Array, train: bool) -> tuple[Any, ...]:
        """(logits, gradients of sum(logits * cotangent) to parameters and x, other variables)."""

        def total(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            variables = self.variables | {"params": params}
            logits, others = self.module.apply(
                variables,
                x,
                train=train,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=True,
            )
            return (logits * cotangent).sum(), (logits, others)

        run = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
        (dparams, dx), (logits, others) = run(self.variables["params"], x)
        return logits, dparams, dx, others


def official_adversary(
    case: Case, module: Any, image_shape: tuple[int, int, int], **fields: Any
) -> Adversary:
    """Ours with LlamaGen's weight and start of a case unless ``fields`` say otherwise."""
    config = case.spec["config"]
    fields = {"weight": config["disc_weight"], "start": config["disc_start"]} | fields
    return Adversary(discriminator=module, image_shape=image_shape, **fields)


def load_judge(case: Case, name: str) -> Judge:
    """Ours with the case's weights of a sub-model."""
    form, images = FORMS[name]
    released = form(case.shapes(name))
    shape = tuple(np.moveaxis(case[images], 1, -1).shape[1:])
    variables = case.params(name, released.part, released.expected(shape))
    keys = [key for key in released.part.places if "running" not in key]
    recorded = [key for key in case.keys(name) if key in keys]
    return Judge(case, released.module, variables, released.part.places, recorded, shape)


def nhwc(case: Case, name: str) -> jax.Array:
    """Of recorded images [B, C, H, W]."""
    return jnp.moveaxis(jnp.asarray(case[name]), 1, -1)


def patchgan_outputs(judge: Judge) -> Outputs:
    """LlamaGen's PatchGAN with running and with the batch's statistics."""
    x, cotangent = nhwc(judge.case, "disc_x"), nhwc(judge.case, "patch_ct")
    for mode, train in (("eval", False), ("train", True)):
        logits, dparams, dx, others = judge.gradients(x, cotangent, train)
        yield f"patch_{mode}_out", nchw(logits)
        yield f"patch_{mode}_grad_x", nchw(dx)[..., ::7, ::7]
        yield f"patch_{mode}_param_grad_norms", judge.norms(dparams)
    stats, last = others["batch_stats"], judge.module.layers
    yield "patch_train_running_mean0", stats["norm1"]["mean"]
    yield "patch_train_running_var0", stats["norm1"]["var"]
    yield "patch_train_running_var_last", stats[f"norm{last}"]["var"]


def stylegan_outputs(judge: Judge) -> Outputs:
    """LlamaGen's StyleGAN discriminator."""
    x = nhwc(judge.case, "style_x")
    logits, dparams, dx, others = judge.gradients(x, jnp.asarray(judge.case["style_ct"]), True)
    yield "style_out", logits
    yield "style_grad_x", nchw(dx)[..., ::5, ::5]
    yield "style_param_grad_norms", judge.norms(dparams)
    block = nchw(others["intermediates"]["block0"]["__call__"][0])
    yield "style_block0_slice", block[:, ::64, ::3, ::3]


def pooled_outputs(judge: Judge) -> Outputs:
    """1d-tokenizer's discriminator, which is given images in [0, 1] there."""
    x, cotangent = nhwc(judge.case, "titok_x"), nhwc(judge.case, "titok_ct")
    logits, dparams, dx, others = judge.gradients(2 * x - 1, cotangent, True)
    yield "titok_disc_out", nchw(logits)
    yield "titok_disc_grad_x", 2 * nchw(dx)[..., ::7, ::7]
    yield "titok_disc_param_grad_norms", judge.norms(dparams)
    stages = others["intermediates"]
    yield "titok_block0", nchw(stages["stage0"]["__call__"][0])[:, ::8, ::9, ::9]
    last = stages[f"stage{judge.module.stages - 1}"]["__call__"][0]
    yield "titok_pool_in_hw", np.array(last.shape[1:3], np.int32)
    pooled = adaptive_max_pool(last, judge.module.pool)
    yield "titok_pool", nchw(pooled)[:, ::16, ::3, ::3]
