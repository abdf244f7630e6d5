"""Flow matching on straight paths from codes to noise, and the samplers that go back.

x_t = (1 - t) x + t e: the codes x at t = 0, standard normal noise e at t = 1. A network learns the
velocity e - x (rectified flow, arXiv:2209.03003). Two ways from noise to codes have the same law at
every t: the differential equation dx = v dt, and with the score s = -((1 - t) v + x) / t of x_t the
stochastic one of diffusion w = 2 t,

    dx = (v - w s / 2) dt + sqrt(w) dW,    v - w s / 2 = v + (1 - t) v + x,

which is that of xAR (arXiv:2502.20388).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.nn.diffusion import timestep_features

Array = jax.Array
# (x [..., C], t a scalar, state) -> (velocity [..., C], state)
Velocity = Callable[[Array, Array, Any], tuple[Array, Any]]

SAMPLERS = ("euler", "euler_maruyama")
TIMES = 1000  # whole numbers that networks are told in place of t in [0, 1]
TIME_FEATURES = 256


def interpolate(codes: Array, noise: Array, t: Array | float) -> Array:
    """x_t of codes and standard normal noise, broadcast."""
    return (1.0 - t) * codes + t * noise


def time_index(t: Any) -> Array:
    """int32: t float32 as networks are told it, cut to a whole number of thousandths."""
    return (jnp.asarray(t, jnp.float32) * TIMES).astype(jnp.int32)


class TimeEmbedding(nn.Module, kw_only=True):
    """Vectors float32 [..., width] of `time_index` [...]: sinusoids through two linear layers."""

    width: int
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, index: Array) -> Array:
        def dense(name: str) -> nn.Dense:
            init = nn.initializers.normal(self.init_std)
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=name)

        features = timestep_features(index, TIME_FEATURES).astype(self.dtype)
        hidden = jax.nn.silu(dense("in_embed")(features))
        return dense("out_embed")(hidden).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """A way from noise to codes in so many evaluations of the velocity.

    Attributes:
        sampler: 'euler', the differential equation in equal intervals, or 'euler_maruyama', the
            stochastic one in equal intervals down to t = ``last`` and from there to 0 without
            noise.
        steps: evaluations.
        last: of 'euler_maruyama'.

    Raises:
        ValueError: names the field of config.head that is out of its range.
    """

    sampler: str
    steps: int
    last: float

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"head.sampler is {self.sampler!r}; it must be one of {SAMPLERS}")
        if self.steps < 1:
            raise ValueError(f"head.sampling_steps is {self.steps}; it must be at least 1")
        if self.stochastic and not 0 < self.last < 1:
            raise ValueError(f"head.last is {self.last}; it must lie between 0 and 1")

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.sampler == "euler_maruyama"

    @functools.cached_property
    def times(self) -> np.ndarray:
        """float64 [steps + 1], from 1 to 0: an evaluation at each but the last."""
        if self.stochastic:
            return np.append(np.linspace(1.0, self.last, self.steps), 0.0)
        return np.linspace(1.0, 0.0, self.steps + 1)

    def step(
        self, n: Array, x: Array, velocity: Array, noise: Array, temperature: Array | float
    ) -> Array:
        """x at the time after the n-th from x and the velocity there; noise standard normal."""
        times = self.times
        t = jnp.asarray(times[:-1].astype(np.float32))[n]
        dt = jnp.asarray(np.diff(times).astype(np.float32))[n]
        if not self.stochastic:
            return x + velocity * dt
        # Of the float64 times, and none in the last step.
        spread = np.sqrt(2.0 * times[:-1] * -np.diff(times)) * (
            np.arange(self.steps) + 1 < self.steps
        )
        drift = velocity + (1.0 - t) * velocity + x
        return x + drift * dt + jnp.asarray(spread.astype(np.float32))[n] * noise * temperature

    def sample(
        self,
        velocity: Velocity,
        start: Array,
        noise: Array | Callable[[Array], Array],
        state: Any = None,
        temperature: Array | float = 1.0,
        hold: Callable[[Array, Array], Array] = lambda x, t: x,
    ) -> tuple[Array, Any]:
        """(codes, state) from ``start`` [..., C].

        Args:
            velocity: the network. It is told t in float32, and carries a state along.
            noise: standard normal [steps, ..., C] in order of use, the last unused; or a function
                of the number of the step. Of 'euler' none is used.
            temperature: factor on the noise of the steps, not on ``start``.
            hold: of (x, t): what becomes of x at every time before the velocity is asked for.
        """
        times = jnp.asarray(self.times.astype(np.float32))

        def body(carry: tuple[Array, Any], n: Array) -> tuple[tuple[Array, Any], None]:
            x, state = carry
            x = hold(x, times[n])
            found, state = velocity(x, times[n], state)
            if not self.stochastic:
                drawn = jnp.zeros_like(x)
            else:
                drawn = noise(n) if callable(noise) else noise[n]
            return (self.step(n, x, found, drawn, temperature), state), None

        return jax.lax.scan(body, (start, state), jnp.arange(self.steps))[0]
