"""Continuous batching of raster codes: requests join and leave a batch of fixed slots.

Every slot has a cache, a position, a condition, a key, knobs and guidance of its own, all traced:
two programs, one that admits a request to a slot and one that draws the next codes of all slots,
serve whatever comes. A request gets what `CachedSampler` draws for its key and condition, whoever
is beside it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, System
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, by_step
from ar_jax.sampling.one_image import check_one_by_one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One image that is wanted.

    Attributes:
        cond: its condition, of classes ``{'label': 3}``: as of `CachedSampler`, without B.
        key: a typed key, see `ar_jax.sampling.loop.image_keys`.
        knobs, guidance: its own; None: plain sampling, no guidance.
        length: codes to draw, the first of the image; None: all.
    """

    cond: Cond
    key: Array
    knobs: Knobs | None = None
    guidance: Guidance | None = None
    length: int | None = None


class Slots(NamedTuple):
    """What N slots hold on the device; leaves of one slot have no N."""

    codes: Array  # int32 [N, L], 0 where none is drawn yet
    drawn: Array  # int32 [N], codes so far
    length: Array  # int32 [N], codes that are wanted; a slot with all of them is free
    cond: Cond  # leaves [N, ...]
    keys: Array  # [N]
    knobs: Knobs  # leaves [N, ...]
    scales: Array  # float32 [N, L]
    cache: Cache  # leaves [N, 2 or 1, H, T, K]: each slot's conditional and null rows


class ContinuousBatch:
    """A batch of slots that requests are drawn in, first come, first served.

    Args:
        sampler: of a system that draws one code a step from codes.
        slots: N, requests that are drawn at a time.
        guided: whether requests may have guidance, which doubles the work of all.
        codes_per_call: codes that each slot draws before requests can join and leave again.

    Raises:
        ValueError: another kind of system, or a number below 1.
    """

    def __init__(
        self, sampler: CachedSampler, *, slots: int, guided: bool = True, codes_per_call: int = 4
    ) -> None:
        check_one_by_one(sampler, "continuous batching")
        for name, value in (("slots", slots), ("codes_per_call", codes_per_call)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.sampler, self.guided, self.codes_per_call = sampler, guided, codes_per_call
        self._waiting: collections.deque[tuple[int, tuple]] = collections.deque()
        self._owners: list[int | None] = [None] * slots
        self._left = np.zeros(slots, np.int64)  # codes that a slot still has to draw
        self._submitted = 0
        self._slots: Slots | None = None

    @property
    def busy(self) -> bool:
        """Whether any request waits or is being drawn."""
        return bool(self._waiting) or any(owner is not None for owner in self._owners)

    def submit(self, request: Request) -> int:
        """Puts a request at the end of the queue; its number, from 0.

        Raises:
            ValueError: a length that the image does not have, guidance where none is allowed for,
                or knobs that mean nothing here.
        """
        schedule = self.sampler.system.schedule
        length = schedule.length if request.length is None else request.length
        if not 1 <= length <= schedule.length:
            raise ValueError(f"length is {length}; it must be between 1 and {schedule.length}")
        knobs, scales = by_step(schedule, request.knobs, request.guidance)
        if knobs.smooth:
            raise ValueError("sampling.smooth mixes codes between scales: there are none here")
        knobs.check_unused(("choice_temperature", "confidence"), "codes drawn in a fixed order")
        if not self.guided and bool(np.any(scales != 1.0)):
            raise ValueError("the request has guidance, but guided=False says that none has")
        knobs = knobs.spread(len(scales))
        cond = jax.tree.map(jnp.asarray, request.cond)
        inputs = (cond, request.key, knobs, jnp.asarray(scales), jnp.int32(length))
        self._waiting.append((self._submitted, inputs))
        self._submitted += 1
        return self._submitted - 1

    def step(self) -> dict[int, Array]:
        """Admits who waits, draws the next codes of all; number -> codes int32 [L] of who is done.

        Of a request with a length, the cells behind its last code are 0.
        """
        system, params = self.sampler.system, self.sampler.params
        for slot, owner in enumerate(self._owners):
            if owner is not None or not self._waiting:
                continue
            number, inputs = self._waiting.popleft()
            if self._slots is None:
                self._slots = empty_slots(system, len(self._owners), inputs, self.guided)
            self._slots = admit(system, params, self._slots, slot, inputs, guided=self.guided)
            self._owners[slot], self._left[slot] = number, int(inputs[-1]) - 1
        if self._slots is None:
            return {}
        if self._left.any():
            self._slots = draw_next(
                *(system, params, self._slots), count=self.codes_per_call, guided=self.guided
            )
        self._left = np.maximum(self._left - self.codes_per_call, 0)
        done = {}
        for slot, owner in enumerate(self._owners):
            if owner is not None and not self._left[slot]:
                done[owner], self._owners[slot] = self._slots.codes[slot], None
        return done

    def run(self, requests: list[Request]) -> list[Array]:
        """Draws all of ``requests``; the codes int32 [L] of each, in their order."""
        numbers = [self.submit(request) for request in requests]
        done: dict[int, Array] = {}
        while self.busy:
            done |= self.step()
        return [done[number] for number in numbers]


def empty_slots(system: System, count: int, inputs: tuple, guided: bool) -> Slots:
    """Free slots, for requests of the shapes of ``inputs``; see `ContinuousBatch.submit`."""
    cond, key, knobs, scales, _ = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), inputs
    )
    cache = jax.vmap(lambda _: system.backbone.init_cache(2 if guided else 1))(jnp.arange(count))
    codes = jnp.zeros((count, system.schedule.length), jnp.int32)
    drawn, length = jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32)  # both are donated
    return Slots(codes, drawn, length, cond, key, knobs, scales, cache)


def next_code(
    system: System, params: Params, slot: Slots, context: Array | None, *, guided: bool
) -> tuple[Array, Cache]:
    """(the next code int32 [], the cache with it) of one slot; ``context`` int32 [1, 1]."""
    index = jnp.minimum(slot.drawn, system.schedule.length - 1)
    cond = jax.tree.map(lambda leaf: leaf[None], slot.cond)
    if guided:
        null = system.backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        context = None if context is None else jnp.concatenate([context, context])
    hidden, cache = system.backbone.apply(
        {"params": params["backbone"]},
        context,
        cond,
        step=0 if context is None else index,
        cache=slot.cache,
    )
    logits = system.head.apply({"params": params["head"]}, hidden)  # [1 or 2, 1, V]
    if guided:
        logits = system.head.guide(logits[:1], logits[1:], slot.scales[index])
    knobs = slot.knobs.at(index)
    noise = jax.random.gumbel(jax.random.fold_in(slot.keys, index), logits.shape[1:])
    gumbel = jnp.where(knobs.temperature > 0, noise, 0.0)
    return system.head.draw(truncate(logits, knobs), gumbel[None])[0, 0], cache


@functools.partial(jax.jit, static_argnames=("system", "guided"), donate_argnames="slots")
def admit(
    system: System, params: Params, slots: Slots, slot: Any, inputs: tuple, *, guided: bool
) -> Slots:
    """The slots with a new request in number ``slot``, its first code drawn."""
    cond, key, knobs, scales, length = inputs
    codes = jnp.zeros_like(slots.codes[0])
    cache = system.backbone.init_cache(2 if guided else 1)
    new = Slots(codes, jnp.int32(0), length, cond, key, knobs, scales, cache)
    code, cache = next_code(system, params, new, None, guided=guided)
    new = new._replace(codes=codes.at[0].set(code), drawn=jnp.int32(1), cache=cache)
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), slots, new)


@functools.partial(jax.jit, static_argnames=("system", "count", "guided"), donate_argnames="slots")
def draw_next(system: System, params: Params, slots: Slots, *, count: int, guided: bool) -> Slots:
    """The slots after up to ``count`` more codes of each; full ones do not change."""

    def one(slot: Slots) -> Slots:
        context = slot.codes[slot.drawn - 1].reshape(1, 1)
        code, cache = next_code(system, params, slot, context, guided=guided)
        wanted = slot.drawn < slot.length
        place = jnp.where(wanted, slot.drawn, len(slot.codes))  # behind the last: dropped
        return slot._replace(
            codes=slot.codes.at[place].set(code, mode="drop"),
            drawn=slot.drawn + wanted,
            cache=cache,
        )

    return jax.lax.fori_loop(0, count, lambda _, slots: jax.vmap(one)(slots), slots)
