"""The decoder-only transformer over a schedule: VAR's, LlamaGen's, RAR's and PAR's by its fields.

Rows of the sequence: the condition's prefix first, then one row for every code of the steps after
the first. The last n_1 prefix rows predict step 1; a later row predicts its own code and is fed
what the step may see of earlier steps: the previous code (raster, random orders), a code of the
previous group or, in a group larger than that, a learned row (PAR), or the coarser scales' sum
resampled to this scale (next-scale).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cache, Cond
from ar_jax.backbones.cache_mask import cache_mask
from ar_jax.backbones.caches import empty_cache
from ar_jax.backbones.conditions import ClassCondition, TextCondition
from ar_jax.backbones.step_rows import Segment, fed_tokens, held_cells, is_first, unfed_rows
from ar_jax.backbones.target_positions import TargetAwarePositions
from ar_jax.nn.blocks import Stack
from ar_jax.nn.layers import LayerNorm, RMSNorm, layer_norm
from ar_jax.nn.modulation import Modulation
from ar_jax.nn.unstack import unstack
from ar_jax.schedules import Schedule

Array = jax.Array


class Decoder(nn.Module, kw_only=True):
    """Causal-by-step decoder. Calls return (hidden float32 [B, n, D], cache).

    Attributes:
        schedule: the generation order; fixes the number of rows and the visibility.
        condition: 'class' (num_classes, null_class) or 'text' (caption_length rows of the prefix,
            caption_features, caption_null_rows), see `conditions`.
        context: what later rows are fed: 'codes' (int32, an embedding of vocab_size rows) or
            'features' (float [.., feature_width], a linear layer).
        shared_embedding: one table of the codes, a mask (a row that only masked training reads),
            the classes and the null class, in this order (RAR).
        start_row: a learned row before the condition (RAR's class token).
        positions: 'learned' (position, scale and start tables), 'rope' (2-D rotary) or
            'target_aware' (see `target_positions`), the only ones that take an order.
        spare_positions: rows of the target-aware tables that nothing reads.
        step_embedding: add a learned vector of the row's place in the sequence to the condition of
            the adaptive norms, which then differs from row to row (RAR).
        spare_steps: rows of that table that nothing reads.
        norm, modulation, qk_norm, ...: see `ar_jax.nn.blocks`. logit_scale None: K ** -0.5.
        kv_heads: heads of keys and values; None: as many as of queries.
        mlp_hidden: None: 4 D.
        init_std: of linear layers and embeddings; None: sqrt(1 / (3 D)), VAR's.
        depth_scaled_init: divide the residual outputs' std by sqrt(2 depth).
        attention: how rows attend without a cache: 'auto', 'xla' or 'splash', see
            `ar_jax.nn.splash.attend_all`.
    """

    schedule: Schedule
    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    condition: str = "class"
    num_classes: int = 0
    null_class: bool = True
    caption_length: int = 0
    caption_features: int = 0
    caption_null_rows: int | None = None
    context: str
    vocab_size: int = 0
    feature_width: int = 0
    shared_embedding: bool = False
    start_row: bool = False
    positions: str
    rope_base: float = 10_000.0
    spare_positions: int = 0
    step_embedding: bool = False
    spare_steps: int = 0
    norm: str
    norm_epsilon: float
    modulation: str = "none"
    qk_norm: str = "none"
    logit_scale: float | None = None
    attention_bias: str = "none"
    activation: str
    gated: bool = False
    mlp_bias: bool = False
    mlp_hidden: int | None = None
    token_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_hidden_dropout: float = 0.0
    mlp_dropout: float = 0.0
    drop_path: float = 0.0
    init_std: float | None = None
    depth_scaled_init: bool = False
    gate_init: float = 1e-3
    modulation_init: float = 0.5
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    takes_windows = True  # a context longer than a step's goes on into the steps after it

    @property
    def conditioner(self) -> ClassCondition | TextCondition:
        """The condition module, also for its parameterless ``null`` and ``rows``."""
        if self.condition == "text":
            return TextCondition(
                length=self.caption_length,
                features=self.caption_features,
                null_rows=self.caption_null_rows,
                width=self.width,
                init_std=self._std,
                dtype=self.dtype,
                parent=None,
                name="condition",
            )
        return ClassCondition(
            num_classes=self.num_classes,
            width=self.width,
            init_std=self._std,
            null_class=self.null_class,
            shared_from=self.vocab_size + 1 if self.shared_embedding else None,
            parent=None,
            name="condition",
        )

    @property
    def row_schedule(self) -> Schedule:
        """Of the rows: ``schedule``, a row for every code."""
        return self.schedule

    @property
    def prefix_rows(self) -> int:
        """Rows before the second step's: the condition's, at least one for each first code."""
        return int(self.start_row) + max(self.conditioner.rows, self.row_schedule.sizes[0])

    @property
    def lead(self) -> int:
        """Prefix rows that predict nothing."""
        return self.prefix_rows - self.row_schedule.sizes[0]

    @property
    def rows(self) -> int:
        """T, all rows of the sequence."""
        return self.lead + self.row_schedule.length

    @property
    def _std(self) -> float:
        return (3 * self.width) ** -0.5 if self.init_std is None else self.init_std

    def init_cache(self, batch_size: int) -> Cache:
        """An empty cache."""
        sizes = (batch_size, self.rows, self.depth, self.kv_heads or self.heads)
        largest = max(self.row_schedule.sizes)
        return empty_cache(*sizes, self.width // self.heads, self.dtype, largest=largest)

    @nn.nowrap
    def for_sampling(self, params: dict) -> tuple[Decoder, dict]:
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
        step: Array | int | None = None,
        segment: Segment | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Hidden states after the final norm.

        Args:
            context: without ``step`` the inputs of all rows after the prefix, [B, L - n_1], or
                windows of codes [B, L - n_1, n], or [B, L - n_1, F] (teacher forcing); with a step
                > 0 that step's [B, n_s(, F)].
            cond: see `conditions`.
            order: int32 [B, L], the grid cell of every code of the sequence; None is the
                schedule's own order. The context is in the same order.
            step: None for all steps at once; else this step only, reading and extending ``cache``.
            segment: of the schedule, that a traced step is of; its steps have one size. A longer
                context goes on into as many steps after it, which see what is fed of those before.
            train: dropout and stochastic depth on; needs rngs 'dropout' and 'drop_path'.

        Returns:
            float32 [B, L, D] without step, [B, n_s, D] with (of a longer context as many rows).
        """
        embed = self._token_embed()
        conditioner = self.conditioner.copy(parent=self, name="condition")
        prefix, prefix_mask = conditioner(cond, embed if self.shared_embedding else None)
        if self.positions == "learned" and self.schedule.sizes[0] > 1:
            # One class row serves every code of a first step larger than one.
            prefix = jnp.broadcast_to(
                prefix[:, -1:], (prefix.shape[0], self.prefix_rows, self.width)
            )
        vector = prefix[:, -1:]  # [B, 1, D], before positions are added
        first_row, count = self._row_range(step, segment, context)
        if self.start_row:
            row = self.param("start_row", nn.initializers.zeros, (1, self.width), jnp.float32)
            start = jnp.broadcast_to(row[None], (len(prefix), 1, self.width))
            prefix = jnp.concatenate([start, prefix], axis=1)
            if prefix_mask is not None:
                prefix_mask = jnp.pad(prefix_mask, ((0, 0), (1, 0)), constant_values=True)
        if self.step_embedding:
            vector = vector + self._step_embed(first_row, count)  # [B, count, D]
        x = self._embed(embed, context, prefix, step)  # [B, count, D]
        if self.positions == "target_aware":
            x = x + self._target_positions(order, first_row, count)
        elif order is not None:
            raise ValueError(
                f"backbone.positions={self.positions!r} cannot tell the decoder which cell comes "
                "next: an order needs positions='target_aware'"
            )
        x = self._add_positions(x, first_row, count, starts=step is None or is_first(step))
        x = nn.Dropout(self.token_dropout, deterministic=not train)(x).astype(self.dtype)
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
            x,
            condition,
            self._rope(first_row, count),
            self._mask(step, first_row, count, prefix_mask, cached=cache is not None),
            None if cache is None else tuple(zip(cache.k, cache.v, strict=True)),
            first_row,
            first_row + count if isinstance(first_row, int) else None,
            train,
        )
        if caches is not None:
            cache = Cache(k=tuple(c[0] for c in caches), v=tuple(c[1] for c in caches))
        if step is None or is_first(step):
            x = x[:, self.lead :]
            vector = vector[:, self.lead :] if self.step_embedding else vector
        return self._final_norm(x, vector), cache

    def _row_range(
        self, step: Array | int | None, segment: Segment | None, context: Array | None
    ) -> tuple[Any, int]:
        """(first row, number of rows) that a call computes."""
        schedule = self.row_schedule
        if step is None:
            return 0, self.rows
        if is_first(step):
            return 0, self.prefix_rows
        if isinstance(step, int):
            return self.lead + schedule.starts[step], schedule.sizes[step]
        assert context is not None
        start, _ = segment or (0, 0)
        first = schedule.starts[start] + (step - start) * schedule.sizes[start]
        return self.lead + first, context.shape[1]

    def _token_embed(self) -> Any:
        """The layer that turns contexts into rows."""
        init = nn.initializers.normal(self._std)
        if self.context == "features":  # float32 as the official embedding sum
            return nn.Dense(self.width, kernel_init=init, dtype=jnp.float32, name="token_embed")
        rows = self.vocab_size + (self.num_classes + 2 if self.shared_embedding else 0)
        return nn.Embed(rows, self.width, embedding_init=init, name="token_embed")

    def _embed(
        self, embed: Any, context: Array | None, prefix: Array, step: Array | int | None
    ) -> Array:
        if step is not None and is_first(step):
            return prefix
        tokens = embed(context)
        tokens = tokens.mean(2) if tokens.ndim == 4 else tokens  # windows are fed their means
        if self.context == "codes" and (count := unfed_rows(self.row_schedule)):
            init = nn.initializers.normal(self._std)
            table = self.param("transition", init, (count, self.width), jnp.float32)
            tokens = fed_tokens(tokens, table, self.row_schedule, step)
        return jnp.concatenate([prefix, tokens], axis=1) if step is None else tokens

    def _step_embed(self, first: Array | int, count: int) -> Array:
        """[1, count, D]: vectors of the rows' places in the sequence."""
        init, rows = nn.initializers.normal(self._std), self.rows + self.spare_steps
        table = self.param("step_embed", init, (rows, self.width), jnp.float32)
        return jax.lax.dynamic_slice_in_dim(table, first, count)[None]

    def _target_positions(self, order: Array | None, first: Array | int, count: int) -> Array:
        return TargetAwarePositions(
            schedule=self.schedule,
            width=self.width,
            prefix_rows=self.prefix_rows,
            spare=self.spare_positions,
            init_std=self._std,
            name="cell_positions",
        )(order, first, count)

    def _add_positions(self, x: Array, first: Array | int, count: int, *, starts: bool) -> Array:
        if self.positions != "learned":
            return x
        init = nn.initializers.normal(self._std)
        rows, first_size = self.schedule.length, self.schedule.sizes[0]
        if self.lead:
            raise ValueError("positions='learned' has no place for rows before the first step's")
        position = self.param("position", init, (rows, self.width), jnp.float32)
        scale = self.param("scale_embed", init, (len(self.schedule.grids), self.width), jnp.float32)
        start = self.param("position_start", init, (first_size, self.width), jnp.float32)
        table = position + scale[self.schedule.coords[:, 0]]  # [L, D]
        x = x + jax.lax.dynamic_slice_in_dim(table, first, count)[None]
        return x.at[:, :first_size].add(start[None]) if starts else x

    def _rope(self, first: Array | int, count: int) -> Array | None:
        if self.positions != "rope":
            return None
        rows = (self.row_schedule, self.prefix_rows, self.context)
        table = held_cells(*rows, self.width // self.heads, self.rope_base)
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(table), first, count)

    @property
    def row_steps(self) -> tuple[int, ...]:
        """Steps of all rows, below 0 for prefix rows that predict nothing."""
        return (*range(-self.lead, 0), *map(int, self.row_schedule.step_id))

    def _mask(
        self,
        step: Array | int | None,
        first: Array | int,
        count: int,
        prefix_mask: Array | None,
        *,
        cached: bool,
    ) -> Array | None:
        """What `ar_jax.nn.blocks.Attention` wants: of the cache's rows, or of all rows."""
        real = None  # bool [B, T], False for the padding of a caption
        if prefix_mask is not None:
            spare = self.rows - self.prefix_rows
            real = jnp.pad(prefix_mask, ((0, 0), (0, spare)), constant_values=True)
        if not cached:
            return real
        newest = isinstance(first, int) and step is not None and (first > 0 or not self.lead)
        return cache_mask(self.row_steps, real, first, count, newest=newest)

    def _final_norm(self, x: Array, vector: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.norm == "rmsnorm":
            x = RMSNorm(epsilon=self.norm_epsilon, name="final_norm")(x)
        elif self.norm == "affine_layernorm" and self.modulation == "none":
            x = LayerNorm(epsilon=self.norm_epsilon, name="final_norm")(x)
        else:  # adaptive norms have their scales and shifts from the condition
            x = layer_norm(x, epsilon=self.norm_epsilon)
        if self.modulation == "none":
            return x
        init = nn.initializers.normal(self._std * self.modulation_init)
        modulation = Modulation(
            vectors=2, kernel_init=init, dtype=jnp.float32, name="final_modulation"
        )
        vectors = modulation(vector)  # [B, 1 or n, 2, D]
        return x * (1 + vectors[:, :, 0]) + vectors[:, :, 1]

    def _block_fields(self) -> tuple:
        head_width = self.width // self.heads
        depth_factor = (2 * self.depth) ** -0.5 if self.depth_scaled_init else 1.0
        fields = dict(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            kernel=self.attention,
            row_steps=self.row_steps,
            mlp_hidden=self.mlp_hidden or 4 * self.width,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            modulation=self.modulation,
            qk_norm=self.qk_norm,
            logit_scale=head_width**-0.5 if self.logit_scale is None else self.logit_scale,
            attention_bias=self.attention_bias,
            activation=self.activation,
            gated=self.gated,
            mlp_bias=self.mlp_bias,
            attention_dropout=self.attention_dropout,
            residual_dropout=self.residual_dropout,
            mlp_hidden_dropout=self.mlp_hidden_dropout,
            mlp_dropout=self.mlp_dropout,
            init_std=self._std,
            out_init_std=self._std * depth_factor,
            gate_init=self.gate_init,
            modulation_init=self.modulation_init,
            dtype=self.dtype,
        )
        return tuple(fields.items())
