"""A generator of one continuous code, trained by an energy score (EAR, arXiv:2505.07812)."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.adaptive_mlp import NORM_EPSILON, XAVIER, AdaptiveBlock, divided
from ar_jax.nn.layers import layer_norm
from ar_jax.nn.modulation import Modulation

Array = jax.Array


class EnergyHead(nn.Module, kw_only=True):
    """Code = network(hidden, noise) in one pass: no likelihood, no steps.

    The hidden state is the stream of residual MLP blocks whose norms the noise shifts, scales and
    gates. Of two samples s and t of a code y the loss is |s - y|^a + |t - y|^a - |s - t|^a, whose
    mean is least where samples have the law of the codes (Gneiting & Raftery, 2007), and there
    alone for 0 < a < 2. Guidance mixes hidden states.

    Attributes:
        code_width: C, numbers in a code.
        width, depth: of the residual blocks.
        noise_width: numbers of the noise, uniform in [-0.5, 0.5).
        alpha: a, the exponent of the distances.
        train_temperature: a factor on |s - t|^a; below 1 samples keep closer together than the
            codes do.
    """

    # What evaluation reports of the loss: twice the first, minus train_temperature of the second.
    METRICS: ClassVar[dict[str, str]] = {
        "distance": "mean distance of samples to their codes, to the power alpha",
        "spread": "mean distance of two samples of a code to each other, to the power alpha",
    }

    code_width: int
    width: int
    depth: int
    noise_width: int = 64
    alpha: float = 1.0
    train_temperature: float = 1.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        def dense(name: str) -> nn.Dense:
            return nn.Dense(self.width, kernel_init=XAVIER, dtype=self.dtype, name=name)

        zeros = nn.initializers.zeros
        self.condition_embed = dense("condition_embed")
        self.noise_embed = dense("noise_embed")
        self.blocks = [
            AdaptiveBlock(dtype=self.dtype, name=f"blocks_{i}") for i in range(self.depth)
        ]
        self.final_modulation = Modulation(vectors=2, kernel_init=zeros, dtype=self.dtype)
        self.output = nn.Dense(self.code_width, kernel_init=zeros, dtype=jnp.float32)

    def __call__(self, hidden: Array, noise: Array, temperature: Array | float = 1.0) -> Array:
        """Codes float32 [N, C].

        Args:
            hidden: [N, D].
            noise: [N, noise_width].
            temperature: of sampling: a factor on the shifts of the blocks.
        """
        h = self.condition_embed(hidden.astype(self.dtype))
        y = self.noise_embed(noise.astype(self.dtype))[:, None]  # [N, 1, width]
        for block in self.blocks:
            h = block(h, y, temperature)
        shift, scale = (self.final_modulation(y)[:, 0, i] for i in range(2))
        h = divided(layer_norm(h, epsilon=NORM_EPSILON) * (1 + scale) + shift)
        return self.output(h)

    def loss(self, hidden: Array, codes: Array, draws: Any) -> tuple[Array, dict[str, Array]]:
        """(energy loss, `METRICS`), float32 [N] each.

        Args:
            hidden: [N, D].
            codes: [N, C].
            draws: see `draws`, [N, 2, noise_width].
        """
        first, second = (self(hidden, draws[:, i]) for i in range(2))
        near = self.distance(first, codes) + self.distance(second, codes)
        spread = self.distance(first, second)
        metrics = {"distance": near / 2, "spread": spread}
        return near - self.train_temperature * spread, metrics

    def distance(self, a: Array, b: Array) -> Array:
        """|a - b|^alpha of rows [N, C], float32 [N]; without gradient where they are equal."""
        squared = jnp.square(a - b).sum(-1)
        apart = squared > 0
        length = jnp.sqrt(jnp.where(apart, squared, 1.0))
        return jnp.where(apart, length if self.alpha == 1 else length**self.alpha, 0.0)

    @nn.nowrap
    def draws(self, keys: Array, shape: tuple[int, ...]) -> Array:
        """The noise of two samples of so many codes, [*shape, 2, noise_width], from two keys."""
        return _uniform(keys[0], (*shape, 2, self.noise_width))

    @nn.nowrap
    def noise(self, key: Array) -> Array:
        """What one code is drawn from, [noise_width]."""
        return _uniform(key, (self.noise_width,))

    @nn.nowrap
    def draw(
        self,
        params: Any,
        hidden: Array,
        noise: Array,
        *,
        null: Array | None = None,
        scale: Array | float = 1.0,
        temperature: Array | float = 1.0,
    ) -> Array:
        """Codes float32 [N, C] of hidden states [N, D].

        Args:
            params: of this head.
            noise: see `noise`, [N, noise_width].
            null: hidden states [N, D] of the unconditional model, to be guided away from.
            temperature: see `__call__`.
        """
        apply: Any = functools.partial(self.apply, {"params": params})
        guided = hidden if null is None else self.guide(hidden, null, scale)
        return apply(guided, noise, temperature)

    @staticmethod
    def guide(cond: Array, null: Array, scale: Array | float) -> Array:
        """Classifier-free guidance on hidden states: scale * cond + (1 - scale) * null."""
        return scale * cond + (1 - scale) * null


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
