"""The next-scale decoder that attends to a text (Infinity, arXiv:2412.04431).

Rows of the sequence: one for every code. The first scale's begin with the condition's pooled
vector, which is the condition of the adaptive norms too; a later row is fed the coarser scales' sum
resampled to its scale. A row's rotary position is its cell's on one reference grid for all scales,
and a learned vector says its scale.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.api import Cache, Cond
from ar_jax.backbones.caches import empty_cache
from ar_jax.backbones.caption_features import CaptionFeatures, CaptionReader, ClassFeatures
from ar_jax.backbones.step_rows import Segment
from ar_jax.nn.blocks import Mixing, Stack
from ar_jax.nn.layers import layer_norm
from ar_jax.nn.modulation import Modulation
from ar_jax.nn.positions import rope_2d
from ar_jax.nn.unstack import unstack
from ar_jax.schedules import Grid, Schedule

Array = jax.Array


class CrossDecoder(nn.Module, kw_only=True):
    """See above. Calls return (hidden float32 [B, n, D], cache).

    Attributes:
        schedule: of scales.
        condition: 'class' (num_classes, each of caption_length learned rows of caption_features)
            or 'text' (caption_features and caption_null_rows, see `CaptionFeatures`).
        pool_heads: of the attentive pooling.
        feature_width: of what a row is fed.
        reference_grid: of the rotary positions; None: the last scale.
        spare_scales: rows of the table of scales that nothing reads.
        modulation: 'shared' or 'own', see `ar_jax.nn.blocks.Block`.
        qk_norm: 'cosine' or 'none', see `ar_jax.nn.blocks.Attention`.
        cross_gate: see `ar_jax.nn.blocks.Block`.
        mlp_hidden: None: 4 D.
        init_std: None: sqrt(1 / (3 D)).
        depth_scaled_init, attention, scan: see `Decoder`.
    """

    schedule: Schedule
    width: int
    depth: int
    heads: int
    condition: str = "class"
    num_classes: int = 0
    caption_length: int
    caption_features: int
    caption_null_rows: int | None = None
    pool_heads: int
    feature_width: int
    reference_grid: Grid | None = None
    rope_base: float = 10_000.0
    spare_scales: int = 0
    norm_epsilon: float = 1e-6
    modulation: str = "shared"
    qk_norm: str = "cosine"
    cross_gate: bool = False
    activation: str = "gelu_tanh"
    mlp_hidden: int | None = None
    drop_path: float = 0.0
    init_std: float | None = None
    depth_scaled_init: bool = False
    gate_init: float = 1e-3
    modulation_init: float = 0.5
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    attention_dropout = 0.0
    context = "features"

    @property
    def conditioner(self) -> ClassFeatures | CaptionFeatures:
        """The condition module, also for its parameterless ``null`` and ``empty``."""
        common: dict[str, Any] = dict(
            length=self.caption_length,
            features=self.caption_features,
            parent=None,
            name="condition",
        )
        if self.condition == "text":
            return CaptionFeatures(null_rows=self.caption_null_rows, **common)
        return ClassFeatures(num_classes=self.num_classes, **common)

    @property
    def rows(self) -> int:
        """T, all rows of the sequence."""
        return self.schedule.length

    @property
    def mixable(self) -> int:
        """Blocks of which guidance can mix what leaves them."""
        return self.depth

    @property
    def text_pairs(self) -> int:
        """Pairs of a row and a row of the text that it sees."""
        return self.rows * self.caption_length

    @property
    def row_steps(self) -> tuple[int, ...]:
        """Steps of all rows."""
        return tuple(map(int, self.schedule.step_id))

    @property
    def _std(self) -> float:
        return (3 * self.width) ** -0.5 if self.init_std is None else self.init_std

    def init_cache(self, batch_size: int) -> Cache:
        """An empty cache of the self-attention; what is attended to of a text is not kept."""
        sizes = (batch_size, self.rows, self.depth, self.heads, self.width // self.heads)
        return empty_cache(*sizes, self.dtype, largest=max(self.schedule.sizes))

    @nn.nowrap
    def for_sampling(self, params: dict) -> tuple[CrossDecoder, dict]:
        """This decoder unrolled, with its parameters unstacked: what samplers run."""
        if not self.scan:
            return self, params
        return self.clone(scan=False), unstack(params, {"stack": self.depth}, self.dtype)

    @nn.compact
    def __call__(
        self,
        context: Array | None,
        cond: Cond,
        *,
        order: Array | None = None,
        step: int | None = None,
        segment: Segment | None = None,
        cache: Cache | None = None,
        train: bool = False,
        mixing: Mixing | None = None,
    ) -> tuple[Array, Cache | None]:
        """Hidden states after the final norm.

        Args:
            context: without ``step`` what the rows after the first scale are fed, float32
                [B, L - n_1, F] (teacher forcing); with a step > 0 that step's [B, n_s, F].
            cond: see `caption_features`.
            order: None; scales are in no other.
            step: None for all steps at once; else this step only, reading and extending ``cache``.
            segment: not needed, as steps are never traced.
            train: stochastic depth on; needs rngs 'drop_path'.
            mixing: guide what leaves some of the blocks, see `ar_jax.nn.blocks.Stack`.

        Returns:
            float32 [B, L, D] without step, [B, n_s, D] with.
        """
        if order is not None:
            raise ValueError("backbone.name='cross_decoder' has rows of scales: it takes no order")
        conditioner = self.conditioner.copy(parent=self, name="condition")
        vector, text = CaptionReader(
            width=self.width,
            pool_heads=self.pool_heads,
            norm_epsilon=self.norm_epsilon,
            init_std=self._std,
            dtype=self.dtype,
            name="reader",
        )(conditioner(cond))
        first, count = 0, self.rows
        if step is not None:
            first, count = self.schedule.starts[step], self.schedule.sizes[step]
        x = self._rows(context, vector, step)
        x = x + self._scale_vectors(first, count)
        condition = vector
        if self.modulation == "shared":
            init = nn.initializers.normal(self._std)
            condition = Modulation(
                vectors=6, kernel_init=init, dtype=self.dtype, name="shared_modulation"
            )(vector)
        x, caches = Stack(
            depth=self.depth,
            block=self._block_fields(),
            scan=self.scan,
            remat=self.remat,
            drop_path=self.drop_path,
            name="stack",
        )(
            x.astype(self.dtype),
            condition,
            jnp.asarray(self.rotations()[first : first + count]),
            None,  # a step's rows see each other and all before them
            None if cache is None else tuple(zip(cache.k, cache.v, strict=True)),
            first,
            first + count,
            train,
            text=text,
            mixing=mixing,
        )
        if caches is not None:
            cache = Cache(k=tuple(c[0] for c in caches), v=tuple(c[1] for c in caches))
        return self._final_norm(x, vector), cache

    def _rows(self, context: Array | None, vector: Array, step: int | None) -> Array:
        """[B, n, D]: the first scale's rows, the others', or both."""
        init = nn.initializers.normal(self._std)
        embed = nn.Dense(self.width, kernel_init=init, dtype=jnp.float32, name="token_embed")
        if step:
            return embed(context)
        shape = (self.schedule.sizes[0], self.width)
        start = vector + self.param("position_start", init, shape, jnp.float32)[None]
        return start if step == 0 else jnp.concatenate([start, embed(context)], axis=1)

    def _scale_vectors(self, first: int, count: int) -> Array:
        """[1, n, D]."""
        shape = (len(self.schedule.grids) + self.spare_scales, self.width)
        table = self.param("scale_embed", nn.initializers.normal(self._std), shape, jnp.float32)
        return table[self.schedule.coords[first : first + count, 0]][None]

    @nn.nowrap
    def rotations(self) -> np.ndarray:
        """Float32 [L, K/2, 2]: a cell (y, x) of h x w turns as (y H / h, x W / w), rounded."""
        height, width = self.reference_grid or self.schedule.grids[-1]
        cells = []
        for grid in self.schedule.grids:
            factors = np.array([height / grid[0], width / grid[1]], np.float32)
            cells.append(np.rint(np.indices(grid).reshape(2, -1).T.astype(np.float32) * factors))
        return rope_2d(np.concatenate(cells), self.width // self.heads, self.rope_base)

    def _final_norm(self, x: Array, vector: Array) -> Array:
        init = nn.initializers.normal(self._std * self.modulation_init)
        vectors = Modulation(
            vectors=2, kernel_init=init, dtype=jnp.float32, name="final_modulation"
        )(vector)  # [B, 1, 2, D]
        x = layer_norm(x, epsilon=self.norm_epsilon)
        return x * (1 + vectors[:, :, 0]) + vectors[:, :, 1]

    def _block_fields(self) -> tuple:
        depth_factor = (2 * self.depth) ** -0.5 if self.depth_scaled_init else 1.0
        fields = dict(
            heads=self.heads,
            kv_heads=self.heads,
            kernel=self.attention,
            row_steps=self.row_steps,
            mlp_hidden=self.mlp_hidden or 4 * self.width,
            norm="layernorm",
            norm_epsilon=self.norm_epsilon,
            modulation=self.modulation,
            qk_norm=self.qk_norm,
            logit_scale=(self.width // self.heads) ** -0.5,
            attention_bias="qv",
            activation=self.activation,
            gated=False,
            mlp_bias=True,
            attention_dropout=0.0,
            residual_dropout=0.0,
            mlp_hidden_dropout=0.0,
            mlp_dropout=0.0,
            init_std=self._std,
            out_init_std=self._std * depth_factor,
            gate_init=self.gate_init,
            modulation_init=self.modulation_init,
            cross=True,
            cross_gate=self.cross_gate,
            dtype=self.dtype,
        )
        return tuple(fields.items())
