"""Heads that say with which velocity noisy codes become codes (flow matching)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.flow import Flow

Array = jax.Array


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
