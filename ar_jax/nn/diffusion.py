"""Gaussian diffusion: schedule, respacing, learned-variance loss and ancestral sampling.

Denoising diffusion with a noise prediction and a learned variance (arXiv:2006.11239, 2102.09672),
as MAR uses it for one token (arXiv:2406.11838). Tables are float64 numpy, cast to float32 where
they meet an array. Arrays are [..., C]; timesteps and step indices [...].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# (x [..., C], original timestep, a scalar) -> (noise estimate, variance coefficient), [..., C] each
Predict = Callable[[Array, Array], tuple[Array, Array]]


def cosine_betas(steps: int, largest: float = 0.999) -> np.ndarray:
    """Variances added at every step, float64 [steps], for alpha-bar = cos^2 (arXiv:2102.09672)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), largest) for i in range(steps)]
    )


def respace(steps: int, spacing: str) -> tuple[int, ...]:
    """Timesteps that sampling keeps, ascending.

    Args:
        steps: of training.
        spacing: 'n': n steps from the first to the last, a fractional stride apart, halves rounded
            to even; 'a,b,c': as many in equal sections; 'ddimN': N at the smallest integer stride
            that gives exactly N.

    Raises:
        ValueError: no such spacing, or a section smaller than its count.
    """
    if spacing.startswith("ddim"):
        count = _count(spacing[4:], spacing)
        for whole in range(1, steps):
            if len(range(0, steps, whole)) == count:
                return tuple(range(0, steps, whole))
        raise ValueError(f"spacing {spacing!r}: no integer stride over {steps} steps gives {count}")
    counts = [_count(part, spacing) for part in spacing.split(",")]
    size, left_over = divmod(steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < left_over)
        if count > length:
            raise ValueError(
                f"spacing {spacing!r} wants {count} steps of a section of {length} ({steps} in all)"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0  # accumulated, not multiplied: the rounding of halves depends on it
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return tuple(sorted(set(kept)))


def _count(text: str, spacing: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"spacing {spacing!r} must be as '100', '10,10,20' or 'ddim50'")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """A process of S steps: training's, or a respaced one with the kept steps' marginals.

    Attributes:
        steps: of training.
        timesteps: the original timestep of every step, ascending; they tell the network the time.
    """

    steps: int
    timesteps: tuple[int, ...]

    @classmethod
    def training(cls, steps: int = 1000) -> Diffusion:
        """All steps."""
        return cls(steps, tuple(range(steps)))

    @classmethod
    def respaced(cls, steps: int, spacing: str) -> Diffusion:
        """See `respace`."""
        return cls(steps, respace(steps, spacing))

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """float64 [S]; those whose products are the original alpha-bars at the kept steps."""
        kept = np.cumprod(1.0 - cosine_betas(self.steps))[list(self.timesteps)]
        return 1.0 - kept / np.append(1.0, kept[:-1])

    @functools.cached_property
    def alpha_bars(self) -> np.ndarray:
        """Products of 1 - beta, float64 [S]."""
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def _before(self) -> np.ndarray:
        return np.append(1.0, self.alpha_bars[:-1])

    @functools.cached_property
    def posterior_variance(self) -> np.ndarray:
        """Of q(x_{t-1} | x_t, x_0), float64 [S]; 0 at the first step."""
        return self.betas * (1.0 - self._before) / (1.0 - self.alpha_bars)

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; the first step has the second's."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1:2] if len(variance) > 1 else self.betas, variance[1:]))

    def add_noise(self, x_0: Array, t: Array, noise: Array) -> Array:
        """x_t of clean x_0, step t and standard normal noise."""
        bars = self.alpha_bars
        return _at(np.sqrt(bars), t) * x_0 + _at(np.sqrt(1.0 - bars), t) * noise

    def clean(self, x_t: Array, t: Array, noise: Array) -> Array:
        """x_0 for an estimate of the noise."""
        bars = self.alpha_bars
        return _at(np.sqrt(1.0 / bars), t) * x_t - _at(np.sqrt(1.0 / bars - 1), t) * noise

    def posterior_mean(self, x_0: Array, x_t: Array, t: Array) -> Array:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        bars = self.alpha_bars
        first = self.betas * np.sqrt(self._before) / (1.0 - bars)
        second = (1.0 - self._before) * np.sqrt(1.0 - self.betas) / (1.0 - bars)
        return _at(first, t) * x_0 + _at(second, t) * x_t

    def log_variance(self, coefficient: Array, t: Array) -> Array:
        """Between the posterior's (coefficient -1) and beta (1), in the logarithm."""
        fraction = (coefficient + 1) / 2
        largest = _at(np.log(self.betas), t)
        return fraction * largest + (1 - fraction) * _at(self.posterior_log_variance, t)

    def step(self, x_t: Array, t: Array, noise: Array, coefficient: Array) -> Step:
        """p(x_{t-1} | x_t) for a noise estimate and a variance coefficient."""
        x_0 = self.clean(x_t, t, noise)
        return Step(self.posterior_mean(x_0, x_t, t), self.log_variance(coefficient, t), x_0)

    def loss(
        self, x_0: Array, t: Array, noise: Array, estimate: Array, coefficient: Array
    ) -> tuple[Array, Array]:
        """(squared error of the noise estimate, variational bound in bits), means over C: [...].

        The bound is step t's: its gradient reaches the variance only. At step 0 it is the code
        length of x_0 in bins of 1/255 half-width, else the divergence of the two posteriors.
        """
        error = jnp.square(estimate - noise).mean(-1)
        x_t = self.add_noise(x_0, t, noise)
        step = self.step(x_t, t, jax.lax.stop_gradient(estimate), coefficient)
        true_mean = self.posterior_mean(x_0, x_t, t)
        true_log_variance = _at(self.posterior_log_variance, t)
        divergence = normal_kl(true_mean, true_log_variance, step.mean, step.log_variance)
        length = -binned_log_likelihood(x_0, step.mean, 0.5 * step.log_variance)
        bound = jnp.where(t[..., None] == 0, length, divergence).mean(-1) / math.log(2.0)
        return error, bound

    def sample(
        self,
        predict: Predict,
        start: Array,
        noise: Array | Callable[[Array], Array],
        temperature: Array | float = 1.0,
    ) -> Array:
        """Ancestral sampling from x_T = ``start`` [..., C] to x_0.

        Args:
            predict: the network, told the original timestep.
            noise: standard normal [S, ..., C] in order of use, the last unused; or a function of
                the number n of the step (0 first, a traced integer).
            temperature: factor on the noise of the steps, not on ``start``.
        """
        count = len(self.timesteps)
        times = jnp.asarray(self.timesteps, jnp.int32)

        def body(x: Array, n: Array) -> tuple[Array, None]:
            t = count - 1 - n
            # The same step for all rows, in their rank.
            step = self.step(x, jnp.broadcast_to(t, (1,) * (x.ndim - 1)), *predict(x, times[t]))
            drawn = noise(n) if callable(noise) else noise[n]
            spread = jnp.exp(0.5 * step.log_variance) * drawn * temperature
            return step.mean + jnp.where(t > 0, spread, 0.0), None

        return jax.lax.scan(body, start, jnp.arange(count))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """p(x_{t-1} | x_t), and the clean x_0 it is about."""

    mean: Array
    log_variance: Array
    clean: Array


def normal_kl(mean: Array, log_variance: Array, mean_2: Array, log_variance_2: Array) -> Array:
    """KL divergence of two normals, nats, elementwise."""
    return 0.5 * (
        log_variance_2
        - log_variance
        - 1.0
        + jnp.exp(log_variance - log_variance_2)
        + jnp.square(mean - mean_2) * jnp.exp(-log_variance_2)
    )


def binned_log_likelihood(x: Array, mean: Array, log_std: Array) -> Array:
    """log of a normal's mass in [x - 1/255, x + 1/255], nats; the outer bins reach to infinity.

    The normal distribution function is the tanh approximation, as in the official code.
    """

    def distribution(z: Array) -> Array:
        return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse = x - mean, jnp.exp(-log_std)
    upper = distribution(inverse * (centred + 1.0 / 255.0))
    lower = distribution(inverse * (centred - 1.0 / 255.0))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def timestep_features(t: Array, width: int) -> Array:
    """Cosines, then sines, of t at ``width`` / 2 frequencies from 1 down to 1 / 10,000."""
    half = width // 2
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = jnp.expand_dims(jnp.exp(exponents), tuple(range(t.ndim)))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _at(table: np.ndarray, t: Array) -> Array:
    """float32 [..., 1] of a float64 table at indices t [...]."""
    return jnp.asarray(table.astype(np.float32))[t][..., None]
