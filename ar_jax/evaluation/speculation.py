"""Which speculation a generator draws with, and what it changes: calls of the model, and the law.

What a speculation draws is judged by the model's own likelihood of it: an exact one has the plain
sampler's distribution, of whatever statistic; a lossy one has not, and by how much is told.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ar_jax.api import Array, Cond, Params, System
from ar_jax.build import create_draft_sampler, create_sampler
from ar_jax.evaluation.load import load_system
from ar_jax.sampling.grouped import Grouping
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler
from ar_jax.sampling.speculative import REDRAWS, SpeculativeSampler

# 'draft' has a smaller model; 'grouped' is lossy; the others are Jacobi's, by their redraws.
RULES = (*REDRAWS, "grouped", "draft")
BINS = 10  # of likelihoods, equally full of the plain sampler's images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """How codes are drawn ahead.

    Attributes:
        rule: one of `RULES`.
        window: drafts checked in one call, of all rules but 'draft'.
        grouping: of the rule 'grouped', which redraws as 'maximal' does; None: the default.
        draft: workdir of the drafting model, of the rule 'draft' alone.
        branches: of the tree of its drafts, see `ar_jax.nn.draft_tree.DraftTree`.

    Raises:
        ValueError: an unknown rule, or one that has a drafting model or has none, wrongly.
    """

    rule: str
    window: int = 16
    grouping: Grouping | None = None
    draft: str | Path | None = None
    branches: tuple[int, ...] = (1, 1, 1, 1)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"speculation is {self.rule!r}; it must be one of {RULES}")
        if (self.draft is not None) != (self.rule == "draft"):
            raise ValueError(
                f"speculation is {self.rule!r} and its drafting model {self.draft}: the rule "
                "'draft' needs one, and no other rule has one"
            )

    def __str__(self) -> str:
        """For reports."""
        if self.rule == "draft":
            return f"drafts {'-'.join(map(str, self.branches))} of {self.draft} (exact)"
        law = "lossy" if self.rule == "grouped" else "exact"
        return f"Jacobi speculation, {self.rule}, window {self.window} ({law})"

    def sampler(self, sampler: Any, draft: CachedSampler | None = None) -> Any:
        """What draws so, and is called as the plain ``sampler`` is.

        Args:
            draft: the drafting model if it is at hand; None: it is read from its workdir.

        Raises:
            ValueError: a generator or a drafting model that is not drawn code by code, or that do
                not fit each other.
        """
        if not isinstance(sampler, CachedSampler):
            raise ValueError(
                f"{type(sampler).__name__} draws no code after the other: none can be drawn ahead"
            )
        if self.rule == "draft":
            assert self.draft is not None
            drafting = load_draft(self.draft, sampler) if draft is None else draft
            return create_draft_sampler(sampler, drafting, self.branches)
        grouped = self.rule == "grouped"
        return SpeculativeSampler(
            sampler=sampler,
            window=self.window,
            redraw="maximal" if grouped else self.rule,
            grouping=(self.grouping or Grouping()) if grouped else None,
        )


def load_draft(workdir: str | Path, sampler: CachedSampler) -> CachedSampler:
    """The drafting model of a workdir; ValueError if its codes are another tokenizer's."""
    _, system, params = load_system(workdir)
    draft = create_sampler(system, params)
    if not isinstance(draft, CachedSampler):
        raise ValueError(f"{workdir} holds no generator that draws one code after the other")
    both = params["tokenizer"], sampler.params["tokenizer"]
    drafts, ours = (jax.tree.leaves_with_path(one) for one in both)
    if [path for path, _ in drafts] != [path for path, _ in ours] or not all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(drafts, ours, strict=True)
    ):
        raise ValueError(
            f"{workdir} was trained on codes of another tokenizer than the generator that it is to "
            "draft for: its drafts would mean nothing"
        )
    return draft


@functools.partial(jax.jit, static_argnames=("system", "guided"))
def _nats(
    system: System, params: Params, cond: Cond, codes: Array, scales: Array, *, guided: bool
) -> Array:
    context = system.tokenizer.apply({"params": params["tokenizer"]}, codes, method="contexts")

    def logits(cond: Cond) -> Array:
        hidden, _ = system.backbone.apply({"params": params["backbone"]}, context, cond)
        return system.head.apply({"params": params["head"]}, hidden)

    found = logits(cond)
    if guided:
        null = system.backbone.conditioner.null(cond)
        found = system.head.guide(found, logits(null), scales[None, :, None])
    return -system.head.log_prob(found, codes).sum(-1)


def nats_of(
    sampler: CachedSampler,
    cond: Mapping[str, np.ndarray],
    codes: np.ndarray,
    guidance: Guidance,
    batch_size: int,
) -> np.ndarray:
    """Negative log-likelihood of codes [N, L] under the guided model, before filters: [N]."""
    schedule = sampler.system.schedule
    scales = guidance.scales(schedule.num_steps, schedule.known)
    found = []
    for first in range(0, len(codes), batch_size):
        rows = np.minimum(np.arange(first, first + batch_size), len(codes) - 1)
        part = {name: jnp.asarray(value[rows]) for name, value in cond.items()}
        found.append(
            _nats(
                *(sampler.system, sampler.params, part, jnp.asarray(codes[rows])),
                jnp.asarray(scales),
                guided=bool(np.any(scales != 1.0)),
            )
        )
    return np.concatenate(found)[: len(codes)]


def law_distance(nats: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """How far images are from the plain sampler's, by their likelihoods [N] and [M].

    Returns:
        nats_per_image and its difference from the plain one in standard errors; the total
        variation of their histograms over `BINS` bins, equally full of the plain images, which
        is above 0 by chance alone too; and the p-value of the chi-square test that both are one
        distribution: an exact rule gives a small one by chance alone.
    """
    edges = np.quantile(plain, np.linspace(0, 1, BINS + 1)[1:-1])
    table = np.stack([np.bincount(np.digitize(x, edges), minlength=BINS) for x in (nats, plain)])
    shares = table / table.sum(1, keepdims=True)
    error = np.sqrt(nats.var(ddof=1) / len(nats) + plain.var(ddof=1) / len(plain))
    filled = table[:, table.sum(0) > 0]
    return {
        "nats_per_image": float(nats.mean()),
        "nats_off_in_standard_errors": float((nats.mean() - plain.mean()) / max(error, 1e-12)),
        "total_variation_of_nats": float(np.abs(shares[0] - shares[1]).sum() / 2),
        "chi_square_p": float(stats.chi2_contingency(filled).pvalue),
    }


def call_figures(calls: np.ndarray, steps: int, batch_size: int) -> dict[str, float]:
    """Of the calls [N] of the model for each image, where the plain sampler needs ``steps``.

    ``calls_per_batch``: a batch goes on until its slowest image is done.
    """
    batches: Sequence[np.ndarray] = np.split(calls, range(batch_size, len(calls), batch_size))
    error = calls.std(ddof=1) / np.sqrt(len(calls)) if len(calls) > 1 else 0.0
    return {
        "calls_per_image": float(calls.mean()),
        "calls_standard_error": float(error),
        "steps_saved": float(steps / calls.mean()),
        "calls_per_batch": float(np.mean([batch.max() for batch in batches])),
    }
