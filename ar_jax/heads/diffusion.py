"""A small diffusion model of one continuous code given its hidden state (MAR, 2406.11838)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.diffusion import Diffusion, timestep_features
from ar_jax.nn.layers import MLP, LayerNorm, layer_norm
from ar_jax.nn.modulation import Modulation

Array = jax.Array

TIME_FEATURES = 256
NORM_EPSILON = 1e-6
XAVIER = nn.initializers.xavier_uniform()


class DiffusionHead(nn.Module, kw_only=True):
    """p(code | hidden) by denoising: residual MLP blocks with adaptive norms over a noisy code.

    There is no likelihood: training minimises the squared error of the noise estimate plus the
    variational bound that teaches the variance. Guidance mixes the noise estimates.

    Attributes:
        code_width: C, numbers in a code.
        width, depth: of the residual blocks.
        steps: of the diffusion in training.
        sampling_steps: which of them sampling keeps; see `ar_jax.nn.diffusion.respace`.
    """

    code_width: int
    width: int
    depth: int
    steps: int = 1000
    sampling_steps: str = "100"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        def dense(name: str, init: Callable = XAVIER) -> nn.Dense:
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=name)

        zeros = nn.initializers.zeros
        time_init = nn.initializers.normal(0.02)
        self.time_in = dense("time_embed_0", time_init)
        self.time_out = dense("time_embed_1", time_init)
        self.condition_embed = dense("condition_embed")
        self.noisy_embed = dense("noisy_embed")
        self.blocks = [
            DiffusionBlock(dtype=self.dtype, name=f"blocks_{i}") for i in range(self.depth)
        ]
        self.final_modulation = Modulation(vectors=2, kernel_init=zeros, dtype=self.dtype)
        self.output = nn.Dense(2 * self.code_width, kernel_init=zeros, dtype=jnp.float32)

    @property
    def training(self) -> Diffusion:
        """The process that training sees."""
        return Diffusion.training(self.steps)

    @property
    def sampling(self) -> Diffusion:
        """The process that samples are drawn by."""
        return Diffusion.respaced(self.steps, self.sampling_steps)

    def __call__(self, hidden: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """(noise estimate, variance coefficient), float32 [N, C] each.

        Args:
            hidden: [N, D].
            x: noisy codes [N, C].
            t: timesteps int32 [N], or [1] for all.
        """
        return self.denoise(self.condition_embed(hidden.astype(self.dtype)), x, t)

    def denoise(self, condition: Array, x: Array, t: Array) -> tuple[Array, Array]:
        """As `__call__` from embedded hidden states [N, width], which do not change with t."""
        time = self.time_in(timestep_features(t, TIME_FEATURES).astype(self.dtype))
        time = self.time_out(jax.nn.silu(time))  # [N or 1, width]
        y = (time + condition)[:, None]  # [N, 1, width]
        h = self.noisy_embed(x.astype(self.dtype))
        for block in self.blocks:
            h = block(h, y)
        shift, scale = (self.final_modulation(y)[:, 0, i] for i in range(2))
        h = layer_norm(h, epsilon=NORM_EPSILON) * (1 + scale) + shift
        estimate, coefficient = jnp.split(self.output(h), 2, axis=-1)
        return estimate, coefficient

    def embed(self, hidden: Array) -> Array:
        """The condition [N, width] of `denoise`."""
        return self.condition_embed(hidden.astype(self.dtype))

    def loss(self, hidden: Array, codes: Array, t: Array, noise: Array) -> tuple[Array, Array]:
        """(squared error of the noise, variational bound in bits), float32 [N] each.

        Args:
            hidden: [N, D].
            codes: clean [N, C].
            t: timesteps int32 [N] in [0, steps).
            noise: standard normal [N, C].
        """
        x = self.training.add_noise(codes, t, noise)
        return self.training.loss(codes, t, noise, *self(hidden, x, t))

    @nn.nowrap
    def draw(
        self,
        params: Any,
        hidden: Array,
        start: Array,
        noise: Array | Callable[[Array], Array],
        *,
        null: Array | None = None,
        scale: Array | float = 1.0,
        temperature: Array | float = 1.0,
    ) -> Array:
        """Codes float32 [N, C] of hidden states [N, D].

        Args:
            params: of this head.
            start, noise, temperature: see `Diffusion.sample`.
            null: hidden states [N, D] of the unconditional model, for guidance: the noise estimate
                becomes null + ``scale`` (cond - null), the variance stays the conditional one's.
        """
        apply: Any = functools.partial(self.apply, {"params": params})
        both = hidden if null is None else jnp.concatenate([hidden, null])
        condition = apply(both, method="embed")

        def predict(x: Array, t: Array) -> tuple[Array, Array]:
            if null is None:
                return apply(condition, x, t[None], method="denoise")
            doubled = jnp.concatenate([x, x])
            estimate, coefficient = apply(condition, doubled, t[None], method="denoise")
            cond, uncond = jnp.split(estimate, 2)
            return self.guide(cond, uncond, scale), coefficient[: len(x)]

        return self.sampling.sample(predict, start, noise, temperature)

    @staticmethod
    def guide(cond: Array, null: Array, scale: Array | float) -> Array:
        """Classifier-free guidance on noise estimates: null + scale * (cond - null)."""
        return null + scale * (cond - null)


class DiffusionBlock(nn.Module, kw_only=True):
    """x + gate * mlp(norm(x) * (1 + scale) + shift), the three vectors from the condition."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """x [N, W] and its condition [N, 1, W] -> [N, W]."""
        width = x.shape[-1]
        vectors = Modulation(
            vectors=3, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="modulation"
        )(condition)
        shift, scale, gate = (vectors[:, 0, i] for i in range(3))
        h = LayerNorm(epsilon=NORM_EPSILON, name="norm")(x) * (1 + scale) + shift
        h = MLP(
            hidden=width,
            activation="silu",
            gated=False,
            bias=True,
            kernel_init=XAVIER,
            out_init=XAVIER,
            dtype=self.dtype,
            name="mlp",
        )(h.astype(self.dtype))
        return x + gate * h
