"""What is read from compiled programs: cycles, loops, collectives, kernels; a real compilation."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ar_jax.compilation.axes import replica_groups
from ar_jax.compilation.chips import CHIPS, find_chip
from ar_jax.compilation.collectives import Collective, find_collectives
from ar_jax.compilation.estimate import LEFT_OUT, estimate, kernel_of, left_out, visible_share
from ar_jax.compilation.execution import execute
from ar_jax.compilation.hlo import shape_bytes
from tests.tpu_compiler import needs_compiler

ROOT = Path(__file__).resolve().parent.parent

# A loop of 3 around a loop of 5, a fusion that hides a collective, a conditional, a kernel whose
# metadata spans lines.
PROGRAM = """HloModule jit_step

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %fusion.1 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"7"}
  %kern_fwd.1 = (bf16[2,3,128,64]{3,2,1,0}, f32[4]{0}) custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a": 1
}}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %fusion.1)
}

%inner_condition (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%f (a: f32[8,4]) -> f32[8,4] {
  ROOT %all-reduce.9 = f32[8,4]{1,0} all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%add
}

%outer_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %w = (s32[], f32[8,4]) while(%p), condition=%inner_condition, body=%inner_body
  ROOT %dot = f32[8,4]{1,0} fusion(%a), kind=kOutput, calls=%g, backend_config={"estimated_cycles":"100"}
}

%outer_condition (p: (s32[], f32[8,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%cheap (p: f32[]) -> f32[] {
  ROOT %r = f32[] fusion(%p), kind=kLoop, calls=%h, backend_config={"estimated_cycles":"1"}
}

%dear (p: f32[]) -> f32[] {
  ROOT %r = f32[] fusion(%p), kind=kLoop, calls=%h, backend_config={"estimated_cycles":"50"}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %w = (s32[], f32[8,4]) while(%a), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[] conditional(%i, %a, %a), branch_computations={%cheap, %dear}
  %all-gather-start.1 = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %d = f32[8,4] all-gather-done(%all-gather-start.1)
}
"""  # noqa: E501


def test_cycles_count_nested_loops_and_the_dearest_branch():
    assert execute(PROGRAM).cycles == 3 * (5 * 7 + 100) + 50


def test_a_loop_that_ends_by_its_data_counts_once_and_is_said():
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    run = execute(PROGRAM.replace(known, ""))
    assert (run.cycles, run.unknown_loops) == (5 * 7 + 100 + 50, 1)
    assert left_out(run) == f"{LEFT_OUT}; all turns but one of 1 loops that end by their data"
    assert left_out(execute(PROGRAM)) == LEFT_OUT


def test_collectives_are_found_in_loops_and_fusions():
    run = execute(PROGRAM)
    names = [step.instruction.name for step in run.steps]
    fusion, start = names.index("fusion.1"), names.index("all-gather-start.1")
    assert find_collectives(run) == [
        Collective("all-reduce", 15, 128, 2, True, False, ((0, 1), (2, 3), (4, 5), (6, 7)), fusion),
        Collective(
            "all-gather", 1, 128, 4, False, True, ((0, 1, 2, 3), (4, 5, 6, 7)), start, start + 1
        ),
    ]


def test_kernels_are_found_with_their_shapes():
    ((kernel, count),) = [
        (found, step.times) for step in execute(PROGRAM).steps if (found := kernel_of(step))
    ]
    assert (kernel.name, count) == ("kern_fwd.1", 15)
    assert kernel.operands == (("f32", (8, 4)),)
    assert [shape_bytes(shape) for shape in kernel.results] == [2 * 3 * 128 * 64 * 2, 16]


STRIDED = """HloModule x

%body (p: (f32[4], s32[])) -> (f32[4], s32[]) {
  %i = s32[] get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %kept = s32[] copy(%next)
  %x = f32[4]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"7"}
  ROOT %t = (f32[4], s32[]) tuple(%x, %kept)
}

%condition (p: (f32[4], s32[])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=1
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  ROOT %w = (f32[4], s32[]) while(%a), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_in_steps_has_fewer_turns():
    assert execute(STRIDED).cycles == 4 * 7  # 0, 2, 4, 6
    assert execute(STRIDED.replace("constant(2)", "constant(1)")).cycles == 7 * 7
    hidden = STRIDED.replace("add(%i, %two)", "fusion(%i), kind=kLoop, calls=%g")
    assert execute(hidden).cycles == 7 * 7


def test_metadata_of_several_lines_is_read_to_its_end():
    more = PROGRAM.replace(
        "}}\n  ROOT %t", '}}, backend_config={"estimated_cycles":"9"}\n  ROOT %t'
    )
    assert execute(more).cycles == execute(PROGRAM).cycles + 15 * 9


def test_groups_of_named_mesh_axes():
    line = "all-reduce(%a), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}, x={}"
    assert replica_groups(line) == (tuple(range(8)),)
    assert replica_groups(line.replace("'axis_0',", "")) == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        execute("HloModule x\n")


def test_estimate_adds_kernels_by_bytes_or_products():
    chip = CHIPS["v5e"]
    seconds = estimate(execute(PROGRAM), chip, visible=1.0, timed=())
    assert np.isclose(seconds["compiler"], 455 / 1.5e9)
    assert np.isclose(seconds["kernels"], 15 * (128 + 98_304 + 16) / 819e9)
    keys = "  %y = bf16[2,3,64,256]{3,2,1,0} get-tuple-element(%p), index=1\n"
    attention = (
        PROGRAM.replace("%kern_fwd.1", "%splash_mha_fwd.1")
        .replace("f32[8,4]{1,0:T(8,128)} get-tuple", "bf16[2,3,128,64]{3,2,1,0} get-tuple")
        .replace("custom-call(%x)", "custom-call(%x, %y)")
        .replace("  %splash_mha_fwd.1 =", f"{keys}  %splash_mha_fwd.1 =")
    )
    flops = 2 * 2 * 2 * 3 * 128 * 256 * 64 * 0.5  # of two products over half of the blocks
    narrow = estimate(execute(attention), chip, visible=0.5, timed=())["kernels"]
    assert np.isclose(narrow, 15 * (4 * 98_304 + 16) / 819e9)
    wide = dataclasses.replace(chip, bandwidth=1e15)
    computed = estimate(execute(attention), wide, visible=0.5, timed=())["kernels"]
    assert np.isclose(computed, 15 * flops / (197e12 / 2))  # heads of 64 fill half of the MXU
    larger = dataclasses.replace(wide, mxu=256)
    doubled = estimate(execute(attention), larger, visible=0.5, timed=())["kernels"]
    assert np.isclose(doubled, 2 * computed)


def test_share_of_visible_blocks():
    assert visible_share((0,) * 256) == 1.0
    assert visible_share(tuple(range(768))) == 6 / 9


@pytest.mark.parametrize("topology", ["v5e", "v4:2x2", "v5e:4*4"])
def test_unknown_topologies_are_named(topology):
    with pytest.raises(ValueError, match="is not KIND:AxB"):
        find_chip(topology)


@needs_compiler
def test_a_train_step_compiles_for_a_topology(tmp_path):
    command = [sys.executable, "experiments/compile_ahead.py", "--topology=v5e:2x4"]
    command += ["--config=configs/fashion_mnist/var.py:smoke", f"--out={tmp_path}/report.json"]
    command += ["--config.mesh.data=4", "--config.mesh.tensor=2"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["devices"], report["mesh"]["tensor"]) == (8, 2)
    assert report["attention"] == "splash" and report["seconds"]["kernels"] > 0
    assert 0 < report["memory"]["peak"] < report["memory"]["capacity"]
    assert {found["group"] for found in report["collectives"]} >= {2, 4}
    seconds, phases = report["seconds"], report["phases"]
    names = {"tokenizer", "forward", "head and loss", "head and loss backward", "backward"}
    assert set(phases) == names | {"optimizer", "other"}
    assert np.isclose(sum(row["compiler"] for row in phases.values()), seconds["compiler"])
    assert phases["other"]["compiler"] < 0.2 * seconds["compiler"]
    assert phases["backward"]["flops"] > phases["forward"]["flops"] > 0
    assert seconds["with_collectives"] == seconds["total"] + seconds["collectives_exposed"]
    exposed = sum(found["exposed"] for found in report["collectives"])
    assert np.isclose(exposed, seconds["collectives_exposed"]) and exposed > 0
