"""The sampler of flow matching: step after step of a schedule, each from noise by a flow (xAR).

A head of noisy context (`ar_jax.heads.flow`) is asked for the velocity through the backbone, which
has what is known in a cache: a step that is done is fed once more, clean and at time 0, before the
next begins. For another head the backbone makes hidden states of what is known, once a step.

Steps of one size run in a `lax.scan`, others by a program each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, Samples, System
from ar_jax.nn.flow import interpolate
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept, check_kept
from ar_jax.sampling.loop import check_keys, own_order, to_cells
from ar_jax.sampling.refine import UNUSED, decode_codes
from ar_jax.schedules import Schedule


@flax.struct.dataclass
class FlowNoise:
    """All that chance decides, in place of keys, in the order of the schedule."""

    start: Array  # float32 [B, L, C], standard normal: where the flow of a step begins
    steps: Array  # float32 [N, B, L, C], standard normal: of the flow's steps, the last unused


@dataclasses.dataclass(frozen=True)
class FlowSampler:
    """Samples from a system with a head of velocities."""

    system: System  # with the unrolled backbone and head
    params: Params  # {'tokenizer', 'backbone', 'head'}, the latter two unstacked

    @classmethod
    def create(cls, system: System, params: Params) -> FlowSampler:
        """From a system as it was trained and its parameters."""
        backbone, of_backbone = system.backbone.for_sampling(params["backbone"])
        head, of_head = system.head.for_sampling(params["head"])
        unrolled = dataclasses.replace(system, backbone=backbone, head=head)
        return cls(unrolled, dict(params, backbone=of_backbone, head=of_head))

    def __call__(
        self,
        cond: Cond,
        keys: Array | None = None,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        noise: FlowNoise | None = None,
        given: Array | None = None,
        keep: Array | None = None,
    ) -> Samples:
        """Draws one image for every condition.

        Args:
            cond: ``{'label': int32 [B]}``.
            keys: one typed key an image [B]; an image depends on its own alone. Not needed where
                ``noise`` is given, which comes first.
            knobs: of these the temperature, a factor on the noise of the flow's steps.
            guidance: default none.
            noise: in place of the keys'; see `draw_noise`.
            given, keep: codes [B, L, C] as images have them, and bool [B, L], which of them these
                images are to have; see `ar_jax.sampling.kept`. Within a step they go along with
                the others, with the noise of every time, so that these fit them.

        Returns:
            codes float32 [B, L, C], images float32 [B, H, W, channels] in [-1, 1], and the order.

        Raises:
            ValueError: if neither keys nor noise are given, they are not one for every condition,
                or knobs are set that mean nothing for continuous codes.
        """
        knobs = knobs or Knobs()
        knobs.check_unused(UNUSED, "continuous codes")
        schedule, head = self.system.schedule, self.system.head
        batch_size = len(jax.tree.leaves(cond)[0])
        check_keys(keys, batch_size)
        if keys is None and noise is None:
            raise ValueError(
                "neither keys nor noise are given: give one key an image (`image_keys`) or the "
                "noise; a flow begins with noise at any temperature"
            )
        keys = keys if noise is None else None  # one program, whoever gives both
        shape = (batch_size, schedule.length, head.code_width)
        if noise is not None:
            found = noise.start.shape, noise.steps.shape
            if found != (shape, (head.sampling_steps, *shape)):
                raise ValueError(
                    f"start and steps of the noise have the shapes {found}; they must be "
                    f"{(shape, (head.sampling_steps, *shape))}"
                )
        kept = check_kept(given, keep, shape)
        arguments, guided = self._arguments(cond, keys, knobs, guidance, noise)
        codes = draw_codes(self.system, *arguments, kept, guided=guided)
        order = own_order(schedule, batch_size)
        return Samples(codes=codes, images=self.decode(codes), order=order)

    def program(
        self,
        cond: Cond,
        keys: Array,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """How to lower the program that draws codes, and its arguments: for benchmarks."""
        arguments, guided = self._arguments(cond, keys, knobs or Knobs(), guidance, None)
        lower = functools.partial(draw_codes.lower, self.system, *arguments, guided=guided)
        return lower, arguments

    def _arguments(
        self,
        cond: Cond,
        keys: Array | None,
        knobs: Knobs,
        guidance: Guidance | None,
        noise: FlowNoise | None,
    ) -> tuple[tuple[Any, ...], bool]:
        """What `draw_codes` takes after the system, and whether it is guided."""
        schedule = self.system.schedule
        scales = (guidance or Guidance()).scales(schedule.num_steps, schedule.known)
        params = {name: self.params[name] for name in ("backbone", "head")}
        temperature = knobs.as_arrays().temperature
        arguments = (params, cond, keys, temperature, jnp.asarray(scales), noise)
        return arguments, bool(np.any(scales != 1.0))

    def decode(self, codes: Array, known: Array | None = None) -> Array:
        """Images [B, H, W, C] in [-1, 1] of codes [B, L, C], of which bool [B, L] are known."""
        return decode_codes(self.system, self.params["tokenizer"], codes, known)


def runs(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """Ranges (first, end) of steps of which one program draws each: of one size, as is the step
    before the first. Scales are each their own."""
    count, sizes = schedule.num_steps, schedule.sizes
    alone = len(schedule.grids) > 1
    edges = [
        step for step in range(count) if alone or step < 2 or len({*sizes[step - 2 : step + 1]}) > 1
    ]
    return tuple(itertools.pairwise((*edges, count)))


def draw_noise(system: System, keys: Array) -> FlowNoise:
    """The noise that keys [B] stand for."""
    schedule, head = system.schedule, system.head

    def rows(draw: Array | int) -> Array:
        parts = [
            _step_noise(keys, step, draw, (size, head.code_width))
            for step, size in enumerate(schedule.sizes)
        ]
        return jnp.concatenate(parts, axis=1)

    return FlowNoise(
        start=rows(0), steps=jax.vmap(lambda n: rows(n + 1))(jnp.arange(head.sampling_steps))
    )


def _step_noise(keys: Array, step: Array | int, draw: Array | int, shape: Any) -> Array:
    """Normal [B, n, C]: a function of the image's key, the step of the schedule, and which draw."""

    def one(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, step), draw), shape)

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnames=("system", "guided"))
def draw_codes(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    temperature: Array,
    scales: Array,
    noise: FlowNoise | None,
    kept: Kept | None = None,
    *,
    guided: bool,
) -> Array:
    """The sampling program: codes float32 [B, L, C], as images have them.

    Of ``keys`` and ``noise`` one is None.
    """
    schedule, backbone, head = system.schedule, system.backbone, system.head
    batch_size = len(jax.tree.leaves(cond)[0])
    width, starts = head.code_width, jnp.asarray(schedule.starts)
    places = None if schedule.cells is None else own_order(schedule, batch_size)
    kept = kept if kept is None or places is None else kept.taken(places)
    if guided:
        null = backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    of_backbone: Any = functools.partial(backbone.apply, {"params": params["backbone"]})
    of_head: Any = functools.partial(head.apply, {"params": params["head"]})

    def both(x: Array) -> Array:
        return jnp.concatenate([x, x]) if guided else x

    def begin(step: Any, before: Array | None, cache: Cache) -> tuple[Array | None, Cache]:
        """(hidden states of a step, if the head wants them, cache) from the codes before it."""
        with jax.named_scope("refine_backbone"):  # for `ar_jax.compilation.phases`
            if head.noisy_context:
                if before is not None:
                    clean = jnp.zeros((1, 1))
                    _, cache = of_backbone(both(before), cond, clean, step=step - 1, cache=cache)
                return None, cache
            context = None
            if before is not None:
                context = both(system.tokenizer.next_context(before, step - 1))
            return of_backbone(context, cond, step=step, cache=cache)

    def draw(step: Any, size: int, before: Array | None, cache: Cache) -> tuple[Array, Cache]:
        """(codes [B, n, C] of a step, cache)."""
        hidden, cache = begin(step, before, cache)

        def part(rows: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(rows, starts[step], size, axis)

        def velocity(x: Array, t: Array, cache: Cache) -> tuple[Array, Cache]:
            fed, at = both(x), jnp.reshape(t, (1, 1))
            states = hidden
            if head.noisy_context:
                with jax.named_scope("refine_backbone"):
                    states, cache = of_backbone(fed, cond, at, step=step, cache=cache)
            with jax.named_scope("refine_head"):
                found = of_head(states, fed, at)
                if guided:
                    found = head.guide(found[:batch_size], found[batch_size:], scales[step])
            return found, cache

        shape = (size, width)
        if noise is None:
            assert keys is not None
            begun = _step_noise(keys, step, 0, shape)
            later: Any = lambda n: _step_noise(keys, step, n + 1, shape)  # noqa: E731
        else:
            begun, later = part(noise.start, 1), part(noise.steps, 2)
        if kept is None:
            return head.flow.sample(velocity, begun, later, cache, temperature)
        stays = jax.tree.map(lambda rows: part(rows, 1), kept)

        def hold(x: Array, t: Array) -> Array:
            return stays.replace(codes=interpolate(stays.codes, begun, t)).force(x)

        codes, cache = head.flow.sample(velocity, begun, later, cache, temperature, hold)
        return stays.force(codes), cache

    cache = backbone.init_cache(2 * batch_size if guided else batch_size)
    before: Array | None = None
    parts: list[Array] = []
    for first, end in runs(schedule):
        size = schedule.sizes[first]
        if end - first == 1:
            before, cache = draw(first, size, before, cache)
            parts.append(before)
            continue

        def body(state: tuple, step: Array, size: int = size) -> tuple[tuple, Array]:
            codes, cache = draw(step, size, *state)
            return (codes, cache), codes

        (before, cache), drawn = jax.lax.scan(body, (before, cache), jnp.arange(first, end))
        parts.append(jnp.moveaxis(drawn, 0, 1).reshape(batch_size, -1, width))
    return to_cells(jnp.concatenate(parts, axis=1), places)
