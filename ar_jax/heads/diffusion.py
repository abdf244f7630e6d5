"""A small diffusion model of one continuous code given its hidden state (MAR, 2406.11838)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.adaptive_mlp import NORM_EPSILON, XAVIER, AdaptiveBlock, divided
from ar_jax.nn.diffusion import Diffusion, timestep_features
from ar_jax.nn.layers import layer_norm
from ar_jax.nn.modulation import Modulation

Array = jax.Array

TIME_FEATURES = 256


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

    # What evaluation reports of the loss, the sum of both.
    METRICS: ClassVar[dict[str, str]] = {
        "noise_error": "mean squared error of the head's estimate of unit-variance noise",
        "bound_bits": "variational bound of one step, bits per number of a code",
    }

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
            AdaptiveBlock(dtype=self.dtype, name=f"blocks_{i}") for i in range(self.depth)
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
        y = divided((time + condition)[:, None])  # [N, 1, width]
        h = self.noisy_embed(x.astype(self.dtype))
        for block in self.blocks:
            h = block(h, y)
        shift, scale = (self.final_modulation(y)[:, 0, i] for i in range(2))
        h = divided(layer_norm(h, epsilon=NORM_EPSILON) * (1 + scale) + shift)
        estimate, coefficient = jnp.split(self.output(h), 2, axis=-1)
        return estimate, coefficient

    def embed(self, hidden: Array) -> Array:
        """The condition [N, width] of `denoise`."""
        return self.condition_embed(hidden.astype(self.dtype))

    def loss(self, hidden: Array, codes: Array, draws: Any) -> tuple[Array, dict[str, Array]]:
        """(loss, what it is the sum of): squared error of the noise plus the bound, float32 [N].

        Args:
            hidden: [N, D].
            codes: clean [N, C].
            draws: see `draws`, with leaves [N, ...].
        """
        t, noise = draws["times"], draws["noise"]
        x = self.training.add_noise(codes, t, noise)
        error, bound = self.training.loss(codes, t, noise, *self(hidden, x, t))
        return error + bound, {"noise_error": error, "bound_bits": bound}

    @nn.nowrap
    def draws(self, keys: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        """What chance decides in losses of so many codes, from two keys.

        Timesteps int32 [*shape] in [0, steps) and standard normal noise [*shape, C].
        """
        return {
            "times": jax.random.randint(keys[0], shape, 0, self.steps),
            "noise": jax.random.normal(keys[1], (*shape, self.code_width)),
        }

    @nn.nowrap
    def noise(self, key: Array) -> dict[str, Array]:
        """What one code is drawn from: 'start' [C] and 'steps' [S, C], standard normal.

        'start' is where the process starts, 'steps' is of its S steps, the last of which takes
        none.
        """

        def normal(draw: Array | int) -> Array:
            return jax.random.normal(jax.random.fold_in(key, draw), (self.code_width,))

        steps = 1 + jnp.arange(len(self.sampling.timesteps))
        return {"start": normal(0), "steps": jax.vmap(normal)(steps)}

    @nn.nowrap
    def draw(
        self,
        params: Any,
        hidden: Array,
        noise: Any,
        *,
        null: Array | None = None,
        scale: Array | float = 1.0,
        temperature: Array | float = 1.0,
    ) -> Array:
        """Codes float32 [N, C] of hidden states [N, D].

        Args:
            params: of this head.
            noise: see `noise`, with leaves [N, ...].
            temperature: a factor on the noise of the steps.
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

        steps = noise["steps"].swapaxes(0, 1)
        return self.sampling.sample(predict, noise["start"], steps, temperature)

    @staticmethod
    def guide(cond: Array, null: Array, scale: Array | float) -> Array:
        """Classifier-free guidance on noise estimates: null + scale * (cond - null)."""
        return null + scale * (cond - null)
