"""Heads that say with which velocity noisy codes become codes (flow matching)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.nn.blocks import Stack
from ar_jax.nn.flow import Flow, TimeEmbedding, time_index
from ar_jax.nn.layers import layer_norm
from ar_jax.nn.modulation import Modulation
from ar_jax.nn.unstack import unstack

Array = jax.Array

NORM_EPSILON = 1e-6


class VelocityHead(nn.Module, kw_only=True):
    """A linear layer of hidden states that are of the noisy codes themselves (xAR, 2502.20388).

    Attributes:
        code_width: C, numbers in a code.
        sampler, sampling_steps, last: how samples are drawn, see `ar_jax.nn.flow.Flow`.
    """

    code_width: int
    sampler: str = "euler_maruyama"
    sampling_steps: int = 50
    last: float = 0.04
    dtype: DTypeLike = jnp.float32

    # Whether the backbone is fed the noisy codes.
    noisy_context = True

    @property
    def flow(self) -> Flow:
        """The way from noise to codes."""
        return Flow(sampler=self.sampler, steps=self.sampling_steps, last=self.last)

    @nn.compact
    def __call__(
        self, hidden: Array, noisy: Array, times: Array, sizes: Sequence[int] | None = None
    ) -> Array:
        """Velocities float32 [B, n, C] of hidden states [B, n, D].

        Args:
            noisy: [B, n, C] and their ``times`` [B or 1, S]: what the hidden states know already.
            sizes: codes of each of the S steps; None: they are of one step.
        """
        init = nn.initializers.zeros
        return nn.Dense(self.code_width, kernel_init=init, dtype=jnp.float32, name="output")(hidden)

    @staticmethod
    def guide(cond: Array, null: Array, scale: Array | float) -> Array:
        """Guided velocities: null + scale (cond - null)."""
        return null + scale * (cond - null)

    @nn.nowrap
    def for_sampling(self, params: dict) -> tuple[VelocityHead, dict]:
        """What samplers run."""
        return self, params


class FlowHead(VelocityHead, kw_only=True):
    """A small transformer over the noisy codes of one step, told what they are to mean (FlowAR).

    FlowAR (arXiv:2412.15205) has released no code. Of what its paper says: the codes of a scale are
    denoised together, by blocks whose norms are shifted, scaled and gated position by position, by
    the hidden state of the position and the time (spatial AdaLN). Chosen here: hidden state and
    time are embedded and added, rows have no positions but by their states, time is told as in xAR,
    gates and output begin at zero (DiT).

    Attributes:
        width, depth, heads: of the blocks.
        mlp_hidden: of their feed-forward layers; None: 4 width.
        activation: see `ar_jax.nn.layers.activate`.
        init_std: of linear layers.
    """

    width: int
    depth: int
    heads: int
    mlp_hidden: int | None = None
    activation: str = "gelu_tanh"
    init_std: float = 0.02
    sampler: str = "euler"
    sampling_steps: int = 25
    scan: bool = True

    noisy_context = False

    def setup(self) -> None:
        init, zeros = nn.initializers.normal(self.init_std), nn.initializers.zeros

        def dense(name: str) -> nn.Dense:
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=name)

        self.condition_embed = dense("condition_embed")
        self.noisy_embed = dense("noisy_embed")
        self.time = TimeEmbedding(width=self.width, init_std=self.init_std, dtype=self.dtype)
        self.stack = self._stack()
        self.final_modulation = Modulation(vectors=2, kernel_init=zeros, dtype=self.dtype)
        self.output = nn.Dense(self.code_width, kernel_init=zeros, dtype=jnp.float32)

    def __call__(
        self, hidden: Array, noisy: Array, times: Array, sizes: Sequence[int] | None = None
    ) -> Array:
        """See `VelocityHead`; codes of different steps do not see each other."""
        sizes = (noisy.shape[1],) if sizes is None else tuple(sizes)
        ends = np.cumsum(sizes)[:-1].tolist()
        parts = zip(jnp.split(hidden, ends, 1), jnp.split(noisy, ends, 1), strict=True)
        found = [
            self.velocity(states, codes, times[:, step : step + 1])
            for step, (states, codes) in enumerate(parts)
        ]
        return jnp.concatenate(found, axis=1)

    def velocity(self, hidden: Array, noisy: Array, time: Array) -> Array:
        """Of the codes of one step, at ``time`` [B or 1, 1]."""
        condition = self.condition_embed(hidden.astype(self.dtype)).astype(jnp.float32)
        condition = condition + self.time(time_index(time))  # [B, n, W]
        x = self.noisy_embed(noisy.astype(self.dtype))
        x, _ = self.stack(x, condition, None, None, None, 0, None, False)
        shift, scale = jnp.moveaxis(self.final_modulation(condition), 2, 0)
        return self.output(layer_norm(x, epsilon=NORM_EPSILON) * (1 + scale) + shift)

    @nn.nowrap
    def for_sampling(self, params: dict) -> tuple[FlowHead, dict]:
        """This head unrolled, with its parameters unstacked."""
        if not self.scan:
            return self, params
        return self.clone(scan=False), unstack(params, {"stack": self.depth}, self.dtype)

    def _stack(self) -> Stack:
        fields = dict(
            heads=self.heads,
            kv_heads=self.heads,
            kernel="xla",  # few rows, all of which see each other
            row_steps=None,
            mlp_hidden=self.mlp_hidden or 4 * self.width,
            norm="layernorm",
            norm_epsilon=NORM_EPSILON,
            modulation="own",
            qk_norm="none",
            logit_scale=(self.width // self.heads) ** -0.5,
            attention_bias="qkv",
            activation=self.activation,
            gated=False,
            mlp_bias=True,
            attention_dropout=0.0,
            residual_dropout=0.0,
            mlp_hidden_dropout=0.0,
            mlp_dropout=0.0,
            init_std=self.init_std,
            out_init_std=self.init_std,
            gate_init=0.0,
            modulation_init=0.0,
            dtype=self.dtype,
        )
        block = tuple(fields.items())
        return Stack(depth=self.depth, block=block, scan=self.scan, remat="none", drop_path=0.0)


def check_velocity_head(head: VelocityHead) -> None:
    """Raises ValueError that names the field of config.head that is out of its range."""
    head.flow  # noqa: B018  checks its own fields
    if isinstance(head, FlowHead) and (head.heads < 1 or head.width % head.heads):
        raise ValueError(
            f"head.width is {head.width}, which is no multiple of head.heads {head.heads}"
        )
