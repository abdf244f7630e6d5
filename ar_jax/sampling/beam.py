"""Beam search over the steps of a schedule, with forked caches (arXiv:2510.16751).

After every step (of next-scale prediction, every scale) each of W beams has C candidates, and of
all W C the W that a score likes best go on, with what their parents have cached: the model is
called for a beam, not for a candidate. The score is the log-probability, or any function of what
the codes so far show. What is found has no longer the model's distribution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cond, Params, Samples, System
from ar_jax.sampling.around import AroundSampler
from ar_jax.sampling.companions import Companion
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept, check_kept
from ar_jax.sampling.likeliest import likeliest_maps
from ar_jax.sampling.loop import (
    CachedSampler,
    by_step,
    check_chance,
    check_keys,
    own_order,
    place_order,
    to_cells,
)
from ar_jax.sampling.step import State, Stepper, padded, run_steps, step_noise


class Draft(NamedTuple):
    """N images as far as they are drawn, what a score is a function of. What it leaves unused is
    not computed."""

    codes: Array  # [N, L] as images have them, 0 where none is drawn yet
    images: Array  # float32 [N, H, W, C] in [-1, 1], of the codes so far
    cond: Cond  # of N rows
    log_p: Array  # float32 [N], of the codes so far, guided, but without temperature and filters
    step: Array | int  # the last one that is drawn; may be traced


# Traced; -> float [N], the larger the better.
DraftScore = Callable[[Draft], Array]


def log_probability(draft: Draft) -> Array:
    """The score that finds likely images."""
    return draft.log_p


class Found(NamedTuple):
    """The last beams of every image, the best first; equal ones where there are not W others."""

    codes: Array  # [B, W, L]
    scores: Array  # float32 [B, W]; -inf of codes that the filters remove
    log_p: Array  # float32 [B, W]
    order: Array | None  # int32 [B, L], that of the draws; None: the schedule's own


class Beams(NamedTuple):
    """What goes from step to step; R = B W rows, image after image."""

    context: Array | None  # with carry and caches a `State` of R rows
    carry: Any
    caches: tuple
    codes: Array  # [R, L + padding] in the order of the draws
    log_p: Array  # float32 [R]; -inf of what cannot be drawn
    scores: Array  # float32 [R]
    same: Array  # int32 [R], equal for beams of one image that have equal codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch(AroundSampler):
    """Searches for images that a score likes, scale by scale; called as the sampler that it is of.

    Attributes:
        sampler: of codes that are drawn in a fixed or random order, with companions or without.
        width: W, beams of every image.
        candidates: C, continuations of every beam at every step.
        likeliest: take the C likeliest maps of codes of a step, exactly, in place of C draws: the
            search is deterministic then. With enough width and candidates for all sequences it
            finds the best of all.
        score: of drafts, after every step; compiled into the program.

    Raises:
        ValueError: a number below 1, or another kind of sampler.
    """

    sampler: CachedSampler
    width: int
    candidates: int
    likeliest: bool = False
    score: DraftScore = log_probability

    def __post_init__(self) -> None:
        for name in ("width", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not isinstance(self.sampler, CachedSampler):
            raise ValueError(
                "beam search forks the caches of a sampler that draws step by step: a "
                f"{type(self.sampler).__name__} has none"
            )

    def __call__(self, cond: Cond, keys: Array | None = None, **settings: Any) -> Samples:
        """The best image for every condition; see `search`."""
        found = self.search(cond, keys, **settings)
        codes, order = found.codes[:, 0], found.order
        if order is None and self.system.schedule.cells is not None:
            order = own_order(self.system.schedule, len(codes))
        return Samples(codes=codes, images=self.decode(codes), order=order)

    def search(
        self,
        cond: Cond,
        keys: Array | None = None,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        order: Array | None = None,
        given: Array | None = None,
        keep: Array | None = None,
    ) -> Found:
        """All last beams. Arguments: see `CachedSampler.__call__`.

        Candidate c of beam w draws with a key of its own, number 0 of beam 0 with the image's key
        itself: a beam of one candidate is plain sampling. Of candidates that equal another only one
        is kept, as long as there are others.

        Raises:
            ValueError: as the sampler; no keys where candidates are draws, draws of temperature 0,
                which are all the same, or smooth ones.
        """
        system, schedule = self.system, self.system.schedule
        batch_size = len(jax.tree.leaves(cond)[0])
        check_keys(keys, batch_size)
        kept = check_kept(given, keep, (batch_size, *system.tokenizer.codes_shape))
        knobs, scales = by_step(schedule, knobs, guidance)
        knobs.check_unused(("choice_temperature", "confidence", "smooth"), "beam search")
        if not self.likeliest:
            check_chance(keys, None, knobs.temperature)
            if self.width * self.candidates > 1 and knobs.temperature == 0:
                raise ValueError(
                    f"sampling.temperature is 0, so that candidates={self.candidates} of "
                    f"width={self.width} would all be one: set likeliest=True"
                )
        order = place_order(schedule, batch_size, keys, order, kept, free=order is None)
        return draw_beams(
            system,
            self.params,
            cond,
            keys,
            knobs.spread(schedule.num_steps),
            jnp.asarray(scales),
            order,
            kept,
            width=self.width,
            candidates=self.candidates,
            likeliest=self.likeliest,
            score=self.score,
            **self.sampler.mixing(scales, guidance),
        )


@functools.partial(
    jax.jit,
    static_argnames=("system", "guided", "layers", "width", "candidates", "likeliest", "score"),
)
def draw_beams(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    knobs: Knobs,
    scales: Array,
    order: Array | None,
    kept: Kept | None,
    *,
    guided: bool,
    layers: tuple[int, ...],
    companions: tuple[Companion, ...],
    width: int,
    candidates: int,
    likeliest: bool,
    score: DraftScore,
) -> Found:
    """The program of `BeamSearch.search`."""
    schedule, tokenizer = system.schedule, system.tokenizer
    batch_size = len(jax.tree.leaves(cond)[0])
    per_image, count = width * candidates, batch_size * width
    places = own_order(schedule, batch_size) if order is None and schedule.cells else order
    kept = kept if kept is None or places is None else kept.taken(places)
    keys = None if likeliest or keys is None else slot_keys(keys, per_image, schedule.length)

    def repeated(tree: Any, times: int) -> Any:
        """Leaves [B, ...] as [B times, ...]."""
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), tree)

    stepper = Stepper.create(
        system=system,
        params=params,
        cond=repeated(cond, width),
        keys=None,
        knobs=knobs,
        scales=scales,
        order=repeated(order, width),
        guided=guided,
        layers=layers,
        companions=companions,
    )
    cond_each, places_each = repeated(cond, per_image), repeated(places, per_image)
    kept_rows = repeated(padded(schedule, kept), width)

    def propose(index: Any, logits: Array, free: Array) -> tuple[Array, Array]:
        """(codes [R C, n, ...], bool [R C]: whether they are any) of logits [R, n, ...]."""
        filtered = truncate(logits, knobs.at(index))
        if likeliest:
            return likeliest_maps(filtered, free, candidates)
        each = repeated(filtered, candidates)
        noise = jnp.zeros_like(each) if keys is None else step_noise(keys, index, each.shape[1:])
        noise = jnp.where(knobs.at(index).temperature > 0, noise, 0.0)
        return system.head.draw(each, noise), jnp.ones(len(each), bool)

    def show(index: Any, codes: Array) -> Array:
        """Images of codes as they are stored, of which the steps up to ``index`` are drawn."""
        known: Any = index + 1
        if len(schedule.grids) == 1:
            ends = jnp.asarray(schedule.starts) + jnp.asarray(schedule.sizes)
            drawn = jnp.arange(schedule.length)[None] < ends[index]
            known = to_cells(jnp.broadcast_to(drawn, codes.shape[:2]), places_each)
        return tokenizer.apply({"params": params["tokenizer"]}, codes, known, method="decode")

    def step(index: Any, segment: Any, beams: Beams) -> tuple[None, Beams]:
        state = State(beams.context, beams.carry, beams.caches)
        logits, caches = stepper.predict(index, segment, state)  # [R, n, ...]
        size = logits.shape[1]
        real = jnp.arange(size) < jnp.asarray(schedule.sizes)[index]  # [n]; others are padding
        part = jax.tree.map(lambda rows: stepper.of_step(rows, index, size), kept_rows)
        free = jnp.broadcast_to(real, (count, size)) if part is None else real[None] & ~part.keep
        made, valid = propose(index, logits, free)
        made = made if part is None else repeated(part, candidates).force(made)
        each = system.head.log_prob(repeated(logits, candidates), made)  # [R C, n]
        log_p = repeated(beams.log_p, candidates) + jnp.where(real[None], each, 0.0).sum(-1)
        log_p = jnp.where(valid, log_p, -jnp.inf)
        made = jnp.where(real.reshape(1, -1, *(1,) * (made.ndim - 2)), made, 0)
        start = jnp.asarray(schedule.starts)[index]
        codes = jax.lax.dynamic_update_slice_in_dim(
            repeated(beams.codes, candidates), made, start, axis=1
        )
        stored = to_cells(codes[:, : schedule.length], places_each)
        liked = score(Draft(stored, show(index, stored), cond_each, log_p, index))
        liked = jnp.where(log_p > -jnp.inf, liked.astype(jnp.float32), -jnp.inf)
        # [B, W C]: number of the first candidate with the same codes.
        first = first_equal(made, repeated(beams.same, candidates), per_image)
        new = first == jnp.arange(per_image)[None]
        chosen = jax.lax.top_k(jnp.where(new, liked.reshape(new.shape), -jnp.inf), width)[1]
        images = jnp.arange(batch_size)[:, None]
        rows = (images * per_image + chosen).reshape(-1)  # [R] of R C
        parents = (images * width + chosen // candidates).reshape(-1)  # [R] of R
        carry = beams.carry
        if width > 1:
            carry, caches = fork(carry, caches, parents, count)
        carry, context = stepper.advance(index, made[rows], carry)
        same = first[images, chosen].reshape(-1).astype(jnp.int32)
        return None, Beams(context, carry, caches, codes[rows], log_p[rows], liked[rows], same)

    begun = stepper.begin()
    empty = jnp.zeros((count, *tokenizer.codes_shape), tokenizer.codes_dtype)
    beams = Beams(
        *begun,
        codes=padded(schedule, empty),
        log_p=jnp.zeros(count),
        scores=jnp.zeros(count),
        same=jnp.zeros(count, jnp.int32),
    )
    _, beams = run_steps(schedule, step, beams)
    codes = to_cells(beams.codes[:, : schedule.length], repeated(places, width))
    scores = beams.scores.reshape(batch_size, width)
    best = jnp.argsort(-scores, axis=1, stable=True)

    def sort(leaf: Array) -> Array:
        leaf = leaf.reshape(batch_size, width, *leaf.shape[1:])
        return leaf[jnp.arange(batch_size)[:, None], best]

    return Found(sort(codes), scores=sort(beams.scores), log_p=sort(beams.log_p), order=order)


def fork(carry: Any, caches: tuple, parents: Array, count: int) -> tuple[Any, tuple]:
    """What the R beams go on with: of carry and caches the rows of their ``parents`` int32 [R].

    A cache of 2 R rows has the null class's behind the others.
    """

    def take(leaf: Array) -> Array:
        return leaf[parents if len(leaf) == count else jnp.concatenate([parents, parents + count])]

    return jax.tree.map(take, (carry, caches))


def slot_keys(keys: Array, per_image: int, length: int) -> Array:
    """[B n] keys of the n slots of every image [B]; of slot 0 its own."""

    def split(key: Array) -> Array:
        # Steps and orders fold in the numbers up to the length.
        others = jax.random.split(jax.random.fold_in(key, length + 1), per_image - 1)
        return jnp.concatenate([key[None], others])

    return jax.vmap(split)(keys).reshape(-1) if per_image > 1 else keys


def first_equal(made: Array, same: Array, per_image: int) -> Array:
    """Number of the first of an image's candidates with equal codes, int32 [B, W C].

    ``made`` [B W C, n, ...] are the codes of this step, ``same`` [B W C] of those before.
    """
    codes = made.reshape(-1, per_image, made[0].size)
    before = same.reshape(-1, per_image)
    equal = (codes[:, :, None] == codes[:, None]).all(-1) & (before[:, :, None] == before[:, None])
    return jnp.argmax(equal, axis=-1)
