"""Our VAR with the weights of a golden case."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.sampling.loop import CachedSampler
from tests.golden_weights import Case, Places


@dataclasses.dataclass(frozen=True)
class Var:
    """A case and our system with its weights."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    places: dict[str, Places]  # of 'tokenizer' and 'transformer'

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case.io[name]

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """int32 [B, L] of the input image."""
        return self.drawn("tok")

    def drawn(self, run: str) -> np.ndarray:
        """int32 [B, L], the ids of a run."""
        scales = range(self.system.schedule.num_steps)
        return np.concatenate([self[f"{run}.idx_{k}"] for k in scales], axis=1)

    @property
    def image(self) -> np.ndarray:
        """uint8 [B, H, W, C]."""
        return self["image_u8"].transpose(0, 2, 3, 1)

    @property
    def cond(self) -> dict[str, jax.Array]:
        return {"label": jnp.asarray(self["label"])}

    @property
    def null(self) -> dict[str, jax.Array]:
        return self.system.backbone.conditioner.null(self.cond)

    @functools.cached_property
    def forward(self) -> Any:
        """Compiled once: (cond, codes) -> teacher-forced logits."""
        run = jax.jit(functools.partial(teacher_forced, self.system))
        return functools.partial(run, self.params)

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        return CachedSampler.create(self.system, self.params)

    def tokenizer(self, method, *args, **kwargs) -> Any:
        """Applies a method, by name or as a function of the module, of our tokenizer."""
        variables = {"params": self.params["tokenizer"]}
        return self.system.tokenizer.apply(variables, *args, method=method, **kwargs)


def var_config(spec: dict[str, Any]) -> dict[str, Any]:
    """Our config of the system that a case describes."""
    tok, net = spec["config"]["tokenizer"], spec["config"]["transformer"]
    head_width = net["embed_dim"] // net["num_heads"]
    autoencoder = dict(
        image_size=spec["config"]["image_size"],
        image_channels=tok["in_channels"],
        latent=tok["z_channels"],
        code_width=tok["z_channels"],
        channels=tok["ch"],
        multipliers=tok["ch_mult"],
        encoder_blocks=tok["num_res_blocks"],
        decoder_blocks=tok["num_res_blocks"] + 1,
        projection=tok["quant_conv_ks"],
    )
    return dict(
        dtype="float32",
        tokenizer=dict(
            name="multiscale_vq",
            autoencoder=autoencoder,
            scales=tok["v_patch_nums"],
            codebook_size=tok["vocab_size"],
            phis=tok["share_quant_resi"],
            phi_ratio=tok["quant_resi"],
            l2_norm=tok["using_znorm"],
        ),
        schedule=dict(name="next_scale", scales=net["patch_nums"]),
        backbone=dict(
            name="decoder",
            width=net["embed_dim"],
            depth=net["depth"],
            heads=net["num_heads"],
            num_classes=net["num_classes"],
            context="features",
            feature_width=tok["z_channels"],
            positions="learned",
            norm="layernorm",
            norm_epsilon=net["norm_eps"],
            modulation="shared" if net["shared_aln"] else "own",
            qk_norm="cosine" if net["attn_l2_norm"] else "none",
            logit_scale=0.25 * head_width**-0.5,
            attention_bias="qv",
            activation="gelu_tanh",
            mlp_bias=True,
            mlp_hidden=int(net["mlp_ratio"] * net["embed_dim"]),
            drop_path=net["drop_path_rate"],
        ),
        head=dict(name="categorical", vocab_size=tok["vocab_size"], bias=True, init_std=0.02),
    )
