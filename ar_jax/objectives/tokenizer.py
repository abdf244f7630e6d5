"""Training of tokenizers: reconstruction, codebook and commitment terms, codebook upkeep."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Params, Stats, weighted_mean
from ar_jax.nn.kmeans import kmeans
from ar_jax.nn.quantize import Assignments, code_counts, normalise, perplexity, usage, vector_sums
from ar_jax.objectives.adversarial import LAST_LAYER
from ar_jax.objectives.ranges import check_decay, check_weight
from ar_jax.objectives.reconstruction import check_image_terms, image_terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerObjective:
    """reconstruction + perceptual + codebook + commitment + entropy, each times its weight.

    The codebook moves outside of the gradient too, see `finish`: as a running mean, by restarts of
    dead codes and once by k-means. Quantisers without one (their ``codebook_update`` is None) have
    but the histogram.

    Attributes:
        tokenizer: a `ar_jax.tokenizers.tokenizer.Tokenizer`.
        l1, l2: weights of the mean absolute and the mean squared error of images in [-1, 1].
        charbonnier: weight of the mean sqrt(error^2 + charbonnier_epsilon^2), an l1 that is smooth
            at zero.
        perceptual: weight of the distance in the features of ``perceptual_network``: LPIPS with
            'vgg' or 'alexnet', whose weights are in the file ``perceptual_weights``, or the shipped
            Fashion-MNIST 'classifier'.
        codebook, commitment, entropy: weights of the quantiser's terms, of those that it has.
        diversity: weight, within the entropy term, of the entropy of the mean assignment, which is
            to be large.
        usage_decay: decay of the code histogram behind the usage and perplexity metrics and the
            restarts.
        ema_decay: of the EMA codebook (only with ``codebook_update='ema'``).
        restart_below: codes whose share of the histogram is below this fraction of the uniform
            share restart as a random vector of the batch; 0 never restarts.
        kmeans_vectors: as soon as so many vectors were quantised, their k-means become the
            codebook; 0: it goes on from its random start. They are kept in the training state.
        fixed_codebook: the optimiser freezes the codebook (`config.optimizer.freeze`), so that
            nothing else moves it either.
        adversary: an `ar_jax.objectives.adversarial.Adversary`, or None.

    The perceptual network's parameters come in ``frozen``, as a generator's tokenizer does. The
    adversarial term is the train step's to add: `loss` only hands out the images that the adversary
    judges.
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
    diversity: float = 1.0
    usage_decay: float = 0.99
    ema_decay: float = 0.99
    restart_below: float = 0.0
    kmeans_vectors: int = 0
    fixed_codebook: bool = False
    adversary: Any = None

    def __post_init__(self) -> None:
        for term in ("l1", "l2", "codebook", "commitment", "entropy", "diversity"):
            check_weight(term, getattr(self, term))
        check_image_terms(self)
        check_decay("usage_decay", self.usage_decay)
        check_decay("ema_decay", self.ema_decay)
        if not 0 <= self.restart_below < 1:
            raise ValueError(
                f"objective.restart_below is {self.restart_below}; it must lie in [0, 1): from 1 "
                "on codes of the usual share would restart too"
            )
        if self.kmeans_vectors < 0:
            raise ValueError(
                f"objective.kmeans_vectors is {self.kmeans_vectors}; it must not be negative"
            )

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return len(self._step_id)

    @property
    def last_layer(self) -> str:
        """The parameter that makes the images last."""
        return LAST_LAYER

    @property
    def _step_id(self) -> tuple[int, ...]:
        grids = self.tokenizer.grids
        return tuple(i for i, (h, w) in enumerate(grids) for _ in range(h * w))

    @property
    def _moves_codebook(self) -> bool:
        learned = self.tokenizer.quantizer.codebook_update is not None
        return learned and not self.fixed_codebook

    @property
    def _ema(self) -> bool:
        return self._moves_codebook and self.tokenizer.quantizer.codebook_update == "ema"

    @property
    def _restarts(self) -> bool:
        return self._moves_codebook and self.restart_below > 0

    @property
    def _kmeans(self) -> bool:
        return self._moves_codebook and self.kmeans_vectors > 0

    def init(self, key: Array) -> Params:
        """Float32 parameters of the tokenizer."""
        images = jnp.zeros((1, *self.tokenizer.image_shape), jnp.float32)
        return self.tokenizer.init(key, images)["params"]

    def init_stats(self, params: Params) -> Stats:
        """Histogram float32 [scales, V] and what moves the codebook.

        For EMA codebooks counts [V] and sums [V, C]; for k-means the vectors [n, C] and how many
        of them there are.
        """
        shape = (len(self.tokenizer.grids), self.tokenizer.index_size)
        stats = {"histogram": jnp.ones(shape, jnp.float32) / shape[1]}
        if self._ema:
            # A copy: donated training state must not hold one buffer twice.
            stats |= {
                "ema_counts": jnp.ones(shape[1:], jnp.float32),
                "ema_sums": jnp.array(params["quantizer"]["codebook"], copy=True),
            }
        if self._kmeans:
            width = params["quantizer"]["codebook"].shape[1]
            stats |= {
                "kmeans_pool": jnp.zeros((self.kmeans_vectors, width), jnp.float32),
                "kmeans_filled": jnp.zeros((), jnp.int32),
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
        loss = self.l1 * l1 + self.l2 * l2
        clipped = jnp.clip(reconstruction, -1.0, 1.0) - images
        mse = jnp.square(clipped / 2).mean(axis=(1, 2, 3))  # [B], of images in [0, 1]
        metrics = {
            "l1": l1,
            "l2": l2,
            "psnr": weighted_mean(-10 * jnp.log10(jnp.maximum(mse, 1e-10)), mask),
        }
        for name in ("codebook", "commitment"):
            if name in self.tokenizer.quantizer.losses:
                term = weighted_mean(getattr(quantized, f"{name}_loss"), mask)
                loss += getattr(self, name) * term
                metrics[f"{name}_loss"] = term
        if self.entropy:
            each, mean = quantized.sample_entropy, quantized.codebook_entropy
            term = each - self.diversity * mean
            loss += self.entropy * term
            metrics |= {"entropy_loss": term, "sample_entropy": each, "codebook_entropy": mean}
        more, terms = image_terms(self, frozen, images, reconstruction, mask)
        metrics |= terms | self._codebook_metrics(stats)
        if not train:
            return loss + more, Aux(metrics=metrics)
        judged = (images, reconstruction) if self.adversary is not None else None
        return loss + more, Aux(metrics=metrics, judged=judged, **self._updates(quantized, key))

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Moves the histogram, the EMA codebook, starts from k-means and restarts dead codes."""
        counts = sums["counts"]  # [scales, V]
        share = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
        decay = self.usage_decay
        stats = dict(stats, histogram=decay * stats["histogram"] + (1 - decay) * share)
        if not self._moves_codebook:
            return params, stats
        codebook = params["quantizer"]["codebook"]
        if self._ema:
            decay = self.ema_decay
            stats["ema_counts"] = decay * stats["ema_counts"] + (1 - decay) * counts.sum(0)
            stats["ema_sums"] = decay * stats["ema_sums"] + (1 - decay) * sums["vectors"]
            codebook = stats["ema_sums"] / jnp.maximum(stats["ema_counts"], 1e-5)[:, None]
            codebook = normalise(codebook, self.tokenizer.quantizer.unit_vectors)
        if self._kmeans:
            pool, due = self._collect(stats, last["vectors"])
            stats |= pool
            start = functools.partial(
                kmeans,
                pool["kmeans_pool"],
                len(codebook),
                key,
                l2_norm=self.tokenizer.quantizer.unit_vectors,
            )
            codebook = jax.lax.cond(due, start, lambda: codebook)
            stats = self._renewed(stats, jnp.full(len(codebook), due), codebook)
        if self._restarts:
            dead = stats["histogram"].mean(0) * codebook.shape[0] < self.restart_below  # [V]
            codebook = jnp.where(dead[:, None], last["candidates"], codebook)
            stats = self._renewed(stats, dead, codebook)
        quantizer = params["quantizer"] | {"codebook": codebook}
        return params | {"quantizer": quantizer}, stats

    def _collect(self, stats: Stats, vectors: Array) -> tuple[Stats, Array]:
        """The pool with vectors [N, C], as far as it has place, and whether it is full just now."""
        filled, size = stats["kmeans_filled"], self.kmeans_vectors
        rows = filled + jnp.arange(len(vectors))
        pool = stats["kmeans_pool"].at[rows].set(vectors, mode="drop")
        after = jnp.minimum(filled + len(vectors), size)
        full = (after == size) & (filled < size)
        return {"kmeans_pool": pool, "kmeans_filled": after}, full

    def _renewed(self, stats: Stats, rows: Array, codebook: Array) -> Stats:
        """Statistics with those of new codes, bool [V], started: they get time to be used."""
        histogram = jnp.where(rows[None], 1.0 / len(codebook), stats["histogram"])
        stats = stats | {"histogram": histogram}
        if self._ema:
            stats["ema_counts"] = jnp.where(rows, 1.0, stats["ema_counts"])
            stats["ema_sums"] = jnp.where(rows[:, None], codebook, stats["ema_sums"])
        return stats

    def _updates(self, quantized: Any, key: Array) -> dict[str, Any]:
        """What `finish` needs of a microbatch: sums over the batch, vectors and candidates."""
        size = self.tokenizer.index_size
        scales = len(self.tokenizer.grids)
        steps = jnp.asarray(self._step_id, jnp.int32)
        index = self.tokenizer.index(quantized.codes)
        sums = {"counts": code_counts(index, steps, scales, size)}
        vectors = jax.lax.stop_gradient(quantized.vectors)
        pool = vectors.reshape(-1, vectors.shape[-1])
        if self._ema:
            assignments = Assignments(codes=quantized.codes, vectors=vectors)
            sums["vectors"] = vector_sums(assignments, size)
        last = {}
        if self._kmeans:
            last["vectors"] = pool
        if self._restarts:
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
