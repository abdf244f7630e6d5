"""One training step and one evaluation step, for every objective.

A step: gradients of the mean loss over the global batch (in microbatches, if asked), clipping and
update, the objective's own `finish` (EMA codebooks), the running mean of the parameters. If loss or
gradient is not finite the whole step is undone and counted; it is undone, too, where the optimiser
does not take it. An objective's adversary is updated in
the same step, by what it said of the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ar_jax.api import Aux, Batch, Objective, Params
from ar_jax.train.adversarial import accumulate_both, update_adversary
from ar_jax.train.microbatches import Parts, over_microbatches
from ar_jax.train.optimizer import Optimizer
from ar_jax.train.state import EVALUATION, TrainState, adversary_of

Array = jax.Array
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Params, Batch, Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Any, Params, Batch, Array, Array | int], tuple[Metrics, Array]]


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    ema_warmup: bool = True,
    adversary_optimizer: Optimizer | None = None,
    quiet: bool = False,
) -> TrainStep:
    """The pure function (state, frozen, batch, key) -> (state, metrics), to be jitted.

    Args:
        accumulation: microbatches; gradients, metrics and sums are float32 means (sums) over them.
        ema_decay: of the running mean of the parameters, 0 for none; with ``ema_warmup`` it is
            min(decay, (1 + step) / (10 + step)), so that early means forget the initial values.
        adversary_optimizer: of the objective's adversary, where it has one.
        quiet: for steps before the adversary's start: the same, but nothing of it is computed.

    ``key`` is the run's key: step n uses fold_in(key, n), microbatch i of it fold_in(that, i), and
    `finish` fold_in(that, accumulation).

    Raises:
        ValueError: the objective has an adversary, and that no optimiser.
    """
    adversary = None if quiet else adversary_of(objective)
    if adversary is not None and adversary_optimizer is None:
        raise ValueError(
            "config.discriminator_optimizer is missing: config.objective.adversarial.weight is "
            "not 0, so that a discriminator is trained too"
        )

    def train_step(
        state: TrainState, frozen: Params, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        accumulated = (state, frozen, batch, step_key, accumulation, optimizer.hold)
        if adversary is None:
            loss, grads, aux = accumulate(objective, *accumulated)
            verdict = None
        else:
            loss, grads, aux, verdict = accumulate_both(objective, adversary, *accumulated)
        with jax.named_scope("optimizer"):  # for `ar_jax.compilation.phases`
            grad_norm = optax.tree.norm(grads)
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            taken = optimizer.takes(grads, state.step)

            updates, opt_state = optimizer.transform.update(
                grads, state.opt_state, state.params, step=state.step
            )
            params = optax.apply_updates(state.params, updates)
            finish_key = jax.random.fold_in(step_key, accumulation)
            params, stats = objective.finish(params, state.stats, aux.sums, aux.last, finish_key)
            ema = state.ema
            if ema_decay:
                decay = ema_rate(state.step, ema_decay, ema_warmup)
                mean = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
                ema = optimizer.where_frozen(ema, lambda old, _: old, mean)

            new = (params, opt_state, ema, stats)
            old = (state.params, state.opt_state, state.ema, state.stats)
            params, opt_state, ema, stats = jax.tree.map(
                lambda after, before: jnp.where(finite & taken, after, before), new, old
            )
            # What is bad for the one need not be for the other: each is undone by itself.
            sound, branch = finite, state.adversary
            if verdict is not None:
                assert adversary_optimizer is not None
                branch, well = update_adversary(adversary_optimizer, branch, verdict, state.step)
                sound = finite & well
            state = TrainState(
                step=state.step + 1,
                params=params,
                opt_state=opt_state,
                ema=ema,
                stats=stats,
                bad_steps=jnp.where(sound, 0, state.bad_steps + 1),
                bad_total=state.bad_total + jnp.where(sound, 0, 1),
                adversary=branch,
            )
            metrics = {
                "loss": loss,
                "grad_norm": grad_norm,
                "param_norm": optax.tree.norm(params),
                "learning_rate": optimizer.learning_rate(state.step - 1),
                "weight_decay": optimizer.weight_decay(state.step - 1),
                "bad_steps": state.bad_steps,
                "bad_total": state.bad_total,
            }
            if optimizer.skip_norm:
                metrics["skipped"] = 1.0 - taken
        return state, merge(metrics, aux.metrics)

    return train_step


def accumulate(
    objective: Objective,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: Array,
    accumulation: int,
    hold: Callable[[Params], Params] = lambda params: params,
) -> tuple[Array, Params, Aux]:
    """(mean loss, mean gradient, aux) over ``accumulation`` microbatches, one after the other.

    ``hold`` takes the gradient from parameters that are not to move.
    """

    def value_and_grad(i: Array | int, micro: Batch) -> Parts:
        def loss(params: Params) -> tuple[Array, Aux]:
            micro_key = jax.random.fold_in(key, i)
            value, aux = objective.loss(
                hold(params), state.stats, frozen, micro, micro_key, True, step=state.step
            )
            return value.astype(jnp.float32), aux

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return (value, grads, aux.metrics), aux.sums, aux.last

    (value, grads, metrics), sums, last = over_microbatches(value_and_grad, batch, accumulation)
    return value, grads, Aux(metrics=metrics, sums=sums, last=last)


def ema_rate(step: Array, decay: float, warmup: bool) -> Array:
    """The EMA's decay after ``step`` completed steps."""
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if warmup else jnp.float32(decay)


def merge(metrics: Metrics, more: Metrics) -> Metrics:
    """Both; ValueError names what is in both."""
    both = sorted(metrics.keys() & more.keys())
    if both:
        raise ValueError(f"the objective's metrics {both} have names that the train step uses")
    return metrics | more


def make_eval_step(objective: Objective) -> EvalStep:
    """The pure function (params, stats, frozen, batch, key, index) -> (means, number of rows).

    Means are over the rows whose ``mask`` [B] is 1; ``index`` is the batch's number, so that every
    evaluation of a run draws the same noise.
    """

    def eval_step(
        params: Params, stats: Any, frozen: Params, batch: Batch, key: Array, index: Array | int
    ) -> tuple[Metrics, Array]:
        key = jax.random.fold_in(jax.random.fold_in(key, EVALUATION), index)
        loss, aux = objective.loss(params, stats, frozen, batch, key, False)
        return merge({"loss": loss}, aux.metrics), batch["mask"].sum()

    return eval_step
