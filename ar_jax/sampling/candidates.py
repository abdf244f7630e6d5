"""Several drafts for one code: how they are drawn, and which of them is kept. Exact.

Drafts of one node are drawn from q without replacement. They are tried one after the other: the
first is kept with probability min(1, p / q); if it is not, p becomes what p has above q, q loses
the draft, and the next is tried. If none is kept the code is drawn from what is left of p
(recursive rejection sampling, arXiv:2402.14160). Whatever q is, the code has the distribution p.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_jax.api import Array
from ar_jax.sampling.one_image import residual


def draw_candidates(
    logits: Array, log_q: Array, count: int, gumbel: Array, greedy: Array
) -> tuple[Array, Array]:
    """(drafts int32 [n, count] of n nodes, what they were drawn from, log-probabilities [n, V]).

    Draws without replacement are the largest perturbed log-probabilities (arXiv:1903.06059).

    Args:
        logits: [n, V], the drafting model's, before the knobs: greedy drafts are its largest ones.
        log_q: [n, V], under the knobs.
        gumbel: noise [n, V].
        greedy: bool [n], whether the temperature is 0; the drafts are then certain.
    """
    greedy = greedy[:, None]
    _, drafts = jax.lax.top_k(jnp.where(greedy, logits, log_q + gumbel), count)
    # Logits where greedy: all that counts then is that none is impossible.
    return drafts.astype(jnp.int32), jnp.where(greedy, jax.nn.log_softmax(logits), log_q)


def choose(
    log_p: Array, log_q: Array, drafts: Array, uniform: Array, greedy: Array
) -> tuple[Array, Array]:
    """(which draft is kept, int32; their number if none, logits [V] of the code if none is).

    Args:
        log_p, log_q: [V], log-probabilities of the model and of what drew the drafts.
        drafts: int32 [c], in the order of their draws.
        uniform: float32 [c], in [0, 1).
        greedy: bool, see `draw_candidates`: q is then the draft alone.
    """
    count, vocab = len(drafts), len(log_p)
    kept = jnp.int32(count)
    tried = jnp.zeros(vocab, bool)
    for number in range(count):
        draft = drafts[number]
        its_own = jnp.arange(vocab) == draft
        left = without(log_q, tried)
        q = jnp.where(greedy, jnp.where(its_own, 0.0, -jnp.inf), left)
        # q has fewer codes than there are drafts: this one is none of them.
        drawn = jnp.isfinite(left[draft])
        keeps = drawn & (uniform[number] < jnp.exp(log_p[draft] - q[draft]))
        kept = jnp.where((kept == count) & keeps, number, kept)
        log_p = jnp.where(drawn, jax.nn.log_softmax(residual(log_p, q)), log_p)
        tried = tried | its_own
    # Where a draft is kept, what became of p behind it is not looked at.
    return kept, log_p


def without(log_q: Array, tried: Array) -> Array:
    """Log-probabilities [V] of what is left of q [V] without ``tried``, bool [V]."""
    left = jnp.where(tried, -jnp.inf, log_q)
    largest = left.max()
    total = largest + jnp.log(jnp.exp(left - jnp.where(jnp.isfinite(largest), largest, 0.0)).sum())
    return jnp.where(jnp.isfinite(largest), left - total, -jnp.inf)
