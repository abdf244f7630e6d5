"""Likelihood of pixels by patches of patches (fractal generative models, arXiv:2502.17437)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.api import Array, Aux, Batch, Cond, Params, Stats, System
from ar_jax.objectives.likelihood import drop_condition, read_codes
from ar_jax.objectives.ranges import check_share


@flax.struct.dataclass
class NestedDraws:
    """All that chance decides of the masks and colours of every level, in place of a key."""

    # Of masked levels float32 [N, L], what each hidden patch counts, 0 if it is known; else None.
    shares: tuple[Array | None, ...]
    # Of levels that draw a mean colour float32 [N, C], standard normal; else None.
    noise: tuple[Array | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NestedLikelihood:
    """Cross-entropy of pixels in nats a channel, and of mean colours where levels draw them.

    Levels that take their patches one by one predict all; the loss then is the images' exact
    negative log-likelihood. Masked levels predict a part: in training the share that is hidden of
    each image is normal, truncated to [0, 1], in evaluation the number of its hidden patches is
    uniform, which estimates an upper bound of the negative log-likelihood without bias.

    Attributes:
        system: the generator; its tokenizer has no parameters.
        label_dropout: probability of training an image on the null condition (for guidance).
        rate_mean, rate_std: of that normal.
        channel_weights: what each channel counts in training; (): the same.
        colour_weights: the same for mean colours.
    """

    # What evaluation reports of it.
    METRICS: ClassVar[dict[str, str]] = {
        "loss": "nats a channel, of the pixels and of the mean colours where levels draw them",
        "bits_per_dim": "the same in bits",
        "accuracy": "fraction of the predicted channels that are the most probable value",
    }

    system: System
    label_dropout: float = 0.1
    rate_mean: float = 1.0
    rate_std: float = 0.25
    channel_weights: tuple[float, ...] = ()
    colour_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_share("label_dropout", self.label_dropout)
        if self.rate_std <= 0:
            raise ValueError(f"objective.rate_std is {self.rate_std}; it must be positive")
        channels = self.system.backbone.channels
        for name in ("channel_weights", "colour_weights"):
            weights = getattr(self, name)
            if weights and (len(weights) != channels or min(weights) <= 0):
                raise ValueError(
                    f"objective.{name} is {weights}; it must be a positive number for each of the "
                    f"{channels} channels, or () for equal ones"
                )

    @property
    def remark(self) -> str:
        """What the loss is, for reports."""
        backbone = self.system.backbone
        levels = range(len(backbone.schedule.levels))
        if all(backbone.causal(index) for index in levels):
            return "It is the exact negative log-likelihood of the images, given their classes."
        if any(backbone.has_colour(index) for index in levels):
            return (
                "It is above an upper bound of the images' negative log-likelihood, as it counts "
                "mean colours too."
            )
        return "It estimates an upper bound of the images' negative log-likelihood."

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, for throughput."""
        return self.system.schedule.length

    def init(self, key: Array) -> Params:
        """Float32 ``{'backbone': ..., 'head': ...}``."""
        backbone, head = self.system.backbone, self.system.head
        backbone_key, head_key = jax.random.split(key)
        codes = jnp.zeros((1, *self.system.tokenizer.codes_shape), jnp.int32)
        draws = self.draw(key, 1, train=True)
        arguments = codes, backbone.conditioner.empty(1), draws.shares, draws.noise
        hidden = jnp.zeros((1, backbone.hidden_width), jnp.float32)
        return {
            "backbone": backbone.init(backbone_key, *arguments)["params"],
            "head": head.init(head_key, hidden, codes[:, 0])["params"],
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
        drop_key, draws_key, dropout_key = jax.random.split(key, 3)
        with jax.named_scope("tokenizer"):  # as that below: for `ar_jax.compilation.phases`
            codes = read_codes(self.system, frozen, batch)
        conditioner = self.system.backbone.conditioner
        cond = drop_condition(conditioner, batch, drop_key, self.label_dropout * train)
        draws = self.draw(draws_key, len(codes), train=train)
        weights, dropout = batch.get("mask"), dropout_key if train else None
        return self.loss_of(
            params, codes, cond, draws, weights=weights, train=train, dropout=dropout
        )

    def loss_of(
        self,
        params: Params,
        codes: Array,
        cond: Cond,
        draws: NestedDraws,
        *,
        weights: Array | None = None,
        train: bool = False,
        dropout: Array | None = None,
    ) -> tuple[Array, Aux]:
        """The loss for given draws.

        Args:
            codes: int32 [B, L, C].
            cond: with the labels that are dropped already made null.
            weights: float32 [B] of the images; None: equal.
            train: channels count as training weighs them.
            dropout: key of the backbone's dropout; None: off.
        """
        backbone, head = self.system.backbone, self.system.head
        pixels, colours = backbone.apply(
            {"params": params["backbone"]},
            *(codes, cond, draws.shares, draws.noise, weights),
            train=dropout is not None,
            rngs=None if dropout is None else {"dropout": dropout},
        )
        with jax.named_scope("head_and_loss"):
            logits = head.apply({"params": params["head"]}, pixels.hidden, pixels.codes)

            def mean(values: Array, rows: Any, shares: tuple[float, ...]) -> Array:
                """Of [N, C] over rows, then channels, by their weights."""
                total = jnp.maximum(rows.weights.sum(), 1e-9)
                channels = (values * rows.weights[:, None]).sum(0) / total
                each = jnp.asarray(shares or (1.0,) * len(channels))
                return (channels * each).sum() / each.sum()

            found = [(head.loss(logits, pixels.codes), pixels, self.channel_weights)]
            for rows in colours:
                found.append((head.loss(rows.hidden, rows.codes), rows, self.colour_weights))
            plain = jnp.stack([mean(nll, rows, ()) for nll, rows, _ in found]).sum()
            total = plain
            if train:
                total = jnp.stack([mean(nll, rows, shares) for nll, rows, shares in found]).sum()
            correct = (jnp.argmax(logits, -1) == pixels.codes).astype(jnp.float32)
            metrics = {
                "bits_per_dim": plain / math.log(2.0),
                "accuracy": mean(correct, pixels, ()),
            }
            return total, Aux(metrics=metrics)

    def draw(self, key: Array, count: int, *, train: bool) -> NestedDraws:
        """Draws for ``count`` images."""
        shares: list[Array | None] = []
        noise: list[Array | None] = []
        backbone = self.system.backbone
        for index, level in enumerate(backbone.schedule.levels):
            level_key = jax.random.fold_in(key, index)
            share_key, noise_key = jax.random.split(level_key)
            masked = not backbone.causal(index)
            shares.append(self._shares(share_key, (count, level.length), train) if masked else None)
            colour = backbone.has_colour(index)
            shape = (count, backbone.channels)
            noise.append(jax.random.normal(noise_key, shape) if colour else None)
            count *= level.length
        return NestedDraws(shares=tuple(shares), noise=tuple(noise))

    def _shares(self, key: Array, shape: tuple[int, int], train: bool) -> Array:
        """Of a masked level [N, L]: 1 of hidden patches in training, else L / n for n of them."""
        count_key, order_key = jax.random.split(key)
        rows, length = shape
        if train:
            low, high = ((edge - self.rate_mean) / self.rate_std for edge in (0.0, 1.0))
            drawn = jax.random.truncated_normal(count_key, low, high, (rows, 1))
            counts = jnp.ceil(length * (self.rate_mean + self.rate_std * drawn))
            counts = jnp.clip(counts, 0, length)  # rounding may leave the range
        else:
            counts = jax.random.randint(count_key, (rows, 1), 1, length + 1)
        ranks = jnp.argsort(jax.random.uniform(order_key, shape), axis=1)
        each = 1.0 if train else length / counts
        return jnp.where(ranks < counts, each, 0.0)

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Nothing to do after an update."""
        return params, stats
