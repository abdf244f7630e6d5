"""Heads of single codes over eight devices: each computes the rows of its own images."""

from __future__ import annotations

import re
from typing import Any

import jax
import ml_collections

from ar_jax.build import build_objective
from ar_jax.compilation.ahead import batch_shapes, frozen_params
from ar_jax.parallel.mesh import batch_sharding, make_mesh, use_mesh
from ar_jax.parallel.rules import shardings
from tests.smoke_runs import smoke_config

IMAGES, WIDTH = 24, 96  # of all devices; of the head, as nothing else


def has_all_rows(system: str) -> bool:
    """Whether one device's program of the gradient has an array of all codes' rows and WIDTH."""
    config = ml_collections.ConfigDict(smoke_config(system).to_dict())
    config.head.width = WIDTH
    objective: Any = build_objective(config)
    rows = IMAGES * objective.repeats * objective.system.tokenizer.codes_shape[0]
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(objective.init, key)

    def loss(*arguments: Any) -> jax.Array:
        return objective.loss(*arguments, True)[0]

    def placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    mesh = make_mesh(data=1, fsdp=8)
    with use_mesh(mesh):
        split = jax.tree.map(placed, params, shardings(params, mesh))
        shapes = batch_shapes(objective, IMAGES, "codes")
        batch = jax.tree.map(lambda leaf: placed(leaf, batch_sharding(mesh)), shapes)
        gradient = jax.jit(jax.grad(loss))
        text = gradient.lower(split, {}, frozen_params(objective), batch, key).compile().as_text()
    assert text
    return re.search(rf"f32\[{rows}(,\d)*,{WIDTH}\]", text) is not None


def test_a_device_computes_its_own_rows(monkeypatch):
    assert not has_all_rows("ear")
    for module in ("nn.adaptive_mlp", "objectives.masked", "heads.energy"):
        monkeypatch.setattr(f"ar_jax.{module}.divided", lambda x: x)
    jax.clear_caches()
    assert has_all_rows("ear")
