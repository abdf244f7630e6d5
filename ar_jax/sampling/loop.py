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

from ar_jax.api import Array, Cond, Params, Samples, System
from ar_jax.sampling.companions import Companion, check_companions
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance, mixed_layers
from ar_jax.sampling.kept import Kept, check_kept, kept_first
from ar_jax.sampling.step import Stepper, padded, run_steps
from ar_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class CachedSampler:
    """Samples from a trained system.

    Build it once with `CachedSampler.create`, which unrolls the backbone and unstacks its
    parameters, then call it as often as wanted.
    """

    system: System  # with the unrolled backbone
    params: Params  # {'tokenizer', 'backbone' (unstacked), 'head'}
    companions: tuple[Companion, ...] = ()  # the weak one first; see `beside`

    @classmethod
    def create(cls, system: System, params: Params) -> CachedSampler:
        """From a system as it was trained and its parameters."""
        backbone, unstacked = system.backbone.for_sampling(params["backbone"])
        return cls(dataclasses.replace(system, backbone=backbone), dict(params, backbone=unstacked))

    def beside(self, *companions: Companion) -> CachedSampler:
        """This sampler with models that speak at every step: see `ar_jax.sampling.companions`.

        Raises:
            ValueError: a model of other steps, codes or conditions, or a second weak one.
        """
        check_companions(self.system, self.params, companions)
        ordered = sorted(companions, key=lambda companion: companion.role != "weak")
        return dataclasses.replace(self, companions=tuple(ordered))

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
        kept = check_kept(given, keep, (batch_size, *self.system.tokenizer.codes_shape))
        knobs, scales = by_step(schedule, knobs, guidance)
        knobs = knobs.spread(len(scales))
        knobs.check_unused(("choice_temperature", "confidence"), "codes drawn in a fixed order")
        check_chance(keys, noise, knobs.temperature)
        free = order is None and noise is None
        order = place_order(schedule, batch_size, keys, order, kept, free=free)
        keys = keys if noise is None else None  # one program, whoever gives both
        drawing = (cond, keys, knobs, jnp.asarray(scales), noise, order, kept)
        inputs, mixing = (self.system, self.params, *drawing), self.mixing(scales, guidance)
        if not knobs.smooth:
            codes = draw_codes(*inputs, **mixing)
            if order is None and schedule.cells is not None:
                order = own_order(schedule, batch_size)
            return Samples(codes=codes, images=self.decode(codes), order=order)
        if not self.system.tokenizer.quantizer.mixes:
            raise ValueError(
                "sampling.smooth=True mixes code vectors between scales, but the steps of this "
                "tokenizer see codes: set it to False"
            )
        codes, features = draw_features(*inputs, **mixing)
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
        knobs = knobs.spread(len(scales))
        mixing = self.mixing(scales, guidance)
        drawing = (cond, keys, knobs, jnp.asarray(scales), None, None, None)
        arguments = (self.params, *drawing, mixing.pop("companions"))
        lower = functools.partial(draw_codes.lower, self.system, *arguments, **mixing)
        return lower, arguments

    def mixing(self, scales: np.ndarray, guidance: Guidance | None) -> dict[str, Any]:
        """What a sampling program takes as ``guided``, ``layers`` and ``companions``.

        Models that change nothing, as guidance of scale 1 makes of the weak one, do not run.

        Raises:
            ValueError: layers that the backbone cannot mix, or a weak model cannot be mixed at.
        """
        layers, companions = mixed_layers(self.system.backbone, guidance), self.companions
        guided, weak = bool(np.any(scales != 1.0)), any(c.role == "weak" for c in companions)
        if weak and layers != (0,):
            raise ValueError(
                f"sampling.guidance.layers is {layers}: a weak model has no hidden states to mix; "
                "set it to (0,)"
            )
        if not guided:
            companions = tuple(c for c in companions if c.role != "weak")
        return {"guided": guided and not weak, "layers": layers, "companions": companions}

    def decode(self, codes: Array, steps: int | None = None) -> Array:
        """Images [B, H, W, C] in [-1, 1] of what the first ``steps`` steps determine."""
        return decode_codes(self.system, self.params["tokenizer"], codes, steps=steps)


def by_step(
    schedule: Schedule, knobs: Knobs | None, guidance: Guidance | None
) -> tuple[Knobs, np.ndarray]:
    """(checked knobs, guidance scale of every step, float32 [S])."""
    knobs = (knobs or Knobs()).as_arrays()
    knobs.check_steps(schedule.num_steps)
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


def place_order(
    schedule: Schedule,
    batch_size: int,
    keys: Array | None,
    order: Array | None,
    kept: Kept | None,
    *,
    free: bool,
) -> Array | None:
    """The order int32 [B, L] of the draws of B images; None: the schedule's own, in all steps.

    ``order`` where it is given, else of shuffled schedules the keys'; where an order is ``free``,
    cells that are kept come first.
    """
    if order is not None:
        order = check_order(order, batch_size, schedule.length)
    elif keys is not None and schedule.shuffled:
        order = draw_order(keys, schedule.length)
    if kept is not None and free and schedule.random:
        order = kept_first(own_order(schedule, 1) if order is None else order, kept.keep)
    return order


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
    companions: tuple[Companion, ...] = (),
    *,
    guided: bool,
    layers: tuple[int, ...] = (0,),
) -> Array:
    """The sampling program: codes [B, L(, bits)]. See `CachedSampler.__call__`."""
    inputs = (system, params, cond, keys, knobs, scales, noise, order, kept)
    return draw_steps(*inputs, guided=guided, layers=layers, companions=companions)[0]


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
    companions: tuple[Companion, ...] = (),
) -> tuple[Array, Array]:
    """As `draw_codes` for smooth draws: (codes of largest weight, features [B, h, w, C])."""
    inputs = (system, params, cond, keys, knobs, scales, noise, order, kept)
    return draw_steps(*inputs, guided=guided, layers=layers, companions=companions)


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
    companions: tuple[Companion, ...] = (),
    inverted: bool = False,
) -> tuple[Array, Any]:
    """The program itself, not compiled: (codes [B, L], what the tokenizer carries at the end).

    ``layers``: see `Guidance`.

    ``inverted``: in place of the codes, the Gumbel noise float32 [B, L, V], in the order of the
    draws, under which the codes of ``kept`` are drawn; see `ar_jax.sampling.invert`.
    """
    schedule, batch_size = system.schedule, len(jax.tree.leaves(cond)[0])
    if order is None and keys is not None and schedule.shuffled:
        order = draw_order(keys, schedule.length)
    places = own_order(schedule, batch_size) if order is None and schedule.cells else order
    kept = kept if kept is None or places is None else kept.taken(places)
    noise, kept = padded(schedule, (noise, kept))
    stepper = Stepper.create(
        system=system,
        params=params,
        cond=cond,
        keys=keys,
        knobs=knobs,
        scales=scales,
        noise=noise,
        order=order,
        kept=kept,
        guided=guided,
        layers=layers,
        companions=companions,
    )
    step = functools.partial(stepper, inverted=inverted)
    parts, state = run_steps(schedule, step, stepper.begin())
    made = jnp.concatenate(parts, axis=1)
    return made if inverted else to_cells(made, places), state.carry


def to_cells(codes: Array, order: Array | None) -> Array:
    """Codes [B, L] as they were drawn, at the positions ``order`` [B, L] that they belong to."""
    if order is None:
        return codes
    return jnp.zeros_like(codes).at[jnp.arange(len(codes))[:, None], order].set(codes)
