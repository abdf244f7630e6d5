"""The bidirectional backbone: what is hidden has no influence, all else has, in all directions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.nn.blocks import Attention
from ar_jax.nn.layers import MLP, LayerNorm
from ar_jax.nn.plain_stack import plain_stack
from tests.modules import apply
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import masked_config
from tests.toy_masked_codes import masked_codes_config, masked_codes_system
from tests.toy_systems import CLASSES

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 16
RNG = np.random.default_rng(2)
CODES = jnp.asarray(RNG.integers(0, 8, (4, LENGTH)), jnp.int32)
KNOWN = jnp.asarray(RNG.random((4, LENGTH)) < 0.5)
COND = {"label": jnp.arange(4, dtype=jnp.int32) % CLASSES}


@pytest.fixture(
    scope="module",
    params=[{}, dict(post_norm=True, output_layer=True)],
    ids=["norms before", "norms after"],
)
def model(request, quick_compilation) -> tuple[Any, Any]:  # noqa: F811
    system, params = masked_codes_system(backbone=request.param)
    return system.backbone, params["backbone"]


def test_hidden_codes_have_no_influence_and_known_ones_do(model):
    hidden = apply(*model, CODES, COND, KNOWN)
    assert hidden.shape == (4, LENGTH, 16) and hidden.dtype == jnp.float32
    other = apply(*model, jnp.where(KNOWN, CODES, (CODES + 3) % 8), COND, KNOWN)
    np.testing.assert_array_equal(other, hidden)
    place = int(np.argmax(np.asarray(KNOWN[0])))
    moved = apply(*model, CODES.at[0, place].set((CODES[0, place] + 1) % 8), COND, KNOWN)
    assert (np.abs(np.asarray(moved - hidden))[0].max(-1) > 0).all()  # at every row
    np.testing.assert_array_equal(moved[1:], hidden[1:])


def test_every_row_sees_every_row(model):
    """Gradients of each row's hidden state: of the class, of codes before it and after it."""
    backbone, params = model
    one = {"label": COND["label"][:1]}
    weight = jnp.asarray(RNG.standard_normal(16), jnp.float32)  # norms have no mean to derive

    @jax.jit
    def jacobian(position: jax.Array) -> jax.Array:
        def rows(position: jax.Array) -> jax.Array:
            variables = {"params": params | {"position": position}}
            return backbone.apply(variables, CODES[:1], one, KNOWN[:1])[0] @ weight

        return jax.jacrev(rows)(position)  # [L, 1 + L, D]

    found = np.abs(np.asarray(jacobian(params["position"]))).max(-1)
    assert found.shape == (LENGTH, 1 + LENGTH) and (found > 0).all()


def test_the_class_matters(model):
    hidden = apply(*model, CODES, COND, KNOWN)
    null = apply(*model, CODES, model[0].conditioner.null(COND), KNOWN)
    assert (np.abs(np.asarray(null - hidden)).max((1, 2)) > 0).all()


def test_norms_after_the_sums():
    """LN(x + attention(x)), then LN(y + MLP(y))."""
    stack = plain_stack(
        name="stack",
        width=16,
        depth=1,
        heads=2,
        mlp_hidden=24,
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=0.0,
        dropout=0.0,
        hidden_dropout=0.0,
        init_std=0.3,
        attention="xla",
        remat="none",
        scan=False,
        dtype=jnp.float32,
        post_norm=True,
    )
    x = jnp.asarray(RNG.standard_normal((2, 5, 16)), jnp.float32)
    seen: dict[type, tuple[Any, Any]] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            seen[type(context.module)] = (args[0], out)
        return out

    @jax.jit
    def run(key: jax.Array) -> Any:
        rest = (None, None, None, None, 0, None, False)
        params = stack.init(key, x, *rest)
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # scales and biases too
        with nn.intercept_methods(record):
            out, _ = stack.apply(params, x, *rest)
        return params["params"]["blocks_0"], seen[Attention], seen[MLP], out

    params, (fed, (attended, _)), (between, last), out = run(jax.random.key(0))
    norm = LayerNorm(epsilon=1e-6)
    np.testing.assert_array_equal(fed, x)
    expected = apply(norm, params["attention_norm"], x + attended)
    np.testing.assert_allclose(between, expected, rtol=1e-4, atol=1e-5)
    expected = apply(norm, params["mlp_norm"], between + last)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(backbone={"heads": 3}), "backbone.width 16 is not a multiple of backbone.heads 3"),
        (dict(backbone={"vocab_size": 9}), "backbone.vocab_size is 9.*codebook_size is 8"),
        (dict(backbone={"num_classes": 0}), "backbone.num_classes is 0"),
        (dict(head={"vocab_size": 9}), "head.vocab_size is 9.*codebook_size is 8"),
        (dict(objective={"name": "likelihood"}), "objective.name is 'likelihood'.*'masked_codes'"),
        (dict(objective={"method": "sine"}), "objective.method is 'sine'"),
        (dict(objective={"rate_min": 1.5}), r"objective.rate_min is 1.5.*\[0, 1\]"),
        (dict(schedule={"method": "sine"}), "schedule.method is 'sine'"),
        (dict(schedule={"iterations": 17}), "schedule.iterations is 17.*16 codes"),
    ],
)
def test_bad_configs_are_errors(change, words):
    with pytest.raises(ValueError, match=words):
        build_objective(masked_codes_config(**change))


def test_other_parts_are_refused():
    config = masked_codes_config()
    config["schedule"] = dict(name="raster", grid=4)
    with pytest.raises(ValueError, match="schedule.name is 'raster'.*'bidirectional'.*'masked'"):
        build_objective(config)
    config = masked_codes_config()
    config["schedule"] = dict(name="next_scale", scales=(1, 2, 4))
    config["tokenizer"] |= dict(name="multiscale_vq", scales=(1, 2, 4))
    with pytest.raises(ValueError, match="schedule.name is 'next_scale'.*use 'masked'"):
        build_objective(config)
    config = masked_config()
    config["backbone"] = masked_codes_config()["backbone"]
    with pytest.raises(ValueError, match="backbone.name is another than 'encoder_decoder'"):
        build_objective(config)
