"""The part of a train step in which an objective and its adversary train against each other.

Both see the images that the objective's parameters made before the step, and the adversary's
parameters before it. What is not linear in the gradients is taken of their means over the
microbatches, so that accumulation and devices do not matter: the adaptive weight is that of the
whole batch. Batch norms' statistics and the logits' means in LeCam's term are a microbatch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ar_jax.api import Adversary, Aux, Batch, Objective, Params, Stats
from ar_jax.train.microbatches import Parts, over_microbatches
from ar_jax.train.optimizer import Optimizer
from ar_jax.train.state import TrainState

Array = jax.Array


@flax.struct.dataclass
class Verdict:
    """What an adversary makes of a microbatch, or the mean over several.

    Attributes:
        deceit: the objective's adversarial loss, unweighted; 0 before the start.
        loss: the adversary's own.
        grads: of its parameters.
        stats: those after it.
        metrics: float32 scalars.
        active: whether it takes part in this step, 0 or 1.
    """

    deceit: Array
    loss: Array
    grads: Params
    stats: Stats
    metrics: dict[str, Array]
    active: Array


def accumulate_both(
    objective: Objective,
    adversary: Adversary,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    key: Array,
    accumulation: int,
    hold: Callable[[Params], Params] = lambda params: params,
) -> tuple[Array, Params, Aux, Verdict]:
    """(total loss, its gradient, aux, verdict) over ``accumulation`` microbatches.

    ``hold`` takes the gradient from parameters that are not to move.

    The total is the objective's own loss + weight * adaptive factor * adversarial loss.
    """
    weight = adversary.weight_at(state.step)
    later = adversary.adaptive and accumulation > 1

    def part(i: Array | int, micro: Batch) -> Parts:
        def forward(params: Params) -> tuple[tuple[Array, Array], Aux]:
            micro_key = jax.random.fold_in(key, i)
            value, aux = objective.loss(
                hold(params), state.stats, frozen, micro, micro_key, True, step=state.step
            )
            assert aux.judged is not None
            return (value.astype(jnp.float32), aux.judged[1]), aux

        (value, fake), pull, aux = jax.vjp(forward, state.params, has_aux=True)
        assert aux.judged is not None
        verdict, cotangent = _try(adversary, state, aux.judged[0], fake)
        one = jnp.ones_like(value)
        factor, grads = jnp.ones((), jnp.float32), {}
        if adversary.adaptive:
            # Another pass forward in name only, which XLA shares with the first.
            _, pull_fake = jax.vjp(lambda params: forward(params)[0][1], state.params)
            grads = {
                "plain": pull((one, jnp.zeros_like(fake)))[0],
                "adverse": pull_fake(cotangent)[0],
            }
        if not later:
            if adversary.adaptive:  # of these gradients only the last layer's is computed
                factor = _balance(objective, adversary, grads)
            grads = {"total": pull((one, weight * factor * cotangent))[0]}
        means = (value, grads, aux.metrics, verdict, factor)
        return means, aux.sums, aux.last

    means, sums, last = over_microbatches(part, batch, accumulation)
    value, grads, metrics, verdict, factor = means
    if later:
        factor = _balance(objective, adversary, grads)
        total = jax.tree.map(
            lambda plain, adverse: plain + weight * factor * adverse,
            grads["plain"],
            grads["adverse"],
        )
    else:
        total = grads["total"]
    metrics = metrics | verdict.metrics
    metrics["adversarial/loss"] = verdict.deceit
    metrics["adversarial/weight"] = weight * factor
    if adversary.adaptive:
        metrics["adversarial/adaptive"] = factor * verdict.active
    metrics["discriminator/loss"] = verdict.loss
    metrics["discriminator/grad_norm"] = optax.tree.norm(verdict.grads)
    value = value + weight * factor * verdict.deceit
    return value, total, Aux(metrics=metrics, sums=sums, last=last), verdict


def _try(
    adversary: Adversary, state: TrainState, real: Array, fake: Array
) -> tuple[Verdict, Array]:
    """(verdict, gradient of the deceit to ``fake``, which is zero before the start)."""
    params, stats = state.adversary["params"], state.adversary["stats"]
    real, fake = jax.lax.stop_gradient((real, fake))
    deceive = jax.value_and_grad(adversary.deceive, argnums=2, has_aux=True)
    (deceit, after), cotangent = deceive(params, stats, fake)
    learn = jax.value_and_grad(adversary.judge, has_aux=True)
    (loss, (after, metrics)), grads = learn(params, after, real, fake)
    active = state.step >= adversary.start
    verdict = Verdict(
        deceit=jnp.where(active, deceit, 0.0),
        loss=loss,
        grads=grads,
        stats=after,
        metrics=metrics,
        active=active.astype(jnp.float32),
    )
    return verdict, jnp.where(active, cotangent, 0.0)


def _balance(objective: Objective, adversary: Adversary, grads: Mapping[str, Params]) -> Array:
    """The adaptive factor, from gradients of the whole model."""

    def last(tree: Any) -> Array:
        for name in objective.last_layer.split("/"):  # type: ignore[attr-defined]
            tree = tree[name]
        return tree

    return adversary.balance(last(grads["plain"]), last(grads["adverse"]))


def update_adversary(
    optimizer: Optimizer, branch: Mapping[str, Any], verdict: Verdict, step: Array
) -> tuple[dict[str, Any], Array]:
    """(branch of the train state after the step, whether loss and gradient were finite).

    The branch stays as it is if they were not, before the adversary's start, and where the
    optimiser does not take the step.
    """
    finite = jnp.isfinite(verdict.loss) & jnp.isfinite(optax.tree.norm(verdict.grads))
    updates, opt_state = optimizer.transform.update(
        verdict.grads, branch["opt_state"], branch["params"], step=step
    )
    params = optax.apply_updates(branch["params"], updates)
    new = {"params": params, "opt_state": opt_state, "stats": verdict.stats}
    moves = finite & (verdict.active > 0) & optimizer.takes(verdict.grads, step)
    return jax.tree.map(lambda after, before: jnp.where(moves, after, before), new, branch), finite
