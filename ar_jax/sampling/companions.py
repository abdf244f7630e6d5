"""Other models that speak at every step of a sampler, each with parameters and a cache of its own.

A *weak* model takes the place of the null class in guidance: ``weak + scale (strong - weak)``
(autoguidance, arXiv:2406.02507). It is an earlier checkpoint, or a smaller model. A *reward* is an
autoregressive model of what is liked (GenARM, arXiv:2410.08193): every code is drawn from
``p(code) p_reward(code)^weight``, up to a constant. Several rewards multiply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, System

ROLES = ("weak", "reward")


@flax.struct.dataclass
class Companion:
    """A model beside the one that is sampled; see `weak` and `reward`.

    Attributes:
        params: {'tokenizer', 'backbone' (unstacked), 'head'}.
        weights: float32 [S], of a reward the exponent at every step; of a weak model unused, as
            its guidance has scales.
        system: with the unrolled backbone. Static, as all below.
        role: one of `ROLES`.
        null: whether it sees the null class in place of the condition.
    """

    params: Params
    weights: Array
    system: System = flax.struct.field(pytree_node=False)
    role: str = flax.struct.field(pytree_node=False)
    null: bool = flax.struct.field(pytree_node=False)

    def condition(self, cond: Cond) -> Cond:
        """What it sees of conditions of B rows."""
        return self.system.backbone.conditioner.null(cond) if self.null else cond

    def logits(self, context: Array | None, cond: Cond, cache: Cache, **how: Any) -> tuple:
        """(logits [B, n, V], cache) of one step; ``how`` is what the backbone takes beside."""
        hidden, cache = self.system.backbone.apply(
            {"params": self.params["backbone"]}, context, cond, cache=cache, **how
        )
        return self.system.head.apply({"params": self.params["head"]}, hidden), cache

    def join(self, logits: Array, own: Array, scale: Array, index: Any) -> Array:
        """The sampled model's ``logits`` [B, n, V] with this one's ``own`` at step ``index``."""
        if self.role == "weak":
            return self.system.head.guide(logits, own, scale)
        # Without a softmax: constants of a row change nothing, and a uniform reward changes no bit.
        return logits + self.weights[index] * own


def weak(system: System, params: Params, *, null: bool = False) -> Companion:
    """A model to be guided away from, as strongly as `Guidance` says.

    Args:
        system, params: as it was trained, all three parts.
        null: show it the null class, not the condition: with the sampled model's own parameters
            that is classifier-free guidance.
    """
    return _companion(system, params, "weak", np.ones(system.schedule.num_steps), null)


def reward(
    system: System, params: Params, *, weight: float | Sequence[float] = 1.0, null: bool = False
) -> Companion:
    """An autoregressive reward, which multiplies p.

    Args:
        system, params: as it was trained, all three parts.
        weight: its exponent, 1 / beta in GenARM; of every step, or of each of the S steps.
        null: show it the null class, not the condition.

    Raises:
        ValueError: other than one weight or S.
    """
    steps = system.schedule.num_steps
    if np.shape(weight) not in ((), (steps,)):
        raise ValueError(
            f"weight has the shape {np.shape(weight)}; give one number, or one for each of the "
            f"{steps} steps"
        )
    return _companion(system, params, "reward", np.broadcast_to(weight, steps), null)


def _companion(system: System, params: Params, role: str, weights: Any, null: bool) -> Companion:
    backbone, unstacked = system.backbone.for_sampling(params["backbone"])
    return Companion(
        params=dict(params, backbone=unstacked),
        weights=jnp.asarray(weights, jnp.float32),
        system=dataclasses.replace(system, backbone=backbone),
        role=role,
        null=null,
    )


def check_companions(system: System, params: Params, companions: Sequence[Companion]) -> None:
    """Raises ValueError unless all of them speak of the sampled system's codes, step for step."""
    if sum(companion.role == "weak" for companion in companions) > 1:
        raise ValueError("there are several weak models: guidance leads away from one")
    for companion in companions:
        theirs = companion.system
        if _steps(theirs.schedule) != _steps(system.schedule):
            raise ValueError(
                f"a {companion.role} model has schedule.name={theirs.schedule.name!r} with steps "
                f"of {_brief(theirs.schedule.sizes)} codes, the sampled one "
                f"{system.schedule.name!r} with {_brief(system.schedule.sizes)}: both must draw "
                "the same steps"
            )
        if theirs.tokenizer != system.tokenizer or not _equal(
            companion.params["tokenizer"], params["tokenizer"]
        ):
            raise ValueError(
                f"a {companion.role} model was trained on the codes of another tokenizer: its "
                "numbers mean other things"
            )
        fields = (theirs.backbone.conditioner.fields, system.backbone.conditioner.fields)
        if fields[0] != fields[1]:
            raise ValueError(
                f"a {companion.role} model is conditioned on {fields[0]}, the sampled one on "
                f"{fields[1]}"
            )


def _steps(schedule: Any) -> Any:
    """A schedule without what matters in training alone."""
    return dataclasses.replace(schedule, anneal=None)


def _brief(sizes: tuple[int, ...]) -> str:
    return f"{sizes[0]} to {sizes[-1]} (in {len(sizes)})"


def _equal(ours: Params, theirs: Params) -> bool:
    """Whether two trees have the same names, shapes and values."""
    names: list[Any] = [jax.tree.structure(tree) for tree in (ours, theirs)]
    return names[0] == names[1] and all(
        a.shape == b.shape and bool(jnp.array_equal(a, b))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )
