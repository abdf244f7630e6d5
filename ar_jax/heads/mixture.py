"""A mixture of Gaussians for one continuous code (GIVT, arXiv:2312.02116): it has a density."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array

MIN_STD = 1e-3


class Mixture(NamedTuple):
    """Of N rows: K Gaussians of diagonal covariance over C numbers."""

    log_weights: Array  # [N, K]
    mean: Array  # [N, K, C]
    std: Array  # [N, K, C]

    def log_prob(self, x: Array) -> Array:
        """The log-density in nats of M points for every row, [N, M, C] -> [N, M]."""
        mean, std = self.mean[:, None], self.std[:, None]  # [N, 1, K, C]
        squares = jnp.square((x[:, :, None] - mean) / std).sum(-1)  # [N, M, K]
        norm = jnp.log(std).sum(-1) + 0.5 * x.shape[-1] * math.log(2 * math.pi)
        parts = self.log_weights[:, None] - 0.5 * squares - norm
        return jax.nn.logsumexp(parts, axis=-1)

    def draw(self, gumbel: Array, normal: Array, temperature: Array | float) -> Array:
        """M points for every row from [N, M, K] and [N, M, C] -> [N, M, C].

        The temperature is a factor on standard deviations; which Gaussian it is stays exact.
        """
        chosen = jnp.argmax(self.log_weights[:, None] + gumbel, axis=-1)[..., None]  # [N, M, 1]
        mean, std = (jnp.take_along_axis(x, chosen, axis=1) for x in (self.mean, self.std))
        return mean + temperature * std * normal


class MixtureHead(nn.Module, kw_only=True):
    """p(code | hidden) = sum_k w_k N(mean_k, std_k^2), all by one linear layer; trained by it.

    Guidance resamples, as ArINAR does: of M candidates that the conditional model draws
    one is chosen in proportion to (p_cond / p_null)^(scale - 1), which for large M is a draw from
    p_cond (p_cond / p_null)^(scale - 1), and never one that the conditional model would not draw.

    Attributes:
        code_width: C, numbers in a code.
        components: K.
        candidates: M.
        init_std: of the linear layer's kernel; means start around normal ones.
    """

    # What evaluation reports of the loss.
    METRICS: ClassVar[dict[str, str]] = {
        "nll": "negative log-likelihood of a hidden code given the known ones, nats",
    }

    code_width: int
    components: int = 16
    candidates: int = 64
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array) -> Mixture:
        """The law of a code for every row of hidden [N, D], float32."""
        count, width = self.components, self.code_width

        def start(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            """Means apart from each other: Gaussians that are equal would stay so."""
            rest = jnp.zeros(count + count * width, dtype)
            return jnp.concatenate([jax.random.normal(key, (count * width,), dtype), rest])

        out = nn.Dense(
            count * (1 + 2 * width),
            kernel_init=nn.initializers.normal(self.init_std),
            bias_init=start,
            dtype=jnp.float32,
            name="output",
        )(hidden)
        mean, std, weights = jnp.split(out, (count * width, 2 * count * width), axis=-1)
        shape = (-1, count, width)
        return Mixture(
            log_weights=jax.nn.log_softmax(weights),
            mean=mean.reshape(shape),
            std=jax.nn.softplus(std.reshape(shape)) + MIN_STD,
        )

    def log_prob(self, hidden: Array, codes: Array) -> Array:
        """Log-densities in nats float32 [N] of codes [N, C] given hidden states [N, D]."""
        return self(hidden).log_prob(codes[:, None])[:, 0]

    def loss(self, hidden: Array, codes: Array, draws: Any) -> tuple[Array, dict[str, Array]]:
        """(negative log-likelihood in nats, `METRICS`), float32 [N] each; nothing is drawn."""
        nll = -self.log_prob(hidden, codes)
        return nll, {"nll": nll}

    @nn.nowrap
    def draws(self, keys: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        """Chance has no part in the loss."""
        return {}

    @nn.nowrap
    def noise(self, key: Array) -> dict[str, Array]:
        """What one code is drawn from: 'component' [M, K] and 'choice' [M], Gumbel's, and 'normal'
        [M, C]; without guidance the first candidate is the draw."""
        component, choice, normal = jax.random.split(key, 3)
        return {
            "component": jax.random.gumbel(component, (self.candidates, self.components)),
            "choice": jax.random.gumbel(choice, (self.candidates,)),
            "normal": jax.random.normal(normal, (self.candidates, self.code_width)),
        }

    @nn.nowrap
    def draw(
        self,
        params: Any,
        hidden: Array,
        noise: dict[str, Array],
        *,
        null: Array | None = None,
        scale: Array | float = 1.0,
        temperature: Array | float = 1.0,
    ) -> Array:
        """Codes float32 [N, C] of hidden states [N, D].

        Args:
            params: of this head.
            noise: see `noise`, with leaves [N, ...].
            null: hidden states [N, D] of the unconditional model, for guidance by ``scale``.
            temperature: a factor on the standard deviations of what is drawn.
        """
        apply: Any = functools.partial(self.apply, {"params": params})
        law = apply(hidden)
        count = 1 if null is None else self.candidates
        drawn = law.draw(noise["component"][:, :count], noise["normal"][:, :count], temperature)
        if null is None:
            return drawn[:, 0]
        ratio = law.log_prob(drawn) - apply(null).log_prob(drawn)  # [N, M]
        chosen = jnp.argmax((scale - 1) * ratio + noise["choice"], axis=1)
        return jnp.take_along_axis(drawn, chosen[:, None, None], axis=1)[:, 0]
