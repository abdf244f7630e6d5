"""Programs of several slices: what is read of the collectives over DCN; a real compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ar_jax.compilation.collectives import Collective, find_collectives
from ar_jax.compilation.dcn import read_transfer
from ar_jax.compilation.execution import execute
from tests.tpu_compiler import needs_compiler

ROOT = Path(__file__).resolve().parent.parent

# As libtpu 0.0.52 writes them for two slices of four chips, shortened.
PROGRAM = """HloModule x

ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %after = token[] after-all()
  %g = f32[64,8]{1,0} all-reduce(%a), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %send.4 = (f32[64,8]{1,0:T(8,128)}, u32[], token[]) send(%g, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.4 = (f32[64,8]{1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send.4), channel_id=2, is_host_transfer=true
  %recv-done.4 = (f32[64,8]{1,0}, token[]) recv-done(%recv.4), channel_id=1, is_host_transfer=true
  %other = (f32[8]{0}, u32[], token[]) recv(%after), channel_id=9, is_host_transfer=true
  ROOT %r = f32[64,8]{1,0} get-tuple-element(%recv-done.4), index=0
}
"""  # noqa: E501


def test_a_transfer_through_the_hosts_is_one_collective_over_dcn():
    all_reduce = Collective("all-reduce", 1, 2048, 4, False, False, ((0, 1, 2, 3),), 1)
    crossing = Collective("all-reduce", 1, 2048, 2, False, True, (), 3, 5, over_dcn=True)
    assert find_collectives(execute(PROGRAM)) == [all_reduce, crossing]


def test_a_transfer_begins_at_the_later_of_its_send_and_recv():
    lines = PROGRAM.splitlines()
    lines[5], lines[6] = lines[6], lines[5]
    (_, crossing) = find_collectives(execute("\n".join(lines)))
    assert (crossing.step, crossing.done) == (3, 5)


@pytest.mark.parametrize(
    ("target", "slices"),
    [("{1,2}x{0:3}", 2), ("{1,2,3,4}x{0:3}", 4), ("{1:8}x{0}", 8), ("{1:2,5}x{0}", 3), ("?", 0)],
)
def test_slices_of_a_target(target, slices):
    line = f'_xla_megascale_target="{target}",_xla_megascale_transfer_type="REDUCE_SCATTER"'
    assert read_transfer(line) == ("reduce-scatter", slices)
    permute = '_xla_megascale_transfer_type="ONE_TO_ONE"'
    assert read_transfer(permute) == ("collective-permute", 0)
    assert read_transfer("recv(%after), is_host_transfer=true") is None


@pytest.mark.slow
@needs_compiler
def test_a_train_step_compiles_for_two_slices(tmp_path):
    command = [sys.executable, "experiments/compile_ahead.py", "--topology=v5e:2x2", "--slices=2"]
    command += ["--config=configs/fashion_mnist/var.py:smoke", f"--out={tmp_path}/report.json"]
    command += ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["devices"] == 8
    assert report["mesh"] == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    found = report["collectives"]
    outer = [one for one in found if one["over_dcn"]]
    assert {one["axes"] for one in outer} == {"slice"}
    assert ("all-reduce", 2) in {(one["kind"], one["group"]) for one in outer}
    # Gradients of a chip's part of the parameters, in float32; of so small a model also codes,
    # labels and metrics.
    crossed = sum(one["bytes_per_run"] for one in outer)
    assert report["parameters"] < crossed < 2 * 4 * report["parameters"]
    assert {"fsdp", "tensor"} <= {one["axes"] for one in found if not one["over_dcn"]}
    assert "2 slices of v5e:2x2 (8 chips" in done.stdout
