"""Masked prediction of continuous codes: a random part is hidden, a head is trained on it (MAR)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Cond, Params, Stats, System
from ar_jax.nn.adaptive_mlp import divided
from ar_jax.objectives.latents import draw_latent_codes
from ar_jax.objectives.ranges import check_share


@flax.struct.dataclass
class MaskedDraws:
    """All that chance decides in a batch, in place of a key."""

    order: Array  # int32 [B, L], the positions in an order of each image's own
    rate: Array | float  # the first ceil(L rate) of the order are hidden; see `hidden_count`
    head: Any  # of the head's loss, see its `draws`: leaves [B, R, L, ...], R repeats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked:
    """The head's loss of the hidden codes, mean over them (arXiv:2406.11838).

    Attributes:
        system: the generator; its tokenizer is frozen.
        label_dropout: probability of training an image on the null condition (for guidance).
        rate_mean, rate_std, rate_min: the share of hidden codes, one for a batch, is normal,
            truncated to [rate_min, 1]; ceil(L rate) codes of every image are hidden, in an order
            of its own.
        repeats: draws of the head's loss for each code, of one hidden state.
    """

    remark: ClassVar[str] = "It is no likelihood of an image."

    system: System
    label_dropout: float = 0.1
    rate_mean: float = 1.0
    rate_std: float = 0.25
    rate_min: float = 0.7
    repeats: int = 1

    def __post_init__(self) -> None:
        check_share("label_dropout", self.label_dropout)
        if not 0 <= self.rate_min <= 1 or self.rate_std <= 0:
            raise ValueError(
                f"objective.rate_min is {self.rate_min} and rate_std {self.rate_std}; rate_min "
                "must lie in [0, 1] and rate_std be positive"
            )
        if self.repeats < 1:
            raise ValueError(f"objective.repeats is {self.repeats}; it must be at least 1")

    @property
    def METRICS(self) -> dict[str, str]:
        """What evaluation reports of it."""
        return {"loss": "the head's loss, mean over the hidden codes", **self.system.head.METRICS}

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return self.system.schedule.length

    def init(self, key: Array) -> Params:
        """Float32 ``{'backbone': ..., 'head': ...}``."""
        backbone, head = self.system.backbone, self.system.head
        backbone_key, head_key = jax.random.split(key)
        codes = jnp.zeros((1, *self.system.tokenizer.codes_shape), jnp.float32)
        known = jnp.ones(codes.shape[:2], bool)
        cond = backbone.conditioner.empty(1)
        hidden = jnp.zeros((1, backbone.hidden_width), jnp.float32)
        drawn = jax.eval_shape(lambda keys: head.draws(keys, (1,)), jax.random.split(key))
        draws = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), drawn)
        return {
            "backbone": backbone.init(backbone_key, codes, cond, known)["params"],
            "head": head.init(head_key, hidden, codes[:, 0], draws, method="loss")["params"],
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

        ``batch['codes']`` is what the tokenizer encodes images into (for latents their moments);
        codes are drawn from it at every visit.
        """
        codes_key, drop_key, draws_key, dropout_key = jax.random.split(key, 4)
        with jax.named_scope("tokenizer"):  # as that below: for `ar_jax.compilation.phases`
            codes = self._codes(frozen, batch, codes_key)
        cond = {"label": batch["label"]}
        if train and self.label_dropout:
            drop = jax.random.bernoulli(drop_key, self.label_dropout, (len(codes),))
            cond = self.system.backbone.conditioner.null(cond, drop)
        draws = self.draw(draws_key, codes.shape)
        weights = batch.get("mask")
        return self.loss_of(
            params, codes, cond, draws, weights=weights, dropout=dropout_key if train else None
        )

    def loss_of(
        self,
        params: Params,
        codes: Array,
        cond: Cond,
        draws: MaskedDraws,
        *,
        weights: Array | None = None,
        dropout: Array | None = None,
    ) -> tuple[Array, Aux]:
        """The loss for given draws.

        Args:
            codes: float32 [B, L, C].
            cond: with the labels that are dropped already made null.
            weights: float32 [B] of the images; None: equal.
            dropout: key of the backbone's dropout; None: off.
        """
        backbone, head = self.system.backbone, self.system.head
        length = codes.shape[1]
        hidden = backbone.apply(
            {"params": params["backbone"]},
            codes,
            cond,
            draws.order,
            length - hidden_count(length, draws.rate, self.rate_min),
            most=length - math.ceil(length * self.rate_min),
            train=dropout is not None,
            rngs=None if dropout is None else {"dropout": dropout},
            method="reveal",
        )  # [B, L, D]
        shape = (len(codes), self.repeats, length)  # [B, R, L]

        def rows(x: Array) -> Array:
            """[B, L, n] -> [B R L, n]; images stay outermost, as they lie on the devices."""
            repeated = jnp.broadcast_to(x[:, None], (*shape, x.shape[-1]))
            return divided(repeated.reshape(-1, x.shape[-1]))

        with jax.named_scope("head_and_loss"):
            losses, parts = head.apply(
                {"params": params["head"]},
                rows(hidden),
                rows(codes),
                jax.tree.map(lambda x: divided(x.reshape(-1, *x.shape[3:])), draws.head),
                method="loss",
            )
        share = hide(draws.order, draws.rate, self.rate_min).astype(jnp.float32)
        if weights is not None:
            share = share * weights[:, None]
        counted = jnp.broadcast_to(share[:, None], shape).reshape(-1)

        def mean(values: Array) -> Array:
            return (values * counted).sum() / jnp.maximum(counted.sum(), 1e-9)

        return mean(losses), Aux(metrics=jax.tree.map(mean, parts))

    def draw(self, key: Array, shape: tuple[int, ...]) -> MaskedDraws:
        """Draws for codes of shape (B, L, C)."""
        rate_key, order_key, *head_keys = jax.random.split(key, 4)
        batch, length, _ = shape
        low = (self.rate_min - self.rate_mean) / self.rate_std
        high = (1.0 - self.rate_mean) / self.rate_std
        rate = self.rate_mean + self.rate_std * jax.random.truncated_normal(rate_key, low, high)
        order = jnp.argsort(jax.random.uniform(order_key, (batch, length)), axis=1)
        drawn = self.system.head.draws(jnp.stack(head_keys), (batch, self.repeats, length))
        return MaskedDraws(order=order.astype(jnp.int32), rate=rate, head=drawn)

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Nothing to do after an update."""
        return params, stats

    def _codes(self, frozen: Params, batch: Batch, key: Array) -> Array:
        """Codes drawn from the cached moments, or from the frozen tokenizer's of the images."""
        return draw_latent_codes(self.system.tokenizer, frozen, batch, key)


def hidden_count(length: int, rate: Array | float, rate_min: float = 0.0) -> Array:
    """ceil(L rate), int32 scalar, for rates in [``rate_min``, 1].

    In float64 for a Python number, as in the official code; for an array in float32, whose rounding
    is kept from leaving the range.
    """
    least = math.ceil(length * rate_min)
    if isinstance(rate, float | int):
        return jnp.int32(min(max(math.ceil(length * rate), least), length))
    return jnp.clip(jnp.ceil(length * rate).astype(jnp.int32), least, length)


def hide(order: Array, rate: Array | float, rate_min: float = 0.0) -> Array:
    """Bool [B, L]: the first ceil(L rate) positions of every order int32 [B, L]."""
    return jnp.argsort(order, axis=1) < hidden_count(order.shape[1], rate, rate_min)
