"""The jitted programs of a run and where their arrays lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ar_jax.api import Objective, Params
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.parallel.mesh import batch_sharding, compiler_options, put_batch, replicated
from ar_jax.parallel.rules import path_name, shardings
from ar_jax.train.optimizer import Optimizer
from ar_jax.train.state import (
    TrainState,
    adversary_of,
    from_parts,
    init_state,
    sampling_params,
    to_parts,
)
from ar_jax.train.step import EvalStep, TrainStep, make_eval_step, make_train_step

Array = jax.Array
HostBatch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a run computes with; call it inside `ar_jax.parallel.mesh.use_mesh`.

    Attributes:
        key: the run's key, fold_in of which makes every other.
        abstract: the train state's shapes with their shardings.
        init: () -> state of a new run; or (params), which are donated, -> one that starts from
            them.
        train_step: (state, frozen, batch, key) -> (state, metrics); the state is donated.
        eval_step: (params, stats, frozen, batch, key, index) -> (means, rows).
        rows: sharding of a batch.
        quiet_until: step from which on the objective's adversary takes part; 0: there is none.
        quiet_step: ``train_step`` before that, without its cost; see `step_at`.
    """

    key: Array
    abstract: TrainState
    init: Callable[..., TrainState]
    train_step: TrainStep
    eval_step: EvalStep
    rows: NamedSharding
    quiet_until: int = 0
    quiet_step: TrainStep | None = None

    def step_at(self, step: int) -> TrainStep:
        """What takes a state of ``step`` completed steps on; compiled anew at ``quiet_until``."""
        if self.quiet_step is not None and step < self.quiet_until:
            return self.quiet_step
        return self.train_step


def build_program(
    objective: Objective,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    seed: int,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    ema_warmup: bool = True,
    adversary_optimizer: Optimizer | None = None,
    place: Callable[[Array, NamedSharding], Any] = jax.device_put,
) -> Program:
    """Compiles nothing yet; raises ValueError where a parameter does not fit the mesh.

    Args:
        adversary_optimizer: of the objective's adversary, where it has one.
        place: puts the key where the sharding says; a mesh of devices that are not here has no
            place for arrays.
    """

    def make_step(quiet: bool) -> TrainStep:
        return make_train_step(
            objective,
            optimizer,
            accumulation=accumulation,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            adversary_optimizer=adversary_optimizer,
            quiet=quiet,
        )

    adversary, step = adversary_of(objective), make_step(quiet=False)
    whole = replicated(mesh)
    key = place(jax.random.key(seed), whole)

    def init(params: Params | None = None) -> TrainState:
        return init_state(
            objective,
            optimizer,
            jax.random.key(seed),
            params,
            ema=ema_decay > 0,
            adversary_optimizer=adversary_optimizer,
        )

    shapes = jax.eval_shape(init)
    jax.eval_shape(optimizer.hold, shapes.params)  # raises where it cannot
    places = shardings(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    options = compiler_options(mesh)

    def jit_step(step: TrainStep) -> TrainStep:
        outputs = (places, whole)
        return jax.jit(step, donate_argnums=0, out_shardings=outputs, compiler_options=options)

    return Program(
        key=key,
        abstract=abstract,
        init=jax.jit(init, donate_argnums=0, out_shardings=places),
        train_step=jit_step(step),
        eval_step=jax.jit(make_eval_step(objective), out_shardings=whole, compiler_options=options),
        rows=batch_sharding(mesh),
        quiet_until=0 if adversary is None else adversary.start,
        quiet_step=None if adversary is None else jit_step(make_step(quiet=True)),
    )


def start_state(
    program: Program,
    checkpoints: Checkpoints,
    train_data: Any,
    initial: Params | None = None,
    *,
    skip_damaged: bool = False,
) -> TrainState:
    """The newest checkpoint's state, with ``train_data`` set to its place, or a new run's.

    Args:
        initial: parameters that a new run starts from; None: new ones.
        skip_damaged: see `ar_jax.io.run_checkpoints.Checkpoints.restore_newest`, whose errors this
            raises.
    """
    if not checkpoints.steps:
        return program.init(initial)
    abstract = to_parts(program.abstract)
    return from_parts(checkpoints.restore_newest(abstract, train_data, skip_damaged=skip_damaged))


def evaluate(
    program: Program, state: TrainState, frozen: Params, batches: Iterable[HostBatch]
) -> dict[str, float]:
    """Means of loss and metrics over all rows whose mask is 1, of the EMA if there is one.

    Raises:
        ValueError: there are no such rows.
    """
    params = sampling_params(state)
    results = [
        program.eval_step(
            params, state.stats, frozen, put_batch(batch, program.rows), program.key, index
        )
        for index, batch in enumerate(batches)
    ]
    fetched = jax.device_get(results)
    count = sum(float(rows) for _, rows in fetched)
    if not count:
        raise ValueError("evaluation needs at least one row: the test split gave none")
    return {
        name: sum(float(means[name]) * float(rows) for means, rows in fetched) / count
        for name in fetched[0][0]
    }


def describe_parameters(
    params: Params, optimizer: Optimizer
) -> list[tuple[str, jax.ShapeDtypeStruct, str]]:
    """(name, shape, decay or frozen and sharding) of every parameter, for the workdir's table."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        decay = "decay" if optimizer.decays(name, leaf.shape) else "no decay"
        decay = "frozen" if optimizer.freezes(name) else decay
        rows.append((name, leaf, f"{decay}, {leaf.sharding.spec}"))
    return rows
