"""Flow matching of continuous codes: the velocity of noisy codes, every step at its own time."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Aux, Batch, Cond, Params, Stats, System
from ar_jax.nn.flow import interpolate
from ar_jax.objectives.latents import draw_latent_codes
from ar_jax.objectives.ranges import check_share


@flax.struct.dataclass
class FlowDraws:
    """All that chance decides in a batch, in place of a key."""

    times: Array  # float32 [B, S] in (0, 1): 0 is clean, 1 is noise
    noise: Array  # float32 [B, L, C], standard normal, in the order of the schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Mean squared error of the velocity noise - code.

    A head of noisy context (xAR) predicts it from steps that are all noisy, each at its own time;
    another (FlowAR) from what the steps before give when they are clean.

    Attributes:
        system: the generator; its tokenizer is frozen.
        label_dropout: probability of training an image on the null condition (for guidance).
        by_step: every step counts the same, whatever the number of its codes; else every code.
        time_mean, time_std: times are the logistic function of a normal of these, one for every
            image and step.
    """

    # What evaluation reports of it.
    METRICS: ClassVar[dict[str, str]] = {
        "loss": "mean squared error of the velocity from codes to unit-variance noise"
    }
    remark: ClassVar[str] = "It is no likelihood of an image."

    system: System
    label_dropout: float = 0.1
    by_step: bool = False
    time_mean: float = 0.0
    time_std: float = 1.0

    def __post_init__(self) -> None:
        check_share("label_dropout", self.label_dropout)
        if not self.time_std > 0:
            raise ValueError(f"objective.time_std is {self.time_std}; it must be positive")

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return self.system.schedule.length

    def init(self, key: Array) -> Params:
        """Float32 ``{'backbone': ..., 'head': ...}``."""
        backbone, head = self.system.backbone, self.system.head
        backbone_key, head_key = jax.random.split(key)
        codes = jnp.zeros((1, *self.system.tokenizer.codes_shape), jnp.float32)
        times = jnp.zeros((1, self.system.schedule.num_steps))
        hidden = jnp.zeros((*codes.shape[:2], backbone.width), jnp.float32)
        fed: tuple[Any, ...] = (codes, backbone.conditioner.empty(1), times)
        if not head.noisy_context:
            fed = (self.system.tokenizer.contexts(codes), fed[1])
        return {
            "backbone": backbone.init(backbone_key, *fed)["params"],
            "head": head.init(head_key, hidden, codes, times, self.system.schedule.sizes)["params"],
        }

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
        """See `ar_jax.api.Objective`; ``frozen`` is ``{'tokenizer': ...}``.

        ``batch['codes']`` is what the tokenizer encodes images into, moments of latents; codes are
        drawn from it at every visit.
        """
        codes_key, drop_key, draws_key, dropout_key = jax.random.split(key, 4)
        with jax.named_scope("tokenizer"):  # as that below: for `ar_jax.compilation.phases`
            codes = draw_latent_codes(self.system.tokenizer, frozen, batch, codes_key)
        cond = {"label": batch["label"]}
        if train and self.label_dropout:
            drop = jax.random.bernoulli(drop_key, self.label_dropout, (len(codes),))
            cond = self.system.backbone.conditioner.null(cond, drop)
        draws = self.draw(draws_key, codes.shape)
        dropout = dropout_key if train else None
        return self.loss_of(
            params, codes, cond, draws, weights=batch.get("mask"), dropout=dropout
        ), Aux(metrics={})

    def loss_of(
        self,
        params: Params,
        codes: Array,
        cond: Cond,
        draws: FlowDraws,
        *,
        weights: Array | None = None,
        dropout: Array | None = None,
    ) -> Array:
        """The loss for given draws.

        Args:
            codes: float32 [B, L, C], as images have them.
            cond: with the labels that are dropped already made null.
            weights: float32 [B] of the images; None: equal.
            dropout: key of the backbone's dropout; None: off.
        """
        schedule = self.system.schedule
        if schedule.cells is not None:
            codes = codes[:, np.asarray(schedule.cells)]
        velocity = self.velocity(params, codes, cond, draws, dropout=dropout)
        error = jnp.square(velocity - (draws.noise - codes)).mean(-1)  # [B, L]
        if self.by_step:
            share = schedule.length / (schedule.num_steps * np.asarray(schedule.sizes))
            error = error * share[schedule.step_id].astype(np.float32)[None]
        images = error.mean(1)
        if weights is None:
            return images.mean()
        return (images * weights).sum() / jnp.maximum(weights.sum(), 1e-9)

    def velocity(
        self,
        params: Params,
        codes: Array,
        cond: Cond,
        draws: FlowDraws,
        *,
        dropout: Array | None = None,
    ) -> Array:
        """What is predicted, float32 [B, L, C], of codes in the order of the schedule."""
        backbone, head, schedule = self.system.backbone, self.system.head, self.system.schedule
        noisy = interpolate(codes, draws.noise, draws.times[:, schedule.step_id, None])
        rngs: dict[str, Any] = {}
        if dropout is not None:
            dropped, paths = jax.random.split(dropout)
            rngs = {"rngs": {"dropout": dropped, "drop_path": paths}}
        fed: tuple[Any, ...] = (noisy, cond, draws.times)
        if not head.noisy_context:
            fed = (self.system.tokenizer.contexts(codes), cond)
        hidden, _ = backbone.apply(
            {"params": params["backbone"]}, *fed, train=dropout is not None, **rngs
        )
        with jax.named_scope("head_and_loss"):
            return head.apply(
                {"params": params["head"]}, hidden, noisy, draws.times, schedule.sizes
            )

    def draw(self, key: Array, shape: tuple[int, ...]) -> FlowDraws:
        """Draws for codes of shape (B, L, C)."""
        time_key, noise_key = jax.random.split(key)
        normal = jax.random.normal(time_key, (shape[0], self.system.schedule.num_steps))
        times = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
        return FlowDraws(times=times, noise=jax.random.normal(noise_key, shape))

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Nothing to do after an update."""
        return params, stats
