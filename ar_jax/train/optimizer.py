"""The optimiser: Adam, AdamW or Muon with schedules of the learning rate and the weight decay.

Schedules are functions of the train state's own step, not of a count inside the optimiser: a step
that the non-finite guard skips still counts, as in training with a loss scaler.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from ar_jax.api import matches_any
from ar_jax.parallel.rules import path_name
from ar_jax.train.gradient_norms import STACKED, norm_sum

Array = jax.Array
Schedule = Callable[[Any], Array]  # completed steps -> float32 scalar

# Never decayed, whatever the configuration says.
NO_DECAY = (r"(^|/)(\w+_)?(bias|scale)$",)
# The matrices that Muon moves: pattern -> which of the last dimensions they multiply, and make.
MUON_MATRICES = {
    r"(^|/)attention/(query|key|value)/kernel$": ((-3,), (-2, -1)),  # D H K
    r"(^|/)attention/out/kernel$": ((-3, -2), (-1,)),  # H K D
    r"(^|/)mlp/(up|gate|down)/kernel$": ((-2,), (-1,)),
}
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update's elements, about Adam's: the same learning rates fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optax transformation and its two schedules.

    Attributes:
        transform: ``update(grads, state, params, step=...)`` returns what to add to ``params``.
        learning_rate, weight_decay: of the number of completed steps.
        decays: 'a/b/c' path and shape -> whether this parameter is decayed.
        freeze: regular expressions on 'a/b/c' paths of parameters that are not trained.
        clip_norm, skip_norm, skip_from: see `build_optimizer`.
    """

    transform: optax.GradientTransformationExtraArgs
    learning_rate: Schedule
    weight_decay: Schedule
    decays: Callable[[str, tuple[int, ...]], bool]
    freeze: tuple[str, ...] = ()
    clip_norm: float = 0.0
    skip_norm: float = 0.0
    skip_from: int = 0

    def takes(self, grads: Any, step: Array) -> Array:
        """Whether a step of these gradients, after so many others, is taken."""
        if not self.skip_norm:
            return jnp.bool_(True)
        total = norm_sum(grads)
        if self.clip_norm:
            total = total * jnp.minimum(1.0, self.clip_norm / optax.tree.norm(grads))
        return (total < self.skip_norm) | (step < self.skip_from)

    def freezes(self, path: str) -> bool:
        """Whether the parameter at ``path`` stays as it is."""
        return matches_any(path, self.freeze)

    def hold(self, params: Any) -> Any:
        """``params``, with no gradient for the frozen ones.

        Raises:
            ValueError: a pattern is in no path, or nothing is left to train.
        """
        if not self.freeze:
            return params
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern in self.freeze:
            if not any(matches_any(name, [pattern]) for name in names):
                raise ValueError(
                    f"config.optimizer.freeze holds {pattern!r}, which is in the path of no "
                    f"parameter: of {', '.join(names[:3])} and {len(names) - 3} others"
                )
        if all(map(self.freezes, names)):
            raise ValueError(f"config.optimizer.freeze={self.freeze} leaves nothing to train")
        return self.where_frozen(params, lambda leaf, _: jax.lax.stop_gradient(leaf), params)

    def where_frozen(self, tree: Any, function: Callable[[Any, Any], Any], new: Any) -> Any:
        """``new``, with function(leaf of ``tree``, its own) in place of the frozen leaves."""

        def one(path: tuple[Any, ...], old: Any, leaf: Any) -> Any:
            return function(old, leaf) if self.freezes(path_name(path)) else leaf

        return jax.tree_util.tree_map_with_path(one, tree, new)


def build_optimizer(
    *,
    steps: int,
    name: str,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    warmup_start: float = 0.0,
    hold: float = 0.0,
    end_ratio: float = 0.0,
    weight_decay_end: float | None = None,
    no_decay: Sequence[str] = (),
    freeze: Sequence[str] = (),
    rate_factors: Sequence[tuple[str, float]] = (),
    clip_norm: float = 0.0,
    skip_norm: float = 0.0,
    skip_from: int = 100,
) -> Optimizer:
    """The optimiser of ``config.optimizer`` for a run of ``config.train.steps`` steps.

    Args:
        name: 'adamw'; 'adam', which has no weight decay; or 'muon': the matrices of the transformer
            blocks move by their orthogonalised momentum (arXiv:2502.16982), all else by AdamW.
        learning_rate: peak.
        schedule: 'constant', 'linear' or 'cosine', after the warm-up; see `learning_rate_ratio`.
        weight_decay: at the start; None for ``weight_decay_end`` means the same at the end, between
            them half a cosine over all steps.
        no_decay: regular expressions on 'a/b/c' paths, besides biases, norm scales and all other
            parameters of less than two dimensions.
        freeze: regular expressions on 'a/b/c' paths of parameters that are not trained and stay bit
            for bit, in their running mean too; ('autoencoder/encoder', 'autoencoder/to_code',
            'quantizer') trains a tokenizer's decoder for codes that stay.
        rate_factors: (regular expression, factor) pairs: the learning rate of parameters whose path
            matches is multiplied; of several pairs that match by the first.
        clip_norm: largest global norm of the gradient; 0: no clipping.
        skip_norm: a step is left out where the norms of all parameters' gradients, clipped, sum up
            to it or more (RandAR); see `gradient_norms.norm_sum`. 0: none is.
        skip_from: the first steps, so many, are taken whatever the norms.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    if name not in ("adam", "adamw", "muon"):
        raise ValueError(f"config.optimizer.name={name!r} is none of 'adamw', 'adam', 'muon'")
    if name == "adam" and (weight_decay or weight_decay_end):
        raise ValueError(
            f"config.optimizer.weight_decay={weight_decay} has no effect with name='adam': set it "
            "to 0.0 or use name='adamw'"
        )
    _check_range("learning_rate", learning_rate, 0.0, math.inf)
    _check_range("clip_norm", clip_norm, 0.0, math.inf)
    _check_range("skip_norm", skip_norm, 0.0, math.inf)
    _check_range("skip_from", skip_from, 0, math.inf)
    _check_range("weight_decay", weight_decay, 0.0, math.inf)
    factored = [pattern for pattern, _ in rate_factors]
    named = (("no_decay", no_decay), ("freeze", freeze), ("rate_factors", factored))
    for field, patterns in named:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"config.optimizer.{field} holds {pattern!r}, no regular expression: {error}"
                ) from error
    for _, factor in rate_factors:
        _check_range("rate_factors", factor, 0.0, math.inf)
    ratio = learning_rate_ratio(
        steps=steps,
        schedule=schedule,
        warmup_steps=warmup_steps,
        warmup_start=warmup_start,
        hold=hold,
        end_ratio=end_ratio,
    )
    end = weight_decay if weight_decay_end is None else weight_decay_end
    rate: Schedule = lambda step: jnp.float32(learning_rate) * ratio(step)  # noqa: E731
    decay = half_cosine(start=weight_decay, end=end, steps=steps)
    undecayed, frozen = tuple(no_decay), tuple(freeze)

    def decays(path: str, shape: tuple[int, ...]) -> bool:
        return not matches_any(path, frozen) and is_decayed(path, shape, undecayed)

    scale = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.float32)
    transform = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.partition({"muon": _muon(), "rest": scale}, _muon_labels)
        if name == "muon"
        else scale,
        _descend(rate, decay, decays, tuple(rate_factors)),
    )
    return Optimizer(
        transform=transform,
        learning_rate=rate,
        weight_decay=decay,
        decays=decays,
        freeze=frozen,
        clip_norm=clip_norm,
        skip_norm=skip_norm,
        skip_from=skip_from,
    )


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"config.optimizer.{field}={value} must lie in [{low:g}, {high:g}]")


def learning_rate_ratio(
    *,
    steps: int,
    schedule: str,
    warmup_steps: int,
    warmup_start: float,
    hold: float,
    end_ratio: float,
) -> Schedule:
    """Learning rate over its peak, at step i of N = ``steps`` with W = ``warmup_steps``.

    i < W:    s + (1 - s) i / W, s = ``warmup_start``.
    then with p = (i - W) / (N - 1 - W) and e = ``end_ratio``, reached at the last step:
    constant: 1
    and of the others 1 while p < h, h = ``hold`` (linear with 0.05 is VAR's lin0), then
    cosine:   e + (1 - e) (1 + cos(pi (p - h) / (1 - h))) / 2
    linear:   e + (1 - e) (1 - p) / (1 - h)

    Raises:
        ValueError: names the field of config.optimizer.
    """
    if schedule not in ("constant", "cosine", "linear"):
        raise ValueError(
            f"config.optimizer.schedule={schedule!r} is none of 'constant', 'cosine', 'linear'"
        )
    if hold and schedule == "constant":
        raise ValueError(
            f"config.optimizer.hold={hold} has no effect with schedule={schedule!r}: set it to 0.0 "
            "or use schedule='linear' or 'cosine'"
        )
    if not 0 <= hold < 1:
        raise ValueError(f"config.optimizer.hold={hold} must lie in [0, 1)")
    if not 0 <= warmup_steps < max(steps, 1):
        raise ValueError(
            f"config.optimizer.warmup_steps={warmup_steps} must be less than "
            f"config.train.steps={steps} and not negative"
        )
    _check_range("warmup_start", warmup_start, 0.0, 1.0)
    _check_range("end_ratio", end_ratio, 0.0, 1.0)

    def ratio(step: Array | int) -> Array:
        i = jnp.asarray(step, jnp.float32)
        warm = warmup_start + (1 - warmup_start) * i / max(warmup_steps, 1)
        span = max(steps - 1 - warmup_steps, 1)
        p = jnp.clip((i - warmup_steps) / span, 0.0, 1.0)
        if schedule == "constant" or steps - 1 == warmup_steps:  # one step: it has the peak
            later = jnp.ones_like(p)
        elif schedule == "cosine":
            fallen = jnp.maximum((p - hold) / (1 - hold), 0.0)
            later = end_ratio + (1 - end_ratio) * (1 + jnp.cos(jnp.pi * fallen)) / 2
        else:
            left = jnp.clip((steps - 1 - i) / span, 0.0, 1.0)  # 1 - p, exactly 0 at the last step
            falling = end_ratio + (1 - end_ratio) * left / (1 - hold)
            later = jnp.where(p < hold, 1.0, falling)
        return jnp.where(i < warmup_steps, warm, later).astype(jnp.float32)

    return ratio


def half_cosine(*, start: float, end: float, steps: int) -> Schedule:
    """From ``start`` at step 0 to ``end`` at step ``steps`` - 1: e + (s - e)(1 + cos(pi p)) / 2."""

    def value(step: Array | int) -> Array:
        p = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0.0, 1.0)
        return (end + (start - end) * (1 + jnp.cos(jnp.pi * p)) / 2).astype(jnp.float32)

    return value


def is_decayed(path: str, shape: tuple[int, ...], no_decay: Sequence[str]) -> bool:
    """Whether weight decay acts on the parameter at ``path`` ('a/b/c')."""
    if matches_any(path, (*NO_DECAY, *no_decay)):
        return False
    return len(shape) - bool(re.search(STACKED, path)) >= 2


def _muon() -> optax.GradientTransformation:
    """Orthogonalised momentum, of Adam's size, for a tree of `MUON_MATRICES`."""

    def dimensions(tree: Any) -> Any:
        def one(path: tuple[Any, ...], leaf: Array) -> optax.contrib.MuonDimensionNumbers:
            reduced, made = _muon_dimensions(path_name(path)) or ((), ())
            return optax.contrib.MuonDimensionNumbers(reduced, made)

        return jax.tree_util.tree_map_with_path(one, tree)

    def scale(updates: Any, params: Any) -> Any:
        def one(path: tuple[Any, ...], leaf: Array) -> Array:
            axes = _muon_dimensions(path_name(path)) or ()
            sides = [math.prod(leaf.shape[i] for i in side) for side in axes]
            return leaf * (MUON_RMS * math.sqrt(max(sides)))

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=MUON_MOMENTUM, mu_dtype=jnp.float32, weight_dimension_numbers=dimensions
        ),
        optax.stateless(scale),
    )


def _muon_dimensions(path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(dimensions multiplied, dimensions made) of a matrix that Muon moves; None for others."""
    found = (axes for pattern, axes in MUON_MATRICES.items() if re.search(pattern, path))
    return next(found, None)


def _muon_labels(params: Any) -> Any:
    """'muon' or 'rest' for every parameter.

    Raises:
        ValueError: no parameter is Muon's.
    """
    labels = jax.tree_util.tree_map_with_path(
        lambda path, leaf: "muon" if _muon_dimensions(path_name(path)) else "rest", params
    )
    if "muon" not in jax.tree.leaves(labels):
        raise ValueError(
            "config.optimizer.name='muon' moves the matrices of transformer blocks, of which this "
            "model has none: use 'adamw'"
        )
    return labels


def _descend(
    rate: Schedule,
    decay: Schedule,
    decays: Callable[[str, tuple[int, ...]], bool],
    factors: Sequence[tuple[str, float]],
) -> optax.GradientTransformationExtraArgs:
    """-rate(step) * (update + decay(step) * param): AdamW's last line (arXiv:1711.05101)."""

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, *, step: Array, **unused: Any
    ) -> tuple[Any, optax.EmptyState]:
        eta, weight = rate(step), decay(step)

        def one(path: tuple[Any, ...], update: Array, param: Array) -> Array:
            name = path_name(path)
            if decays(name, param.shape):
                update = update + weight * param
            factor = next((f for pattern, f in factors if matches_any(name, [pattern])), 1.0)
            return -eta * factor * update

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)
