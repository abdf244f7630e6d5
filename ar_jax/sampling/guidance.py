"""Strength of classifier-free guidance at every step (arXiv:2207.12598).

The head mixes ``null + scale_s (cond - null)``; 1 is the plain conditional distribution.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

KINDS = (
    *("constant", "linear", "linear_known", "linear_before", "linear_after", "linear_below"),
    *("linear_excess", "power_cosine", "steps"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """A guidance schedule over S steps, with r = s / (S - 1).

    Attributes:
        scale: w; 1 is no guidance.
        kind: 'constant': w. 'linear': b + (w - b) r. 'linear_known': b + (w - b) k_s, k_s the
            share of the codes that is known after step s, where one code counts as unknown to the
            end (MAR); 'linear_after' (ARPG): none does; 'linear_before' (RandAR): the share that
            is known before step s. 'power_cosine': 1 + (w - 1)
            (1 - cos(pi q^power)) / 2 with q = s / S, so that the last step stays below w (RAR);
            power 0 is constant. 'linear_excess': 1 + w r, VAR's convention, whose official cfg 1.5
            means 2.5 at the last scale. 'linear_below': 1 + (w - 1) q, q as above (TiTok, whose
            official scale w - 1 is what is added to 1). 'steps': those of ``steps``.
        begin: b, where 'linear', 'linear_known', 'linear_before' and 'linear_after' begin.
        power: exponent of 'power_cosine', >= 0.
        steps: of kind 'steps' the scale of every step, each >= 0; of others ().
        start, stop: guided steps, start <= s < stop (stop -1: the last one too); others use 1.
        layers: what is mixed: 0 what the head gives, -k the hidden states that leave the k-th block
            from the end, which then go on to be those of both conditions (Infinity); with 0 missing
            the head is asked for the conditional one alone.

    Raises:
        ValueError: names the field that is out of its range, its value, and the range.
    """

    scale: float = 1.0
    kind: str = "constant"
    begin: float = 1.0
    power: float = 1.0
    steps: tuple[float, ...] = ()
    start: int = 0
    stop: int = -1
    layers: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"sampling.guidance.kind is {self.kind!r}; it must be one of {KINDS}")
        for name, least in (("scale", 0), ("begin", 0), ("power", 0), ("start", 0), ("stop", -1)):
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"sampling.guidance.{name} is {value}; it must be >= {least}")
        if not all(scale >= 0 for scale in self.steps):
            raise ValueError(f"sampling.guidance.steps is {self.steps}; they must be >= 0")
        if bool(self.steps) != (self.kind == "steps"):
            raise ValueError(
                f"sampling.guidance.steps is {self.steps} and kind is {self.kind!r}: kind 'steps' "
                "takes a scale for every step, others none"
            )
        if not self.layers or max(self.layers) > 0:
            raise ValueError(
                f"sampling.guidance.layers is {self.layers}; it must be 0 (what the head gives) "
                "and numbers below it (blocks counted from the end), one at least"
            )

    def check_layers(self, depth: int) -> None:
        """Raises ValueError if a block is asked for that a model of mixable ``depth`` has not."""
        if min(self.layers) < -depth:
            mixable = f"the last {depth} blocks" if depth else "none of its blocks"
            raise ValueError(
                f"sampling.guidance.layers is {self.layers}, but what leaves {mixable} can be "
                "mixed by this system's sampler"
            )

    def scales(self, num_steps: int, known: np.ndarray | None = None) -> np.ndarray:
        """The scale of every step, float32 [S].

        ``known``, float [S], is `Schedule.known`; None: all steps are of one size.

        Raises:
            ValueError: ``start`` is none of the steps, so that nothing would be guided, or there
                are scales for another number of steps.
        """
        if self.start >= num_steps:
            raise ValueError(
                f"sampling.guidance.start is {self.start}, but the schedule has the steps 0 to "
                f"{num_steps - 1}: guidance would never begin"
            )
        steps = np.arange(num_steps)
        ratio, below = steps / max(num_steps - 1, 1), steps / num_steps
        if self.kind == "steps" and len(self.steps) != num_steps:
            raise ValueError(
                f"sampling.guidance.steps has {len(self.steps)} numbers; the schedule has "
                f"{num_steps} steps: give one for each"
            )
        if self.kind == "steps":
            scales = np.array(self.steps)
        elif self.kind == "constant":
            scales = np.full(num_steps, self.scale)
        elif self.kind == "linear":
            scales = self.begin + (self.scale - self.begin) * ratio
        elif self.kind in ("linear_known", "linear_before", "linear_after"):
            known = (steps + 1) / num_steps if known is None else known
            if self.kind == "linear_before":
                known = np.concatenate([[0.0], known[:-1]])
            elif self.kind == "linear_after":
                known = np.concatenate([known[:-1], [1.0]])
            scales = self.begin + (self.scale - self.begin) * known
        elif self.kind == "power_cosine":
            scales = 1 + (self.scale - 1) * (1 - np.cos(math.pi * below**self.power)) / 2
        elif self.kind == "linear_below":
            scales = 1 + (self.scale - 1) * below
        else:
            scales = 1 + self.scale * ratio
        stop = num_steps if self.stop < 0 else self.stop
        return np.where((steps >= self.start) & (steps < stop), scales, 1.0).astype(np.float32)


def mixed_layers(backbone: Any, guidance: Guidance | None) -> tuple[int, ...]:
    """`Guidance.layers`; ValueError where the backbone cannot mix what leaves one of the blocks."""
    guidance = guidance or Guidance()
    guidance.check_layers(getattr(backbone, "mixable", 0))
    return guidance.layers
