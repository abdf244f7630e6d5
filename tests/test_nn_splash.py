"""The attention kernel of TPUs, in Pallas's interpreter, against XLA's attention."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.build import build_system
from ar_jax.nn import splash
from ar_jax.nn.attention import attend_cache
from ar_jax.nn.splash import attend_all, attend_newest, block_size, padded_mask
from ar_jax.parallel.mesh import make_mesh, use_mesh
from tests.toy_systems import toy_codes, toy_config, toy_labels, toy_params, toy_system
from tests.tpu_compiler import needs_compiler

BATCH, HEADS, WIDTH = 2, 2, 16
STEPS = {
    "raster": tuple(range(140)),
    "next_scale": tuple(map(int, schedules.next_scale(scales=(1, 2, 3, 5, 9)).step_id)),
    "all": (0,) * 20,
}


def arrays(rows: int) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent, [B, T, H, K]."""
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, (BATCH, rows, HEADS, WIDTH)) for key in keys)


def value_and_gradients(
    steps: tuple[int, ...], real: jax.Array | None, kernel: str
) -> tuple[jax.Array, Any]:
    """(result [B, T, H, K] with hidden rows zeroed, its pullback of a fixed cotangent)."""
    *inputs, cotangent = arrays(len(steps))

    def result(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attend_all(q, k, v, steps=steps, real=real, scale=0.3, kernel=kernel)
        return out if real is None else out * real[..., None, None]

    out, pull = jax.jit(lambda *args: jax.vjp(result, *args))(*inputs)
    return out, pull(cotangent)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n != "next_scale" else ()) for n in STEPS]
)
@pytest.mark.parametrize("hidden", [0, 7])
def test_kernel_equals_xla_forward_and_backward(name, hidden):
    steps = STEPS[name]
    starts = jnp.array([0, hidden])
    real = jnp.arange(len(steps))[None] >= starts[:, None] if hidden else None  # [B, T]
    ours, gradients = value_and_gradients(steps, real, "splash")
    theirs, expected = value_and_gradients(steps, real, "xla")
    np.testing.assert_allclose(ours, theirs, atol=5e-6)
    for mine, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)
    if hidden:  # nothing of a hidden row reaches a real one
        for gradient in gradients[1:]:
            assert not np.asarray(gradient[1, :hidden]).any()


def test_a_mask_of_wrong_steps_is_noticed():
    steps = STEPS["next_scale"]
    ours, _ = value_and_gradients(steps[:-1] + (steps[-1] - 1,), None, "splash")
    theirs, _ = value_and_gradients(steps, None, "xla")
    assert np.abs(ours - theirs).max() > 1e-2


def test_added_rows_see_each_other_only():
    mask = padded_mask(STEPS["raster"])
    assert mask.shape == (256, 256)
    assert not mask[:140, 140:].any() and not mask[140:, :140].any() and mask[140:, 140:].all()


@pytest.mark.parametrize(("rows", "block"), [(768, 256), (2304, 256), (384, 384), (640, 128)])
def test_block_size(rows, block):
    assert block_size(rows) == block


def test_blocks_without_a_visible_pair_are_skipped():
    """VAR's 680 rows, padded to 768: no block of the last keys for the first queries."""
    grids = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    steps = tuple(map(int, schedules.next_scale(scales=grids).step_id))
    kernel = splash.splash_kernel(steps, heads=1)
    blocks = padded_mask(steps).reshape(3, 256, 3, 256).any(axis=(1, 3))
    assert not blocks.all()
    np.testing.assert_array_equal(np.asarray(kernel.fwd_mask_info.block_mask)[0] > 0, blocks)


@pytest.mark.slow  # the kernel is interpreted
@pytest.mark.parametrize("name", [pytest.param("raster", marks=pytest.mark.slow), "next_scale"])
def test_a_system_gives_the_same_hidden_states_with_either_kernel(name):
    system, _ = toy_system(name)
    params = toy_params(system)
    codes = toy_codes(system, BATCH)
    context = system.tokenizer.apply({"params": params["tokenizer"]}, codes, method="contexts")
    hidden = {}
    for kernel in ("xla", "splash"):
        backbone = system.backbone.clone(attention=kernel)
        hidden[kernel], _ = jax.jit(backbone.apply)(
            {"params": params["backbone"]}, context, toy_labels(BATCH)
        )
    np.testing.assert_allclose(hidden["splash"], hidden["xla"], atol=2e-5)


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, fsdp=2, tensor=2)])
def test_eight_devices_run_their_samples_and_heads(sizes):
    steps = STEPS["next_scale"]
    q, k, v, _ = (jnp.concatenate([x] * 4) for x in arrays(len(steps)))
    alone = attend_all(q, k, v, steps=steps, real=None, scale=0.3, kernel="splash")
    with use_mesh(make_mesh(**sizes)):
        call = jax.jit(
            lambda *args: nn.with_logical_constraint(
                attend_all(*args, steps=steps, real=None, scale=0.3, kernel="splash"),
                ("batch", None, "heads", None),
            )
        )
        together = call(q, k, v)
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("rows", [(130, 150), (256, 384)])
def test_a_steps_rows_attend_to_a_cache_by_either_kernel(rows):
    """Rows of queries and keys that fill no block, and some that do; on one device and on 8."""
    random = np.random.default_rng(0)
    shapes = ((4, rows[0], 2, 16), *[(4, 2, rows[1], 16)] * 2)
    arrays = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    q, k, v = arrays
    expected = attend_cache(q, k[:, :, :140], v[:, :, :140], mask=None, scale=0.3)

    def newest(*arrays: jax.Array) -> jax.Array:
        return attend_newest(*arrays, seen=140, scale=0.3, kernel="splash")

    np.testing.assert_allclose(newest(*arrays), expected, atol=1e-5)
    with use_mesh(make_mesh(data=4, tensor=2)):
        np.testing.assert_allclose(jax.jit(newest)(*arrays), expected, atol=1e-5)
    text = jax.jit(newest).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    few = [arrays[0][:, :100], *arrays[1:]]
    text = jax.jit(newest).trace(*few).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text


def test_dropout_of_attention_weights_is_refused_when_built():
    config = toy_config("raster") | {"attention": "splash"}
    build_system(config)
    config["backbone"] = dict(config["backbone"], attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention is 'splash'.*attention_dropout is 0.1"):
        build_system(config)
    with pytest.raises(ValueError, match="attention is 'flash'; it must be one of"):
        build_system(dict(config, attention="flash"))


COMPILE = """
from ar_jax.compilation.chips import prepare_environment
prepare_environment("v5e:4x4")
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from ar_jax.nn.splash import attend_all
from ar_jax.parallel.mesh import make_mesh, use_mesh

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
mesh = make_mesh(data=4, fsdp=2, tensor=2, devices=topology.devices)
rows = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
like = jax.ShapeDtypeStruct((16, ROWS, 4, WIDTH), jnp.bfloat16, sharding=rows)

def total(q, k, v):
    steps = tuple(range(ROWS))
    out = attend_all(q, k, v, steps=steps, real=None, scale=0.1, kernel="splash")
    return out.astype(jnp.float32).sum()

with use_mesh(mesh):
    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(like, like, like).compile()
print(compiled.as_text())
"""


@needs_compiler
@pytest.mark.parametrize(("rows", "width"), [(680, 64), (256, 100)])
def test_the_tpu_compiler_takes_the_kernel_in_both_passes(rows, width):
    """VAR's and LlamaGen-3B's rows and head widths, heads and samples divided; no scores in HBM."""
    script = COMPILE.replace("ROWS", str(rows)).replace("WIDTH", str(width))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('custom_call_target="tpu_custom_call"') == 3  # out, dq, dk and dv
    padded = rows + -rows % 128
    for scores in (f"2,2,{rows},{rows}]", f"2,2,{padded},{padded}]"):
        assert scores not in done.stdout
