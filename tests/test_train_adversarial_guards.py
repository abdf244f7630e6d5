"""What keeps a reconstruction alive when its discriminator starts, each guard on and off."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.parallel.mesh import put_batch, use_mesh
from ar_jax.train.program import build_program
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.test_train_step import toy_mesh, toy_optimizer
from tests.toy_adversary import ToyGenerator, toy_adversary

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]

START = 300


def low_rank(count: int, rows: int = 32) -> list[dict[str, np.ndarray]]:
    """Images of four factors, which the toy learns to restore."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(4, 16))
    x = np.tanh(0.5 * rng.normal(size=(count, rows, 4)) @ basis)
    return [{"image": np.round((b.reshape(rows, 4, 4, 1) + 1) * 127.5).astype(np.uint8)} for b in x]


def growth(**fields: Any) -> float:
    """Largest error after the start over that before it."""
    constant = dict(schedule="constant", warmup_steps=0, warmup_start=0.0, end_ratio=0.0)
    undecayed = dict(weight_decay=0.0, weight_decay_end=0.0, clip_norm=0.0)
    ours, its = (toy_optimizer(learning_rate=r, **constant, **undecayed) for r in (0.01, 0.02))
    adversary = toy_adversary(start=START, **fields)
    mesh, errors = toy_mesh("one device"), []
    program = build_program(
        ToyGenerator(adversary=adversary), ours, mesh, seed=0, adversary_optimizer=its
    )
    with use_mesh(mesh):
        state = program.init()
        for i, batch in enumerate(low_rank(START + 100)):
            step = program.step_at(i)
            state, metrics = step(state, {}, put_batch(batch, program.rows), program.key)
            errors.append(float(jax.device_get(metrics["l2"])))
    assert np.isfinite(errors).all() and errors[0] > 50 * errors[START - 1]
    return max(errors[START:]) / float(np.mean(errors[START - 20 : START]))


def test_a_fixed_weight_at_once_destroys_the_reconstruction():
    assert growth(weight=0.5) > 30


def test_the_adaptive_weight_keeps_it():
    assert growth(weight=0.5, adaptive=True) < 10


def test_the_warm_up_keeps_it():
    assert growth(weight=0.5, warmup_steps=2000) < 3


def test_and_so_does_no_weight():
    """What the others are compared with."""
    assert growth(weight=1e-9) < 3
