"""The contracts between the parts of a system, and the small pytrees that travel between them.

Axis letters: B batch, L code positions, S steps, T sequence with condition rows, D width, H heads,
K head width, V vocabulary, C channels, h x w the latent grid.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Protocol

import flax.struct
import jax

from ar_jax.schedules import Schedule

Array = jax.Array
Params = Any  # plain dict pytree of float32 arrays
Stats = Any  # pytree of non-gradient training state
Batch = dict[str, Array]
Cond = dict[str, Array]


@flax.struct.dataclass
class Cache:
    """Keys and values of the rows seen so far, one array a layer (samplers unroll the layers).

    A tuple instead of a stacked array because a decode step that updates one slice of a stacked
    cache makes XLA copy the others; head after head because products over one head's rows would
    else copy them all.
    """

    k: tuple[Array, ...]  # each [B, H, T, K]
    v: tuple[Array, ...]  # each [B, H, T, K]


@flax.struct.dataclass
class Samples:
    """What a sampler returns."""

    codes: Array  # int32 [B, L], int8 [B, L, bits] or float32 [B, L, C]
    images: Array  # float32 [B, H, W, C] in [-1, 1]
    # int32 [B, L], the positions in the order in which they were drawn; None: as they are stored.
    order: Array | None = None
    # int32 [B], how often the model was called for each image; None: as often as there are steps.
    calls: Array | None = None


@flax.struct.dataclass
class Aux:
    """What a loss returns beside its scalar.

    Attributes:
        metrics: float32 scalars, means over the batch.
        sums: pytree that is added over microbatches (code counts and the like).
        last: pytree of which the last microbatch's value is kept.
        judged: (real, fake) images float32 [B, H, W, C] in [-1, 1], in training with an adversary.
    """

    metrics: dict[str, Array]
    sums: Any = dataclasses.field(default_factory=dict)
    last: Any = dataclasses.field(default_factory=dict)
    judged: tuple[Array, Array] | None = None


class Adversary(Protocol):
    """A network that learns to tell what an objective makes from what is real, against it.

    The train state has a branch for its parameters, optimiser and statistics. It takes part after
    ``start`` completed steps. ``adaptive`` says whether `balance` scales its weight.
    """

    start: int
    adaptive: bool

    def init(self, key: Array) -> tuple[Params, Stats]:
        """Float32 parameters and statistics without gradient, of which float32 means are taken."""
        ...

    def weight_at(self, step: Array | int) -> Array:
        """Of `deceive` in the objective's total after so many completed steps, float32."""
        ...

    def deceive(self, params: Params, stats: Stats, fake: Array) -> tuple[Array, Stats]:
        """(loss of what made ``fake``, statistics)."""
        ...

    def judge(
        self, params: Params, stats: Stats, real: Array, fake: Array
    ) -> tuple[Array, tuple[Stats, dict[str, Array]]]:
        """(its own loss, (statistics, metrics))."""
        ...

    def balance(self, plain: Array, adverse: Array) -> Array:
        """Factor of the weight, from the last layer's gradients of both losses."""
        ...


class Objective(Protocol):
    """What training minimises. Implementations are frozen dataclasses that hold Linen modules.

    One that trains against an `Adversary` has it as its attribute ``adversary``, gives ``judged``
    in training, and names in ``last_layer`` ('a/b/c') the parameter that makes the images last.
    """

    def init(self, key: Array) -> Params:
        """Float32 parameters; pure, so that ``jax.eval_shape`` and ``jax.jit`` take it."""
        ...

    def init_stats(self, params: Params) -> Stats:
        """Training state without gradient (codebook statistics); ``{}`` if there is none."""
        ...

    def loss(
        self,
        params: Params,
        stats: Stats,
        frozen: Params,
        batch: Batch,
        key: Array,
        train: bool,
        step: Array | int = 0,
    ) -> tuple[Array, Aux]:
        """Scalar loss and what goes with it.

        ``batch`` holds ``image`` uint8 [B, H, W, C] or ``codes`` int32 [B, L] (of bits int8
        [B, L, bits]), ``label`` int32 [B], and in evaluation ``mask`` float32 [B], 0 for padding
        rows. ``frozen`` are parameters that are not trained (the tokenizer of a generator).
        ``step``, int32, counts the completed training steps, for what changes during training;
        evaluation does not depend on it.
        """
        ...

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        """Once a step, after the optimiser's update: EMA codebooks, restart of dead codes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A generator: one choice on every axis. Hashable, hence a static argument of jitted code.

    Parameters of a system are ``{'tokenizer': ..., 'backbone': ..., 'head': ...}``.

    Attributes:
        tokenizer, backbone, head: Linen modules of whatever class the config names.
        schedule: the order of generation.
    """

    tokenizer: Any
    schedule: Schedule
    backbone: Any
    head: Any


def matches_any(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regular expressions is found in the 'a/b/c' path of a parameter."""
    return any(re.search(pattern, path) for pattern in patterns)


def weighted_mean(values: Array, mask: Array | None) -> Array:
    """Mean over the batch axis of ``values`` [B, ...] with weights ``mask`` [B]; scalar."""
    if mask is None:
        return values.mean()
    weights = mask.reshape(mask.shape + (1,) * (values.ndim - 1))
    count = mask.sum() * (values.size / values.shape[0])
    return (values * weights).sum() / count.clip(min=1e-9)
