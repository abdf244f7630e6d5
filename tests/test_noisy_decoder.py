"""The transformer of noisy codes: what sees what, the cache, entities of every kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_system
from ar_jax.entities import doubling_scales, next_entity
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_flow import flow_config, flow_system
from tests.toy_systems import toy_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")

ENTITIES: dict[str, dict[str, Any]] = {
    "cell": {},
    "ragged": dict(schedule=dict(parts=3)),
    "token": dict(schedule=dict(entity="token", parts=1)),
    "scale": dict(schedule=dict(entity="scale", parts=1), tokenizer=dict(scales=(1, 2, 4))),
}
RNG = np.random.default_rng(0)


def rows_of(system: Any, batch: int = 2) -> tuple[jax.Array, jax.Array]:
    """Codes [B, L, C] and times [B, S]."""
    schedule = system.schedule
    codes = jnp.asarray(RNG.standard_normal((batch, schedule.length, 2)), jnp.float32)
    return codes, jnp.asarray(RNG.random((batch, schedule.num_steps)), jnp.float32)


@pytest.mark.parametrize("name", [pytest.param("cell", marks=pytest.mark.slow), "ragged"])
def test_a_step_sees_itself_and_those_before(name):
    """Codes and times of a step move its own rows and all later ones, and no earlier one."""
    system, params = flow_system(**ENTITIES[name])
    codes, times = rows_of(system)
    step_id = system.schedule.step_id

    @jax.jit
    def hidden(codes: Any, times: Any) -> Any:
        variables = {"params": params["backbone"]}
        return system.backbone.apply(variables, codes, toy_labels(2), times)[0]

    plain = hidden(codes, times)
    for step in (0, 1, system.schedule.num_steps - 1):
        place = system.schedule.starts[step]
        for other in (
            hidden(codes.at[:, place].add(1.0), times),
            hidden(codes, times.at[:, step].set(1.0 - times[:, step])),
        ):
            moved = (np.abs(np.asarray(other - plain)).max(-1) > 0).all(0)
            still = (np.asarray(other == plain)).all((0, 2))
            np.testing.assert_array_equal(moved, step_id >= step)
            np.testing.assert_array_equal(still, step_id < step)


@pytest.mark.parametrize(
    "name",
    ["cell", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ragged", "token", "scale"))],
)
def test_cached_steps_are_the_uncached_ones(name):
    """Step after step from a cache, of other rows before its own ones; traced where sizes allow."""
    system, params = flow_system(**ENTITIES[name])
    codes, times = rows_of(system)
    schedule, cond = system.schedule, toy_labels(2)
    whole, _ = jax.jit(system.backbone.apply)({"params": params["backbone"]}, codes, cond, times)
    backbone, unrolled = system.backbone.for_sampling(params["backbone"])
    traced = schedule.sizes[0] if len(set(schedule.sizes)) == 1 else 0

    @jax.jit
    def stepwise(unrolled: Any, codes: Any) -> Any:
        def run(cache: Any, step: Any, rows: Any, t: Any) -> Any:
            fed = {"step": step, "cache": cache}
            _, cache = backbone.apply({"params": unrolled}, 3.0 - rows, cond, t, **fed)
            hidden, cache = backbone.apply(
                {"params": unrolled}, rows, cond, t, **fed | {"cache": cache}
            )
            return cache, hidden

        cache = backbone.init_cache(2)
        if traced:
            parts = jnp.moveaxis(codes.reshape(2, -1, traced, 2), 1, 0)
            inputs = (jnp.arange(schedule.num_steps), parts, times.T[:, :, None])
            _, hidden = jax.lax.scan(lambda cache, xs: run(cache, *xs), cache, inputs)
            return jnp.moveaxis(hidden, 0, 1).reshape(2, schedule.length, -1)
        found = []
        for step, (start, size) in enumerate(zip(schedule.starts, schedule.sizes, strict=True)):
            rows = codes[:, start : start + size]
            cache, hidden = run(cache, step, rows, times[:, step : step + 1])
            found.append(hidden)
        return jnp.concatenate(found, axis=1)

    np.testing.assert_allclose(stepwise(unrolled, codes), whole, rtol=2e-4, atol=2e-5)


def test_entities():
    cells = next_entity(grid=4, entity="cell", parts=2)
    assert cells.sizes == (4,) * 4 and cells.cells is not None
    assert cells.cells[:8] == (0, 1, 4, 5, 2, 3, 6, 7)
    apart = next_entity(grid=4, entity="subsample", parts=2)
    assert apart.cells is not None and apart.cells[:8] == (0, 2, 8, 10, 1, 3, 9, 11)
    uneven = next_entity(grid=7, entity="cell", parts=2)
    assert uneven.sizes == (16, 12, 12, 9)
    assert next_entity(grid=3, entity="token").sizes == (1,) * 9
    assert next_entity(grid=3, entity="image").sizes == (9,)
    scales = next_entity(grid=7, entity="scale")
    assert scales.grids == ((1, 1), (2, 2), (4, 4), (7, 7)) and scales.sizes == (1, 4, 16, 49)
    assert doubling_scales((16, 16))[:3] == ((1, 1), (2, 2), (4, 4))
    for wrong in (dict(entity="row"), dict(entity="token", parts=2), dict(entity="cell", parts=9)):
        with pytest.raises(ValueError, match=r"schedule\.(entity|parts) is"):
            next_entity(grid=8, **wrong)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": {"width": 20}}, "backbone.width 20 over backbone.heads 2"),
        ({"backbone": {"decoder_heads": 3}}, "backbone.decoder_heads 3"),
        ({"backbone": {"code_width": 3}}, "backbone.code_width is 3"),
        ({"head": {"code_width": 3}}, "head.code_width is 3"),
        ({"head": {"sampler": "heun"}}, "head.sampler is 'heun'"),
        ({"backbone": {"num_classes": 0}}, "backbone.num_classes is 0"),
        ({"schedule": {"entity": "scale", "parts": 1}}, "schedule covers the grids"),
        ({"tokenizer": {"scales": (1, 3)}}, "tokenizer.scales ends at"),
    ],
)
def test_what_does_not_fit_is_an_error(changes, words):
    with pytest.raises(ValueError, match=words):
        build_system(flow_config(**changes))


def test_parts_of_other_systems_are_refused():
    masked = dict(name="masked", grid=4, iterations=3)
    config = flow_config() | {"schedule": masked}
    with pytest.raises(ValueError, match="schedule.name is 'masked'.*use 'next_entity'"):
        build_system(config)
    config = flow_config() | {"head": dict(name="diffusion", code_width=2, width=16, depth=1)}
    with pytest.raises(ValueError, match="head.name is another one.*'velocity'"):
        build_system(config)
