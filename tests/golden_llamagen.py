"""Our LlamaGen models with the weights of a golden case."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.loop import CachedSampler
from tests.golden_weights import (
    Case,
    Places,
    gpt_places,
    to_official,
    to_ours,
    tokenizer_places,
)


@dataclasses.dataclass(frozen=True)
class Gpt:
    """A transformer of the case as our system, with its weights."""

    case: Case
    part: str
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    places: Places

    @functools.cached_property
    def forward(self) -> Any:
        """Compiled once: (cond, codes) -> teacher-forced logits."""
        run = jax.jit(functools.partial(teacher_forced, self.system))
        return functools.partial(run, self.params)

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        return CachedSampler.create(self.system, self.params)

    def gradients(self, cond: dict[str, Any], codes: np.ndarray) -> tuple[Any, Any]:
        """(loss, its gradient in our layout) of our likelihood objective."""
        objective = Likelihood(system=self.system, label_dropout=0.0)
        trained = {name: self.params[name] for name in ("backbone", "head")}
        batch = {"codes": jnp.asarray(codes), **cond}

        def loss(params):
            return objective.loss(params, {}, self.params, batch, jax.random.key(0), False)[0]

        return jax.jit(jax.value_and_grad(loss))(trained)

    def norms(self, gradient: Any) -> list[float]:
        """In the order of the spec."""
        keys = self.case.spec[self.part]["grad_norm_keys"]
        return [float(np.linalg.norm(to_official(self.places, gradient, key))) for key in keys]


def tokenizer_section(spec: dict[str, Any], image_size: int) -> dict[str, Any]:
    tok = spec["config"]["tokenizer"]
    assert tok["encoder_ch_mult"] == tok["decoder_ch_mult"]
    return dict(
        name="vq",
        codebook_size=tok["codebook_size"],
        l2_norm=tok["codebook_l2_norm"],
        entropy=tok["entropy_loss_ratio"] > 0,
        autoencoder=dict(
            image_size=image_size,
            image_channels=3,
            latent=tok["z_channels"],
            code_width=tok["codebook_embed_dim"],
            channels=tok["ch"],
            multipliers=tok["encoder_ch_mult"],
            encoder_blocks=tok["num_res_blocks"],
            decoder_blocks=tok["num_res_blocks"] + 1,
        ),
    )


def build_gpt(case: Case, part: str) -> Gpt:
    net = case.spec["config"][part]
    grid = round(net["block_size"] ** 0.5)
    tokenizer = tokenizer_section(case.spec, image_size=4 * grid)
    tokenizer["codebook_size"] = net["vocab_size"]  # the text model has a vocabulary of its own
    hidden = 2 * 4 * net["dim"] // 3
    backbone = dict(
        name="decoder",
        width=net["dim"],
        depth=net["n_layer"],
        heads=net["n_head"],
        context="codes",
        vocab_size=net["vocab_size"],
        positions="rope",
        norm="rmsnorm",
        norm_epsilon=1e-5,
        activation="silu",
        gated=True,
        mlp_hidden=-(-hidden // net["multiple_of"]) * net["multiple_of"],
    )
    if net["model_type"] == "c2i":
        backbone |= dict(condition="class", num_classes=net["num_classes"])
    else:
        caption = dict(caption_length=net["cls_token_num"], caption_features=net["caption_dim"])
        backbone |= dict(condition="text") | caption
    config = dict(
        dtype="float32",
        tokenizer=tokenizer,
        schedule=dict(name="raster", grid=grid),
        backbone=backbone,
        head=dict(name="categorical", vocab_size=net["vocab_size"], bias=False, init_std=0.02),
    )
    system = build_system(config)
    tensors = case.state_dict(part)
    places = gpt_places(tensors, width=net["dim"], heads=net["n_head"])
    params = to_ours(places, tensors)
    if part == "gpt_c2i":
        weights = case.state_dict("tokenizer")
        params["tokenizer"] = to_ours(case_tokenizer_places(case, weights), weights)
    else:  # the case decodes no text samples: any weights do
        objective = TokenizerObjective(tokenizer=system.tokenizer)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        params["tokenizer"] = jax.tree.map(lambda a: jnp.zeros(a.shape), shapes)
    return Gpt(case, part, system, jax.tree.map(jnp.asarray, params), places)


def case_tokenizer_places(case: Case, weights: dict[str, np.ndarray]) -> Places:
    levels = len(case.spec["config"]["tokenizer"]["encoder_ch_mult"])
    return tokenizer_places(weights, family="llamagen", levels=levels)
