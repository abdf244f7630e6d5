"""Sampling of nested schedules: a patch is drawn by the steps of the level below (2502.17437).

One jitted program holds a `lax.scan` for every level, one inside the other. A level that takes its
patches one by one keeps a cache of its own, which begins anew with every image of the level. A
masked level draws sets of patches in a random order, padded to the largest; the level below draws
all patches of a set, of all images, as one batch. Guidance mixes the logits of pixels alone: both
halves of a batch, with the condition and without, go down through all levels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cond, Params, Samples, System
from ar_jax.nn.patches import patchify, unpatchify
from ar_jax.sampling.filters import BY_ENTROPY, BY_STEP, Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept, check_kept, kept_first
from ar_jax.sampling.loop import by_step, check_chance, check_keys, decode_codes, draw_order

UNUSED = ("smooth", "choice_temperature", "confidence", *BY_STEP, *BY_ENTROPY)
CHANNEL = 2**20  # above the number of any patch


@flax.struct.dataclass
class NestedNoise:
    """What chance decides, in place of keys; patches of all levels by their place in the image.

    ``orders`` are of masked levels, int32 [B, L_0, ..., L_i] of level i, each the patches in the
    order in which they are drawn; None of other levels. ``gumbel`` are of mean colours,
    [B, L_0, ..., L_(i-1), C, V] of level i or None, and last of pixels, [B, L_0, ..., C, V];
    () where temperature 0 leaves nothing to them.
    """

    orders: tuple[Array | None, ...]
    gumbel: tuple[Array | None, ...] = ()


@flax.struct.dataclass
class Images:
    """What the images of a level are drawn with, one a row."""

    keys: Array | None  # [N]
    noise: NestedNoise | None  # without the axes of the levels above but for one, the row
    values: Array | None  # int32 [N, C, s, s], of which
    keep: Array | None  # bool [N, s, s] stay

    def patches(self, places: Array, size: int) -> Images:
        """Of the patches int32 [N, n] of ``size`` pixels: [N n]."""
        count = places.shape[1]
        rows = jnp.arange(len(places))[:, None]

        def cut(pixels: Array) -> Array:
            chosen = patchify(pixels, size)[rows, places]
            return chosen.reshape(-1, *chosen.shape[2:])

        keys, noise = self.keys, self.noise
        if keys is not None:
            inner = jax.vmap(jax.random.fold_in, (None, 0))
            keys = jax.vmap(inner)(keys, places).reshape(len(places) * count)
        if noise is not None:
            taken = NestedNoise(orders=noise.orders[1:], gumbel=noise.gumbel[1:])
            noise = jax.tree.map(lambda x: x[rows, places].reshape(-1, *x.shape[2:]), taken)
        if self.values is None or self.keep is None:
            return Images(keys=keys, noise=noise, values=None, keep=None)
        keep = cut(self.keep[:, None])[:, 0]
        return Images(keys=keys, noise=noise, values=cut(self.values), keep=keep)


@dataclasses.dataclass(frozen=True)
class NestedSampler:
    """Samples from a system of a fractal backbone and a pixel head."""

    system: System  # with the unrolled backbone
    params: Params  # {'tokenizer', 'backbone' (unstacked), 'head'}

    @classmethod
    def create(cls, system: System, params: Params) -> NestedSampler:
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
        noise: NestedNoise | None = None,
        given: Array | None = None,
        keep: Array | None = None,
    ) -> Samples:
        """Draws one image for every condition.

        Args:
            cond: ``{'label': int32 [B]}``.
            keys: one typed key an image [B]; an image depends on its own alone. Not needed where
                ``noise`` is given, or where temperature 0 and no masked level leave nothing to
                chance.
            knobs: temperature and filters of each channel's draw.
            guidance: by the steps of the first level; default none.
            noise: in place of the keys'.
            given, keep: int32 [B, L, C] and bool [B, L]: pixels that stay as they are, see
                `ar_jax.sampling.kept`. Masked levels know patches that are kept whole from the
                start; of other patches each pixel is taken when its turn comes.

        Returns:
            codes int32 [B, L, C], images float32 [B, H, W, C] in [-1, 1], and the order int32
            [B, L] of the pixels by that of the first level's patches.

        Raises:
            ValueError: neither keys nor noise are given for draws that chance decides, arguments
                have other shapes, or a knob is set that means nothing here.
        """
        batch_size = len(jax.tree.leaves(cond)[0])
        check_keys(keys, batch_size)
        kept = check_kept(given, keep, (batch_size, *self.system.tokenizer.codes_shape))
        arguments, options = self._arguments(cond, keys, knobs, guidance, noise, kept)
        codes, order = draw_pixels(self.system, *arguments, **options)
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
        arguments, options = self._arguments(cond, keys, knobs, guidance)
        lower = functools.partial(draw_pixels.lower, self.system, *arguments, **options)
        return lower, arguments

    def decode(self, codes: Array, steps: int | None = None) -> Array:
        """Images [B, H, W, C] in [-1, 1] of codes [B, L, C], the first ``steps`` alone if given."""
        return decode_codes(self.system, self.params["tokenizer"], codes, steps=steps)

    def _arguments(
        self,
        cond: Cond,
        keys: Array | None,
        knobs: Knobs | None,
        guidance: Guidance | None,
        noise: NestedNoise | None = None,
        kept: Kept | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `draw_pixels` takes after the system, and its static options; all checked."""
        levels = self.system.schedule.levels
        knobs, scales = by_step(levels[0], knobs, guidance)
        knobs.check_unused(UNUSED, "pixels of nested patches")
        masked = any(level.mask is not None for level in levels)
        check_chance(keys, noise, max(float(knobs.temperature), float(masked)))
        if noise is not None and keys is None and knobs.temperature > 0 and not noise.gumbel:
            raise ValueError(
                f"the noise has orders alone, but sampling.temperature is {knobs.temperature}: "
                "give Gumbel noise or keys too, or set it to 0"
            )
        params = {name: self.params[name] for name in ("backbone", "head")}
        arguments = (params, cond, keys, knobs, jnp.asarray(scales), noise, kept)
        return arguments, {"guided": bool(np.any(scales != 1.0))}


@functools.partial(jax.jit, static_argnames=("system", "guided"))
def draw_pixels(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    knobs: Knobs,
    scales: Array,
    noise: NestedNoise | None,
    kept: Kept | None = None,
    *,
    guided: bool,
) -> tuple[Array, Array]:
    """The sampling program: (codes int32 [B, L, C], order int32 [B, L]); see `NestedSampler`."""
    batch_size = len(jax.tree.leaves(cond)[0])
    backbone, size = system.backbone, system.schedule.grids[0][0]
    if guided:
        null = backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    values = keep = None
    if kept is not None:
        values = kept.codes.swapaxes(1, 2).reshape(batch_size, -1, size, size)
        keep = kept.keep.reshape(batch_size, size, size)
    draws = _Draws(system, params, knobs, guided)
    conditions = draws.ask("begin", cond)
    images = Images(keys=keys, noise=noise, values=values, keep=keep)
    pixels, order = draws.image(0, conditions, images, scales)
    codes = pixels.reshape(batch_size, -1, size * size).swapaxes(1, 2)
    area = system.schedule.length // system.schedule.levels[0].length
    assert system.schedule.cells is not None
    cells = jnp.asarray(system.schedule.cells).reshape(-1, area)  # [L_0, pixels of a patch]
    return codes, cells[order].reshape(batch_size, -1)


@dataclasses.dataclass(frozen=True)
class _Draws:
    """What is the same in all levels while the program is traced.

    Rows of conditions are N images, and with guidance as many again, unconditional.
    """

    system: System
    params: Params
    knobs: Knobs
    guided: bool

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of the backbone."""
        backbone = {"params": self.params["backbone"]}
        with jax.named_scope("refine_backbone"):  # as another below: for `compilation.phases`
            return self.system.backbone.apply(backbone, *arguments, method=method)

    def both(self, x: Array, axis: int = 0) -> Array:
        """Of N rows, what both halves are fed."""
        return jnp.concatenate([x, x], axis=axis) if self.guided else x

    def image(
        self, index: int, conditions: Array, images: Images, scale: Array
    ) -> tuple[Array, Array]:
        """(images int32 [N, C, s, s] of a level, order int32 [N, L] of their patches).

        ``scale`` of the guidance is one a step in the first level, a scalar below.
        """
        if self.system.backbone.causal(index):
            return self.by_row(index, conditions, images, scale)
        return self.by_sets(index, conditions, images, scale)

    def patches(self, index: int, conditions: Array, images: Images, scale: Array) -> Array:
        """Patches int32 [M, C, p, p] of level ``index`` from their conditions [K, M or 2M, D]."""
        if index + 1 < len(self.system.schedule.levels):
            return self.image(index + 1, conditions, images, scale)[0]
        head, params = self.system.head, {"params": self.params["head"]}

        def logits(codes: Array) -> Array:
            with jax.named_scope("refine_head"):
                return head.apply(params, conditions[0], codes)

        count = conditions.shape[1] // (1 + self.guided)
        pixels = self.pixels(logits, images, scale, count)[..., None, None]
        if images.values is None or images.keep is None:
            return pixels
        return jnp.where(images.keep[:, None], images.values, pixels)

    def by_row(
        self, index: int, conditions: Array, images: Images, scale: Array
    ) -> tuple[Array, Array]:
        """One patch after the other, with a cache."""
        backbone = self.system.backbone
        count = conditions.shape[1] // (1 + self.guided)
        length, size = self._sizes(index)
        channels = backbone.channels

        def step(state: tuple[Array, Any], place: Array) -> tuple[Any, Array]:
            before, caches = state
            fed = self.both(backbone.normalise(before).reshape(count, -1))
            below, caches = self.ask("step", index, fed, conditions, place, caches)
            places = jnp.full((count, 1), place)
            strength = scale[place] if index == 0 else scale
            patch = self.patches(index, below, images.patches(places, size), strength)
            return (patch, caches), patch

        caches = backbone.empty(index, conditions.shape[1])
        start = jnp.zeros((count, channels, size, size), jnp.int32), caches
        _, patches = jax.lax.scan(step, start, jnp.arange(length))
        order = jnp.broadcast_to(jnp.arange(length), (count, length))
        return unpatchify(patches.swapaxes(0, 1)), order

    def by_sets(
        self, index: int, conditions: Array, images: Images, scale: Array
    ) -> tuple[Array, Array]:
        """Sets of patches, each given all that are known."""
        backbone, schedule = self.system.backbone, self.system.schedule.levels[index]
        count = conditions.shape[1] // (1 + self.guided)
        length, size = self._sizes(index)
        rows = jnp.arange(count)[:, None]
        order = self._order(images, length)
        colour = self._colour(index, conditions, images, scale)
        patches = jnp.zeros((count, length, backbone.channels, size, size), jnp.int32)
        held = jnp.zeros((count, length), bool)
        if images.values is not None and images.keep is not None:
            held = patchify(images.keep[:, None], size).all((2, 3, 4))
            patches = jnp.where(held[..., None, None, None], patchify(images.values, size), patches)
            order = kept_first(order, held)
        largest = max(schedule.sizes)
        padded = jnp.pad(order, ((0, 0), (0, largest)))
        ranks = jnp.argsort(order, axis=1)

        def iterate(patches: Array, xs: dict[str, Array]) -> tuple[Array, None]:
            hidden = (ranks >= xs["first"]) & ~held
            fed = backbone.normalise(patches).reshape(count, length, -1)
            fed, masks = self.both(fed), self.both(hidden)
            below = self.ask("reveal", index, fed, conditions, masks, colour)
            places = jax.lax.dynamic_slice_in_dim(padded, xs["first"], largest, axis=1)
            chosen = jnp.take_along_axis(below, self.both(places)[None, ..., None], axis=2)
            strength = scale[xs["index"]] if index == 0 else scale
            drawn = self.patches(
                index,
                chosen.reshape(len(chosen), -1, chosen.shape[-1]),
                images.patches(places, size),
                strength,
            ).reshape(count, largest, *patches.shape[2:])
            fresh = jnp.arange(largest)[None] < xs["count"]
            where = jnp.where(fresh, places, length)
            return patches.at[rows, where].set(drawn, mode="drop"), None

        xs = {
            "index": jnp.arange(schedule.num_steps),
            "first": jnp.asarray(schedule.starts, jnp.int32),
            "count": jnp.asarray(schedule.sizes, jnp.int32),
        }
        patches, _ = jax.lax.scan(iterate, patches, xs)
        return unpatchify(patches), order

    def _sizes(self, index: int) -> tuple[int, int]:
        """(number of patches, their pixels on a side) of a level."""
        levels = self.system.schedule.levels
        below = [level.grids[0][0] for level in levels[index + 1 :]]
        return levels[index].length, int(np.prod(below, dtype=np.int64))

    def _order(self, images: Images, length: int) -> Array:
        if images.noise is not None:
            order = images.noise.orders[0]
            assert order is not None
            return order
        assert images.keys is not None
        return draw_order(images.keys, length)

    def _colour(self, index: int, conditions: Array, images: Images, scale: Array) -> Array | None:
        """The mean colour, normalised [N or 2N, C], of levels that draw it first."""
        backbone = self.system.backbone
        if not backbone.has_colour(index):
            return None

        def logits(codes: Array) -> Array:
            return self.ask("colour_logits", index, conditions, codes)

        drawn = self.pixels(logits, images, scale, conditions.shape[1] // (1 + self.guided))
        return self.both(backbone.normalise_pixels(drawn))

    def pixels(self, logits: Any, images: Images, scale: Array, count: int) -> Array:
        """int32 [N, C], channel after channel, of ``logits(codes)`` [N or 2N, C, V]."""
        backbone, head, knobs = self.system.backbone, self.system.head, self.knobs
        gumbel = images.noise.gumbel if images.noise is not None else ()
        cold = knobs.temperature <= 0
        warmth = jnp.where(cold, 1.0, jnp.maximum(knobs.temperature, 1e-5))
        filters = dataclasses.replace(knobs, temperature=jnp.float32(1.0))
        codes = jnp.zeros((count, backbone.channels), jnp.int32)
        for channel in range(backbone.channels):
            found = logits(self.both(codes))[:, channel] / warmth
            if self.guided:
                found = head.guide(found[:count], found[count:], scale)
            noise = jnp.zeros_like(found)
            if gumbel:
                assert gumbel[0] is not None
                noise = gumbel[0][:, channel]
            elif images.keys is not None:
                noise = _gumbel(images.keys, channel, backbone.values)
            drawn = head.draw(truncate(found, filters), jnp.where(cold, 0.0, noise))
            codes = codes.at[:, channel].set(drawn)
        return codes


def _gumbel(keys: Array, channel: int, values: int) -> Array:
    """Gumbel noise [N, V] of the rows' keys, which no patch's key can be."""

    def one(key: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, CHANNEL + channel), (values,))

    return jax.vmap(one)(keys)
