"""The cached sampler: one jitted program draws all steps of a schedule, a second decodes the codes.

Steps of one size (raster, groups) run in a `lax.scan`; ragged ones (next-scale) as a Python loop
over static slices inside the same program, or, where they are many, padded in a few scans, see
`Schedule.segments`. Labels, keys, knobs, guidance and what an edit keeps are traced, so none of
them recompiles either; only another batch size does, and of the first switching guidance or editing
on or off, or from keys to noise.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, Samples, System
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance, mixed_layers
from ar_jax.sampling.kept import Kept, check_kept, kept_first
from ar_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class CachedSampler:
    """Samples from a trained system.

    Build it once with `CachedSampler.create`, which unrolls the backbone and unstacks its
    parameters, then call it as often as wanted.
    """

    system: System  # with the unrolled backbone
    params: Params  # {'tokenizer', 'backbone' (unstacked), 'head'}

    @classmethod
    def create(cls, system: System, params: Params) -> CachedSampler:
        """From a system as it was trained and its parameters."""
        backbone, unstacked = system.backbone.for_sampling(params["backbone"])
        return cls(dataclasses.replace(system, backbone=backbone), dict(params, backbone=unstacked))

    def __call__(
        self,
        cond: Cond,
        keys: Array | None = None,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        noise: Array | None = None,
        order: Array | None = None,
        given: Array | None = None,
        keep: Array | None = None,
    ) -> Samples:
        """Draws one image for every condition.

        Args:
            cond: the condition, for classes ``{'label': int32 [B]}``.
            keys: one typed key an image [B], so that an image depends on its key and condition
                and not on the batch it was drawn in. See `image_keys`. Not needed where ``noise``
                is given, which comes first, or where temperature 0 leaves nothing to chance.
            knobs: temperature and filters; default plain sampling.
            guidance: default none.
            noise: float32 [B, L, V] (of bits [B, L, bits, 2]) standard Gumbel noise in place of the
                keys', in the order of the draws.
            order: int32 [B, L], the cell of every draw. Default: of shuffled schedules a random
                one for every key, of others, and without keys, the schedule's own. Needs a decoder
                that takes orders.
            given, keep: codes [B, L] as images have them, and bool [B, L], which of them these
                images are to have; see `ar_jax.sampling.kept`. A kept code is taken when its turn
                comes, so that what is drawn later is drawn given it. A schedule of random orders
                takes them first, unless an order or noise is given.

        Returns:
            codes int32 [B, L] cell after cell, images float32 [B, H, W, C] in [-1, 1], and the
            order of the draws unless it is cell after cell.

        Raises:
            ValueError: if neither keys nor noise are given for a temperature above 0, if keys,
                noise, order or what is kept are not one for every condition, an order is no
                permutation, or the tokenizer cannot mix codes for ``knobs.smooth``.
        """
        schedule = self.system.schedule
        batch_size = len(jax.tree.leaves(cond)[0])
        check_keys(keys, batch_size)
        if noise is not None and noise.shape[:2] != (batch_size, schedule.length):
            raise ValueError(
                f"the noise has the shape {noise.shape}; it must begin with "
                f"{(batch_size, schedule.length)}, images and codes"
            )
        if order is not None:
            order = check_order(order, batch_size, schedule.length)
        kept = check_kept(given, keep, (batch_size, *self.system.tokenizer.codes_shape))
        knobs, scales = by_step(schedule, knobs, guidance)
        knobs.check_unused(("choice_temperature", "confidence"), "codes drawn in a fixed order")
        check_chance(keys, noise, knobs.temperature)
        free = order is None and noise is None and schedule.random
        if order is None and keys is not None and schedule.shuffled:
            order = draw_order(keys, schedule.length)
        if kept is not None and free:
            own = own_order(schedule, 1) if order is None else order
            order = kept_first(own, kept.keep)
        keys = keys if noise is None else None  # one program, whoever gives both
        guided = bool(np.any(scales != 1.0))
        layers = mixed_layers(self.system.backbone, guidance)
        drawing = (cond, keys, knobs, jnp.asarray(scales), noise, order, kept)
        inputs = (self.system, self.params, *drawing)
        if not knobs.smooth:
            codes = draw_codes(*inputs, guided=guided, layers=layers)
            if order is None and schedule.cells is not None:
                order = own_order(schedule, batch_size)
            return Samples(codes=codes, images=self.decode(codes), order=order)
        if not self.system.tokenizer.quantizer.mixes:
            raise ValueError(
                "sampling.smooth=True mixes code vectors between scales, but the steps of this "
                "tokenizer see codes: set it to False"
            )
        codes, features = draw_features(*inputs, guided=guided, layers=layers)
        images = decode_features(self.system, self.params["tokenizer"], features)
        return Samples(codes=codes, images=images)

    def program(
        self,
        cond: Cond,
        keys: Array,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """How to lower the program that draws codes, and its arguments: for benchmarks."""
        knobs, scales = by_step(self.system.schedule, knobs, guidance)
        arguments = (self.params, cond, keys, knobs, jnp.asarray(scales), None, None)
        guided = bool(np.any(scales != 1.0))
        layers = mixed_layers(self.system.backbone, guidance)
        options = {"guided": guided, "layers": layers}
        lower = functools.partial(draw_codes.lower, self.system, *arguments, **options)
        return lower, arguments

    def decode(self, codes: Array, steps: int | None = None) -> Array:
        """Images [B, H, W, C] in [-1, 1] of what the first ``steps`` steps determine."""
        return decode_codes(self.system, self.params["tokenizer"], codes, steps=steps)


def by_step(
    schedule: Schedule, knobs: Knobs | None, guidance: Guidance | None
) -> tuple[Knobs, np.ndarray]:
    """(checked knobs, guidance scale of every step, float32 [S])."""
    knobs = (knobs or Knobs()).as_arrays()
    factors = len(knobs.step_temperatures)
    if factors not in (0, schedule.num_steps):
        raise ValueError(
            f"sampling.step_temperatures has {factors} numbers; the schedule has "
            f"{schedule.num_steps} steps: give one for each"
        )
    return knobs, (guidance or Guidance()).scales(schedule.num_steps, schedule.known)


def check_chance(keys: Array | None, noise: Any, temperature: Array | float) -> None:
    """Raises ValueError where neither keys nor noise are given for draws left to chance."""
    if keys is None and noise is None and temperature > 0:
        raise ValueError(
            f"neither keys nor noise are given for sampling.temperature {temperature}: give one "
            "key an image (`image_keys`) or the noise; only temperature 0 needs none"
        )


def check_keys(keys: Array | None, batch_size: int) -> None:
    """Raises ValueError unless ``keys``, where they are given, are one for every condition."""
    if keys is not None and len(keys) != batch_size:
        raise ValueError(
            f"there are {len(keys)} keys for {batch_size} conditions: give one key an image"
        )


def check_order(order: Any, batch_size: int, length: int) -> Array:
    """``order`` as int32 [B, L]; ValueError unless its rows are permutations of 0 ... L - 1."""
    cells = np.asarray(order)
    if cells.shape != (batch_size, length) or not (np.sort(cells) == np.arange(length)).all():
        raise ValueError(
            f"the order has the shape {cells.shape}; it must be {(batch_size, length)}, each row a "
            f"permutation of the cells 0 to {length - 1}"
        )
    return jnp.asarray(cells, jnp.int32)


@functools.partial(jax.jit, static_argnames="length")
def draw_order(keys: Array, length: int) -> Array:
    """A random permutation int32 [B, L] for every key."""
    rows = jnp.arange(length, dtype=jnp.int32)
    return jax.vmap(lambda key: jax.random.permutation(jax.random.fold_in(key, length), rows))(keys)


def own_order(schedule: Schedule, batch_size: int) -> Array:
    """The cells [B, L] as the schedule goes through them."""
    cells = range(schedule.length) if schedule.cells is None else schedule.cells
    return jnp.broadcast_to(jnp.asarray(cells, jnp.int32), (batch_size, schedule.length))


def image_keys(seed: int, first: int, count: int) -> Array:
    """Typed keys [count] of the images ``first``, ``first + 1``, ... of a seed."""
    base = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(first, first + count))


@functools.partial(jax.jit, static_argnames=("system", "steps"))
def decode_codes(system: System, tokenizer: Params, codes: Array, steps: int | None) -> Array:
    """See `CachedSampler.decode`."""
    return system.tokenizer.apply({"params": tokenizer}, codes, steps, method="decode")


@functools.partial(jax.jit, static_argnames="system")
def decode_features(system: System, tokenizer: Params, features: Array) -> Array:
    """Images of what `draw_features` gives."""
    return system.tokenizer.apply({"params": tokenizer}, features, method="decode_features")


@functools.partial(jax.jit, static_argnames=("system", "guided", "layers"))
def draw_codes(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    knobs: Knobs,
    scales: Array,
    noise: Array | None,
    order: Array | None = None,
    kept: Kept | None = None,
    *,
    guided: bool,
    layers: tuple[int, ...] = (0,),
) -> Array:
    """The sampling program: codes [B, L(, bits)]. See `CachedSampler.__call__`."""
    inputs = (system, params, cond, keys, knobs, scales, noise, order, kept)
    return draw_steps(*inputs, guided=guided, layers=layers)[0]


@functools.partial(jax.jit, static_argnames=("system", "guided", "layers"))
def draw_features(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    knobs: Knobs,
    scales: Array,
    noise: Array | None,
    order: Array | None = None,
    kept: Kept | None = None,
    *,
    guided: bool,
    layers: tuple[int, ...] = (0,),
) -> tuple[Array, Array]:
    """As `draw_codes` for smooth draws: (codes of largest weight, features [B, h, w, C])."""
    inputs = (system, params, cond, keys, knobs, scales, noise, order, kept)
    return draw_steps(*inputs, guided=guided, layers=layers)


def draw_steps(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    knobs: Knobs,
    scales: Array,
    noise: Array | None,
    order: Array | None = None,
    kept: Kept | None = None,
    *,
    guided: bool,
    layers: tuple[int, ...] = (0,),
    inverted: bool = False,
) -> tuple[Array, Any]:
    """The program itself, not compiled: (codes [B, L], what the tokenizer carries at the end).

    ``layers``: see `Guidance`.

    ``inverted``: in place of the codes, the Gumbel noise float32 [B, L, V], in the order of the
    draws, under which the codes of ``kept`` are drawn; see `ar_jax.sampling.invert`.
    """
    schedule, batch_size = system.schedule, len(jax.tree.leaves(cond)[0])
    starts = jnp.asarray(schedule.starts)
    blocks = tuple(layer for layer in layers if layer < 0)
    if guided:
        null = system.backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    if order is None and keys is not None and schedule.shuffled:
        order = draw_order(keys, schedule.length)
    orders = jnp.concatenate([order, order]) if guided and order is not None else order
    places = own_order(schedule, batch_size) if order is None and schedule.cells else order
    kept = kept if kept is None or places is None else kept.taken(places)

    def padded(rows: Array) -> Array:
        """[B, L, ...] with room behind the last code for what a segment may have as padding."""
        behind = ((0, 0), (0, max(schedule.sizes) - 1), *((0, 0),) * (rows.ndim - 2))
        return jnp.pad(rows, behind)

    noise, kept = jax.tree.map(padded, (noise, kept))

    def step(index: Any, segment: Any, context: Array | None, carry: Any, cache: Cache) -> tuple:
        """One step: (codes [B, n] or their noise, the tokenizer's carry, next context, cache)."""
        filters = knobs.at(index)
        if guided and context is not None:
            context = jnp.concatenate([context, context])
        hidden, cache = system.backbone.apply(
            {"params": params["backbone"]},
            context,
            cond,
            order=orders,
            step=index,
            segment=segment,
            cache=cache,
            **({"mixing": (blocks, scales[index])} if guided and blocks else {}),
        )
        if guided and 0 not in layers:
            hidden = hidden[:batch_size]
        logits = system.head.apply({"params": params["head"]}, hidden)  # [B or 2B, n, V]
        if guided and 0 in layers:
            logits = system.head.guide(logits[:batch_size], logits[batch_size:], scales[index])
        gumbel = jnp.where(filters.temperature > 0, step_noise(index, logits), 0.0)
        logits = truncate(logits, filters)
        part = jax.tree.map(lambda rows: of_step(rows, index, logits.shape[1]), kept)
        if inverted:
            assert part is not None
            gumbel = system.head.invert(logits, part.codes, gumbel)
        if knobs.smooth:
            ratio = index / max(schedule.num_steps - 1, 1)
            drawn = system.head.soften(logits, gumbel, ratio)  # [B, n, V]
            if part is not None:
                drawn = part.mix(drawn)
            codes = jnp.argmax(drawn, axis=-1).astype(jnp.int32)
        else:
            codes = system.head.draw(logits, gumbel)
            drawn = codes = codes if part is None else part.force(codes)
        carry, context = system.tokenizer.apply(
            {"params": params["tokenizer"]}, carry, drawn, index, method="advance"
        )
        return gumbel if inverted else codes, carry, context, cache

    def of_step(rows: Array, index: Any, count: int) -> Array:
        """[B, n, ...] of [B, L, ...] in the order of the draws."""
        if isinstance(index, int):
            return rows[:, schedule.starts[index] : schedule.starts[index] + count]
        return jax.lax.dynamic_slice_in_dim(rows, starts[index], count, axis=1)

    def step_noise(index: Any, logits: Array) -> Array:
        """Gumbel noise [B, n, V], zero without keys."""
        if noise is not None:
            return of_step(noise, index, logits.shape[1])
        if keys is None:
            return jnp.zeros_like(logits)
        return jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, index), logits.shape[1:])
        )(keys)

    cache = system.backbone.init_cache(2 * batch_size if guided else batch_size)
    carry = system.tokenizer.apply({"params": params["tokenizer"]}, batch_size, method="begin")
    scans = any(end - first > 1 for first, end in schedule.segments)
    context: Any = None
    parts: list[Array] = []
    for segment in schedule.segments:
        first, end = segment
        if end - first == 1:
            # The names are for `ar_jax.compilation.phases`.
            with jax.named_scope("prefill" if scans and not first else f"step_{first}"):
                codes, carry, context, cache = step(first, None, context, carry, cache)
            parts.append(codes)
            continue
        sizes = schedule.sizes[first:end]
        width = max(schedule.sizes[first - 1 : end])

        def body(state: tuple, index: Array, segment=segment, width=width) -> tuple[tuple, Array]:
            context, carry, cache = state
            codes, carry, context, cache = step(index, segment, context, carry, cache)
            return (widened(context, width), carry, cache), codes

        state = (widened(context, width), carry, cache)
        with jax.named_scope("decode"):
            (context, carry, cache), drawn = jax.lax.scan(body, state, jnp.arange(first, end))
        drawn = jnp.moveaxis(drawn, 0, 1)  # [S', B, n, ...] -> [B, S', n, ...]
        if len(set(sizes)) > 1:
            real = np.arange(max(sizes))[None] < np.asarray(sizes)[:, None]
            parts.append(drawn[(slice(None), *np.nonzero(real))])
        else:
            parts.append(drawn.reshape(batch_size, -1, *drawn.shape[3:]))
        context = context[:, : sizes[-1]]
    made = jnp.concatenate(parts, axis=1)
    return made if inverted else to_cells(made, places), carry


def widened(context: Array, width: int) -> Array:
    """Codes [B, n] of a step, [B, width] with zeros behind them."""
    return jnp.pad(context, ((0, 0), (0, width - context.shape[1])))


def to_cells(codes: Array, order: Array | None) -> Array:
    """Codes [B, L] as they were drawn, at the positions ``order`` [B, L] that they belong to."""
    if order is None:
        return codes
    return jnp.zeros_like(codes).at[jnp.arange(len(codes))[:, None], order].set(codes)
