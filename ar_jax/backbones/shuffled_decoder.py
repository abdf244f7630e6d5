"""Token-Shuffle: a decoder with one row for a window of codes (arXiv:2504.17789).

Before the transformer each embedded code is reduced to D / s^2 numbers, those of a window are put
side by side, and blocks of residual MLPs refine the row; after it the same the other way round
gives every code of the next window a hidden state of its own. The transformer has L / s^2 rows. The
codes of a window are independent of each other given the windows before, in the loss and in
sampling alike: the paper predicts them at once.

No code is released. The paper's order of the parts is kept; how many blocks there are, their norms
and their inner width (those of the transformer's own) are choices made here.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax import schedules
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.step_rows import Segment
from ar_jax.nn.layers import MLP, LayerNorm, RMSNorm
from ar_jax.schedules import Schedule

Array = jax.Array


class FusionBlock(nn.Module, kw_only=True):
    """x + MLP(norm(x)), row by row.

    Attributes:
        norm: 'rmsnorm', any other is the affine layer norm.
    """

    hidden: int
    norm: str
    norm_epsilon: float
    activation: str
    gated: bool
    bias: bool
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float32 [B, n, D] of the same."""
        norm = RMSNorm if self.norm == "rmsnorm" else LayerNorm
        init = nn.initializers.normal(self.init_std)
        mlp = MLP(
            hidden=self.hidden,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            kernel_init=init,
            out_init=init,
            dtype=self.dtype,
            name="mlp",
        )
        normed = norm(epsilon=self.norm_epsilon, name="mlp_norm")(x)
        return x + mlp(normed.astype(self.dtype)).astype(jnp.float32)


class ShuffledDecoder(Decoder, kw_only=True):
    """`Decoder` over the windows of ``schedule``, with a hidden state for each of their codes.

    Its calls are the `Decoder`'s: context and hidden states are of codes, in the schedule's order.
    Windows of one code have nothing to merge: the parameters and results are the `Decoder`'s own.

    Attributes:
        fusion_blocks: residual MLPs before the transformer, and as many after it; 0: the linear
            layers alone.
    """

    fusion_blocks: int

    @property
    def row_schedule(self) -> Schedule:
        """Of the rows: one for every window."""
        sides = zip(self.schedule.grids[0], self.schedule.window, strict=True)
        return schedules.raster(grid=tuple(length // side for length, side in sides))

    @property
    def merged(self) -> int:
        """s^2, codes of a row."""
        return self.schedule.sizes[0]

    def _row_range(
        self, step: Array | int | None, segment: Segment | None, context: Array | None
    ) -> tuple[Any, int]:
        if context is not None:
            context = self._by_window(context)
        return super()._row_range(step, segment, context)

    def _by_window(self, context: Array) -> Array:
        """[B, n s^2 + fewer than s^2] -> [B, n, s^2]: without the last window's, which none see."""
        count = context.shape[1] // self.merged
        return context[:, : count * self.merged].reshape(len(context), count, self.merged)

    def _token_embed(self) -> Any:
        embed = super()._token_embed()
        if self.merged == 1:
            return embed
        reduce = self._linear("reduce", self.width // self.merged)
        blocks = self._blocks("merge")

        def merge(context: Array) -> Array:
            parts = reduce(embed(self._by_window(context)).astype(self.dtype))  # [B, n, s^2, D/s^2]
            x = parts.reshape(*parts.shape[:2], self.width).astype(jnp.float32)
            for block in blocks:
                x = block(x)
            return x

        return merge

    def _final_norm(self, x: Array, vector: Array) -> Array:
        x = super()._final_norm(x, vector)  # [B, n, D]
        if self.merged == 1:
            return x
        for block in self._blocks("unmerge"):
            x = block(x)
        parts = x.reshape(len(x), -1, self.width // self.merged)  # [B, n s^2, D / s^2]
        return self._linear("restore", self.width)(parts.astype(self.dtype)).astype(jnp.float32)

    def _linear(self, name: str, width: int) -> nn.Dense:
        # Keeps the size of what it is given, unlike a small ``init_std``: here is no residual.
        init = nn.initializers.lecun_normal()
        return nn.Dense(width, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

    def _blocks(self, name: str) -> list[FusionBlock]:
        return [
            FusionBlock(
                hidden=self.mlp_hidden or 4 * self.width,
                norm=self.norm,
                norm_epsilon=self.norm_epsilon,
                activation=self.activation,
                gated=self.gated,
                bias=self.mlp_bias,
                init_std=self._std,
                dtype=self.dtype,
                name=f"{name}_{index}",
            )
            for index in range(self.fusion_blocks)
        ]


def check_shuffled(backbone: ShuffledDecoder) -> None:
    """config.backbone of name 'shuffled_decoder' and the windows of config.schedule.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    schedule = backbone.schedule
    if schedule.name != "raster":
        raise ValueError(
            f"schedule.name is {schedule.name!r}; the backbone 'shuffled_decoder' draws windows of "
            "codes row by row: use 'raster' with a window"
        )
    size = schedule.sizes[0]
    if backbone.width % size:
        raise ValueError(
            f"backbone.width is {backbone.width}; the {size} codes of schedule.window "
            f"{schedule.window} share it, so that it must be a multiple of {size}"
        )
    if backbone.fusion_blocks < 0:
        raise ValueError(f"backbone.fusion_blocks is {backbone.fusion_blocks}; it must be >= 0")
    if backbone.positions != "rope" or backbone.shared_embedding:
        raise ValueError(
            f"backbone.positions is {backbone.positions!r} and backbone.shared_embedding "
            f"{backbone.shared_embedding}; the rows of 'shuffled_decoder' stand for windows, not "
            "for codes: use 'rope' and False"
        )
