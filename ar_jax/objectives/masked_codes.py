"""Masked prediction of discrete codes: a random part is hidden and predicted (MaskGIT)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Params, Stats, System, weighted_mean
from ar_jax.mask_rule import MaskRule, check_method
from ar_jax.objectives.likelihood import drop_condition, read_codes
from ar_jax.objectives.ranges import check_share


@flax.struct.dataclass
class HidingDraws:
    """All that chance decides of what is hidden, in place of a key: uniform in [0, 1)."""

    rate: Array  # float32 [B], what `MaskRule.share` turns into the share of hidden codes
    places: Array  # float32 [B, L]; those that argsort puts first are hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedCodes:
    """Cross-entropy of the hidden codes, in nats a code.

    Attributes:
        system: the generator; its tokenizer is frozen.
        label_dropout: probability of training an image on the null condition (for guidance).
        label_smoothing: e of the target (1 - e) one_hot + e / V; training only.
        method: of an image's share of hidden codes, see `ar_jax.mask_rule.MaskRule`, at a ratio
            that is uniform in [0, 1).
        rate_min: no smaller share; max(1, round(L share)) codes are hidden.
        seen_weight: of codes that are not hidden, where hidden ones have weight 1 (TiTok: 0.1).
        per_image: the mean over an image's codes, then over the images (MaskGIT); else over all
            codes of the batch (TiTok), where an image counts by what is hidden of it.
    """

    # What evaluation reports of it.
    METRICS: ClassVar[dict[str, str]] = {
        "loss": "cross-entropy of the codes as training weighs them, nats a code, no smoothing",
        "nll": "negative log-likelihood of a hidden code given those that are not, nats",
        "accuracy": "fraction of the hidden codes that are the most probable one",
    }
    remark: ClassVar[str] = "It is no likelihood of an image."

    system: System
    label_dropout: float = 0.1
    label_smoothing: float = 0.0
    method: str = "cosine"
    rate_min: float = 0.0
    seen_weight: float = 0.0
    per_image: bool = True

    def __post_init__(self) -> None:
        for name in ("label_dropout", "label_smoothing", "rate_min", "seen_weight"):
            check_share(name, getattr(self, name))
        check_method("objective.method", self.method)

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return self.system.schedule.length

    def init(self, key: Array) -> Params:
        """Float32 ``{'backbone': ..., 'head': ...}``."""
        backbone, head = self.system.backbone, self.system.head
        backbone_key, head_key = jax.random.split(key)
        codes = jnp.zeros((1, self.system.schedule.length), jnp.int32)
        cond, known = backbone.conditioner.empty(1), jnp.ones(codes.shape, bool)
        hidden = jnp.zeros((1, 1, backbone.width), jnp.float32)
        return {
            "backbone": backbone.init(backbone_key, codes, cond, known)["params"],
            "head": head.init(head_key, hidden)["params"],
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
        """See `ar_jax.api.Objective`; ``frozen`` is ``{'tokenizer': ...}``."""
        backbone, head = self.system.backbone, self.system.head
        drop_key, draws_key, dropout_key = jax.random.split(key, 3)
        with jax.named_scope("tokenizer"):  # as that below: for `ar_jax.compilation.phases`
            codes = read_codes(self.system, frozen, batch)
        cond = drop_condition(backbone.conditioner, batch, drop_key, self.label_dropout * train)
        hidden = self.hide(self.draw(draws_key, codes.shape))
        states = backbone.apply(
            {"params": params["backbone"]},
            codes,
            cond,
            ~hidden,
            train=train,
            rngs={"dropout": dropout_key} if train else None,
        )
        with jax.named_scope("head_and_loss"):
            logits = head.apply({"params": params["head"]}, states)  # [B, L, V]
            return self.score(logits, codes, hidden, weights=batch.get("mask"), train=train)

    def draw(self, key: Array, shape: tuple[int, ...]) -> HidingDraws:
        """Draws for codes of shape (B, L)."""
        rate_key, places_key = jax.random.split(key)
        rate = jax.random.uniform(rate_key, shape[:1])
        return HidingDraws(rate=rate, places=jax.random.uniform(places_key, shape))

    def hide(self, draws: HidingDraws) -> Array:
        """Bool [B, L], the hidden codes; half a code is rounded to the even number."""
        length = draws.places.shape[1]
        share = MaskRule(method=self.method).share(draws.rate, 1.0, length, jnp)
        count = jnp.maximum(1, jnp.round(length * jnp.maximum(share, self.rate_min)))
        return jnp.argsort(draws.places, axis=1) < count[:, None]

    def score(
        self,
        logits: Array,
        codes: Array,
        hidden: Array,
        *,
        weights: Array | None = None,
        train: bool = True,
    ) -> tuple[Array, Aux]:
        """(loss, metrics) of logits float32 [B, L, V].

        Args:
            codes: int32 [B, L].
            hidden: bool [B, L].
            weights: float32 [B] of the images; None: equal.
            train: the loss has its label smoothing.
        """
        nll = self.system.head.loss(logits, codes)  # [B, L]
        loss = nll
        if train and self.label_smoothing:
            loss = self.system.head.loss(logits, codes, label_smoothing=self.label_smoothing)
        counted = hidden.astype(jnp.float32)
        shares = counted + self.seen_weight * (1.0 - counted)
        if not self.per_image and weights is not None:
            shares = shares * weights[:, None]
        if self.per_image:
            total = weighted_mean(_mean(loss, shares), weights)
        else:
            total = (loss * shares).sum() / jnp.maximum(shares.sum(), 1e-9)
        correct = (jnp.argmax(logits, -1) == codes).astype(jnp.float32)
        metrics = {
            name: weighted_mean(_mean(values, counted), weights)
            for name, values in (("nll", nll), ("accuracy", correct))
        }
        return total, Aux(metrics=metrics)

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Nothing to do after an update."""
        return params, stats


def _mean(values: Array, shares: Array) -> Array:
    """Of each image's codes, by shares [B, L] of which some are positive: float32 [B]."""
    return (values * shares).sum(1) / jnp.maximum(shares.sum(1), 1e-9)
