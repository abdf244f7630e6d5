"""What is put around a generator's sampler by name: other models from their workdirs, a search."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ar_jax.build import AnySampler
from ar_jax.evaluation.load import describe_weights, load_system
from ar_jax.io.run_info import read_config
from ar_jax.sampling.beam import BeamSearch
from ar_jax.sampling.companions import Companion, reward, weak
from ar_jax.sampling.loop import CachedSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composition:
    """Options of one sampler, which go together in any way; the default changes nothing.

    Attributes:
        weak: workdir of the model to be guided away from, in place of the null class.
        weak_step: its checkpoint; None is the newest. Without ``weak`` it is of the sampled model.
        weak_null: show it the null class.
        rewards: workdirs of autoregressive rewards.
        reward_weights: an exponent for each; () is 1.
        beams: of every image; 0 is no search.
        candidates: of every beam at every step.
        likeliest: take the likeliest candidates in place of draws.

    Raises:
        ValueError: names what is given without what it goes with.
    """

    weak: str | Path | None = None
    weak_step: int | None = None
    weak_null: bool = False
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()
    beams: int = 0
    candidates: int = 4
    likeliest: bool = False

    def __post_init__(self) -> None:
        if self.weak_null and self.weak is None and self.weak_step is None:
            raise ValueError("--weak_null says what a weak model sees: name one with --weak")
        if len(self.reward_weights) not in (0, len(self.rewards)):
            raise ValueError(
                f"--reward_weights has {len(self.reward_weights)} numbers for "
                f"{len(self.rewards)} models in --rewards: give one for each"
            )
        if self.beams < 0:
            raise ValueError(f"--beams={self.beams} must be at least 0")
        if self.likeliest and not self.beams:
            raise ValueError("--likeliest is of a search: say how many --beams")

    def around(self, sampler: AnySampler, workdir: str | Path) -> AnySampler | BeamSearch:
        """The sampler of ``workdir`` with all that is asked for.

        Raises:
            ValueError: models that do not fit, or a sampler that takes none and is not searched.
        """
        models = self._models(workdir)
        if not models and not self.beams:
            return sampler
        if not isinstance(sampler, CachedSampler):
            raise ValueError(
                "--weak, --rewards and --beams are of samplers that draw codes step by step: "
                f"{workdir} has a {type(sampler).__name__}"
            )
        beside = sampler.beside(*models)
        if not self.beams:
            return beside
        settings: dict[str, Any] = {"candidates": self.candidates, "likeliest": self.likeliest}
        return BeamSearch(sampler=beside, width=self.beams, **settings)

    def describe(self, workdir: str | Path) -> str:
        """', guided away from runs/var (parameters of step 200), ...' for reports."""
        parts = []
        for name, path, step in self._named(workdir):
            parts.append(f"{name} {path} ({describe_weights(path, read_config(path), step)})")
        if self.beams:
            kind = "likeliest" if self.likeliest else "drawn"
            parts.append(f"{self.beams} beams of {self.candidates} {kind} candidates")
        return "".join(f", {part}" for part in parts)

    def _named(self, workdir: str | Path) -> list[tuple[str, str | Path, int | None]]:
        """(what it is, where, checkpoint) of every other model."""
        named: list[tuple[str, str | Path, int | None]] = []
        if self.weak is not None or self.weak_step is not None:
            sees = " without condition" if self.weak_null else ""
            where = workdir if self.weak is None else self.weak
            named.append((f"guided away from{sees}", where, self.weak_step))
        weights = self.reward_weights or (1.0,) * len(self.rewards)
        rewards = zip(self.rewards, weights, strict=True)
        return named + [(f"reward {weight:g} of", path, None) for path, weight in rewards]

    def _models(self, workdir: str | Path) -> list[Companion]:
        weights = iter(self.reward_weights or (1.0,) * len(self.rewards))
        models = []
        for name, path, step in self._named(workdir):
            _, system, params = load_system(path, step=step)
            if name.startswith("reward"):
                models.append(reward(system, params, weight=next(weights)))
            else:
                models.append(weak(system, params, null=self.weak_null))
        return models
