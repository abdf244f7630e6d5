"""The transformer of noisy codes: block-causal over a schedule's steps (xAR, arXiv:2502.20388).

A row for every code, fed the code with the noise of its step's own time, which is told by adaptive
norms. Rows see their own step and those before. In training all steps are noisy alike, in sampling
those that are done come from a cache of clean rows, at time 0. The hidden states are of the noisy
codes: a linear layer makes their velocity of them.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.api import Cache, Cond
from ar_jax.backbones.cache_mask import cache_mask
from ar_jax.backbones.conditions import ClassCondition
from ar_jax.nn.blocks import Stack
from ar_jax.nn.flow import TimeEmbedding, time_index
from ar_jax.nn.layers import RMSNorm
from ar_jax.nn.positions import rope_2d
from ar_jax.nn.unstack import unstack
from ar_jax.schedules import Schedule

Array = jax.Array


class NoisyDecoder(nn.Module, kw_only=True):
    """Calls return (hidden float32 [B, n, D], cache).

    Attributes:
        schedule: the steps and which codes are theirs.
        code_width: C, numbers in a code.
        num_classes: the condition, with a null class.
        width: D, of both halves.
        depth, heads: of the first half.
        decoder_depth, decoder_heads: of the second, which has a position table of its own.
        mlp_hidden: of the gated feed-forward layers; None: int(8 D / 3).
        rope_base: of rotary positions on the finest grid.
        activation, norm_epsilon, gate_init, modulation_init, remat, scan: see `ar_jax.nn.blocks`.
        attention_dropout, dropout: on attention weights; after attention and twice in the
            feed-forward layers.
        init_std: of embeddings, position tables and linear layers.
        attention: 'auto', 'xla' or 'splash', see `ar_jax.nn.splash.attend_all`.
    """

    schedule: Schedule
    code_width: int
    num_classes: int
    width: int
    depth: int
    heads: int
    decoder_depth: int
    decoder_heads: int
    mlp_hidden: int | None = None
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    activation: str = "gelu"
    gate_init: float = 0.0
    modulation_init: float = 0.0
    attention_dropout: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    @property
    def conditioner(self) -> ClassCondition:
        """The condition module, also for its parameterless ``null`` and ``fields``."""
        return ClassCondition(
            num_classes=self.num_classes,
            width=self.width,
            init_std=self.init_std,
            parent=None,
            name="condition",
        )

    def setup(self) -> None:
        length, init = self.schedule.length, nn.initializers.normal(self.init_std)

        def table(name: str) -> Array:
            return self.param(name, init, (length, self.width), jnp.float32)

        def dense(name: str) -> nn.Dense:
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=name)

        def norm() -> RMSNorm:
            return RMSNorm(epsilon=self.norm_epsilon)

        self.condition = self.conditioner.copy(parent=self, name="condition")
        self.time = TimeEmbedding(width=self.width, init_std=self.init_std, dtype=self.dtype)
        self.token_embed = dense("token_embed")
        self.encoder_position = table("encoder_position")
        self.encoder_input_norm = norm()
        self.encoder = self._stack(self.depth, self.heads)
        self.encoder_norm = norm()
        self.decoder_embed = dense("decoder_embed")
        self.decoder_position = table("decoder_position")
        self.decoder = self._stack(self.decoder_depth, self.decoder_heads)
        self.decoder_norm = norm()

    def init_cache(self, batch_size: int) -> Cache:
        """An empty cache in the compute dtype, the first half's layers before the second's."""

        def empty() -> tuple[Array, ...]:
            counts = [self.heads] * self.depth + [self.decoder_heads] * self.decoder_depth
            shapes = [
                (batch_size, heads, self.schedule.length, self.width // heads) for heads in counts
            ]
            axes = ("batch", "heads", None, None)
            return tuple(
                nn.with_logical_constraint(jnp.zeros(shape, self.dtype), axes) for shape in shapes
            )

        return Cache(k=empty(), v=empty())

    @nn.nowrap
    def for_sampling(self, params: dict) -> tuple[NoisyDecoder, dict]:
        """This decoder unrolled, with its parameters unstacked: what samplers run."""
        if not self.scan:
            return self, params
        stacks = {"encoder": self.depth, "decoder": self.decoder_depth}
        return self.clone(scan=False), unstack(params, stacks, self.dtype)

    def __call__(
        self,
        noisy: Array,
        cond: Cond,
        times: Array,
        *,
        step: Array | int | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Hidden states after the last norm.

        Args:
            noisy: float32 [B, L, C] in the order of the schedule; with ``step`` its [B, n, C].
            cond: ``{'label': int32 [B]}``.
            times: float32 [B or 1, S], of every step; with ``step`` [B or 1, 1].
            step: None for all steps at once; else this step only, whose rows are written into
                ``cache`` over those that it has of the step.
            train: dropout on; needs the rng 'dropout'.
        """
        encoded, kept = self.encode(noisy, cond, times, step=step, cache=cache, train=train)
        return self.decode(encoded, cond, times, step=step, cache=kept, train=train)

    def encode(
        self,
        noisy: Array,
        cond: Cond,
        times: Array,
        *,
        step: Array | int | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """The first half: (features float32 [B, n, D], cache)."""
        x = self.token_embed(noisy.astype(self.dtype)).astype(jnp.float32)
        x = self.encoder_input_norm(x + self._rows(self.encoder_position, step, x)[None])
        args = self._vectors(cond, times), self.heads, slice(None, self.depth)
        x, cache = self._run(self.encoder, x, *args, step, cache, train)
        return self.encoder_norm(x), cache

    def decode(
        self,
        encoded: Array,
        cond: Cond,
        times: Array,
        *,
        step: Array | int | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """The second half, of the first one's features: (hidden states, cache)."""
        x = self.decoder_embed(encoded.astype(self.dtype)).astype(jnp.float32)
        x = x + self._rows(self.decoder_position, step, x)[None]
        args = self._vectors(cond, times), self.decoder_heads, slice(self.depth, None)
        x, cache = self._run(self.decoder, x, *args, step, cache, train)
        return self.decoder_norm(x), cache

    def conditions(self, cond: Cond, times: Array) -> Array:
        """Class plus time of every step, float32 [B, S, D], of times [B or 1, S]."""
        return self._vectors(cond, times)

    def _vectors(self, cond: Cond, times: Array) -> Array:
        return self.condition(cond, None)[0] + self.time(time_index(times))

    def _run(
        self,
        stack: Stack,
        x: Array,
        condition: Array,
        heads: int,
        layers: slice,
        step: Array | int | None,
        cache: Cache | None,
        train: bool,
    ) -> tuple[Array, Cache | None]:
        """One half, which has the ``layers`` of the cache."""
        first, count = self._first(step), x.shape[1]
        rope = rotations(self.schedule, self.width // heads, self.rope_base)
        caches, mask = None, None
        if cache is not None:
            caches = tuple(zip(cache.k[layers], cache.v[layers], strict=True))
            static = isinstance(first, int)
            steps = tuple(map(int, self.schedule.step_id))
            mask = cache_mask(steps, None, first, count, newest=static)
        x, filled = stack(
            x.astype(self.dtype),
            condition,
            self._rows(jnp.asarray(rope), step, x),
            mask,
            caches,
            first,
            first + count if isinstance(first, int) else None,
            train,
        )
        if cache is None or filled is None:
            return x, cache
        parts = []
        for name, i in (("k", 0), ("v", 1)):
            held = list(getattr(cache, name))
            held[layers] = [layer[i] for layer in filled]
            parts.append(tuple(held))
        return x, Cache(k=parts[0], v=parts[1])

    def _first(self, step: Array | int | None) -> Any:
        """The first row of a step."""
        if step is None:
            return 0
        starts = self.schedule.starts
        return starts[step] if isinstance(step, int) else jnp.asarray(starts)[step]

    def _rows(self, table: Array, step: Array | int | None, x: Array) -> Array:
        """Rows of a table [L, ...] that belong to those of x [B, n, D]."""
        return jax.lax.dynamic_slice_in_dim(table, self._first(step), x.shape[1])

    def _stack(self, depth: int, heads: int) -> Stack:
        fields = dict(
            heads=heads,
            kv_heads=heads,
            kernel=self.attention,
            row_steps=tuple(map(int, self.schedule.step_id)),
            mlp_hidden=self.mlp_hidden or 8 * self.width // 3,
            norm="plain_rmsnorm",
            norm_epsilon=self.norm_epsilon,
            modulation="own",
            qk_norm="none",
            logit_scale=(self.width // heads) ** -0.5,
            attention_bias="qkv",
            activation=self.activation,
            gated=True,
            mlp_bias=True,
            attention_dropout=self.attention_dropout,
            residual_dropout=self.dropout,
            mlp_hidden_dropout=self.dropout,
            mlp_dropout=self.dropout,
            init_std=self.init_std,
            out_init_std=self.init_std,
            gate_init=self.gate_init,
            modulation_init=self.modulation_init,
            dtype=self.dtype,
        )
        return Stack(
            depth=depth,
            block=tuple(fields.items()),
            scan=self.scan,
            remat=self.remat,
            drop_path=0.0,
        )


def rotations(schedule: Schedule, head_width: int, base: float = 10_000.0) -> np.ndarray:
    """Table [L, K/2, 2] of all codes, by where their cells' centres are on the finest grid."""
    scale, *cells = schedule.coords.T
    finest = np.asarray(schedule.grids[-1])
    ratio = finest / np.asarray(schedule.grids)[scale]  # [L, 2]
    centres = (np.stack(cells, axis=1) + 0.5) * ratio - 0.5
    return rope_2d(centres, head_width, base)


def check_noisy_decoder(backbone: NoisyDecoder) -> None:
    """Raises ValueError that names the field of the configuration that is wrong."""
    for field in ("heads", "decoder_heads"):
        heads = getattr(backbone, field)
        if heads < 1 or backbone.width % (4 * heads):
            raise ValueError(
                f"backbone.width {backbone.width} over backbone.{field} {heads} gives heads of "
                f"width {backbone.width / heads:g}; rotary positions need a multiple of 4"
            )
    schedule = backbone.schedule
    if schedule.random or schedule.mask:
        raise ValueError(
            f"schedule.name is {schedule.name!r}; the backbone 'noisy_decoder' predicts entities "
            "in an order of their own: use 'next_entity'"
        )
