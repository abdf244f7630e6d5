"""Drafts of a smaller model, in a chain or a tree, checked in one call of the large one: exact.

The small model goes some codes ahead of what is settled (arXiv:2211.17192), with one draft for each
or with several (arXiv:2305.09781). The large model is then fed the whole tree at once, every draft
seeing those that it stands behind, and says from the first level on which draft is kept, see
`ar_jax.sampling.candidates`. One code more is settled than drafts are kept: the first that none
will do for is drawn from what is left, and behind the last level there is p itself. Every image has
its own place in the sequence. The shape of the tree is fixed, unlike that of OPT-Tree
(arXiv:2406.17276), whose shapes follow the probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cache, Cond, Params, Samples, System
from ar_jax.nn.draft_tree import DraftTree
from ar_jax.sampling.candidates import choose, draw_candidates
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, to_cells
from ar_jax.sampling.one_image import OneImage, check_windows, draw
from ar_jax.sampling.speculative import speculation_inputs


class State(NamedTuple):
    """Of one image, or with a leading axis of B."""

    codes: Array  # int32 [L], of which the first are settled
    settled: Array  # int32
    calls: Array  # int32, of the large model
    cache: Cache
    draft_cache: Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSampler:
    """Draws as a `CachedSampler` does, with fewer calls of its model.

    Build it with `ar_jax.build.create_draft_sampler`, whose backbones take trees.

    Attributes:
        system, params: of the large model.
        draft_system, draft_params: of the small one, of the same tokenizer and schedule.
        tree: the drafts of one call.
    """

    system: System
    params: Params
    draft_system: System
    draft_params: Params
    tree: DraftTree

    def __call__(
        self,
        cond: Cond,
        keys: Array,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        order: Array | None = None,
    ) -> Samples:
        """Draws one image for every condition, and counts the calls of the large model.

        Args: see `CachedSampler.__call__`. Both models are guided and have the same knobs. Of
            temperature 0 the codes are the plain sampler's; else they are other draws from the same
            distribution.

        Raises:
            ValueError: see `ar_jax.sampling.speculative.speculate`.
        """
        inputs, guided = speculation_inputs(
            self.system.schedule, cond, keys, knobs, guidance, order
        )
        codes, calls = draw_drafted(
            *(self.system, self.draft_system, self.params, self.draft_params, *inputs),
            guided=guided,
            tree=self.tree,
        )
        images = self.decode(codes)
        return Samples(codes=codes, images=images, order=inputs[-1], calls=calls)

    def decode(self, codes: Array, steps: int | None = None) -> Array:
        """As the large model's sampler decodes."""
        return CachedSampler(self.system, self.params).decode(codes, steps)


def check_drafts(sampler: CachedSampler, draft: CachedSampler, tree: DraftTree) -> None:
    """Raises ValueError unless one system can draft for the other; names what differs."""
    for one, what in ((sampler, "speculation"), (draft, "drafting")):
        check_windows(one, what)
    system, draft_system = sampler.system, draft.system
    pairs: dict[str, tuple[Any, Any]] = {
        "schedule": (system.schedule, draft_system.schedule),
        "head.vocab_size": (system.head.vocab_size, draft_system.head.vocab_size),
        "condition": (
            (system.backbone.condition, *system.backbone.conditioner.fields),
            (draft_system.backbone.condition, *draft_system.backbone.conditioner.fields),
        ),
    }
    for name, (ours, drafts) in pairs.items():
        if ours != drafts:
            raise ValueError(
                f"the drafting model's {name} is {drafts}, the large one's {ours}: both must be "
                "trained on the codes of one tokenizer, in one order, for one kind of condition"
            )
    length = system.schedule.length
    if tree.depth >= length or max(tree.branches) > system.head.vocab_size:
        raise ValueError(
            f"branches is {tree.branches}; the image has {length} codes of {system.head.vocab_size}"
            f": use fewer than {length} levels, and at most {system.head.vocab_size} children"
        )


@functools.partial(jax.jit, static_argnames=("system", "draft_system", "guided", "tree"))
def draw_drafted(
    system: System,
    draft_system: System,
    params: Params,
    draft_params: Params,
    cond: Cond,
    keys: Array,
    knobs: Knobs,
    scales: Array,
    order: Array | None = None,
    *,
    guided: bool,
    tree: DraftTree,
) -> tuple[Array, Array]:
    """The program: (codes int32 [B, L], calls of the large model int32 [B])."""
    length, depth = system.schedule.length, tree.depth
    large, small = (
        OneImage(system=one, params=weights, knobs=knobs, scales=scales, guided=guided)
        for one, weights in ((system, params), (draft_system, draft_params))
    )

    def begin(key: Array, cond: Cond, order: Array | None) -> State:
        """Both models have seen the condition, and the first code is settled."""
        place = jnp.zeros(1, jnp.int32)
        logits, cache = large.logits(None, cond, 0, place, large.init_cache(), order)
        _, draft_cache = small.logits(None, cond, 0, place, small.init_cache(), order)
        noise = jax.random.gumbel(jax.random.fold_in(key, 0), logits.shape[1:])
        code = draw(large.log_p(logits, place)[0], noise)
        one = jnp.ones((), jnp.int32)
        codes = jnp.zeros(length, jnp.int32).at[0].set(code)
        return State(codes, one, one, cache, draft_cache)

    def places(step: Array, first: int, end: int) -> Array:
        """Of what the nodes predict; behind the image's last code the last."""
        return jnp.minimum(step + tree.depths[first:end], length - 1)

    def drafted(
        state: State, step: Array, key: Array, cond: Cond, order: Array | None
    ) -> tuple[Array, Array, Cache]:
        """(codes of all nodes [N + 1], what the inner ones' children are of [.., V], cache)."""
        # The last code that is settled, and the one before it, which was a leaf where all drafts of
        # the last call were kept, and which the small model was then not fed.
        start = jnp.maximum(step - 1, 1)
        fed = jax.lax.dynamic_slice_in_dim(state.codes, start - 1, 2)
        at = jnp.minimum(start + jnp.arange(2), length - 1)
        logits, cache = small.logits(fed, cond, start, at, state.draft_cache, order)
        logits = logits[step - start][None]
        nodes = [jax.lax.dynamic_slice_in_dim(state.codes, step - 1, 1)]
        given = []
        for level, count in enumerate(tree.branches):
            span = tree.levels[level]
            if level:
                logits, cache = small.logits(
                    *(nodes[-1], cond, step, places(step, *span), cache, order),
                    backbone=draft_system.backbone.at(*span),
                )
            at = places(step, *span)
            log_q = small.log_p(logits, at)
            noise = jax.random.gumbel(jax.random.fold_in(key, level), log_q.shape)
            codes, log_q = draw_candidates(logits, log_q, count, noise, small.greedy(at))
            nodes.append(codes.reshape(-1))
            given.append(log_q)
        return jnp.concatenate(nodes), jnp.concatenate(given), cache

    def iterate(state: State, key: Array, cond: Cond, order: Array | None) -> State:
        """One call of the large model, and ``depth`` of the small one."""
        step = jnp.minimum(state.settled, length - 1)  # of an image that is done, its last
        key, accept, last = jax.random.split(jax.random.fold_in(key, state.calls), 3)
        nodes, log_q, draft_cache = drafted(state, step, key, cond, order)
        at = places(step, 0, len(nodes))
        logits, cache = large.logits(
            *(nodes, cond, step, at, state.cache, order), backbone=system.backbone.at(0, len(nodes))
        )
        log_p, greedy = large.log_p(logits, at), large.greedy(at)
        node, kept, going = jnp.int32(0), jnp.int32(0), jnp.bool_(True)
        left, path = log_p[0], []
        for level, count in enumerate(tree.branches):
            child = jnp.asarray(tree.first_child)[node]
            uniform = jax.random.uniform(jax.random.fold_in(accept, level), (count,))
            drafts = jax.lax.dynamic_slice_in_dim(nodes, child, count)
            chosen, rest = choose(log_p[node], log_q[node], drafts, uniform, greedy[node])
            stays = going & (chosen < count)
            left = jnp.where(going, jnp.where(stays, log_p[child + chosen], rest), left)
            node = jnp.where(stays, child + chosen, node)
            path.append(node)
            going, kept = stays, kept + stays
        code = draw(left, jax.random.gumbel(last, left.shape))
        ways = jnp.stack(path)  # [D]
        drawn = jnp.append(nodes[ways], code).at[kept].set(code)
        index = jnp.arange(depth + 1)
        # Behind the image, or behind what is settled: dropped.
        target = jnp.where((index <= kept) & (state.settled < length), step + index, length)
        return State(
            state.codes.at[target].set(drawn, mode="drop"),
            jnp.minimum(state.settled + kept + 1, length),
            state.calls + (state.settled < length),
            system.backbone.keep_path(cache, step, ways),
            draft_system.backbone.keep_path(draft_cache, step, ways[:-1]),
        )

    state = jax.vmap(begin)(keys, cond, order)
    state = jax.lax.while_loop(
        lambda state: (state.settled < length).any(),
        lambda state: jax.vmap(iterate)(state, keys, cond, order),
        state,
    )
    return to_cells(state.codes, order), state.calls
