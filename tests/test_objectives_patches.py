"""Stages of patches: windows of one code are codes, embeddings are pooled, nothing looks ahead."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.patches import patch_logits, stage_of
from ar_jax.schedules import window_order
from tests.objective_calls import BATCH, KEY
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_codes, toy_config, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

SYSTEM, PARAMS = toy_system("raster")
CODES, COND = toy_codes(SYSTEM, BATCH), toy_labels(BATCH)
TRAINED = {name: PARAMS[name] for name in ("backbone", "head")}


def logits_of(codes: Any, side: int, params: Any = TRAINED) -> jax.Array:
    run = jax.jit(lambda params, codes: patch_logits(SYSTEM, params, codes, COND, side, None))
    return run(params, codes)


def test_windows_go_row_by_row():
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(window_order((4, 4), (2, 2)), expected)


def test_windows_of_one_code_are_codes():
    plain = jax.jit(teacher_forced, static_argnums=0)(SYSTEM, PARAMS, COND, CODES)
    np.testing.assert_allclose(logits_of(CODES, 1), plain, rtol=1e-4, atol=1e-4)


def test_a_window_is_fed_the_pooled_embeddings_of_the_one_before():
    """A code in another place of its window changes nothing but where logits are read."""
    logits = np.asarray(logits_of(CODES, 2))
    windows = window_order((4, 4), (2, 2))
    for cells in windows:  # one distribution for all codes of a window
        assert (logits[:, cells] == logits[:, cells[:1]]).all()
    turned = CODES.at[:, windows[0]].set(CODES[:, windows[0][::-1]])
    np.testing.assert_allclose(logits_of(turned, 2), logits, rtol=1e-5, atol=1e-5)
    other = (
        CODES.at[:, windows[1][2]]
        .add(1)
        .at[:, windows[1][2]]
        .set((CODES[:, windows[1][2]] + 1) % 8)
    )
    moved = np.abs(np.asarray(logits_of(other, 2)) - logits).max((0, 2))
    assert (moved[windows[:2].reshape(-1)] == 0).all() and (
        moved[windows[2:].reshape(-1)] > 0
    ).all()


def test_the_least_loss_of_a_window_is_the_entropy_of_its_codes():
    codes = jnp.asarray([3, 3, 5, 3])
    counts = jnp.asarray([0, 0, 0, 0.75, 0, 0.25, 0, 0])
    best = jnp.log(jnp.maximum(counts, 1e-30))
    loss = SYSTEM.head.loss(jnp.broadcast_to(best, (4, 8)), codes).mean()
    np.testing.assert_allclose(loss, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), rtol=1e-6)


def test_stages_follow_each_other_in_training_alone():
    np.testing.assert_array_equal(
        [stage_of(((4, 10), (2, 15)), step) for step in (0, 9, 10, 14, 15, 99)], [0, 0, 1, 1, 2, 2]
    )
    objective = Likelihood(system=SYSTEM, label_dropout=0.0, patches=((2, 5),))
    plain = Likelihood(system=SYSTEM, label_dropout=0.0)
    frozen, batch = {"tokenizer": PARAMS["tokenizer"]}, COND | {"codes": CODES}

    @jax.jit
    def losses(step: Any) -> Any:
        def loss(of: Likelihood, train: bool) -> Any:
            return of.loss(TRAINED, {}, frozen, batch, KEY, train, step=step)[0]

        return loss(objective, True), loss(plain, True), loss(objective, False)

    early, late = losses(4), losses(5)
    expected = SYSTEM.head.loss(logits_of(CODES, 2), CODES).mean()
    np.testing.assert_allclose(early[0], expected, rtol=1e-5)
    for staged, single in ((early[2], early[1]), (late[0], late[1]), (late[2], late[1])):
        np.testing.assert_allclose(staged, single, rtol=1e-5)
    assert abs(early[0] - early[1]) > 1e-3


@pytest.mark.parametrize(
    ("name", "patches", "words"),
    [
        ("raster", ((3, 5),), r"windows of 3 x 3 codes.* divide the grid \(4, 4\)"),
        ("raster", ((1, 5),), "at least 2"),
        ("raster", ((4, 5), (2, 5)), "must increase"),
        ("random", ((2, 5),), r"needs schedule.name='raster'.* not 'random' and 'target_aware'"),
    ],
)
def test_what_does_not_fit_is_refused(name, patches, words):
    config = toy_config(name, objective=dict(patches=patches))
    with pytest.raises(ValueError, match=words):
        build_objective(config)
