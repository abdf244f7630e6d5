"""Toy systems whose joint distribution is enumerated, and the chi-square test against it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ar_jax.api import System
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.sampling import loop
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys

V, DRAWS, BATCH, LABEL = 4, 40_000, 8_000, 1
KNOBS = Knobs(temperature=1.5, top_k=3, top_p=0.8)
FLATTEN = 0.5
SETTINGS = {
    "plain": (Knobs(), Guidance()),
    "guided and filtered": (KNOBS, Guidance(scale=2.0, kind="linear_excess")),
}


@dataclasses.dataclass(frozen=True)
class Toy:
    """A system whose images can be counted: V^L of them.

    Attributes:
        order: the cell of every draw; None: the schedule's own order.
    """

    system: System
    params: Any
    order: tuple[int, ...] | None = None

    @functools.cached_property
    def images(self) -> np.ndarray:
        """All code sequences [V^L, L]."""
        length = self.system.schedule.length
        return np.array(list(itertools.product(range(V), repeat=length)), np.int32)

    @functools.cached_property
    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Conditional and null, each float64 [V^L, L, V]."""
        cond = {"label": jnp.full(len(self.images), LABEL)}
        run = jax.jit(functools.partial(teacher_forced, self.system, self.params))
        pair = (cond, self.system.backbone.conditioner.null(cond))
        orders = self.orders(len(self.images))
        given, null = (np.asarray(run(c, self.sequences, orders), np.float64) for c in pair)
        return given, null

    @property
    def sequences(self) -> np.ndarray:
        """The images' codes as they are drawn, [V^L, L]."""
        return self.images if self.order is None else self.images[:, list(self.order)]

    def orders(self, count: int) -> jax.Array | None:
        """The order of ``count`` images."""
        if self.order is None:
            return None
        return jnp.broadcast_to(jnp.asarray(self.order, jnp.int32), (count, len(self.order)))

    def joint(self, knobs: Knobs, guidance: Guidance) -> np.ndarray:
        """Probability of every image, float64 [V^L]."""
        scales = guidance.scales(self.system.schedule.num_steps)
        scale = scales[self.system.schedule.step_id][None, :, None]
        given, null = self.logits
        x = (null + scale * (given - null)) / float(knobs.temperature)
        order = np.argsort(-x, axis=-1)
        rank = np.argsort(order, axis=-1)
        if knobs.top_k:
            x = np.where(rank < knobs.top_k, x, -np.inf)
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if knobs.top_p:
            larger = np.cumsum(np.take_along_axis(p, order, -1), -1)
            larger = np.take_along_axis(larger, rank, -1) - p
            p = np.where(larger <= knobs.top_p, p, 0.0)
            p /= p.sum(-1, keepdims=True)
        return np.take_along_axis(p, self.sequences[..., None], -1)[..., 0].prod(-1)

    def counts(self, knobs: Knobs, guidance: Guidance, seed: int = 0, noise: Any = None):
        """How often each image was drawn, [V^L]."""
        sampler = CachedSampler.create(self.system, self.params)
        cond = {"label": jnp.full(BATCH, LABEL)}
        weights = V ** np.arange(self.system.schedule.length - 1, -1, -1)
        counts = np.zeros(len(self.images))
        for first in range(0, DRAWS, BATCH):
            keys = image_keys(seed, first, BATCH)
            codes = loop.draw_codes(
                sampler.system,
                sampler.params,
                cond,
                keys,
                knobs.as_arrays(),
                jnp.asarray(guidance.scales(self.system.schedule.num_steps)),
                None if noise is None else noise(keys),
                self.orders(BATCH),
                guided=guidance.scale != 1,
            )
            counts += np.bincount(np.asarray(codes) @ weights, minlength=len(counts))
        return counts


def p_value(counts: np.ndarray, joint: np.ndarray) -> float:
    """Of the chi-square test; images expected less than five times are one bin."""
    expected = joint * counts.sum()
    rare = expected < 5
    bins = [np.append(a[~rare], a[rare].sum()) for a in (counts, expected)]
    if bins[1][-1] == 0:
        if bins[0][-1]:
            return 0.0  # drawn, though impossible
        bins = [a[:-1] for a in bins]
    statistic = (np.square(bins[0] - bins[1]) / np.maximum(bins[1], 1e-9)).sum()
    return float(stats.chi2.sf(statistic, len(bins[0]) - 1))
