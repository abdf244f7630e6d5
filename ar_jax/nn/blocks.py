"""The transformer block and the stack of blocks: scanned for training, unrolled for sampling.

One block whose fields give VAR's (adaptive layer norm, cosine attention, tanh-GELU), LlamaGen's
(RMSNorm, rotary positions, SwiGLU) and RAR's (affine layer norm adapted at every position). Given
keys and values, it attends to these in place of its own (ARPG's second half); given a text, to it
between the two (Infinity).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ar_jax.nn.attention import attend_cache, write
from ar_jax.nn.cross_attention import CrossAttention, Text
from ar_jax.nn.layers import MLP, LayerNorm, RMSNorm, drop_path, layer_norm, rms_norm, unit
from ar_jax.nn.modulation import Modulation, modulation_init
from ar_jax.nn.positions import rotate
from ar_jax.nn.splash import attend_all, attend_newest

Array = jax.Array
# Blocks, counted from the end (-1: the last), and the scale that guides what leaves them.
Mixing = tuple[tuple[int, ...], Array]

REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep every activation
    "block": jax.checkpoint_policies.nothing_saveable,  # keep block inputs only
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products
}


class Attention(nn.Module, kw_only=True):
    """Multi-head self-attention over the rows given and, with a cache, all earlier ones.

    Or of the rows given to a ``memory`` of keys and values, which then are not projected here; its
    rows are as many as the queries and seen by ``row_steps``, unless these are None.

    Attributes:
        kv_heads: heads of keys and values, each serving heads / kv_heads of queries
            (arXiv:2305.13245).
        qk_norm: 'none'; 'cosine': unit queries and keys with a learned scale per head, stored as a
            logarithm and capped at ln 100 (VAR); 'layernorm': affine layer norms of queries and of
            keys over the head's width, shared by all heads (RAR).
        qk_norm_epsilon: of these layer norms.
        logit_scale: factor on the dot products without cosine attention.
        bias: 'none', 'qv': biases for queries, values and the output (VAR), or 'qkv': for keys too.
        dropout: rate on the softmax's weights.
        kernel, row_steps: of calls without a cache, see `ar_jax.nn.splash.attend_all`.
    """

    heads: int
    kv_heads: int
    kernel: str
    row_steps: tuple[int, ...] | None
    qk_norm: str
    qk_norm_epsilon: float
    logit_scale: float
    bias: str
    dropout: float
    kernel_init: Initializer
    out_init: Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, Q, D]
        rope: Array | None,  # [Q, K/2, 2]
        mask: Array | None,  # with a cache [B, H, Q, T], else real rows [B, Q]; broadcastable
        cache: tuple[Array, Array] | None,  # each [B, H, T, K]
        start: Array | int,  # cache row of the first query
        visible: int | None,  # cache rows that can be seen at all, if known when tracing
        train: bool,
        # Keys (turned) and values, each [B, T, H, K], or as a cache's where row_steps is None.
        memory: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        width = x.shape[-1]

        def project(name: str, heads: int, bias: bool) -> nn.DenseGeneral:
            # Three kernels instead of a fused one: slicing a fused product costs a CPU more than
            # the product, and cuts across the heads that tensor parallelism splits.
            return nn.DenseGeneral(
                (heads, width // self.heads),
                use_bias=bias,
                kernel_init=self.kernel_init,
                dtype=self.dtype,
                name=name,
            )

        q = project("query", self.heads, self.bias != "none")(x)  # [B, Q, H, K]
        if memory is None:
            k = project("key", self.kv_heads, self.bias == "qkv")(x)
            v = project("value", self.kv_heads, self.bias != "none")(x)
        else:
            k, v = memory
        scale = self.logit_scale
        if self.qk_norm == "cosine":
            log_scale = self.param(
                "log_scale", nn.initializers.constant(jnp.log(4.0)), (self.heads,), jnp.float32
            )
            q = unit(q) * jnp.exp(jnp.minimum(log_scale, jnp.log(100.0)))[None, None, :, None]
            q, k, scale = q.astype(self.dtype), unit(k).astype(self.dtype), 1.0
        if self.qk_norm == "layernorm":
            q, k = (
                LayerNorm(epsilon=self.qk_norm_epsilon, name=name)(rows).astype(self.dtype)
                for name, rows in (("query_norm", q), ("key_norm", k))
            )
        if rope is not None:
            q, k = rotate(q, rope), k if memory is not None else rotate(k, rope)
        if cache is not None:
            cache = write(cache[0], k, start), write(cache[1], v, start)
            k, v = cache
        if cache is not None or (memory is not None and self.row_steps is None):
            seen = visible if mask is None else mask.shape[-1]
            if mask is None:
                out = attend_newest(q, k, v, seen=seen, scale=scale, kernel=self.kernel)
            else:
                k, v = k[:, :, :seen], v[:, :, :seen]
                out = attend_cache(q, k, v, mask=mask, scale=scale)  # [B, Q, H, K]
        else:
            if self.kv_heads != self.heads:
                k, v = (rows.repeat(self.heads // self.kv_heads, axis=2) for rows in (k, v))
            out = attend_all(
                *(q, k, v),
                steps=self.row_steps or (0,) * q.shape[1],
                real=mask,
                scale=scale,
                kernel=self.kernel,
                dropout=nn.Dropout(self.dropout, deterministic=False)
                if train and self.dropout
                else None,
            )
        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            use_bias=self.bias != "none",
            kernel_init=self.out_init,
            dtype=self.dtype,
            name="out",
        )(out.astype(self.dtype))
        return out, cache


class Block(nn.Module, kw_only=True):
    """Attention and feed-forward with optional adaptive norms and residual gates.

    Attributes:
        post_norm: norms of the sums x + f(x) (BERT, arXiv:1810.04805), which know no modulation,
            in place of norms of f's inputs.
        norm: 'layernorm' (no parameters), 'affine_layernorm' (scale and bias), 'rmsnorm' (scale) or
            'plain_rmsnorm' (no parameters).
        modulation: 'none'; 'own': six vectors from the condition by this block's linear layer;
            'shared': the given vectors plus this block's own table (VAR's shared AdaLN).
        gate_init, modulation_init: factors on the initial gates and on scales and shifts.
        kernel, row_steps: see `Attention`; None: all rows see each other.
        cross: attend to a text too, between attention and feed-forward: after an affine layer norm,
            without modulation and never dropped.
        cross_gate: a learned factor for every channel of what that gives.
    """

    heads: int
    kv_heads: int
    kernel: str
    row_steps: tuple[int, ...] | None
    mlp_hidden: int
    norm: str
    norm_epsilon: float
    modulation: str
    qk_norm: str
    logit_scale: float
    attention_bias: str
    activation: str
    gated: bool
    mlp_bias: bool
    attention_dropout: float
    residual_dropout: float
    mlp_hidden_dropout: float
    mlp_dropout: float
    init_std: float
    out_init_std: float
    gate_init: float
    modulation_init: float
    dtype: DTypeLike
    post_norm: bool = False
    cross: bool = False
    cross_gate: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, Q, D]
        drop_rate: Array,  # scalar, this block's stochastic depth
        # [B, R, D] for 'own', [B, R, 6, D] for 'shared'; R is 1, Q or, without a cache, the number
        # of steps in ``row_steps``
        condition: Array | None,
        rope: Array | None,
        mask: Array | None,
        cache: tuple[Array, Array] | None,
        start: Array | int,
        visible: int | None,
        train: bool,
        memory: tuple[Array, Array] | None = None,  # see `Attention`
        text: Text | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        # Without it the compiler follows the weights' sharding and splits the width, not the batch.
        x = nn.with_logical_constraint(x, ("batch", None, None))
        init = nn.initializers.normal(self.init_std)
        out_init = nn.initializers.normal(self.out_init_std)
        modulation = self._modulation(condition, *x.shape[1:])  # six of [B, 1 or Q, D], or None

        def branch(x: Array, name: str, index: int) -> Array:
            h = x if self.post_norm else self._normalise(x, name)
            if modulation is not None:
                h = h * (1 + modulation[2 + index]) + modulation[4 + index]
            return h.astype(self.dtype)

        def residual(x: Array, out: Array, name: str, index: int, dropout: float) -> Array:
            out = nn.Dropout(dropout, deterministic=not train)(out)
            if modulation is not None:
                out = out * modulation[index].astype(out.dtype)
            if train and self.has_rng("drop_path"):
                out = drop_path(out, drop_rate, self.make_rng("drop_path"))
            if self.post_norm:
                return self._normalise(x + out, name).astype(x.dtype)
            return x + out

        attention = Attention(
            heads=self.heads,
            kv_heads=self.kv_heads,
            kernel=self.kernel,
            row_steps=self.row_steps,
            qk_norm=self.qk_norm,
            qk_norm_epsilon=self.norm_epsilon,
            logit_scale=self.logit_scale,
            bias=self.attention_bias,
            dropout=self.attention_dropout,
            kernel_init=init,
            out_init=out_init,
            dtype=self.dtype,
            name="attention",
        )
        h = branch(x, "attention_norm", 0)
        out, cache = attention(h, rope, mask, cache, start, visible, train, memory)
        x = residual(x, out, "attention_norm", 0, self.residual_dropout)
        if self.cross:
            assert text is not None
            x = x + self._crossed(x, text, init, out_init)
        mlp = MLP(
            hidden=self.mlp_hidden,
            activation=self.activation,
            gated=self.gated,
            bias=self.mlp_bias,
            hidden_dropout=self.mlp_hidden_dropout,
            kernel_init=init,
            out_init=out_init,
            dtype=self.dtype,
            name="mlp",
        )
        out = mlp(branch(x, "mlp_norm", 1), train)
        x = residual(x, out, "mlp_norm", 1, self.mlp_dropout)
        return x, cache

    def _crossed(self, x: Array, text: Text, init: Initializer, out_init: Initializer) -> Array:
        h = LayerNorm(epsilon=self.norm_epsilon, name="cross_norm")(x).astype(self.dtype)
        out = CrossAttention(
            width=x.shape[-1],
            heads=self.heads,
            kernel_init=init,
            out_init=out_init,
            dtype=self.dtype,
            name="cross_attention",
        )(h, text)
        if self.cross_gate:
            gate = self.param("cross_gate", nn.initializers.ones, (x.shape[-1],), jnp.float32)
            out = out * gate.astype(out.dtype)
        return out

    def _normalise(self, x: Array, name: str) -> Array:
        if self.norm == "rmsnorm":
            return RMSNorm(epsilon=self.norm_epsilon, name=name)(x)
        if self.norm == "affine_layernorm":
            return LayerNorm(epsilon=self.norm_epsilon, name=name)(x)
        plain = rms_norm if self.norm == "plain_rmsnorm" else layer_norm
        return plain(x, epsilon=self.norm_epsilon)

    def _modulation(self, condition: Array | None, rows: int, width: int) -> list[Array] | None:
        """gate 1, gate 2, scale 1, scale 2, shift 1, shift 2: the official order."""
        if self.modulation == "none":
            return None
        assert condition is not None
        if self.modulation == "own":
            init = modulation_init(self.init_std, self.gate_init, self.modulation_init)
            vectors = Modulation(vectors=6, kernel_init=init, dtype=self.dtype, name="modulation")(
                condition
            )
        else:
            table_init = modulation_init(width**-0.5, self.gate_init, self.modulation_init)
            table = self.param("modulation_table", table_init, (6, width), jnp.float32)
            vectors = condition + table[None, None]
        if vectors.shape[1] not in (1, rows):
            vectors = vectors[:, np.asarray(self.row_steps)]
        return [vectors[:, :, i] for i in range(6)]


class Stack(nn.Module, kw_only=True):
    """``depth`` equal blocks.

    Attributes:
        block: fields of `Block`, as pairs so that the module stays hashable.
        scan: one scanned block with stacked parameters ``blocks`` [depth, ...] (training: compile
            time does not grow with depth), or ``blocks_0`` ... ``blocks_{depth-1}`` (sampling: a
            scan would copy every layer's slice of the weights in every step), see `nn.unstack`.
        remat: key of REMAT_POLICIES.
        drop_path: rate of the last block; it grows linearly from 0 at the first.
    """

    depth: int
    block: tuple[tuple[str, Any], ...]
    scan: bool
    remat: str
    drop_path: float

    @nn.compact
    def __call__(
        self,
        x: Array,
        condition: Array | None,
        rope: Array | None,
        mask: Array | None,
        caches: tuple[tuple[Array, Array], ...] | None,
        start: Array | int,
        visible: int | None,
        train: bool,
        memory: tuple[Array, Array] | None = None,  # the same for all blocks
        text: Text | None = None,  # as well
        mixing: Mixing | None = None,
    ) -> tuple[Array, tuple[tuple[Array, Array], ...] | None]:
        rates = jnp.linspace(0.0, self.drop_path, self.depth, dtype=jnp.float32)
        fields = dict(self.block)
        if not self.scan:
            filled: list[Any] = []
            for i in range(self.depth):
                cache = None if caches is None else caches[i]
                x, cache = Block(**fields, name=f"blocks_{i}")(
                    x, rates[i], condition, rope, mask, cache, start, visible, train, memory, text
                )
                filled.append(cache)
                if mixing is not None and i - self.depth in mixing[0]:
                    x = mixed(x, mixing[1])
            return x, None if caches is None else tuple(filled)
        if caches is not None or mixing is not None:
            raise ValueError(
                "a cache or mixing needs the unrolled stack: scan=False and unstacked params"
            )
        block = Block
        if self.remat != "none":
            block = nn.remat(
                Block,
                prevent_cse=False,
                static_argnums=(7, 8, 9),
                policy=REMAT_POLICIES[self.remat],
            )
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True, "drop_path": True},
            in_axes=(0,) + (nn.broadcast,) * 9,
            length=self.depth,
        )
        x, _ = scanned(**fields, name="blocks")(
            x, rates, condition, rope, mask, None, 0, None, train, memory, text
        )
        return x, None


def mixed(x: Array, scale: Array) -> Array:
    """Rows [2 B, Q, D], the conditional before the null ones, as guided ones in both places.

    At a scale of 1 they stay as they are.
    """
    cond, null = jnp.split(x, 2)
    guided = (null + scale * (cond - null)).astype(x.dtype)
    return jnp.where(scale == 1, x, jnp.concatenate([guided, guided]))
