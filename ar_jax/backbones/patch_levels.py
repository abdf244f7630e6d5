"""One level of a fractal generator: patches of an image and what they are to be drawn from.

A level is given conditions of its image, [K, N, D'], and gives conditions of every patch,
[K', N, L, D], from which the level below draws it as an image of its own. Patches are fed as
normalised numbers, [N, L, C p p], channels first.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.nn.blocks import Stack
from ar_jax.nn.layers import LayerNorm
from ar_jax.nn.pixels import PixelNetwork
from ar_jax.nn.plain_stack import plain_stack
from ar_jax.nn.positions import rope_2d

Array = jax.Array
Caches = tuple[tuple[Array, Array], ...]

# Conditions of a patch that a masked level gives: its own, and those of its four neighbours.
NEIGHBOURS = 5
EPSILON = 1e-6
# Of the colour that a patch is given first: fixed in the official code.
COLOUR_HEAD: dict[str, Any] = dict(width=128, depth=3, heads=4)


def swiglu_width(width: int) -> int:
    """LLaMA's: 8/3 of the width, rounded up to a multiple of 256."""
    return -(-int(8 * width / 3) // 256) * 256


class Level(nn.Module, kw_only=True):
    """What both kinds share.

    Attributes:
        side: patches on a side; L is its square.
        mlp_hidden: of the blocks; None: LLaMA's, or 4 D.
        attention: 'auto', 'xla' or 'splash', see `ar_jax.nn.splash.attend_all`.
    """

    side: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int | None
    attention_dropout: float
    dropout: float
    init_std: float
    remat: str
    attention: str
    scan: bool
    dtype: DTypeLike

    @property
    def length(self) -> int:
        """L."""
        return self.side**2

    def dense(self, name: str) -> nn.Dense:
        """A linear layer to the level's width."""
        kernel_init = nn.initializers.xavier_uniform()
        return nn.Dense(self.width, kernel_init=kernel_init, dtype=self.dtype, name=name)

    def table(self, name: str, rows: int) -> Array:
        """A learned table [rows, D]."""
        return self.param(name, nn.initializers.normal(self.init_std), (rows, self.width))


class CausalLevel(Level, kw_only=True):
    """Patches row by row: a causal transformer in the style of LLaMA, its first row the condition.

    Of the conditions it reads the first. It gives one: the state of the row before the patch.
    """

    def setup(self) -> None:
        fields: dict[str, Any] = dict(
            heads=self.heads,
            kv_heads=self.heads,
            kernel=self.attention,
            row_steps=tuple(range(self.length)),
            mlp_hidden=self.mlp_hidden or swiglu_width(self.width),
            norm="rmsnorm",
            norm_epsilon=1e-5,
            modulation="none",
            qk_norm="none",
            logit_scale=(self.width // self.heads) ** -0.5,
            attention_bias="none",
            activation="silu",
            gated=True,
            mlp_bias=False,
            attention_dropout=self.attention_dropout,
            residual_dropout=self.dropout,
            mlp_hidden_dropout=0.0,
            mlp_dropout=self.dropout,
            init_std=self.init_std,
            out_init_std=self.init_std,
            gate_init=0.0,
            modulation_init=0.0,
            dtype=self.dtype,
        )
        self.patch_embed = self.dense("patch_embed")
        self.condition_embed = self.dense("condition_embed")
        # The row of the last patch is never read, here and in the official code.
        self.position = self.table("position", 1 + self.length)
        self.embed_norm = LayerNorm(epsilon=EPSILON, name="embed_norm")
        self.stack = Stack(
            depth=self.depth,
            block=tuple(fields.items()),
            scan=self.scan,
            remat=self.remat,
            drop_path=0.0,
            name="stack",
        )
        self.final_norm = LayerNorm(epsilon=EPSILON, name="final_norm")

    @property
    def rope(self) -> Array:
        """[L, K/2, 2]; that of the condition is zero, so that its query and key vanish."""
        coords = np.indices((self.side, self.side)).reshape(2, -1).T
        table = rope_2d(coords, self.width // self.heads)
        return jnp.asarray(np.concatenate([np.zeros_like(table[:1]), table[:-1]]))

    def __call__(self, patches: Array, conditions: Array, *, train: bool = False) -> Array:
        """Conditions [1, N, L, D] of all patches: teacher forcing."""
        first = self.condition_embed(conditions[0])[:, None]
        x = jnp.concatenate([first, self.patch_embed(patches[:, :-1])], axis=1)
        x = self.embed_norm(x + self.position[None, :-1]).astype(self.dtype)
        x, _ = self.stack(x, None, self.rope, None, None, 0, None, train)
        return self.final_norm(x)[None]

    def step(
        self, before: Array, conditions: Array, index: Array, caches: Caches
    ) -> tuple[Array, Caches]:
        """(conditions [1, N, D] of the patch ``index``, caches), of the one before [N, C p p]."""
        first = index == 0
        x = jnp.where(first, self.condition_embed(conditions[0]), self.patch_embed(before))
        x = self.embed_norm(x + self.position[index][None])[:, None].astype(self.dtype)
        seen = (jnp.arange(self.length) <= index)[None, None, None]
        rope = jax.lax.dynamic_slice_in_dim(self.rope, index, 1)
        x, filled = self.stack(x, None, rope, seen, caches, index, None, False)
        assert filled is not None
        return self.final_norm(x)[None, :, 0], filled


class MaskedLevel(Level, kw_only=True):
    """Hidden patches from those that are known: a transformer whose rows all see each other.

    Rows: the image's colour if it is drawn first, the conditions, the last one first, the patches.

    Attributes:
        conditions: K, of the conditions given, that are read.
        colour: whether the image's mean colour is drawn first, by a head of its own.
        channels, values: C and V, of that head.
    """

    conditions: int
    colour: bool
    channels: int
    values: int

    def setup(self) -> None:
        self.patch_embed = self.dense("patch_embed")
        self.condition_embed = self.dense("condition_embed")
        self.mask_token = self.table("mask_token", 1)
        self.position = self.table("position", self.conditions + self.colour + self.length)
        if self.colour:
            self.colour_embed = self.dense("colour_embed")
            self.colour_head = PixelNetwork(
                channels=self.channels,
                values=self.values,
                **COLOUR_HEAD,
                init_std=self.init_std,
                remat=self.remat,
                dtype=self.dtype,
                name="colour_head",
            )
        self.embed_norm = LayerNorm(epsilon=EPSILON, name="embed_norm")
        self.stack = plain_stack(
            name="stack",
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_hidden=self.mlp_hidden or 4 * self.width,
            norm_epsilon=EPSILON,
            activation="gelu",
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            hidden_dropout=self.dropout,
            init_std=self.init_std,
            attention=self.attention,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
        )
        self.final_norm = LayerNorm(epsilon=EPSILON, name="final_norm")

    def __call__(
        self,
        patches: Array,
        conditions: Array,
        hidden: Array,
        colour: Array | None,
        *,
        train: bool = False,
    ) -> Array:
        """Conditions [`NEIGHBOURS`, N, L, D] of all patches: own, above, right, below, left.

        Args:
            hidden: bool [N, L]; the numbers of these patches have no influence.
            colour: [N, C], normalised, where the level has one.
        """
        read = conditions[: self.conditions][::-1]
        rows = [self.condition_embed(read).swapaxes(0, 1)]
        if self.colour:
            rows.insert(0, self.colour_embed(colour)[:, None])
        embedded = self.patch_embed(patches)
        rows.append(jnp.where(hidden[..., None], self.mask_token.astype(self.dtype), embedded))
        x = self.embed_norm(jnp.concatenate(rows, axis=1) + self.position[None])
        x, _ = self.stack(x.astype(self.dtype), None, None, None, None, 0, None, train)
        x = self.final_norm(x[:, -self.length :])
        return with_neighbours(x, self.side)

    def colour_logits(self, conditions: Array, codes: Array) -> Array:
        """Logits [N, C, V] of mean colours int32 [N, C], see `PixelNetwork`."""
        return self.colour_head(conditions[0], codes)


def with_neighbours(states: Array, side: int) -> Array:
    """[N, L, D] -> [`NEIGHBOURS`, N, L, D]: with those above, right, below, left; zeros outside."""
    count, length, width = states.shape
    grid = jnp.pad(states.reshape(count, side, side, width), ((0, 0), (1, 1), (1, 1), (0, 0)))

    def shifted(down: int, right: int) -> Array:
        rows = slice(1 + down, 1 + down + side), slice(1 + right, 1 + right + side)
        return grid[:, rows[0], rows[1]].reshape(count, length, width)

    shifts = ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))
    return jnp.stack([shifted(*shift) for shift in shifts])
