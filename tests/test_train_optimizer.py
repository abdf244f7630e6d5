"""Schedules against the official values, the decay mask, and AdamW against optax's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.train.gradient_norms import norm_sum
from ar_jax.train.optimizer import build_optimizer, half_cosine, is_decayed, learning_rate_ratio

FIELDS: dict[str, Any] = {
    "steps": 100,
    "name": "adamw",
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_steps": 10,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.05,
}

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
# From the official training code of VAR: 1000 iterations an epoch, schedule lin0, warm-up of a
# fiftieth of the epochs from 0.005; (epochs, peak, end ratio) and the learning rates at FRACTIONS
# of the run and at its last iteration.
VAR_LEARNING_RATES = [
    (
        (200, 3e-4, 0.1),
        (1.5e-06, 1.5075e-04, 3e-04, 3e-04, 2.9100955e-04, 2.4750772e-04, 1.7500466e-04)
        + (1.0250161e-04, 5.8999772e-05, 3e-05),
    ),
    (
        (350, 2.4e-4, 0.01),
        (1.2e-06, 1.206e-04, 2.4e-04, 2.4e-04, 2.3208845e-04, 1.9380692e-04, 1.3000437e-04)
        + (6.620182e-05, 2.792029e-05, 2.4e-06),
    ),
    (
        (350, 3.2e-4, 0.01),
        (1.6e-06, 1.608e-04, 3.2e-04, 3.2e-04, 3.0945126e-04, 2.5840922e-04, 1.7333916e-04)
        + (8.8269093e-05, 3.7227054e-05, 3.2e-06),
    ),
]
VAR_WEIGHT_DECAY = [0.05, 0.050007402, 0.050029599, 0.050184676, 0.050734156, 0.054393422]
VAR_WEIGHT_DECAY += [0.065000067, 0.075606673, 0.079265885, 0.08]


def positions(steps: int) -> np.ndarray:
    return np.array([round(f * steps) for f in FRACTIONS] + [steps - 1])


@pytest.mark.parametrize(("recipe", "expected"), VAR_LEARNING_RATES)
def test_linear_with_hold_is_the_official_schedule(recipe, expected):
    epochs, peak, end = recipe
    steps = epochs * 1000
    fields = FIELDS | {"schedule": "linear", "learning_rate": peak, "warmup_steps": steps // 50}
    fields |= {"steps": steps, "warmup_start": 0.005, "hold": 0.05, "end_ratio": end}
    rates = jax.vmap(build_optimizer(**fields).learning_rate)(positions(steps))
    np.testing.assert_allclose(rates, expected, rtol=3e-6)
    # The values tell the hold of 0.05 from the neighbouring schedule's 0.15.
    other = jax.vmap(build_optimizer(**fields | {"hold": 0.15}).learning_rate)(positions(steps))
    assert not np.allclose(other, expected, rtol=1e-3)


def test_weight_decay_is_the_official_schedule():
    decay = build_optimizer(**FIELDS | {"steps": 350_000, "weight_decay_end": 0.08}).weight_decay
    np.testing.assert_allclose(jax.vmap(decay)(positions(350_000)), VAR_WEIGHT_DECAY, rtol=2e-6)


def test_weight_decay_is_constant_without_an_end():
    decay = build_optimizer(**FIELDS).weight_decay
    np.testing.assert_array_equal(jax.vmap(decay)(np.arange(100)), np.float32(0.05))


def test_cosine_and_constant():
    ratio = learning_rate_ratio(
        steps=101, schedule="cosine", warmup_steps=20, warmup_start=0.5, hold=0.0, end_ratio=0.2
    )
    got = [float(ratio(i)) for i in (0, 10, 20, 60, 100, 500)]
    np.testing.assert_allclose(got, [0.5, 0.75, 1.0, 0.6, 0.2, 0.2], rtol=1e-6)
    held = learning_rate_ratio(
        steps=101, schedule="cosine", warmup_steps=0, warmup_start=0.0, hold=0.6, end_ratio=0.2
    )
    got = [float(held(i)) for i in (59, 60, 80, 100)]
    np.testing.assert_allclose(got, [1.0, 1.0, 0.6, 0.2], rtol=1e-6)
    fields: Any = dict(steps=10, schedule="constant", warmup_steps=0, warmup_start=0.0)
    constant = learning_rate_ratio(**fields, hold=0.0, end_ratio=0.0)
    assert [float(constant(i)) for i in range(10)] == [1.0] * 10
    with pytest.raises(ValueError, match="hold=0.5 has no effect with schedule='constant'"):
        learning_rate_ratio(**fields, hold=0.5, end_ratio=0.0)


def test_schedules_of_one_step():
    ratio = learning_rate_ratio(
        steps=1, schedule="linear", warmup_steps=0, warmup_start=0.0, hold=0.0, end_ratio=0.1
    )
    assert float(ratio(0)) == 1.0
    assert float(half_cosine(start=0.3, end=0.1, steps=1)(0)) == np.float32(0.3)


@pytest.mark.parametrize(
    ("path", "shape", "decayed"),
    [
        ("backbone/stack/blocks/mlp/up/kernel", (4, 8, 16), True),
        ("backbone/stack/blocks/mlp/up/bias", (4, 16), False),
        ("backbone/stack/blocks/attention/q_bias", (4, 2, 8), False),
        ("backbone/stack/blocks/attention/log_scale", (4, 2), False),  # one dimension in its layer
        ("backbone/stack/blocks/attention_norm/scale", (4, 8), False),
        ("backbone/final_norm/scale", (8,), False),
        ("backbone/condition/class_embed/embedding", (11, 8), True),
        ("backbone/position", (49, 8), False),  # named by the caller
        ("backbone/scale_embed", (3, 8), True),
        ("encoder/conv_in/kernel", (3, 3, 1, 8), True),
    ],
)
def test_decay_mask(path, shape, decayed):
    assert is_decayed(path, shape, (r"/position$",)) is decayed


def test_adamw_equals_optax():
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (4, 3)), "bias": jnp.ones(3)}
    ours = build_optimizer(**FIELDS | {"clip_norm": 0.5})
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            ours.learning_rate,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.05,
            mask={"kernel": True, "bias": False},
        ),
    )
    mine, other = params, params
    state, other_state = ours.transform.init(mine), theirs.init(other)
    for step in range(12):
        grads = jax.tree.map(lambda x: jnp.sin(x * (step + 1)), params)  # noqa: B023
        updates, state = ours.transform.update(grads, state, mine, step=jnp.int32(step))
        mine = optax.apply_updates(mine, updates)
        updates, other_state = theirs.update(grads, other_state, other)
        other = optax.apply_updates(other, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, other)
    assert not np.allclose(mine["kernel"], params["kernel"], rtol=1e-3)


def test_adam_decays_nothing():
    fields = FIELDS | {"name": "adam", "weight_decay": 0.0}
    optimizer = build_optimizer(**fields)
    params = {"kernel": jnp.ones((2, 2))}
    state = optimizer.transform.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.transform.update(zero, state, params, step=jnp.int32(20))
    np.testing.assert_array_equal(updates["kernel"], 0.0)


def test_muon_orthogonalises_the_matrices_of_the_blocks():
    """Each layer's update is near U V^T of its momentum, of Adam's size; the rest is AdamW's."""
    shapes = {
        "attention": {"query": {"kernel": (2, 12, 3, 4)}, "out": {"kernel": (2, 3, 4, 12)}},
        "mlp": {"up": {"kernel": (2, 12, 20), "bias": (2, 20)}},
        "modulation": {"kernel": (2, 12, 6, 12)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    params, grads = (jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2))
    step = jnp.int32(50)
    fields = FIELDS | {"weight_decay": 0.0, "schedule": "constant"}
    muon, adam = (build_optimizer(**fields | {"name": name}) for name in ("muon", "adamw"))
    updates, _ = muon.transform.update(grads, muon.transform.init(params), params, step=step)
    others, _ = adam.transform.update(grads, adam.transform.init(params), params, step=step)
    for path, inner, outer in (
        (("attention", "query"), 12, 12),
        (("attention", "out"), 12, 12),
        (("mlp", "up"), 12, 20),
    ):
        update, grad = (tree[path[0]][path[1]]["kernel"] for tree in (updates, grads))
        for layer in range(2):
            u, _, v = np.linalg.svd(np.asarray(grad[layer]).reshape(inner, outer), False)
            ours = np.asarray(update[layer], np.float64).reshape(inner, outer) / -1e-2
            cosine = (ours * (u @ v)).sum() / np.linalg.norm(ours) / np.linalg.norm(u @ v)
            assert cosine > 0.9  # the iteration leaves singular values between about 0.7 and 1.2
            rms = np.sqrt(np.square(ours).mean())
            expected = 0.2 * np.sqrt(max(inner, outer)) * np.sqrt(min(inner, outer))
            np.testing.assert_allclose(rms, expected / np.sqrt(inner * outer), rtol=0.2)
    for rest in (lambda tree: tree["mlp"]["up"]["bias"], lambda tree: tree["modulation"]["kernel"]):
        np.testing.assert_allclose(rest(updates), rest(others), rtol=1e-6)


def test_muon_needs_blocks():
    transform = build_optimizer(**FIELDS | {"name": "muon"}).transform
    with pytest.raises(ValueError, match="name='muon' moves the matrices of transformer blocks"):
        transform.init({"encoder": {"kernel": jnp.ones((3, 3, 1, 4))}})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "sgd", "name='sgd' is none of"),
        ("name", "adam", "weight_decay=0.05 has no effect with name='adam'"),
        ("schedule", "step", "schedule='step' is none of"),
        ("hold", 1.0, r"hold=1.0 must lie in \[0, 1\)"),
        ("warmup_steps", 100, r"warmup_steps=100 must be less than config.train.steps=100"),
        ("warmup_start", 2.0, r"warmup_start=2.0 must lie in \[0, 1\]"),
        ("end_ratio", -0.1, "end_ratio=-0.1 must lie"),
        ("learning_rate", -1.0, "learning_rate=-1.0 must lie"),
        ("clip_norm", -1.0, "clip_norm=-1.0 must lie"),
        ("no_decay", ("(",), r"no_decay holds '\(', no regular expression"),
    ],
)
def test_bad_fields(field, value, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(**FIELDS | {field: value})


def test_rate_factors_scale_whole_updates():
    """Of the first pattern that fits, weight decay included; the others move as without."""
    params = {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "rest": jnp.ones((2, 2))}
    factors = (("^head/.*kernel$", 0.25), ("^head", 2.0))
    moved = []
    for more in ({}, {"rate_factors": factors}):
        transform = build_optimizer(**FIELDS | more).transform
        updates, _ = transform.update(params, transform.init(params), params, step=jnp.int32(9))
        moved.append(updates)
    plain, scaled = moved
    np.testing.assert_allclose(scaled["head"]["kernel"], 0.25 * plain["head"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(scaled["head"]["bias"], 2.0 * plain["head"]["bias"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["rest"], plain["rest"])
    with pytest.raises(ValueError, match=r"rate_factors=-1.0 must lie in"):
        build_optimizer(**FIELDS, rate_factors=(("head", -1.0),))
    with pytest.raises(ValueError, match=r"rate_factors holds '\(', no regular expression"):
        build_optimizer(**FIELDS, rate_factors=(("(", 1.0),))


def test_norms_are_summed_layer_by_layer_after_clipping():
    """3 and 4 of two layers, 5 of queries and keys, 12 of the rest: 24, and half of it clipped."""
    blocks = {
        "mlp": {"up": {"kernel": jnp.asarray([[[3.0, 0.0]], [[0.0, 4.0]]])}},
        "attention": {
            "query": {"kernel": jnp.asarray([[[3.0]], [[0.0]]])},
            "key": {"kernel": jnp.asarray([[[4.0]], [[0.0]]])},
        },
    }
    gradient = {"stack": {"blocks": blocks}, "head": {"kernel": jnp.asarray([[0.0], [12.0]])}}
    np.testing.assert_allclose(norm_sum(gradient), 24.0)
    norm = float(optax.tree.norm(gradient))
    for limit, taken in ((11.9, False), (12.1, True)):
        optimizer = build_optimizer(**FIELDS, clip_norm=norm / 2, skip_norm=limit)
        assert bool(optimizer.takes(gradient, jnp.int32(100))) == taken
        assert optimizer.takes(gradient, jnp.int32(99))
    assert build_optimizer(**FIELDS).takes(gradient, jnp.int32(100))
