"""What collectives take at least over a chip's links, and how much of it computation hides."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.compilation.chips import CHIPS, dimensions
from ar_jax.compilation.collectives import Collective, find_collectives
from ar_jax.compilation.execution import execute
from ar_jax.compilation.exposure import Network, needed_dimensions, sent_bytes, time_collectives

CHIP = CHIPS["v5e"]
NETWORK = Network(chip=CHIP, topology="v5e:4x4")
AXIS = 100e9  # bytes a second of two of the four links, together 1,600 Gbit/s


def collective(kind: str, size: int = 8000, group: int = 4, **changed) -> Collective:
    fields = dict(kind=kind, count=1, bytes=size, group=group, in_loop=False, asynchronous=False)
    return Collective(**{**fields, "groups": (), "step": 0, **changed})


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 6000),
        ("reduce-scatter", 24000),  # of 32,000 bytes, of which 8,000 are the result
        ("all-reduce", 12000),
        ("all-to-all", 6000),
        ("collective-permute", 8000),
    ],
)
def test_bytes_that_a_ring_sends(kind, sent):
    assert sent_bytes(collective(kind), 4) == sent
    assert NETWORK.call_seconds(collective(kind)) == pytest.approx(sent / AXIS)


def test_a_group_has_two_links_for_each_dimension_that_it_needs():
    assert [needed_dimensions((4, 4), n) for n in (2, 4, 5, 16)] == [1, 1, 2, 2]
    assert [needed_dimensions((2, 4, 4), n) for n in (4, 8, 32)] == [1, 2, 3]
    assert dimensions("v5p:2x4x4") == (2, 4, 4)
    whole = NETWORK.call_seconds(collective("all-gather", group=16))
    assert whole == pytest.approx(8000 * 15 / 16 / (2 * AXIS))
    everyone = NETWORK.call_seconds(collective("all-gather", group=0))
    assert everyone == whole


def test_between_slices_it_is_the_chips_share_of_the_network():
    two = Network(chip=CHIP, topology="v5e:4x4", slices=2)
    for group in (2, 0):  # 0: all
        crossing = collective("all-reduce", group=group, over_dcn=True)
        assert two.call_seconds(crossing) == pytest.approx(8000 / (25e9 / 8))


# In a loop of 3: one gather that a fusion hides, another over the same chips which waits for it,
# one over other chips, a synchronous reduction. Then a scatter with a loop of 2 before its done.
PROGRAM = """HloModule x, is_scheduled=true

%body (p: f32[8]) -> f32[8] {
  %g = (f32[1000000]{0}, f32[4000000]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}
  %h = (f32[1000000]{0}, f32[4000000]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}
  %o = (f32[1000000]{0}, f32[4000000]{0}) all-gather-start(%p), replica_groups={{0,4,8,12}}
  %a = f32[8]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"240000"}
  %hd = f32[4000000]{0} all-gather-done(%h)
  %gd = f32[4000000]{0} all-gather-done(%g)
  %od = f32[4000000]{0} all-gather-done(%o)
  ROOT %r = f32[1000000]{0} all-reduce(%a), replica_groups={{0,1,2,3}}
}

%inner (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"60000"}
}

%condition (p: f32[8]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%scatter (p: f32[4000000]) -> f32[1000000] {
  ROOT %rs = f32[1000000]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %s = ((f32[4000000]{0}), f32[1000000]{0}, u32[]) async-start(%p), calls=%scatter
  %v = f32[8] while(%p), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"2"}}
  %u = ((f32[4000000]{0}), f32[1000000]{0}, u32[]) async-update(%s), calls=%scatter
  ROOT %d = f32[1000000]{0} async-done(%u)
}
"""  # noqa: E501


def timed(text: str) -> list:
    run = execute(text)
    busy = [step.cycles / CHIP.clock for step in run.steps]
    return time_collectives(find_collectives(run), busy, run.scheduled, NETWORK)


def test_what_runs_between_start_and_done_hides_a_collective():
    gather, second, other, reduction, scatter = timed(PROGRAM)
    bound = 12e6 / AXIS  # 120 us; the fusion takes 160 us
    assert gather.seconds == pytest.approx(3 * bound) and gather.exposed == 0
    assert second.overlapped == pytest.approx(3 * (160e-6 - bound))  # after the first
    assert second.exposed == pytest.approx(3 * (2 * bound - 160e-6))
    assert other.exposed == 0 and other.overlapped == pytest.approx(3 * bound)
    assert reduction.overlapped == 0 and reduction.exposed == pytest.approx(3 * 6e6 / AXIS)
    assert scatter.seconds == pytest.approx(bound)
    assert scatter.overlapped == pytest.approx(2 * 40e-6)  # both turns of the loop, through updates


def test_nothing_is_hidden_where_the_order_is_not_known():
    found = timed(PROGRAM.replace(", is_scheduled=true", ""))
    assert all(one.overlapped == 0 for one in found) and len(found) == 5


def test_a_start_without_a_done_is_exposed():
    found = timed(PROGRAM.replace("%od = f32[4000000]{0} all-gather-done(%o)", ""))
    assert found[2].overlapped == 0 and found[2].collective.asynchronous


SPREAD = """HloModule x, is_scheduled=true

%start (a: f32[2]) -> f32[8] {
  ROOT %g.1 = f32[4000000]{0} all-gather(%a), channel_id=5, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
}

%beside (a: f32[2]) -> f32[8] {
  ROOT %g.2 = f32[4000000]{0} all-gather(%a), channel_id=5, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

ENTRY %main (p: f32[2]) -> f32[8] {
  %before = f32[8]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"15000"}
  %s = f32[8]{0} fusion(%p), calls=%start
  %m = f32[8]{0} fusion(%p), calls=%beside, backend_config={"estimated_cycles":"30000"}
  %n = f32[8]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"15000"}
  ROOT %d = f32[8]{0} fusion(%p), calls=%beside
}
"""  # noqa: E501


def test_a_collective_spread_over_fusions_is_hidden_by_what_is_between():
    (found,) = timed(SPREAD)
    assert np.isclose(found.overlapped, 45_000 / CHIP.clock)
    assert np.isclose(found.seconds, 12e6 / AXIS)
