"""Confidence decoding: hidden codes are drawn all at once, the surest stay (MaskGIT, 2202.04200).

An iteration draws every code that is hidden, from what is known. As many of the drawn ones as the
schedule says are hidden again, those of least confidence; a code that was kept once stays.

    confidence of a drawn code = what the logits say of it + t g,  t = choice_temperature (1 - r),

g Gumbel noise and r the ratio of iterations done when this one ends. Of two conventions,
``knobs.confidence``, 'probability' is MaskGIT's: the logarithm of the code's probability, by logits
as the network gives them (guided, but of temperature 1). 'logit' is TiTok's: the code's own logit,
divided by the temperature; and t is also a factor on the noise that draws the code, so that the
last iteration takes the largest logit.
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
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept, check_kept
from ar_jax.sampling.loop import by_step, check_chance, check_keys, decode_codes


@flax.struct.dataclass
class ConfidenceNoise:
    """Standard Gumbel noise in place of keys, of the iterations that are run."""

    codes: Array  # float32 [S, B, L, V]
    choice: Array  # float32 [S, B, L]


@flax.struct.dataclass
class Iterations:
    """What confidence decoding did, iteration by iteration."""

    fed: Array  # int32 [B, S, L], the codes before each; hidden ones mean nothing
    known: Array  # bool [B, S, L], those that are not hidden before it
    drawn: Array  # int32 [B, S, L], after it, all known or drawn: of the last one the samples

    @property
    def order(self) -> Array:
        """int32 [B, L]: the positions as they became known, by number where at the same time."""
        return jnp.argsort((~self.known).sum(1), axis=1, stable=True).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class ConfidenceSampler:
    """Samples from a system of a bidirectional backbone and a categorical head."""

    system: System
    params: Params  # {'tokenizer', 'backbone', 'head'}, as trained

    @classmethod
    def create(cls, system: System, params: Params) -> ConfidenceSampler:
        """From a system as it was trained and its parameters."""
        return cls(system, params)

    def __call__(
        self,
        cond: Cond,
        keys: Array | None = None,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        noise: ConfidenceNoise | None = None,
        given: Array | None = None,
        keep: Array | None = None,
        start: int = 0,
    ) -> Samples:
        """Draws one image for every condition.

        Args:
            cond: ``{'label': int32 [B]}``.
            keys: one typed key an image [B]; an image depends on its own alone. Not needed where
                ``noise`` is given, which comes first, or where both temperatures are 0.
            knobs: temperature and filters of the draws, choice temperature, confidence.
            guidance: default none.
            noise: in place of the keys'; of the iterations from ``start`` on.
            given, keep: int32 and bool [B, L]: codes that stay as they are, see
                `ar_jax.sampling.kept`; the schedule's shares are of the others, image by image.
            start: the first iteration that is run. An edit may begin late, with fewer codes to
                draw at a time left to their confidence.

        Returns:
            codes int32 [B, L], images float32 [B, H, W, C] in [-1, 1], and the order int32 [B, L]
            in which the codes became known, those given first.

        Raises:
            ValueError: neither keys nor noise are given for draws that chance decides, arguments
                have other shapes, or a knob is set that means nothing here.
        """
        batch_size = len(jax.tree.leaves(cond)[0])
        check_keys(keys, batch_size)
        arguments, options = self._arguments(cond, keys, knobs, guidance, noise, given, keep, start)
        steps = draw_steps(self.system, *arguments, **options)
        drawn = steps.drawn[:, -1]
        return Samples(codes=drawn, images=self.decode(drawn), order=steps.order)

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
        lower = functools.partial(draw_steps.lower, self.system, *arguments, **options)
        return lower, arguments

    def decode(self, codes: Array, steps: int | None = None) -> Array:
        """Images [B, H, W, C] in [-1, 1] of codes [B, L], the first ``steps`` alone if given."""
        return decode_codes(self.system, self.params["tokenizer"], codes, steps=steps)

    def _arguments(
        self,
        cond: Cond,
        keys: Array | None,
        knobs: Knobs | None,
        guidance: Guidance | None,
        noise: ConfidenceNoise | None = None,
        given: Array | None = None,
        keep: Array | None = None,
        start: int = 0,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `draw_steps` takes after the system, and its static options; all checked."""
        schedule = self.system.schedule
        shape = (len(jax.tree.leaves(cond)[0]), schedule.length)
        knobs, scales = by_step(schedule, knobs, guidance)
        (guidance or Guidance()).check_layers(0)
        knobs.check_unused(("smooth",), "codes of one grid")
        chance = max(knobs.temperature, knobs.choice_temperature)
        check_chance(keys, noise, chance)
        iterations = schedule.num_steps
        if not 0 <= start < iterations:
            raise ValueError(
                f"start is {start}; the schedule has the iterations 0 to {iterations - 1}"
            )
        kept = check_kept(given, keep, shape)
        if noise is not None:
            wanted = (iterations - start, *shape)
            found = noise.codes.shape[:3], noise.choice.shape
            if found != (wanted, wanted):
                raise ValueError(f"codes and choice of the noise begin with {found}, not {wanted}")
        hidden = np.full(shape[0], schedule.length)
        if kept is not None:
            hidden -= np.asarray(kept.keep).sum(1)
        assert schedule.mask is not None
        lengths = schedule.mask.lengths(hidden, iterations, start).T  # [S, B]
        params = {name: self.params[name] for name in ("backbone", "head")}
        keys = keys if noise is None else None  # one program, whoever gives both
        arrays = (jnp.asarray(scales), jnp.asarray(lengths), noise, kept)
        options = {"guided": bool(np.any(scales != 1.0)), "start": start}
        return (params, cond, keys, knobs, *arrays), options


def least_confident(confidence: Array, gumbel: Array, strength: Array, lengths: Array) -> Array:
    """Bool [B, L]: ``lengths`` [B] positions of the least confidence + strength gumbel.

    Args:
        confidence: float32 [B, L]; positions of infinite confidence are never chosen.
        gumbel: float32 [B, L].
    """
    noisy = confidence + strength * gumbel
    rank = jnp.argsort(jnp.argsort(noisy, axis=1), axis=1)  # equal ones by their place
    return (rank < lengths[:, None]) & (confidence < jnp.inf)


@functools.partial(jax.jit, static_argnames=("system", "guided", "start"))
def draw_steps(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array | None,
    knobs: Knobs,
    scales: Array,
    lengths: Array,
    noise: ConfidenceNoise | None,
    kept: Kept | None = None,
    *,
    guided: bool,
    start: int = 0,
) -> Iterations:
    """The sampling program, from iteration ``start`` on.

    Args:
        scales: float32 [start + S] of the guidance.
        lengths: int32 [S, B], codes that are hidden after each iteration. What the last one says
            has no effect.
    """
    backbone, head = system.backbone, system.head
    batch_size = len(jax.tree.leaves(cond)[0])
    total = start + len(lengths)
    if guided:
        null = backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    if kept is None:
        codes = jnp.zeros((batch_size, system.schedule.length), jnp.int32)
        kept = Kept(codes=codes, keep=jnp.zeros(codes.shape, bool))

    def both(x: Array) -> Array:
        return jnp.concatenate([x, x]) if guided else x

    def draws(xs: dict[str, Any], shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Gumbel noise [B, L, V] of the codes and [B, L] of the choice."""
        if noise is not None:
            return xs["noise"].codes, xs["noise"].choice
        if keys is None:
            return jnp.zeros(shape), jnp.zeros(shape[:2])

        def one(key: Array) -> tuple[Array, Array]:
            codes_key, choice_key = jax.random.split(jax.random.fold_in(key, xs["index"]))
            return jax.random.gumbel(codes_key, shape[1:]), jax.random.gumbel(
                choice_key, shape[1:2]
            )

        return jax.vmap(one)(keys)

    def iterate(state: tuple[Array, Array], xs: Any) -> tuple[Any, Any]:
        codes, known = state
        filters = knobs.at(xs["index"])
        with jax.named_scope("refine_backbone"):  # as that below: for `ar_jax.compilation.phases`
            hidden = backbone.apply({"params": params["backbone"]}, both(codes), cond, both(known))
        with jax.named_scope("refine_head"):
            logits: Any = head.apply({"params": params["head"]}, hidden)  # [B or 2B, L, V]
            if guided:
                logits = head.guide(logits[:batch_size], logits[batch_size:], xs["scale"])
            gumbel, choice = draws(xs, logits.shape)
            strength = knobs.choice_temperature * (1.0 - (xs["index"] + 1) / total)
            truncated = truncate(logits, filters)
            by_logit = knobs.confidence == "logit"
            gumbel = strength * gumbel if by_logit else gumbel
            drawn = head.draw(truncated, jnp.where(filters.temperature > 0, gumbel, 0.0))
            drawn = jnp.where(known, codes, drawn)
            if by_logit:
                sure = jnp.take_along_axis(truncated, drawn[..., None], axis=-1)[..., 0]
            else:
                sure = head.log_prob(logits, drawn)
            sure = jnp.where(known, jnp.inf, sure)
            hide = least_confident(sure, choice, strength, xs["length"])
        return (drawn, ~hide), Iterations(fed=codes, known=known, drawn=drawn)

    xs: dict[str, Any] = {"index": jnp.arange(start, total)}
    xs |= {"scale": scales[start:], "length": lengths}
    if noise is not None:
        xs["noise"] = noise
    _, steps = jax.lax.scan(iterate, (kept.codes, kept.keep), xs)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps)
