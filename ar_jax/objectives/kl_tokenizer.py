"""Training of KL autoencoders: reconstruction of a posterior sample, and its divergence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Params, Stats, weighted_mean
from ar_jax.objectives.ranges import check_weight
from ar_jax.objectives.reconstruction import check_image_terms, image_terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLTokenizerObjective:
    """Reconstruction and perceptual terms + KL divergence from the standard normal, with weights.

    (arXiv:2112.10752)

    All terms are per pixel value: the divergence of an image's latents, in nats, is divided by the
    image's numbers, which is the official balance of sums over both.

    Attributes:
        tokenizer: a `ar_jax.tokenizers.kl.KLTokenizer`.
        l1, l2: weights of the mean absolute and the mean squared error of images in [-1, 1].
        charbonnier, charbonnier_epsilon, perceptual, perceptual_network, perceptual_weights: see
            `ar_jax.objectives.tokenizer.TokenizerObjective`.
        kl: weight of the divergence.

    The metric ``latent_power`` is the latents' mean square: ``tokenizer.scale`` should be about its
    inverse square root.
    """

    tokenizer: Any
    l1: float = 0.0
    l2: float = 1.0
    charbonnier: float = 0.0
    charbonnier_epsilon: float = 1e-3
    perceptual: float = 0.0
    perceptual_network: str = "vgg"
    perceptual_weights: str = ""
    kl: float = 1e-6

    def __post_init__(self) -> None:
        for term in ("l1", "l2", "kl"):
            check_weight(term, getattr(self, term))
        check_image_terms(self)

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return self.tokenizer.codes_shape[0]

    def init(self, key: Array) -> Params:
        """Float32 parameters of the tokenizer."""
        images = jnp.zeros((1, *self.tokenizer.image_shape), jnp.float32)
        return self.tokenizer.init(key, images)["params"]

    def init_stats(self, params: Params) -> Stats:
        """No state."""
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
        """See `ar_jax.api.Objective`; images are uint8. Evaluation decodes the posterior's mean."""
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mask, noise = batch.get("mask"), None
        if train:
            autoencoder = self.tokenizer.autoencoder
            shape = (len(images), *autoencoder.grid, autoencoder.code_width)
            noise = jax.random.normal(key, shape)
        reconstruction, posterior = self.tokenizer.apply({"params": params}, images, noise)
        error = reconstruction - images
        l1 = weighted_mean(jnp.abs(error), mask)
        l2 = weighted_mean(jnp.square(error), mask)
        kl = weighted_mean(posterior.kl(), mask)
        clipped = jnp.clip(reconstruction, -1.0, 1.0) - images
        mse = jnp.square(clipped / 2).mean(axis=(1, 2, 3))  # [B], of images in [0, 1]
        power = jnp.square(posterior.mean) + jnp.exp(posterior.log_variance)
        metrics = {
            "l1": l1,
            "l2": l2,
            "psnr": weighted_mean(-10 * jnp.log10(jnp.maximum(mse, 1e-10)), mask),
            "kl": kl,
            "latent_power": weighted_mean(power, mask),
        }
        loss = self.l1 * l1 + self.l2 * l2 + self.kl * kl / (images.size / len(images))
        more, terms = image_terms(self, frozen, images, reconstruction, mask)
        return loss + more, Aux(metrics=metrics | terms)

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Nothing to do after an update."""
        return params, stats
