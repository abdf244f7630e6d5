"""A toy that trains against an adversary: images through two layers, judged by another two."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Params, Stats
from ar_jax.objectives.adversarial import Adversary

SHAPE = (4, 4, 1)


class ToyDiscriminator(nn.Module):
    """One logit an image, without batch statistics, so that microbatches are alike.

    Attributes:
        poison: images whose first pixel is above this have a logit of NaN.
    """

    poison: float = 2.0

    def problem(self, image_shape: tuple[int, int, int]) -> str | None:
        return None

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        bad = x[:, 0, 0, 0] > self.poison
        h = nn.tanh(nn.Dense(8, name="hidden")(x.reshape(len(x), -1)))
        logits = nn.Dense(1, name="output")(h)
        return jnp.where(bad[:, None], jnp.nan, logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyGenerator:
    """Autoencoding of 4x4 images, l2."""

    adversary: Any = None

    @property
    def last_layer(self) -> str:
        return "decoder/conv_out/kernel"

    def init(self, key: Array) -> Params:
        draws = jax.random.uniform(key, (2, 16, 16), minval=-0.3, maxval=0.3)
        return {
            "encoder": {"kernel": draws[0]},
            "decoder": {"conv_out": {"kernel": draws[1], "bias": jnp.zeros(16)}},
        }

    def init_stats(self, params: Params) -> Stats:
        return {}

    def loss(
        self,
        params: Params,
        stats: Stats,
        frozen: Params,
        batch: Batch,
        key: Array,
        train: bool,
        step: Array | int = 0,
    ) -> tuple[Array, Aux]:
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        last = params["decoder"]["conv_out"]
        h = jnp.tanh(images.reshape(len(images), -1) @ params["encoder"]["kernel"])
        made = (h @ last["kernel"] + last["bias"][None]).reshape(images.shape)
        l2 = jnp.square(made - images).mean()
        judged = (images, made) if train and self.adversary is not None else None
        return l2, Aux(metrics={"l2": l2}, judged=judged)

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        return params, stats


def toy_adversary(poison: float = 2.0, **fields: Any) -> Adversary:
    """Weight 0.5 from the first step on, unless ``fields`` say otherwise."""
    network = ToyDiscriminator(poison=poison)
    return Adversary(discriminator=network, image_shape=SHAPE, **(dict(weight=0.5) | fields))
