"""Mesh axes of replica groups, asynchronous collectives, memory overflow, and the report's text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.compilation.axes import axis_groups, mesh_axes, replica_groups
from ar_jax.compilation.chips import CHIPS
from ar_jax.compilation.collectives import find_collectives
from ar_jax.compilation.estimate import model_flops, rooflines
from ar_jax.compilation.execution import execute
from ar_jax.compilation.overflow import (
    DoesNotFit,
    advise,
    largest_arrays,
    read_overflow,
    read_size,
)
from ar_jax.compilation.report import summarise_collectives, summary
from tests.tpu_compiler import needs_compiler

ROOT = Path(__file__).resolve().parent.parent
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("replica_groups={{0,2},{4,6},{1,3},{5,7}}", "fsdp"),
        ("replica_groups=[4,2]<=[4,2]T(1,0)", "fsdp"),  # 0 2 4 6 1 3 5 7 in pairs
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),  # 0 4 1 5 2 6 3 7
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "data x fsdp"),
        ("replica_groups=[1,8]<=[8]", "data x fsdp x tensor"),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, x={}", "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", "data x fsdp"),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", "data"),
        ("replica_groups={}", "all"),
        ("channel_id=1", "all"),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", "not read"),
    ],
)
def test_groups_are_named_by_mesh_axes(text, axes):
    assert mesh_axes(replica_groups(f"all-reduce(%a), {text}, to_apply=%add"), MESH) == axes


def test_axis_groups_follow_the_mesh_order():
    assert axis_groups(MESH, ("fsdp",)) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert axis_groups(MESH, ("tensor", "data")) == ((0, 1, 4, 5), (2, 3, 6, 7))


# Two tensors gathered by one start; a collective in a computation that runs asynchronously; the
# start of a reduction, whose result holds no operands.
ASYNCHRONOUS = """HloModule x

%inner (a: f32[8]) -> f32[2] {
  ROOT %rs = f32[2]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %g = ((f32[2]{0}, bf16[4]{0}), (f32[4]{0}, bf16[8]{0})) all-gather-start(%a, %b), replica_groups=[4,2]<=[8]
  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%a), calls=%inner
  %d = f32[2]{0} async-done(%s)
  ROOT %r = f32[8]{0} all-reduce-start(%a), replica_groups={}, to_apply=%add
}
"""  # noqa: E501


def test_asynchronous_collectives_count_results_once():
    found = [
        (c.kind, c.bytes, c.group, c.asynchronous, c.done)
        for c in find_collectives(execute(ASYNCHRONOUS))
    ]
    assert found == [
        ("all-gather", 16 + 16, 2, True, None),
        ("reduce-scatter", 8, 4, True, 2),
        ("all-reduce", 32, 0, True, None),
    ]


SCATTERED = """HloModule x

%all-reduce-scatter.1 (a: bf16[8,100]) -> bf16[8,32] {
  %p = bf16[8,128]{0,1} pad(%a, %zero), padding=0_0x0_28
  %r = bf16[8,128]{0,1} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = bf16[8,32]{0,1} dynamic-slice(%r, %zero, %id), dynamic_slice_sizes={8,32}
}

ENTRY %main (a: bf16[8,100]) -> bf16[8,32] {
  ROOT %f = bf16[8,32]{0,1} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_reduction_of_which_a_part_is_kept_scatters():
    (found,) = find_collectives(execute(SCATTERED))
    assert (found.kind, found.bytes, found.group) == ("reduce-scatter", 8 * 32 * 2, 4)
    kept_whole = SCATTERED.replace("all-reduce-scatter.1", "all-reduce-and-slice")
    (found,) = find_collectives(execute(kept_whole))
    assert (found.kind, found.bytes, found.group) == ("all-reduce", 8 * 128 * 2, 4)


FUSED = """HloModule x

%start (a: f32[2]) -> f32[8] {
  ROOT %g.1 = f32[8]{0} all-gather(%a), channel_id=5, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%beside (a: f32[2]) -> f32[8] {
  ROOT %g.2 = f32[8]{0} all-gather(%a), channel_id=5, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%body (p: f32[2]) -> f32[8] {
  %s = f32[8]{0} fusion(%a), kind=kCustom, calls=%start
  %m = f32[8]{0} fusion(%a), kind=kOutput, calls=%beside, backend_config={"estimated_cycles":"10"}
  ROOT %d = f32[8]{0} fusion(%a), kind=kCustom, calls=%beside
}

%condition (p: f32[2]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (a: f32[2]) -> f32[8] {
  ROOT %w = f32[2] while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_a_collective_spread_over_fusions_counts_once():
    run = execute(FUSED)
    assert run.cycles == 30
    (found,) = find_collectives(run)
    assert (found.kind, found.count, found.bytes, found.asynchronous) == ("all-gather", 3, 32, True)
    names = [step.instruction.name for step in run.steps]
    assert (found.step, found.done) == (names.index("s"), names.index("d"))


def test_sizes_are_read():
    sizes = [read_size(text) for text in ("15.75G", "1.5M", "512", "2KiB", "many")]
    assert sizes == [round(15.75 * 2**30), 3 * 2**19, 512, 2048, None]


PLACED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.

Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(step)/mlp/up" source_file="a.py"
     Shape: bf16[16,680,4096]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 1.50G
     ==========================

  2. Size: 512.00M
     Shape: f32[8,8]{1,0}
     ==========================

  3. Size: 2.00G
     Operator: op_name="jit(step)/head"
     Shape: f32[4]{0}

  4. Size: 1.00M
     Shape: f32[2]{0}
"""


def test_overflow_names_the_largest_buffers():
    verdict = read_overflow(PLACED, advise("none", {"data": 1}))
    assert verdict and not verdict["fits"] and not verdict["whole"]
    assert verdict["needed"] == 20 * 2**30 and verdict["capacity"] == round(15.75 * 2**30)
    assert [(b["bytes"], b["shape"], b["operation"]) for b in verdict["buffers"]] == [
        (2 * 2**30, "f32[4]", "jit(step)/head"),
        (3 * 2**29, "bf16[16,680,4096]", "jit(step)/mlp/up"),
        (2**29, "f32[8,8]", ""),
    ]
    text = str(DoesNotFit(verdict))
    assert "20.00 GiB of a chip's 15.75 GiB" in text and "remat='block'" in text


# As libtpu 0.0.52 writes it where temporaries alone are too large.
UNPLACED = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (397.47G) exceeds available HBM (15.75G). HLO module: jit_step."
)
LOWERED = """
  %3:2 = stablehlo.while(%a = %c, %b = %d) : tensor<i32>, tensor<16x4x8xbf16>
  %4 = stablehlo.dot_general %a, %b : (tensor<999x999xf32>, tensor<8x4xf32>) -> tensor<8x4xf32>
  %5 = stablehlo.add %a, %b : tensor<5000xf32>
"""


def test_overflow_without_buffers_names_the_programs_arrays():
    verdict = read_overflow(UNPLACED, [], LOWERED)
    assert verdict and verdict["whole"] and verdict["of"] == "temporaries"
    assert verdict["needed"] == round(397.47 * 2**30)
    assert [(b["bytes"], b["shape"], b["operation"]) for b in verdict["buffers"]] == [
        (1024, "bf16[16,4,8]", "while"),
        (128, "f32[8,4]", "dot_general"),
    ]
    assert largest_arrays("") == [] and "before division" in str(DoesNotFit(verdict))


def test_nothing_is_advised_that_is_so_already():
    smaller, remat, split = advise("none", {"data": 2})
    assert advise("block", {"data": 2}) == [smaller, split]
    assert advise("dots", {"data": 1}) == [smaller, remat]
    assert advise("block", {"data": 1}) == advise(None, {"data": 1}) == [smaller]
    whole = "lower --batch_size (config.train.batch_size)"
    assert advise(None, {"data": 1}, accumulates=False) == [whole] and whole in smaller


def test_other_errors_are_no_overflow():
    assert read_overflow("INTERNAL: Mosaic failed to compile", []) is None


def test_flops_by_formula():
    width, vocabulary, rows, depth = 8, 32, 4, 2
    params = {
        "up": {"kernel": jnp.zeros((depth, width, width)), "bias": jnp.zeros((depth, width))},
        "modulation": {"kernel": jnp.zeros((width, 2, width))},
        "head": {"kernel": jnp.zeros((width, vocabulary))},
    }
    backbone = SimpleNamespace(rows=rows, depth=depth, width=width, row_steps=(0, 1, 1, 2))
    products = rows * (depth * width**2 + width * vocabulary) + 2 * width**2
    pairs = 1 + 3 + 3 + 4
    forward = 5 * (2 * products + 4 * depth * width * pairs)
    system = SimpleNamespace(backbone=backbone)
    assert model_flops(params, system, 5, passes=1) == forward
    assert model_flops(params, system, 5) == 3 * forward
    stacked = jax.eval_shape(lambda: params)
    assert model_flops(stacked, system, 5, passes=2) == 2 * forward


def test_rooflines_name_the_higher():
    memory = {"argument": 819 * 10**6, "output": 819 * 10**6}
    bounds = rooflines(197e12, memory, CHIPS["v5e"], devices=2)
    assert bounds["bound"] == "compute"
    assert np.isclose(bounds["compute"], 0.5) and np.isclose(bounds["bandwidth"], 2e-3)
    assert rooflines(1.0, memory, CHIPS["v5e"], devices=2)["bound"] == "bandwidth"


def collective(**changed):
    found = dict(kind="all-gather", axes="fsdp", group=2, in_loop=True, asynchronous=False)
    found |= dict(over_dcn=False, count=3, bytes=2**20, bytes_per_run=3 * 2**20)
    found |= dict(seconds=0.002, exposed=0.001)
    return {**found, **changed}


def test_equal_collectives_are_added_up():
    rows = summarise_collectives(
        [collective(), collective(count=1, bytes_per_run=2**20), collective(axes="data", count=9)]
    )
    names = ("axes", "count", "bytes", "seconds", "exposed")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("fsdp", 4, 4 * 2**20, 0.004, 0.002),
        ("data", 9, 3 * 2**20, 0.002, 0.001),
    ]


def test_summary_says_what_fits_and_where_collectives_go():
    names = ("argument", "output", "alias", "temp", "generated_code", "peak")
    taken = {"compiler": 0.02, "kernels": 0.001, "collectives_exposed": 0.005}
    phase = {**taken, "compute": 0.01, "bandwidth": 0.003, "bound": "compute"}
    report = {
        "program": "train",
        "topology": "v5e:2x4",
        "devices": 8,
        "mesh": MESH,
        "batch_size": 8,
        "parameters": 1000,
        "attention": "splash",
        "fits": True,
        "memory": {**dict.fromkeys(names, 2**30), "capacity": 16 * 2**30},
        "seconds": {
            **taken,
            "total": 0.021,
            "collectives_overlapped": 0.004,
            "with_collectives": 0.026,
            "attention": 0.002,
        },
        "method": "m",
        "left_out": "l",
        "model_flops": 1e12,
        "model_flops_rule": "r",
        "mfu": 0.25,
        "mfu_with_collectives": 0.2,
        "rooflines": {"compute": 0.01, "bandwidth": 0.001, "bound": "compute"},
        "phases": {"forward": phase},
        "phases_rule": "p",
        "collectives": [collective()],
    }
    text = summary(report)
    assert "fits: peak 1.00 of 16.00 GiB" in text
    assert "time: 21.00 ms a step" in text and "MFU by this estimate: 0.250" in text
    assert "with collectives at least 26.00 ms: exposed 5.00, hidden by the rest 4.00" in text
    assert "attention among all rows without its projections: 2.00 ms" in text
    line = "  forward: compiler 20.00, kernels 1.00, exposed collectives 5.00; rooflines: compute "
    assert f"{line}10.00, bandwidth 3.00: compute is the higher" in text
    line = "  all-gather: 3 calls, 3.0 MiB, over fsdp (groups of 2), in a loop, synchronous, "
    line += "2.00 ms at least, 1.00 exposed"
    assert text.endswith(line)
    assert summary({**report, "collectives": []}).endswith("  none")
    assert "does not fit" in summary({**report, "fits": False})
    over_dcn = collective(axes="slice", over_dcn=True, group=4)
    mesh = {"slice": 4, **MESH}
    text = summary({**report, "mesh": mesh, "devices": 32, "collectives": [over_dcn]})
    assert "train on 4 slices of v5e:2x4 (32 chips: slice 4, data 2" in text
    assert "over slice over DCN (groups of 4)" in text


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "experiments/compile_ahead.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )


@needs_compiler
def test_a_sampler_compiles_for_a_topology(tmp_path):
    out = tmp_path / "report.json"
    done = run(
        "--config=configs/fashion_mnist/var.py:smoke",
        "--topology=v5e:2x4",
        "--program=sample",
        "--batch_size=16",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert (report["program"], report["batch_size"], report["guided"]) == ("sample", 16, True)
    assert report["fits"] and report["seconds"]["compiler"] > 0
    steps = [f"step_{number}" for number in range(8)]
    assert list(report["phases"])[-1] == "other" and set(report["phases"]) <= {*steps, "other"}
    taken = {name: row["compiler"] for name, row in report["phases"].items()}
    assert np.isclose(sum(taken.values()), report["seconds"]["compiler"])
    assert any("tensor" in found["axes"] for found in report["collectives"])
    assert "HBM a chip: fits" in done.stdout
