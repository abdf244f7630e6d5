"""Decoders of any order: causality, cached groups, what groups are drawn from, devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.nn.blocks import Stack
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.objective_calls import close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_joint import Toy, V, p_value
from tests.toy_systems import toy_codes, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("instructed", "two_pass")
ONE_BY_ONE = dict(steps=16)
_forced = jax.jit(teacher_forced, static_argnums=0)


@functools.cache
def system_of(name: str, **changes: Any) -> tuple[System, Any]:
    """Changes are of the schedule, and of the backbone its group_attention."""
    backbone: dict[str, Any] = dict(depth=2)
    if "group_attention" in changes:
        backbone["group_attention"] = changes.pop("group_attention")
    schedule = toy_schedule(name) | changes
    images = dict(image_size=2 * schedule["grid"])
    return toy_system(name, backbone=backbone, schedule=schedule, autoencoder=images)


def toy_schedule(name: str) -> dict[str, Any]:
    curve = {"instructed": "cosine_ahead", "two_pass": "arccos"}[name]
    return dict(name="random_groups", grid=4, steps=7, curve=curve)


def some_orders(system: System, batch: int) -> jax.Array:
    rng = np.random.default_rng(3)
    length = system.schedule.length
    return jnp.asarray(np.stack([rng.permutation(length) for _ in range(batch)]), jnp.int32)


@pytest.mark.parametrize("name", NAMES)
def test_one_code_a_step_is_teacher_forcing(name):
    """By a scan over traced steps, guided, in any order; raster order is the default."""
    system, params = system_of(name, **ONE_BY_ONE)
    assert system.schedule.sizes == (1,) * 16
    cond, codes, order = toy_labels(2), toy_codes(system, 2), some_orders(system, 2)
    full = _forced(system, params, cond, codes, order)
    null = _forced(system, params, system.backbone.conditioner.null(cond), codes, order)
    scales = Guidance(scale=3.0, kind="linear").scales(16)
    guided = null + scales[None, :, None] * (full - null)
    cached, _ = stepwise_logits(system, params, cond, codes, scales, order)
    assert np.linalg.norm(cached - guided) < 1e-5 * np.linalg.norm(guided)
    assert np.linalg.norm(full - null) > 0.05 * np.linalg.norm(full)
    raster = jnp.broadcast_to(jnp.arange(16)[None], codes.shape)
    plain = _forced(system, params, cond, codes, raster)
    assert np.linalg.norm(plain - full) > 0.05 * np.linalg.norm(full)
    np.testing.assert_allclose(plain, _forced(system, params, cond, codes), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_causality_by_gradients_in_the_permuted_order(name):
    """State t sees the codes before it, all of them, and no other."""
    system, params = system_of(name)
    codes, cond, order = toy_codes(system, 1), toy_labels(1), some_orders(system, 1)

    def hidden(delta: jax.Array) -> jax.Array:
        def shift(call: Any, args: Any, kwargs: Any, info: Any) -> Any:
            out = call(*args, **kwargs)
            embeds = info.module.name == "token_embed" and info.method_name == "__call__"
            return out + delta if embeds and out.shape == delta.shape else out

        with nn.intercept_methods(shift):
            out: Any = system.backbone.apply(
                {"params": params["backbone"]}, codes[:, :-1], cond, order=order
            )
        return out[0][0]

    jacobian = jax.jit(jax.jacrev(hidden))(jnp.zeros((1, 15, system.backbone.width)))
    matrix = np.sqrt(np.square(jacobian).sum((1, 2, 4)))  # [L, L - 1]
    visible = np.arange(16)[:, None] > np.arange(15)[None]
    assert not matrix[~visible].any() and (matrix[visible] > 1e-7).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_what_is_to_come_does_not_matter(name):
    """Two orders with the same beginning have the same logits there; then they have not."""
    system, params = system_of(name)
    codes, cond, order = toy_codes(system, 2), toy_labels(2), some_orders(system, 2)
    half = 8
    other = jnp.concatenate([order[:, :half], order[:, half:][:, ::-1]], axis=1)
    a, b = (_forced(system, params, cond, codes, o) for o in (order, other))
    np.testing.assert_allclose(a[:, :half], b[:, :half], atol=1e-5)
    assert np.abs(a[:, half:] - b[:, half:]).max(axis=-1).min() > 1e-3


def shown_apart(system: System, params: Any, cond: Any, codes: Any, order: Any) -> np.ndarray:
    """The group logits of 'instructed' without a cache, [B, L, V]: of the rows of training those of
    the groups before, then the group's instructions one behind the other."""
    schedule, found = system.schedule, []
    context = codes[:, :-1]
    for start, size in zip(schedule.starts, schedule.sizes, strict=True):
        asked = [1 + 2 * (start + i) for i in range(size)]
        rows = [*range(1 + 2 * start), *asked]
        rows += [0] * (system.backbone.rows - len(rows))

        # Their states come out where those of training are read.
        places = np.arange(system.backbone.rows)
        places[asked] = 1 + 2 * start + np.arange(size)

        index = np.array(rows)

        def rearrange(
            call: Any, args: Any, kwargs: Any, info: Any, rows=index, places=places
        ) -> Any:
            if not isinstance(info.module, Stack):
                return call(*args, **kwargs)
            x, condition, rope, *rest = args
            out, cache = call(x[:, rows], condition, rope[:, rows], *rest, **kwargs)
            return out[:, places], cache

        @jax.jit
        def run(params: Any, rearrange=rearrange) -> Any:
            with nn.intercept_methods(rearrange):
                variables = {"params": params["backbone"]}
                hidden: Any = system.backbone.apply(variables, context, cond, order=order)
            return system.head.apply({"params": params["head"]}, hidden[0])

        found.append(run(params)[:, start : start + size])
    return np.concatenate(found, axis=1)


@pytest.mark.slow
def test_cached_groups_of_instructions():
    """A group sees all codes of the groups before and the instructions before, no cache needed."""
    system, params = system_of("instructed", grid=3, steps=4)
    assert max(system.schedule.sizes) > 2
    codes, cond, order = toy_codes(system, 2), toy_labels(2), some_orders(system, 2)
    cached, _ = stepwise_logits(system, params, cond, codes, None, order)
    wanted = shown_apart(system, params, cond, codes, order)
    assert np.linalg.norm(cached - wanted) < 1e-5 * np.linalg.norm(wanted)
    # Not what training has: a code inside a group does not see those before it.
    forced = _forced(system, params, cond, codes, order)
    assert np.linalg.norm(forced - wanted) > 1e-2 * np.linalg.norm(wanted)


def test_cached_groups_of_queries():
    """A query sees the groups before: as in training the first of its group, asked for its cell."""
    system, params = system_of("two_pass", group_attention="causal")
    schedule = system.schedule
    codes, order = toy_codes(system, 1), some_orders(system, 1)
    cached, _ = stepwise_logits(system, params, toy_labels(1), codes, None, order)
    places, firsts = np.arange(16), np.asarray(schedule.starts)[schedule.step_id]
    swapped = np.broadcast_to(places, (16, 16)).copy()  # query t in the place of the first
    swapped[places, firsts], swapped[places, places] = places, firsts
    cond = {"label": jnp.zeros(16, jnp.int32)}
    forced = _forced(system, params, cond, codes[0][swapped], order[0][swapped])
    wanted = forced[places, firsts]
    assert np.linalg.norm(cached[0] - wanted) < 1e-5 * np.linalg.norm(wanted)
    plain = _forced(system, params, toy_labels(1), codes, order)[0]
    assert np.linalg.norm(plain - wanted) > 1e-2 * np.linalg.norm(wanted)


@pytest.mark.slow  # two programs of all steps
def test_a_group_is_a_set():
    """Another order within a group: its own logits move along, later ones stay as they are.

    Not where the fed codes see only those before them, which is the other kind.
    """
    changed = {}
    for kind in ("bidirectional", "causal"):
        system, params = system_of("two_pass", group_attention=kind)
        first, size = system.schedule.starts[2], system.schedule.sizes[2]
        assert size > 1
        turned = np.arange(16)
        turned[first : first + size] = turned[first : first + size][::-1]
        codes, cond, order = toy_codes(system, 2), toy_labels(2), some_orders(system, 2)
        plain, _ = stepwise_logits(system, params, cond, codes, None, order)
        other, _ = stepwise_logits(system, params, cond, codes[:, turned], None, order[:, turned])
        np.testing.assert_allclose(
            other[:, : first + size], plain[:, turned[: first + size]], atol=1e-5
        )
        changed[kind] = np.abs(other - plain)[:, first + size :].max()
    assert changed["bidirectional"] < 1e-5 < 1e-3 < changed["causal"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_padded_scans_draw_what_single_steps_do(name, monkeypatch):
    """More kinds of steps than segments: each code is the one that its logits and noise give."""
    monkeypatch.setattr(schedules, "MAX_SEGMENTS", 3)
    system, params = system_of(name, steps=8)  # of no other test: programs are remembered
    schedule, batch = system.schedule, 2
    assert len(schedule.segments) == 3
    assert all(len(set(schedule.sizes[slice(*s)])) > 1 for s in schedule.segments[1:])
    order = some_orders(system, batch)
    drawn_noise = np.random.default_rng(0).gumbel(size=(batch, 16, system.head.vocab_size))
    noise = jnp.asarray(drawn_noise, jnp.float32)
    sampler = CachedSampler.create(system, params)
    guidance = Guidance(scale=2.0, kind="linear_before")
    drawn = sampler(toy_labels(batch), noise=noise, guidance=guidance, order=order).codes
    sequence = jnp.take_along_axis(drawn, order, axis=1)
    scales = guidance.scales(schedule.num_steps, schedule.known)
    logits, _ = stepwise_logits(system, params, toy_labels(batch), sequence, scales, order)
    np.testing.assert_array_equal(sequence, (logits + noise).argmax(-1))
    assert len(np.unique(sequence)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_drawn_in_an_order_of_its_own(name):
    system, params = system_of(name)
    sampler = CachedSampler.create(system, params)
    keys = image_keys(0, 0, 3)
    drawn = sampler(toy_labels(3), keys)
    assert drawn.order is not None
    order = np.asarray(drawn.order)
    np.testing.assert_array_equal(np.sort(order), np.arange(16)[None].repeat(3, 0))
    assert len(np.unique(order, axis=0)) == 3
    again = sampler(toy_labels(3), keys, order=drawn.order)
    np.testing.assert_array_equal(again.codes, drawn.codes)
    # An image depends on its own key and class alone.
    cond = {"label": jnp.roll(toy_labels(3)["label"], 1)}
    rolled = sampler(cond, jnp.roll(keys, 1))
    np.testing.assert_array_equal(rolled.codes, np.roll(drawn.codes, 1, axis=0))


@dataclasses.dataclass(frozen=True)
class Groups(Toy):
    """Images whose groups are drawn at once."""

    @functools.cached_property
    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        cond = {"label": jnp.full(len(self.images), 1)}
        found, _ = stepwise_logits(
            self.system, self.params, cond, self.sequences, None, self.orders(len(self.images))
        )
        return np.asarray(found, np.float64), np.asarray(found, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_drawn_independently_given_what_is_known(name):
    """The joint of all images is the product of the groups' single distributions."""
    schedule = dict(toy_schedule(name), grid=2, steps=2)
    changes: dict[str, Any] = dict(schedule=schedule, autoencoder=dict(image_size=4))
    system, params = toy_system(name, vocab_size=V, **changes)
    assert max(system.schedule.sizes) > 1
    order = (2, 0, 3, 1)
    toy = Groups(system, params, order)
    joint = toy.joint(Knobs(), Guidance())
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    counts = toy.counts(Knobs(), Guidance())
    assert p_value(counts, joint) > 1e-3
    # The chain of single codes is another distribution: the test can fail.
    assert p_value(counts, Toy(system, params, order).joint(Knobs(), Guidance())) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_device_and_eight_have_one_loss(name):
    system, params = system_of(name)
    frozen = {"tokenizer": params["tokenizer"]}
    trained = {part: params[part] for part in ("backbone", "head")}
    batch = toy_labels(16) | {"codes": toy_codes(system, 16)}
    objective = Likelihood(system=system)
    one, many = (
        gradient_of(objective, place(trained), {}, place(frozen), rows(batch))
        for place, rows in ((lambda a: a, lambda a: a), (replicated, sharded))
    )
    close(many, one, rtol=1e-4, atol=1e-5)
    loss, aux = loss_of(objective, trained, {}, frozen, batch, train=True)
    assert float(aux.metrics["random_share"]) == 1.0
    evaluated, _ = loss_of(objective, trained, {}, frozen, batch)
    assert abs(float(loss) - float(evaluated)) > 1e-3  # in random orders, in raster order
