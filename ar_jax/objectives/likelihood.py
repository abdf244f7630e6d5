"""Maximum likelihood of the codes: teacher forcing over a schedule."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Aux, Batch, Cond, Params, Stats, System, weighted_mean
from ar_jax.nn.bits import draw_flips
from ar_jax.objectives.orders import draw_orders, random_share
from ar_jax.objectives.patches import Patches, check_patches, staged_logits
from ar_jax.objectives.ranges import check_share
from ar_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Mean of the head's loss of all codes, weight 1/L each: of most heads nats per code.

    Attributes:
        system: the generator; its tokenizer is frozen.
        label_dropout: probability of training a sample on the null condition (for guidance).
        label_smoothing: e of the target (1 - e) one_hot + e / V; training only.
        self_correction: of next-scale training, the largest share of codes that the model draws
            itself, where finer scales learn to make up for what was drawn wrong; each sample's
            share is uniform in [0, self_correction]. It costs one more forward pass. 0: none.
        bit_flips: of next-scale training on bits, the largest share of bits of a scale that are
            flipped, where finer scales learn to make up for them; see
            `ar_jax.tokenizers.bitwise.draw_flips`. 0: none.
        flipped_scales: so many scales, coarse to fine, have flipped bits; None: all.
        balance_scales: in training, weight a code by 1 / sqrt(codes of its scale), in place of 1/L
            (Infinity).
        patches: (side of windows, step at which this ends) of the stages of training before that
            of single codes, see `ar_jax.objectives.patches`; (): none.

    Schedules of random orders permute the codes of training samples, more and more rarely if they
    anneal; evaluation keeps the schedule's own order. A batch may hold an ``order`` int32 [B, L],
    which is then used, in training and in evaluation.

    The metrics report loss and accuracy for groups of steps too: every scale of next-scale
    schedules, quarters of the sequence (in its order) of the others; and the share of permuted
    samples that training aims at.
    """

    system: System
    label_dropout: float = 0.1
    label_smoothing: float = 0.0
    self_correction: float = 0.0
    bit_flips: float = 0.0
    flipped_scales: int | None = None
    balance_scales: bool = False
    patches: Patches = ()

    def __post_init__(self) -> None:
        check_share("label_dropout", self.label_dropout)
        check_share("label_smoothing", self.label_smoothing)
        check_share("self_correction", self.self_correction)
        check_share("bit_flips", self.bit_flips)
        check_patches(self.patches, self.system)

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return self.system.schedule.length

    def init(self, key: Array) -> Params:
        """Float32 ``{'backbone': ..., 'head': ...}``."""
        system = self.system
        backbone_key, head_key = jax.random.split(key)
        codes = jnp.zeros((1, *system.tokenizer.codes_shape), jnp.int32)
        tokenizer = jax.eval_shape(lambda k: init_tokenizer(system, k), key)
        context = jax.eval_shape(
            lambda p: system.tokenizer.apply({"params": p}, codes, method="contexts"), tokenizer
        )
        context = jnp.zeros(context.shape, context.dtype)
        cond = empty_cond(system, 1)
        backbone = system.backbone.init(backbone_key, context, cond)["params"]
        hidden = jnp.zeros((1, 1, system.backbone.width), jnp.float32)
        return {"backbone": backbone, "head": system.head.init(head_key, hidden)["params"]}

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
        """See `ar_jax.api.Objective`; ``frozen`` is ``{'tokenizer': ...}``."""
        system, mask = self.system, batch.get("mask")
        drop_key, dropout_key, path_key, order_key, draw_key = jax.random.split(key, 5)
        with jax.named_scope("tokenizer"):  # as those below: for `ar_jax.compilation.phases`
            codes = read_codes(system, frozen, batch)
        share = random_share(system.schedule, step)
        order = batch.get("order")
        if order is None and train and system.schedule.random:
            order = draw_orders(order_key, share, len(codes), system.schedule)
        if order is not None:
            codes = jnp.take_along_axis(codes, order, axis=1)
        elif system.schedule.cells is not None:
            codes = codes[:, np.asarray(system.schedule.cells)]
        with jax.named_scope("tokenizer"):
            frozen_params = {"params": frozen["tokenizer"]}
            if train and self.bit_flips:
                codes, context = self._flipped(frozen_params, codes, batch, draw_key)
            else:
                context = system.tokenizer.apply(frozen_params, codes, method="contexts")
        conditioner = system.backbone.conditioner
        cond = drop_condition(conditioner, batch, drop_key, self.label_dropout * train)
        rngs = {"dropout": dropout_key, "drop_path": path_key} if train else None
        if train and self.self_correction:
            logits = jax.lax.stop_gradient(self._logits(params, context, cond, order, rngs))
            codes, context = self._corrected(frozen, codes, logits, draw_key)
        single = functools.partial(self._logits, params, context, cond, order, rngs)
        if train and self.patches:
            fed = params, codes, cond
            logits = staged_logits(
                system, *fed, rngs, patches=self.patches, step=step, single=single
            )
        else:
            logits = single()  # [B, L, V]
        with jax.named_scope("head_and_loss"):
            nll = -system.head.log_prob(logits, codes)  # [B, L]
            smoothing = self.label_smoothing if train else 0.0
            loss = system.head.loss(logits, codes, label_smoothing=smoothing)
            if train and self.balance_scales:
                loss = loss * jnp.asarray(scale_weights(system.schedule))[None]
            correct = system.head.correct(logits, codes)
            metrics = {"nll": weighted_mean(nll, mask), "accuracy": weighted_mean(correct, mask)}
            if train and system.schedule.random:
                metrics["random_share"] = share
            for name, (first, last) in self._groups().items():
                metrics[f"nll/{name}"] = weighted_mean(nll[:, first:last], mask)
                metrics[f"accuracy/{name}"] = weighted_mean(correct[:, first:last], mask)
            return weighted_mean(loss, mask), Aux(metrics=metrics)

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Nothing to do after an update."""
        return params, stats

    def _logits(
        self, params: Params, context: Array, cond: Cond, order: Array | None, rngs: Any
    ) -> Array:
        """Teacher-forced logits float32 [B, L, V]; ``rngs`` None: not in training."""
        hidden, _ = self.system.backbone.apply(
            {"params": params["backbone"]},
            context,
            cond,
            order=order,
            train=rngs is not None,
            rngs=rngs,
        )
        with jax.named_scope("head_and_loss"):
            return self.system.head.apply({"params": params["head"]}, hidden)

    def _flipped(
        self, tokenizer: Params, codes: Array, batch: Batch, key: Array
    ) -> tuple[Array, Array]:
        """(right codes [B, L, bits], contexts) after some of their bits were flipped.

        What is right is what is left over of the encoder's features, or of what cached codes stand
        for.
        """
        schedule, bits = self.system.schedule, self.system.tokenizer.bits
        scales = schedule.num_steps if self.flipped_scales is None else self.flipped_scales
        sizes = (len(codes), schedule.sizes, bits)
        flips = draw_flips(key, *sizes, strength=self.bit_flips, scales=scales)
        inputs = codes if "codes" in batch else to_float(batch)
        found = self.system.tokenizer.apply(tokenizer, inputs, flips, method="flip")
        return jax.lax.stop_gradient(found)

    def _corrected(
        self, frozen: Params, codes: Array, logits: Array, key: Array
    ) -> tuple[Array, Array]:
        """(right codes [B, L], contexts) after some were drawn from logits [B, L, V]."""
        share_key, choice_key, noise_key = jax.random.split(key, 3)
        share = self.self_correction * jax.random.uniform(share_key, (len(codes), 1))
        wrong = jax.random.bernoulli(choice_key, share, codes.shape)
        drawn = self.system.head.draw(logits, jax.random.gumbel(noise_key, logits.shape))
        tokenizer = {"params": frozen["tokenizer"]}
        with jax.named_scope("tokenizer"):
            return self.system.tokenizer.apply(tokenizer, codes, drawn, wrong, method="correct")

    def _groups(self) -> dict[str, tuple[int, int]]:
        """Ranges of code positions whose loss is reported on its own."""
        schedule = self.system.schedule
        if len(schedule.grids) > 1:
            return {
                f"scale_{i:02d}": (start, start + size)
                for i, (start, size) in enumerate(zip(schedule.starts, schedule.sizes, strict=True))
            }
        edges = [schedule.length * i // 4 for i in range(5)]
        return {
            f"quarter_{i}": (edges[i], edges[i + 1]) for i in range(4) if edges[i] < edges[i + 1]
        }


def scale_weights(schedule: Schedule) -> np.ndarray:
    """float32 [L] of mean 1: of every code, in proportion to 1 / sqrt(codes of its step)."""
    weights = np.repeat(np.asarray(schedule.sizes) ** -0.5, schedule.sizes)
    return (weights / weights.mean()).astype(np.float32)


def read_codes(system: System, frozen: Params, batch: Batch) -> Array:
    """Cached codes int32 [B, L] or int8 [B, L, bits], or the frozen tokenizer's of the images."""
    if "codes" in batch:
        return batch["codes"].astype(jnp.int8 if system.tokenizer.bits else jnp.int32)
    frozen_params = {"params": frozen["tokenizer"]}
    codes = system.tokenizer.apply(frozen_params, to_float(batch), method="encode")
    return jax.lax.stop_gradient(codes)


def to_float(batch: Batch) -> Array:
    """The batch's images uint8 [B, H, W, C] as float32 in [-1, 1]."""
    return batch["image"].astype(jnp.float32) / 127.5 - 1.0


def drop_condition(conditioner: Any, batch: Batch, key: Array, rate: float) -> Cond:
    """The batch's condition, each image's made null with the probability ``rate``."""
    cond = {name: batch[name] for name in conditioner.fields}
    if not rate:
        return cond
    batch_size = len(jax.tree.leaves(cond)[0])
    return conditioner.null(cond, jax.random.bernoulli(key, rate, (batch_size,)))


def init_tokenizer(system: System, key: Array) -> Params:
    """Fresh tokenizer parameters (for shapes, tests and benchmarks); {} where it has none."""
    images = jnp.zeros((1, *system.tokenizer.image_shape), jnp.float32)
    return system.tokenizer.init(key, images).get("params", {})


def empty_cond(system: System, batch_size: int) -> Cond:
    """A condition pytree of zeros of the right shapes."""
    return system.backbone.conditioner.empty(batch_size)
