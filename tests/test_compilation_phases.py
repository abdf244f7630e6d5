"""FLOPs and bytes of instructions, and what the phases of a program take."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.compilation.analysis import analyse
from ar_jax.compilation.chips import CHIPS
from ar_jax.compilation.execution import execute
from ar_jax.compilation.phases import sample_phase, train_phase
from ar_jax.compilation.work import moved_bytes, product_flops


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(train_step)/jvp(Decoder)/stack/while/body/blocks/mlp/dot_general", "forward"),
        ("jit(train_step)/transpose(jvp(Decoder))/checkpoint/rematted/dot", "backward"),
        ("jit(train_step)/jvp(head_and_loss)/CategoricalHead/dot_general", "head and loss"),
        ("jit(train_step)/transpose(jvp(head_and_loss))/dot", "head and loss backward"),
        ("jit(train_step)/jvp(tokenizer)/Tokenizer.contexts/add", "tokenizer"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/while/body/optimizer/add", "optimizer"),
        ("jit(train_step)/mul", None),
        ("", None),
    ],
)
def test_phases_of_a_train_step(op_name, phase):
    assert train_phase(op_name) == phase


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(draw_codes)/step_3/Decoder/stack/dot_general", "step_3"),
        ("jit(draw_codes)/vmap(step_10)/add", "step_10"),
        ("jit(draw_codes)/prefill/Decoder/dot_general", "prefill"),
        ("jit(draw_codes)/decode/while/body/add", "decode"),
        ("jit(draw_codes)/Tokenizer.decode/step_embed/add", None),
    ],
)
def test_phases_of_a_sampler(op_name, phase):
    assert sample_phase(op_name) == phase


def instruction(line: str) -> str:
    return f"""HloModule x

%f (a: f32[8], b: f32[8]) -> f32[8] {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  ROOT %c = f32[8,4]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%sliced (a: f32[64], i: s32[]) -> f32[8] {{
  %i = s32[] parameter(1)
  %a = f32[64,16]{{1,0}} parameter(0)
  %v = f32[64,16]{{1,0}} bitcast(%a)
  ROOT %d = f32[1,16]{{1,0}} dynamic-slice(%v, %i, %i), dynamic_slice_sizes={{1,16}}
}}

%view (a: f32[8]) -> f32[4] {{
  %a = f32[4,2,16]{{2,1,0}} parameter(0)
  ROOT %v = f32[8,16]{{1,0}} bitcast(%a)
}}

%through_a_view (a: f32[8], b: f32[8]) -> f32[8] {{
  %a = f32[4,2,16]{{2,1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  %v = f32[8,16]{{1,0}} fusion(%a), kind=kLoop, calls=%view
  ROOT %c = f32[8,4]{{1,0}} convolution(%v, %b), dim_labels=bf_io->bf
}}

%updated (a: f32[64], u: f32[1], i: s32[]) -> f32[64] {{
  %a = f32[64,16]{{1,0}} parameter(0)
  %u = f32[1,16]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[64,16]{{1,0}} dynamic-update-slice(%a, %u, %i, %i)
}}

ENTRY %main (p: f32[8], q: f32[8]) -> f32[8] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  %q = f32[16,4]{{1,0}} parameter(1)
  %near = f32[16,4]{{1,0:T(8,128)S(1)}} copy(%q)
  %long = f32[64,16]{{1,0}} parameter(2)
  %row = f32[1,16]{{1,0}} parameter(3)
  %i = s32[]{{:S(6)}} parameter(4)
  %image = f32[2,6,6,3]{{3,2,1,0}} parameter(5)
  %kernel = f32[3,3,3,8]{{3,2,1,0}} parameter(6)
  %batched = bf16[32,10,16]{{2,1,0}} parameter(7)
  %other = bf16[32,16,12]{{2,1,0}} parameter(8)
  ROOT %r = {line}
}}
"""


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("f32[8,4] fusion(%p, %q), kind=kOutput, calls=%f", 2 * 8 * 16 * 4),
        ("f32[8,4] dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 1024),
        # Of 6 places 4 have three taps each, the two at the rim two: (4 * 3 + 2 * 2) ** 2 pairs.
        (
            "f32[2,6,6,8] convolution(%image, %kernel), window={size=3x3 pad=1_1x1_1}, "
            "dim_labels=b01f_01io->b01f",
            2 * 2 * 3 * 8 * 16**2,
        ),
        # Every second place: the first has two taps.
        (
            "f32[2,3,3,8] convolution(%image, %kernel), window={size=3x3 pad=1_0x1_0 stride=2x2}, "
            "dim_labels=b01f_01io->b01f",
            2 * 2 * 3 * 8 * (2 + 3 + 3) ** 2,
        ),
        # A batch of products: of its place in the result only one pair counts.
        (
            "bf16[32,10,12] convolution(%batched, %other), window={size=32 stride=31 "
            "lhs_dilate=32}, dim_labels=0bf_0io->0bf",
            2 * 32 * 10 * 12 * 16,
        ),
        ("f32[8,16] negate(%p)", 0),
    ],
)
def test_flops_of_products(line, flops):
    run = execute(instruction(line))
    assert product_flops(run.steps[-1], run.computations) == flops


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("f32[8,4]{1,0} fusion(%p, %q), kind=kOutput, calls=%f", 4 * (128 + 64 + 32)),
        ("f32[8,4]{1,0} fusion(%p, %near), kind=kOutput, calls=%f", 4 * (128 + 32)),
        ("f32[8,4]{1,0:S(1)} fusion(%p, %near), kind=kOutput, calls=%f", 4 * 128),
        ("f32[8,4]{1,0} fusion(%p, %near), kind=kOutput, calls=%through_a_view", 4 * (128 + 32)),
        ("f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%view", 2 * 4 * 128),
        ("f32[1,16]{1,0} fusion(%long, %i), kind=kLoop, calls=%sliced", 2 * 4 * 16),
        ("f32[64,16]{1,0} fusion(%long, %row, %i), kind=kLoop, calls=%updated", 2 * 4 * 16),
        ("f32[1,16]{1,0} dynamic-slice(%long, %i, %i)", 2 * 4 * 16),
        ("f32[64,16]{1,0} dynamic-update-slice(%long, %row, %i, %i)", 2 * 4 * 16),
        ("(f32[16,4]{1,0:S(1)}, f32[16,4]{1,0}, u32[]{:S(2)}) copy-start(%q)", 4 * 64),
        ("((f32[64,16]{1,0}), f32[4,16]{1,0:S(1)}, s32[]) slice-start(%long)", 4 * 64),
        ("f32[8,16]{1,0} copy-done(%p)", 0),
        ("f32[8,16]{1,0} negate(%p)", 4 * 256),
        ("(f32[8,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%p)", 4 * (128 + 256)),
        ('f32[8,16]{1,0} custom-call(%p), custom_call_target="AllocateBuffer"', 0),
        ('f32[8,16]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"', 4 * 256),
    ],
)
def test_bytes_to_and_from_hbm(line, moved):
    run = execute(instruction(line))
    assert moved_bytes(run.steps[-1], run.computations) == moved


# A fusion that only what it holds names, a copy in a loop that only the loop names, one that
# nothing names, an exposed collective.
STEP = """HloModule x, is_scheduled=true

%f (a: f32[8], b: f32[8]) -> f32[8] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %c = f32[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(s)/jvp(M)/dot"}
}

%body (p: f32[8]) -> f32[8] {
  ROOT %k = f32[8,16]{1,0} copy(%p), backend_config={"estimated_cycles":"50"}
}

%condition (p: f32[8]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (p: f32[8], q: f32[8]) -> f32[8] {
  %p = f32[8,16]{1,0} parameter(0)
  %q = f32[16,4]{1,0} parameter(1)
  %none = f32[8,16]{1,0} copy(%p), backend_config={"estimated_cycles":"7"}
  %fused = f32[8,4]{1,0} fusion(%p, %q), kind=kOutput, calls=%f, backend_config={"estimated_cycles":"100"}
  %w = f32[8] while(%p), condition=%condition, body=%body, metadata={op_name="jit(s)/transpose(jvp(M))/while"}, backend_config={"known_trip_count":{"n":"4"}}
  %r = f32[8,4]{1,0} all-reduce(%fused), replica_groups={{0,1,2,3}}, metadata={op_name="jit(s)/transpose(jvp(M))/dot"}
  ROOT %o = f32[8,4]{1,0} add(%r, %r), metadata={op_name="jit(s)/optimizer/add"}, backend_config={"estimated_cycles":"30"}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("op_name", "cycles"),
    [
        ("jit(s)/optimizer/add", 100),  # of the fusion without a name, by what is fused in it
        ("jit(s)/transpose(jvp(M))/attention/attend/add", 130),
        ("jit(s)/jvp(M)/attention/query/add", 100),
    ],
)
def test_attention_is_what_its_function_does(op_name, cycles):
    chip, step = CHIPS["v5e"], STEP.replace("jvp(M)/dot", "jvp(M)/attention/attend/dot")
    step = step.replace("jit(s)/optimizer/add", op_name)
    found = analyse(step, chip, "v5e:2x2", {"data": 4}, train_phase, 1.0)
    assert found["seconds"]["attention"] == pytest.approx(cycles / chip.clock)


def test_phases_add_up_to_the_whole():
    chip = CHIPS["v5e"]
    found = analyse(STEP, chip, "v5e:2x2", {"data": 4}, train_phase, 1.0)
    phases, seconds = found["phases"], found["seconds"]
    assert list(phases) == ["forward", "backward", "optimizer", "other"]
    cycles = [round(row["compiler"] * chip.clock) for row in phases.values()]
    assert cycles == [100, 4 * 50, 30, 7]
    for name in ("compiler", "kernels", "collectives_exposed"):
        assert np.isclose(sum(row[name] for row in phases.values()), seconds[name])
    assert phases["backward"]["collectives_exposed"] == seconds["collectives_exposed"] > 0
    forward, optimizer = phases["forward"], phases["optimizer"]
    assert forward["flops"] == 2 * 8 * 16 * 4 and optimizer["flops"] == 0
    assert forward["compute"] == forward["flops"] / chip.peak
    assert forward["bandwidth"] == 4 * (128 + 64 + 32) / chip.bandwidth
    assert optimizer["bound"] == "bandwidth"
    (reduction,) = found["collectives"]
    assert reduction["axes"] == "data" and reduction["exposed"] == reduction["seconds"]
