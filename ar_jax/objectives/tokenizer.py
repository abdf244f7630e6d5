"""Training of tokenizers: reconstruction, codebook and commitment terms, codebook upkeep."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Params, Stats, weighted_mean
from ar_jax.nn.quantize import Assignments, code_counts, normalise, perplexity, usage, vector_sums
from ar_jax.objectives.ranges import check_decay, check_weight
from ar_jax.objectives.reconstruction import check_image_terms, image_terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerObjective:
    """reconstruction + perceptual + codebook + commitment + entropy, each times its weight.

    Attributes:
        tokenizer: a `ar_jax.tokenizers.tokenizer.Tokenizer`.
        l1, l2: weights of the mean absolute and the mean squared error of images in [-1, 1].
        charbonnier: weight of the mean sqrt(error^2 + charbonnier_epsilon^2), an l1 that is smooth
            at zero.
        perceptual: weight of the distance in the features of ``perceptual_network``: LPIPS with
            'vgg' or 'alexnet', whose weights are in the file ``perceptual_weights``, or the shipped
            Fashion-MNIST 'classifier'.
        codebook, commitment, entropy: weights of the quantiser's terms.
        usage_decay: decay of the code histogram behind the usage and perplexity metrics and the
            restarts.
        ema_decay: of the EMA codebook (only with ``codebook_update='ema'``).
        restart_below: codes whose share of the histogram is below this fraction of the uniform
            share restart as a random vector of the batch; 0 never restarts.

    The perceptual network's parameters come in ``frozen``, as a generator's tokenizer does. An
    adversarial term would be a summand too, but its discriminator trains against the tokenizer:
    that needs parameters and an optimiser of their own beside those of the train state.
    """

    tokenizer: Any
    l1: float = 0.0
    l2: float = 1.0
    charbonnier: float = 0.0
    charbonnier_epsilon: float = 1e-3
    perceptual: float = 0.0
    perceptual_network: str = "vgg"
    perceptual_weights: str = ""
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    usage_decay: float = 0.99
    ema_decay: float = 0.99
    restart_below: float = 0.0

    def __post_init__(self) -> None:
        for term in ("l1", "l2", "codebook", "commitment", "entropy"):
            check_weight(term, getattr(self, term))
        check_image_terms(self)
        check_decay("usage_decay", self.usage_decay)
        check_decay("ema_decay", self.ema_decay)
        if not 0 <= self.restart_below < 1:
            raise ValueError(
                f"objective.restart_below is {self.restart_below}; it must lie in [0, 1): from 1 "
                "on codes of the usual share would restart too"
            )

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return len(self._step_id)

    @property
    def _step_id(self) -> tuple[int, ...]:
        grids = self.tokenizer.grids
        return tuple(i for i, (h, w) in enumerate(grids) for _ in range(h * w))

    @property
    def _ema(self) -> bool:
        return self.tokenizer.quantizer.codebook_update == "ema"

    def init(self, key: Array) -> Params:
        """Float32 parameters of the tokenizer."""
        images = jnp.zeros((1, *self.tokenizer.image_shape), jnp.float32)
        return self.tokenizer.init(key, images)["params"]

    def init_stats(self, params: Params) -> Stats:
        """Histogram float32 [scales, V] and, for EMA codebooks, counts [V] and sums [V, C]."""
        codebook = params["quantizer"]["codebook"]
        shape = (len(self.tokenizer.grids), self.tokenizer.codebook_size)
        stats = {"histogram": jnp.ones(shape, jnp.float32) / shape[1]}
        if self._ema:
            # A copy: donated training state must not hold one buffer twice.
            stats |= {
                "ema_counts": jnp.ones(shape[1:], jnp.float32),
                "ema_sums": jnp.array(codebook, copy=True),
            }
        return stats

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
        """See `ar_jax.api.Objective`; images are uint8, ``frozen`` as `frozen_shapes` says."""
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mask = batch.get("mask")
        reconstruction, quantized = self.tokenizer.apply({"params": params}, images, mask)
        error = reconstruction - images
        l1 = weighted_mean(jnp.abs(error), mask)
        l2 = weighted_mean(jnp.square(error), mask)
        codebook_loss = weighted_mean(quantized.codebook_loss, mask)
        commitment_loss = weighted_mean(quantized.commitment_loss, mask)
        loss = (
            self.l1 * l1
            + self.l2 * l2
            + self.codebook * codebook_loss
            + self.commitment * commitment_loss
            + self.entropy * quantized.entropy_loss
        )
        clipped = jnp.clip(reconstruction, -1.0, 1.0) - images
        mse = jnp.square(clipped / 2).mean(axis=(1, 2, 3))  # [B], of images in [0, 1]
        metrics = {
            "l1": l1,
            "l2": l2,
            "psnr": weighted_mean(-10 * jnp.log10(jnp.maximum(mse, 1e-10)), mask),
            "codebook_loss": codebook_loss,
            "commitment_loss": commitment_loss,
        }
        if self.entropy:
            metrics["entropy_loss"] = quantized.entropy_loss
        more, terms = image_terms(self, frozen, images, reconstruction, mask)
        metrics |= terms | self._codebook_metrics(stats)
        return loss + more, Aux(metrics=metrics, **(self._updates(quantized, key) if train else {}))

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Moves the histogram, the EMA codebook and restarts dead codes."""
        counts = sums["counts"]  # [scales, V]
        share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
        decay = self.usage_decay
        stats = dict(stats, histogram=decay * stats["histogram"] + (1 - decay) * share)
        codebook = params["quantizer"]["codebook"]
        if self._ema:
            decay = self.ema_decay
            stats["ema_counts"] = decay * stats["ema_counts"] + (1 - decay) * counts.sum(0)
            stats["ema_sums"] = decay * stats["ema_sums"] + (1 - decay) * sums["vectors"]
            codebook = stats["ema_sums"] / jnp.maximum(stats["ema_counts"], 1e-5)[:, None]
            codebook = normalise(codebook, self.tokenizer.quantizer.unit_vectors)
        if self.restart_below:
            dead = stats["histogram"].mean(0) * codebook.shape[0] < self.restart_below  # [V]
            codebook = jnp.where(dead[:, None], last["candidates"], codebook)
            # A restarted code gets the time to prove itself.
            fresh = jnp.where(dead[None], 1.0 / codebook.shape[0], stats["histogram"])
            stats["histogram"] = fresh
            if self._ema:
                stats["ema_counts"] = jnp.where(dead, 1.0, stats["ema_counts"])
                stats["ema_sums"] = jnp.where(dead[:, None], codebook, stats["ema_sums"])
        quantizer = params["quantizer"] | {"codebook": codebook}
        return params | {"quantizer": quantizer}, stats

    def _updates(self, quantized: Any, key: Array) -> dict[str, Any]:
        """What `finish` needs of a microbatch: sums over the batch, and restart candidates."""
        sg = jax.lax.stop_gradient
        size = self.tokenizer.codebook_size
        scales = len(self.tokenizer.grids)
        steps = jnp.asarray(self._step_id, jnp.int32)
        sums = {"counts": code_counts(quantized.codes, steps, scales, size)}
        if self._ema:
            assignments = Assignments(codes=quantized.codes, vectors=sg(quantized.vectors))
            sums["vectors"] = vector_sums(assignments, size)
        last = {}
        if self.restart_below:
            pool = sg(quantized.vectors).reshape(-1, quantized.vectors.shape[-1])
            picks = jax.random.randint(key, (size,), 0, len(pool))
            last["candidates"] = pool[picks]  # [V, C]
        return {"sums": sums, "last": last}

    def _codebook_metrics(self, stats: Stats) -> dict[str, Array]:
        """Usage and perplexity over the last steps, per scale and of all scales together."""
        histogram = stats["histogram"]
        # A code counts as used if its share is above a hundredth of the uniform one.
        used = jnp.where(histogram * histogram.shape[-1] > 1e-2, histogram, 0.0)
        metrics = {
            "usage": usage(used.mean(0)),
            "perplexity": perplexity(histogram.mean(0)),
        }
        if len(histogram) > 1:
            for i in range(len(histogram)):
                metrics[f"usage/scale_{i:02d}"] = usage(used[i])
                metrics[f"perplexity/scale_{i:02d}"] = perplexity(histogram[i])
        return metrics
