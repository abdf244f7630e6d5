"""One step of the cached sampler, with its caches in hand, and the loop over a schedule's steps.

`ar_jax.sampling.loop` runs it from the first code to the last; whoever drives it otherwise, as
`ar_jax.sampling.beam` does, predicts, draws and advances by the same functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, System
from ar_jax.sampling.companions import Companion
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.kept import Kept
from ar_jax.schedules import Schedule


class State(NamedTuple):
    """What one step hands to the next."""

    context: Array | None  # what the next step may see, [B, n] or [B, n, C]; None before the first
    carry: Any  # the tokenizer's
    # The sampled model's, of the conditional and, where it is guided by the null class, the null
    # rows behind them; then the companions', of B rows each.
    caches: tuple[Cache, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepper:
    """All that stays the same from step to step of drawing B images. See `CachedSampler.__call__`.

    Make it with `create`, outside of any loop.

    Attributes:
        cond: B rows.
        keys: [B], and ``noise`` [B, L, V] in their place; neither: no noise.
        knobs: as arrays.
        scales: of guidance, float32 [S].
        order: int32 [B, L], the cell of every draw; None: the schedule's own.
        kept: what the images are to have, in the order of the draws.
        guided: by the null class.
        layers: see `Guidance`.
        companions: see `ar_jax.sampling.companions`; a weak one goes with guided=False.
        rows, orders: what the backbone is fed of both, the null rows behind the conditional ones.
    """

    system: System
    params: Params
    cond: Cond
    keys: Array | None
    knobs: Knobs
    scales: Array
    noise: Array | None = None
    order: Array | None = None
    kept: Kept | None = None
    guided: bool
    layers: tuple[int, ...] = (0,)
    companions: tuple[Companion, ...] = ()
    rows: Cond
    orders: Array | None

    @classmethod
    def create(
        cls, *, system: System, cond: Cond, guided: bool, order: Array | None = None, **fields: Any
    ) -> Stepper:
        """From all attributes but ``rows`` and ``orders``."""
        rows, orders = cond, order
        if guided:
            null = system.backbone.conditioner.null(cond)
            rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
            orders = order if order is None else jnp.concatenate([order, order])
        given: dict[str, Any] = {"system": system, "cond": cond, "guided": guided, "order": order}
        return cls(**given, **fields, rows=rows, orders=orders)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(jax.tree.leaves(self.cond)[0])

    def begin(self) -> State:
        """Before the first step."""
        count = self.batch_size
        own = self.system.backbone.init_cache(2 * count if self.guided else count)
        others = tuple(other.system.backbone.init_cache(count) for other in self.companions)
        carry = self.system.tokenizer.apply(self._tokenizer, count, method="begin")
        return State(context=None, carry=carry, caches=(own, *others))

    def predict(self, index: Any, segment: Any, state: State) -> tuple[Array, tuple[Cache, ...]]:
        """(logits [B, n, V] of step ``index``, guided but not yet filtered; caches).

        Args:
            index: the step, a number or traced.
            segment: that it is one of, see `Schedule.segments`; None: it runs alone.
        """
        system, guided, context, batch_size = (
            self.system,
            self.guided,
            state.context,
            self.batch_size,
        )
        how: dict[str, Any] = {"step": index, "segment": segment}
        blocks = tuple(layer for layer in self.layers if layer < 0)
        hidden, cache = system.backbone.apply(
            {"params": self.params["backbone"]},
            jnp.concatenate([context, context]) if guided and context is not None else context,
            self.rows,
            order=self.orders,
            cache=state.caches[0],
            **how,
            **({"mixing": (blocks, self.scales[index])} if guided and blocks else {}),
        )
        if guided and 0 not in self.layers:
            hidden = hidden[:batch_size]
        logits = system.head.apply({"params": self.params["head"]}, hidden)  # [B or 2B, n, V]
        if guided and 0 in self.layers:
            logits = system.head.guide(logits[:batch_size], logits[batch_size:], self.scales[index])
        caches = [cache]
        for other, seen in zip(self.companions, state.caches[1:], strict=True):
            seen_cond = other.condition(self.cond)
            own, seen = other.logits(context, seen_cond, seen, order=self.order, **how)
            logits = other.join(logits, own, self.scales[index], index)
            caches.append(seen)
        return logits, tuple(caches)

    def advance(self, index: Any, drawn: Array, carry: Any) -> tuple[Any, Array | None]:
        """(the tokenizer's carry, context of the next step) after codes or weights [B, n, ...]."""
        return self.system.tokenizer.apply(self._tokenizer, carry, drawn, index, method="advance")

    def of_step(self, rows: Array, index: Any, count: int) -> Array:
        """[B, n, ...] of [B, L, ...] in the order of the draws."""
        schedule = self.system.schedule
        if isinstance(index, int):
            return rows[:, schedule.starts[index] : schedule.starts[index] + count]
        return jax.lax.dynamic_slice_in_dim(
            rows, jnp.asarray(schedule.starts)[index], count, axis=1
        )

    def gumbel(self, index: Any, logits: Array) -> Array:
        """Gumbel noise like ``logits`` [B, n, V], zero without keys and at temperature 0."""
        if self.noise is not None:
            noise = self.of_step(self.noise, index, logits.shape[1])
        elif self.keys is None:
            noise = jnp.zeros_like(logits)
        else:
            noise = step_noise(self.keys, index, logits.shape[1:])
        return jnp.where(self.knobs.at(index).temperature > 0, noise, 0.0)

    def __call__(
        self, index: Any, segment: Any, state: State, *, inverted: bool = False
    ) -> tuple[Array, State]:
        """One step: (codes [B, n] or, inverted, their noise [B, n, V]; what the next one needs)."""
        head, schedule = self.system.head, self.system.schedule
        logits, caches = self.predict(index, segment, state)
        gumbel = self.gumbel(index, logits)
        logits = truncate(logits, self.knobs.at(index))
        part = jax.tree.map(lambda rows: self.of_step(rows, index, logits.shape[1]), self.kept)
        if inverted:
            assert part is not None
            gumbel = head.invert(logits, part.codes, gumbel)
        if self.knobs.smooth:
            ratio = index / max(schedule.num_steps - 1, 1)
            drawn = head.soften(logits, gumbel, ratio)  # [B, n, V]
            if part is not None:
                drawn = part.mix(drawn)
            codes = jnp.argmax(drawn, axis=-1).astype(jnp.int32)
        else:
            codes = head.draw(logits, gumbel)
            drawn = codes = codes if part is None else part.force(codes)
        carry, context = self.advance(index, drawn, state.carry)
        return gumbel if inverted else codes, State(context, carry, caches)

    @property
    def _tokenizer(self) -> dict[str, Params]:
        return {"params": self.params["tokenizer"]}


def step_noise(keys: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Gumbel noise [B, *shape] of a step, of keys [B]."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), shape))(keys)


def padded(schedule: Schedule, rows: Any) -> Any:
    """Leaves [B, L, ...] with room behind the last code for what a segment may have as padding."""

    def pad(rows: Array) -> Array:
        behind = ((0, 0), (0, max(schedule.sizes) - 1), *((0, 0),) * (rows.ndim - 2))
        return jnp.pad(rows, behind)

    return jax.tree.map(pad, rows)


def run_steps(
    schedule: Schedule, step: Callable[[Any, Any, Any], tuple[Any, Any]], state: Any
) -> tuple[list[Any], Any]:
    """All steps of a schedule, segment after segment.

    Args:
        step: (index, segment or None, state) -> (what it made [B, n, ...] or None, state).
        state: a tuple with names, of which ``context`` is as in `State`.

    Returns:
        (what was made, one array [B, n', ...] a segment; the state after the last step).
    """
    scans = any(end - first > 1 for first, end in schedule.segments)
    parts: list[Any] = []
    for segment in schedule.segments:
        first, end = segment
        if end - first == 1:
            # The names are for `ar_jax.compilation.phases`.
            with jax.named_scope("prefill" if scans and not first else f"step_{first}"):
                made, state = step(first, None, state)
            parts.append(made)
            continue
        sizes = schedule.sizes[first:end]
        width = max(schedule.sizes[first - 1 : end])

        def body(state: Any, index: Array, segment: Any = segment, width: int = width) -> tuple:
            made, state = step(index, segment, state)
            return state._replace(context=widened(state.context, width)), made

        state = state._replace(context=widened(state.context, width))
        with jax.named_scope("decode"):
            state, made = jax.lax.scan(body, state, jnp.arange(first, end))
        state = state._replace(context=state.context[:, : sizes[-1]])
        parts.append(None if made is None else _in_a_row(made, sizes))
    return parts, state


def _in_a_row(made: Array, sizes: tuple[int, ...]) -> Array:
    """[S', B, n, ...] of steps of ``sizes``, padded to n, as [B, sum of sizes, ...]."""
    made = jnp.moveaxis(made, 0, 1)
    if len(set(sizes)) > 1:
        real = np.arange(max(sizes))[None] < np.asarray(sizes)[:, None]
        return made[(slice(None), *np.nonzero(real))]
    return made.reshape(made.shape[0], -1, *made.shape[3:])


def widened(context: Array, width: int) -> Array:
    """Codes [B, n] of a step, [B, width] with zeros behind them."""
    return jnp.pad(context, ((0, 0), (0, width - context.shape[1])))
