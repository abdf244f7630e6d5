"""Parameters that `config.optimizer.freeze` names stay bit for bit, and so does what is theirs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.parallel.rules import path_name
from ar_jax.train.optimizer import build_optimizer
from ar_jax.train.state import init_state
from ar_jax.train.step import make_train_step
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import AUTOENCODER

pytestmark = pytest.mark.usefixtures("quick_compilation")

ENCODER = ("autoencoder/encoder", "autoencoder/to_code", "quantizer")


def optimizer(**fields: Any) -> Any:
    section: dict[str, Any] = dict(
        name="adamw",
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    return build_optimizer(steps=10, **(section | fields))


def objective(freeze: tuple[str, ...]) -> Any:
    tokenizer = dict(name="vq", codebook_size=12, codebook_update="ema")
    return build_objective(
        dict(
            dtype="float32",
            tokenizer=tokenizer | dict(autoencoder=dict(AUTOENCODER)),
            objective=dict(name="tokenizer", restart_below=0.9, usage_decay=0.1),
            optimizer=dict(freeze=freeze),
        )
    )


def named(tree: Any) -> dict[str, np.ndarray]:
    return {
        path_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_only_the_decoder_trains():
    """Weight decay, a running codebook, restarts and the mean of the parameters included."""
    trained, adam = objective(ENCODER), optimizer(freeze=ENCODER)
    state = init_state(trained, adam, jax.random.key(0), ema=True)
    before = named(state.params)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 8, 1)).astype(np.uint8)
    step = jax.jit(make_train_step(trained, adam, ema_decay=0.9))
    for image in images:
        state, metrics = step(state, {}, {"image": jnp.asarray(image)}, jax.random.key(1))
    assert metrics["grad_norm"] > 0
    for tree in (state.params, state.ema):
        for name, leaf in named(tree).items():
            frozen = name.startswith(ENCODER)
            assert np.array_equal(leaf, before[name]) == frozen, name
    assert {name.split("/")[1] for name in before if not name.startswith(ENCODER)} == {
        "decoder",
        "from_code",
    }
    assert state.stats.keys() == {"histogram"}
    moments = named(state.opt_state)
    assert all(not leaf.any() for name, leaf in moments.items() if "/encoder/" in name)


@pytest.mark.slow
def test_without_it_all_of_that_moves():
    trained, adam = objective(()), optimizer()
    state = init_state(trained, adam, jax.random.key(0), ema=True)
    assert state.stats.keys() == {"histogram", "ema_counts", "ema_sums"}
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1)).astype(np.uint8)
    step = jax.jit(make_train_step(trained, adam, ema_decay=0.9))
    later, _ = step(state, {}, {"image": jnp.asarray(images)}, jax.random.key(1))
    before = named(state.params)
    for tree in (later.params, later.ema):
        same = [name for name, leaf in named(tree).items() if np.array_equal(leaf, before[name])]
        assert not same


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        (
            ("autoencoder/encodre",),
            r"freeze holds 'autoencoder/encodre', which is in the path of no",
        ),
        (("",), r"freeze=\('',\) leaves nothing to train"),
        (("(",), r"freeze holds '\(', no regular expression"),
    ],
)
def test_patterns_that_cannot_be_meant(freeze, words):
    params = {"autoencoder": {"encoder": jnp.zeros(2), "decoder": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=words):
        optimizer(freeze=freeze).hold(params)
