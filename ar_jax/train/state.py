"""Everything that a step changes and a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.api import Adversary, Objective, Params, Stats
from ar_jax.parallel.rules import path_name
from ar_jax.train.optimizer import Optimizer

Array = jax.Array

# Keys are fold_in(key(seed), n). Training steps use n = 0, 1, ...; these are out of their reach.
INIT = 2**32 - 1
EVALUATION = 2**32 - 2
ADVERSARY = 2**32 - 3


@flax.struct.dataclass
class TrainState:
    """The train state; there is no key in it, because step n's key is fold_in(key(seed), n).

    Attributes:
        step: int32, completed steps, skipped ones included.
        params: float32 dict tree.
        opt_state: of the optimiser.
        ema: float32 running mean of ``params``, or {} if it is off.
        stats: training state without gradient that belongs to the objective.
        bad_steps: int32, steps just now in a row of which an update was skipped as not finite.
        bad_total: int32, all of them.
        adversary: {'params', 'opt_state', 'stats'} of the objective's adversary; {} if it has none.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params
    stats: Stats
    bad_steps: Array
    bad_total: Array
    adversary: dict[str, Any] = dataclasses.field(default_factory=dict)


def adversary_of(objective: Objective) -> Adversary | None:
    """What the objective trains against."""
    return getattr(objective, "adversary", None)


def init_params(objective: Objective, key: Array) -> Params:
    """A new run's parameters, from the run's key.

    Raises:
        ValueError: names a parameter that is not float32.
    """
    params = objective.init(jax.random.fold_in(key, INIT))
    check_float32(params)
    return params


def check_float32(params: Params) -> None:
    """Raises ValueError that names a parameter that is not float32."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(f"parameter {path_name(path)} is {leaf.dtype}; it must be float32")


def init_state(
    objective: Objective,
    optimizer: Optimizer,
    key: Array,
    params: Params | None = None,
    *,
    ema: bool,
    adversary_optimizer: Optimizer | None = None,
) -> TrainState:
    """A new run's state, from the run's key; pure, for `jax.jit` and `jax.eval_shape`.

    Args:
        params: to start from; None: `init_params`.
        adversary_optimizer: of the objective's adversary, where it has one.
    """
    if params is None:
        params = init_params(objective, key)
    adversary, branch = adversary_of(objective), {}
    if adversary is not None:
        assert adversary_optimizer is not None
        rival, stats = adversary.init(jax.random.fold_in(key, ADVERSARY))
        check_float32(rival)
        moments = adversary_optimizer.transform.init(rival)
        branch = {"params": rival, "opt_state": moments, "stats": stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transform.init(params),
        # A copy: the step donates both.
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        stats=objective.init_stats(params),
        bad_steps=jnp.zeros((), jnp.int32),
        bad_total=jnp.zeros((), jnp.int32),
        adversary=branch,
    )


def sampling_params(state: TrainState) -> Params:
    """What evaluation and samples use: the EMA if there is one."""
    return state.ema or state.params


def to_parts(state: Any) -> dict[str, Any]:
    """The parts of a checkpoint; see `ar_jax.io.checkpoint`."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "stats": state.stats,
        "bad_steps": state.bad_steps,
        "bad_total": state.bad_total,
    }
    if state.adversary:
        rest["adversary"] = state.adversary
    return {"params": state.params, "ema": state.ema, "state": rest}


def from_parts(parts: dict[str, Any]) -> TrainState:
    """Undoes `to_parts`."""
    return TrainState(params=parts["params"], ema=parts["ema"], **parts["state"])
