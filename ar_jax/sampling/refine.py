"""Iterative refinement: sets of codes in random order, each given all that are known (MAR).

One jitted program runs all iterations. Their sizes differ, so consecutive iterations are grouped:
a group is a `lax.scan` padded to its largest member, and a program has few groups however many
iterations there are. With as few iterations as groups nothing is padded.
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

from ar_jax.api import Array, Cond, Params, Samples, System
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept, check_kept, kept_first
from ar_jax.sampling.loop import check_keys, draw_order, image_keys
from ar_jax.schedules import Schedule

MAX_GROUPS = 8
UNUSED = tuple(field.name for field in dataclasses.fields(Knobs) if field.name != "temperature")


@flax.struct.dataclass
class RefineNoise:
    """All that chance decides, in place of keys.

    The n-th row of the head's noise belongs to the code drawn n-th, position ``order[n]``.
    """

    order: Array  # int32 [B, L], the positions in the order in which they are drawn
    head: Any  # what codes are drawn from, see the head's `noise`: leaves [B, L, ...]


@dataclasses.dataclass(frozen=True)
class RefineSampler:
    """Samples from a system of an encoder-decoder backbone and a head of continuous codes."""

    system: System
    params: Params  # {'tokenizer', 'backbone', 'head'}, as trained

    @classmethod
    def create(cls, system: System, params: Params) -> RefineSampler:
        """From a system as it was trained and its parameters."""
        return cls(system, params)

    def __call__(
        self,
        cond: Cond,
        keys: Array | None = None,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        noise: RefineNoise | None = None,
        given: Array | None = None,
        keep: Array | None = None,
    ) -> Samples:
        """Draws one image for every condition.

        Args:
            cond: ``{'label': int32 [B]}``.
            keys: one typed key an image [B]; an image depends on its own alone. Not needed where
                ``noise`` is given, which comes first.
            knobs: of these the temperature; see the head's `draw`.
            guidance: default none.
            noise: in place of the keys'; see `draw_noise`.
            given, keep: codes [B, L, C] as images have them, and bool [B, L], which of them these
                images are to have; see `ar_jax.sampling.kept`. They are known from the start, as
                if the schedule had drawn them first: its last iterations draw the others.

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
                "noise; the order of the codes is drawn at any temperature"
            )
        keys = keys if noise is None else None  # one program, whoever gives both
        if noise is not None:
            draw = functools.partial(draw_noise, self.system)
            anew = jax.eval_shape(draw, image_keys(0, 0, batch_size))
            found, wanted = (jax.tree.map(jnp.shape, each) for each in (noise, anew))
            if found != wanted:
                raise ValueError(f"the noise has the shapes {found}; they must be {wanted}")
        kept = check_kept(given, keep, (batch_size, schedule.length, head.code_width))
        arguments, guided = self._arguments(cond, keys, knobs, guidance, noise)
        codes, order = draw_codes(self.system, *arguments, kept, guided=guided)
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
        noise: RefineNoise | None,
    ) -> tuple[tuple[Any, ...], bool]:
        """What `draw_codes` takes after the system, and whether it is guided."""
        schedule = self.system.schedule
        guidance = guidance or Guidance()
        guidance.check_layers(0)
        scales = guidance.scales(schedule.num_steps, schedule.known)
        params = {name: self.params[name] for name in ("backbone", "head")}
        temperature = knobs.as_arrays().temperature
        arguments = (params, cond, keys, temperature, jnp.asarray(scales), noise)
        return arguments, bool(np.any(scales != 1.0))

    def decode(self, codes: Array, known: Array | None = None) -> Array:
        """Images [B, H, W, C] in [-1, 1] of codes [B, L, C], of which bool [B, L] are known."""
        return decode_codes(self.system, self.params["tokenizer"], codes, known)


@functools.partial(jax.jit, static_argnames="system")
def decode_codes(system: System, tokenizer: Params, codes: Array, known: Array | None) -> Array:
    """See `RefineSampler.decode`."""
    return system.tokenizer.apply({"params": tokenizer}, codes, known, method="decode")


def groups(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """Ranges (first, end) of iterations that share a program, as even as can be."""
    edges = np.linspace(0, schedule.num_steps, min(MAX_GROUPS, schedule.num_steps) + 1).round()
    return tuple((int(a), int(b)) for a, b in itertools.pairwise(edges))


def draw_noise(system: System, keys: Array) -> RefineNoise:
    """The noise that keys [B] stand for."""
    length = system.schedule.length
    drawn = _head_noise(system.head, keys, jnp.arange(length))
    return RefineNoise(order=draw_order(keys, length), head=drawn)


def _head_noise(head: Any, keys: Array, ranks: Array) -> Any:
    """The head's noise, leaves [B, n, ...], of the codes drawn at these ranks [n]."""

    def one(key: Array, rank: Array) -> Any:
        return head.noise(jax.random.fold_in(key, rank))

    return jax.vmap(lambda key: jax.vmap(lambda rank: one(key, rank))(ranks))(keys)


def _without_output(run: Any) -> Any:
    """A `lax.scan` body of a function that only carries."""
    return lambda carry, xs: (run(carry, xs), None)


def _where_needed(run: Any, least: Array) -> Any:
    """An iteration that is left out if all its codes are among the ``least`` kept in any image."""

    def needed(codes: Array, xs: dict[str, Array]) -> Array:
        draws = xs["first"] + xs["count"] > least
        return jax.lax.cond(draws, run, lambda codes, xs: codes, codes, xs)

    return needed


@functools.partial(jax.jit, static_argnames=("system", "guided"))
def draw_codes(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    temperature: Array,
    scales: Array,
    noise: RefineNoise | None,
    kept: Kept | None = None,
    *,
    guided: bool,
) -> tuple[Array, Array]:
    """The sampling program: (codes float32 [B, L, C], order int32 [B, L]).

    Of ``keys`` and ``noise`` one is None.
    """
    schedule, backbone, head = system.schedule, system.backbone, system.head
    batch_size = len(jax.tree.leaves(cond)[0])
    length, width = schedule.length, head.code_width
    apply: Any = functools.partial(backbone.apply, {"params": params["backbone"]})
    images = jnp.arange(batch_size)[:, None]
    if noise is None:
        assert keys is not None
        order = draw_order(keys, length)
    else:
        order = noise.order
    codes = jnp.zeros((batch_size, length, width), jnp.float32)
    held = jnp.zeros((1, 1), jnp.int32)  # codes that are known before the first iteration
    if kept is not None:
        order, codes = kept_first(order, kept.keep), kept.force(codes)
        held = kept.keep.sum(1, keepdims=True)  # [B, 1]
    largest = max(schedule.sizes)
    padded = jnp.pad(order, ((0, 0), (0, largest)))  # a slice must not be pushed back at the end
    if guided:
        cond = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), cond, backbone.conditioner.null(cond)
        )

    def both(x: Array) -> Array:
        return jnp.concatenate([x, x]) if guided else x

    def draws(first: Array, count: int) -> Any:
        """The head's noise, leaves [B n, ...], of the codes drawn from the first-th on."""
        ranks = first + jnp.arange(count)
        if noise is None:
            assert keys is not None
            drawn = _head_noise(head, keys, ranks)
        else:
            index = jnp.minimum(ranks, length - 1)  # padding takes any
            drawn = jax.tree.map(lambda x: jnp.take(x, index, 1), noise.head)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)

    def hidden_at(codes: Array, seen: Array, known: Array | None, wanted: Array) -> Array:
        """Hidden states [B or 2B, n, D] of the positions ``wanted`` [B, n]."""
        fed = both(jnp.take_along_axis(codes, seen[..., None], axis=1))
        seen, known = both(seen), None if known is None else both(known)
        with jax.named_scope("refine_backbone"):  # as that below: for `ar_jax.compilation.phases`
            encoded = apply(fed, cond, known, seen, method="encode")
            hidden = apply(encoded, known, seen, method="decode")
            return jnp.take_along_axis(hidden, both(wanted)[..., None], axis=1)

    def iterate(codes: Array, xs: dict[str, Array], size: int, visible: int, exact: bool) -> Array:
        """One iteration of at most ``size`` new codes that sees at most ``visible``."""
        first, ranks = xs["first"], jnp.arange(size)[None]
        fresh = (ranks < xs["count"]) & (first + ranks >= held)
        fresh = jnp.broadcast_to(fresh, (batch_size, size))
        known = None if exact else jnp.arange(visible)[None] < jnp.maximum(first, held)
        known = None if known is None else jnp.broadcast_to(known, (batch_size, visible))
        wanted = jax.lax.dynamic_slice_in_dim(padded, first, size, axis=1)  # [B, n]
        hidden = hidden_at(codes, order[:, :visible], known, wanted).reshape(
            -1, backbone.hidden_width
        )
        split = batch_size * size
        with jax.named_scope("refine_head"):
            drawn: Any = head.draw(
                params["head"],
                hidden[:split],
                draws(first, size),
                null=hidden[split:] if guided else None,
                scale=xs["scale"],
                temperature=temperature,
            )
        places = jnp.where(fresh, wanted, length)
        return codes.at[images, places].set(drawn.reshape(batch_size, size, width), mode="drop")

    starts, sizes = np.asarray(schedule.starts), np.asarray(schedule.sizes)
    for begin, end in groups(schedule):
        part = slice(begin, end)
        xs = {
            "first": jnp.asarray(starts[part], jnp.int32),
            "count": jnp.asarray(sizes[part], jnp.int32),
            "scale": scales[part],
        }
        run = functools.partial(
            iterate,
            size=int(sizes[part].max()),
            visible=int(starts[end - 1]) if kept is None else length,
            exact=kept is None and end - begin == 1,
        )
        if kept is not None:
            run = _where_needed(run, held.min())
        codes, _ = jax.lax.scan(_without_output(run), codes, xs)
    return codes, order
