"""Fractal generators: levels of patches of patches, down to pixels (arXiv:2502.17437).

Every level is a generator of its own (`ar_jax.backbones.patch_levels`), autoregressive (FractalAR)
or masked (FractalMAR) as the schedule of the level says. All patches of an image are images of the
level below, so that training runs each level once over all of them. Hidden states of the last one
are what a head draws pixels from.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cond, Params
from ar_jax.backbones.conditions import ClassOrNullCondition
from ar_jax.backbones.patch_levels import Caches, CausalLevel, Level, MaskedLevel
from ar_jax.nn.patches import patchify
from ar_jax.nn.unstack import unstack
from ar_jax.schedules import Schedule

Array = jax.Array

ROUNDING_NOISE = 0.01  # of a colour's value, which decides of those halfway between two


@flax.struct.dataclass
class Rows:
    """What a head is asked for: rows of hidden states and the pixels that they predict."""

    hidden: Array  # float32 [N, D], or logits [N, C, V] where the head is the backbone's own
    codes: Array  # int32 [N, C]
    weights: Array  # float32 [N]


class Fractal(nn.Module, kw_only=True):
    """Hidden states of all pixels.

    Attributes:
        schedule: nested; says how large the levels are and which take their patches one by one.
        num_classes: the condition, with a null class beside its table.
        channels, values: C and V, of the tokenizer's pixels.
        widths, depths, heads: of every level.
        mlp_hidden: of every level; None: 4 D, of levels that take patches one by one LLaMA's.
        conditions: of a patch that the level below reads, at most 5: its own state and those of its
            neighbours; levels that take patches one by one read the first and give no other.
        colour: masked levels below the first draw their image's mean colour first.
        mean, std: what the channels in [0, 1] are normalised with.
        attention_dropout, dropout: on attention weights; after attention, in feed-forward layers.
        remat, scan, attention: see `ar_jax.nn.blocks` and `ar_jax.nn.splash.attend_all`.
    """

    schedule: Schedule
    num_classes: int
    channels: int
    values: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_hidden: tuple[int, ...] | None = None
    conditions: int = 1
    colour: bool = False
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    attention_dropout: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.condition = ClassOrNullCondition(
            num_classes=self.num_classes, width=self.widths[0], init_std=self.init_std
        )
        self.levels = [self._level(i) for i in range(len(self.schedule.levels))]

    @property
    def conditioner(self) -> ClassOrNullCondition:
        """The condition module, for its parameterless ``null`` and ``fields``."""
        return ClassOrNullCondition(
            num_classes=self.num_classes,
            width=self.widths[0],
            init_std=self.init_std,
            parent=None,
        )

    @property
    def hidden_width(self) -> int:
        """Width of the hidden states."""
        return self.widths[-1]

    @property
    def sides(self) -> tuple[int, ...]:
        """Patches on a side, of every level."""
        return tuple(level.grids[0][0] for level in self.schedule.levels)

    def causal(self, index: int) -> bool:
        """Whether a level takes its patches one by one."""
        return self.schedule.levels[index].mask is None

    def has_colour(self, index: int) -> bool:
        """Whether a level draws its image's mean colour first."""
        return self.colour and index > 0 and not self.causal(index)

    def _level(self, index: int) -> Level:
        form: Any = CausalLevel
        more: dict[str, Any] = {}
        if not self.causal(index):
            form = MaskedLevel
            more = dict(conditions=self.conditions, colour=self.has_colour(index))
            more |= dict(channels=self.channels, values=self.values)
        level: Level = form(
            side=self.sides[index],
            width=self.widths[index],
            depth=self.depths[index],
            heads=self.heads[index],
            mlp_hidden=None if self.mlp_hidden is None else self.mlp_hidden[index],
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            init_std=self.init_std,
            remat=self.remat,
            attention=self.attention,
            scan=self.scan,
            dtype=self.dtype,
            **more,
        )
        return level

    def __call__(
        self,
        codes: Array,
        cond: Cond,
        shares: tuple[Array | None, ...],
        noise: tuple[Array | None, ...],
        weights: Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[Rows, tuple[Rows, ...]]:
        """(rows of all pixels in the schedule's order, rows of all mean colours, level by level).

        N of a level are all patches of the level above, image after image.

        Args:
            codes: int32 [B, H W, C].
            cond: ``{'label': int32 [B]}``.
            shares: of every masked level float32 [N, L], what each hidden patch counts; 0 of those
                that are known. None of other levels, which predict all.
            noise: of every level that draws a mean colour float32 [N, C], standard normal: it
                decides to which value the mean is rounded where it is halfway.
            weights: float32 [B] of the images; None: 1.
            train: dropout on; needs the rng 'dropout'.
        """
        size = self.schedule.grids[0][0]
        images = codes.swapaxes(1, 2).reshape(-1, self.channels, size, size)
        weights = jnp.ones(len(codes), jnp.float32) if weights is None else weights
        conditions, colours = self.begin(cond), []
        for index in range(len(self.levels)):
            patches = patchify(images, images.shape[-1] // self.sides[index])
            fed = self.normalise(patches).reshape(*patches.shape[:2], -1)
            level, share = self.levels[index], shares[index]
            if share is None:
                below = level(fed, conditions, train=train)
                share = jnp.ones(fed.shape[:2], jnp.float32)
            else:
                colour = None
                if self.has_colour(index):
                    colour = self.normalise(images).mean((2, 3))
                    drawn = noise[index]
                    assert drawn is not None
                    ids = self.round_colour(colour, drawn)
                    logits = level.colour_logits(conditions, ids)
                    colours.append(Rows(hidden=logits, codes=ids, weights=weights))
                below = level(fed, conditions, share > 0, colour, train=train)
            conditions = below.reshape(len(below), -1, below.shape[-1])
            images = patches.reshape(-1, *patches.shape[2:])
            weights = (weights[:, None] * share).reshape(-1)
        pixels = images.reshape(-1, self.channels)
        return Rows(hidden=conditions[0], codes=pixels, weights=weights), tuple(colours)

    def begin(self, cond: Cond) -> Array:
        """Conditions [K, B, D] of the first level: the class, K times."""
        embedded = self.condition(cond)
        return jnp.broadcast_to(embedded, (self.conditions, *embedded.shape))

    def step(
        self, index: int, before: Array, conditions: Array, place: Array, caches: Caches
    ) -> tuple[Array, Caches]:
        """`CausalLevel.step` of level ``index``."""
        return self.levels[index].step(before, conditions, place, caches)

    def reveal(
        self, index: int, patches: Array, conditions: Array, hidden: Array, colour: Array | None
    ) -> Array:
        """`MaskedLevel.__call__` of level ``index``."""
        return self.levels[index](patches, conditions, hidden, colour)

    def colour_logits(self, index: int, conditions: Array, codes: Array) -> Array:
        """`MaskedLevel.colour_logits` of level ``index``."""
        return self.levels[index].colour_logits(conditions, codes)

    def empty(self, index: int, rows: int) -> Caches:
        """Caches of ``rows`` images of a level that takes its patches one by one."""
        heads, length = self.heads[index], self.schedule.levels[index].length
        one = jnp.zeros((rows, heads, length, self.widths[index] // heads), self.dtype)
        return ((one, one),) * self.depths[index]

    def normalise(self, codes: Array) -> Array:
        """Values int32 [..., C, s, s] as what the levels are fed, float32."""
        shape = (1,) * (codes.ndim - 3) + (-1, 1, 1)
        mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (self.mean, self.std))
        return (codes.astype(jnp.float32) / (self.values - 1) - mean) / std

    def normalise_pixels(self, codes: Array) -> Array:
        """`normalise` of [..., C]."""
        return self.normalise(codes[..., None, None])[..., 0, 0]

    def round_colour(self, colour: Array, noise: Array) -> Array:
        """The nearest values int32 [N, C] of normalised colours [N, C]."""
        scaled = colour * jnp.asarray(self.std)[None] + jnp.asarray(self.mean)[None]
        rounded = jnp.round(scaled * (self.values - 1) + ROUNDING_NOISE * noise)
        return jnp.clip(rounded, 0, self.values - 1).astype(jnp.int32)

    def for_sampling(self, params: Params) -> tuple[Fractal, Params]:
        """(the backbone with unrolled levels, their parameters): see `ar_jax.nn.blocks.Stack`."""
        unstacked = dict(params)
        for index, depth in enumerate(self.depths):
            level = params[f"levels_{index}"]
            unstacked[f"levels_{index}"] = unstack(level, {"stack": depth}, self.dtype)
        return self.clone(scan=False), unstacked
