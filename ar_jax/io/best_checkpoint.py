"""Which checkpoint of a run is its best, by a metric that is kept in the checkpoints themselves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from ar_jax.io.checkpoint import FOLDER, list_steps
from ar_jax.io.checkpoint_health import RECORD

SCORES = "scores"  # in a checkpoint's metadata: metric -> value
MODES = ("min", "max")


@dataclasses.dataclass(frozen=True)
class Best:
    """What the best checkpoint is the best in.

    Attributes:
        metric: name of an evaluation's metric, as it is written: 'eval/loss'.
        mode: 'min' or 'max' of it.
    """

    metric: str
    mode: str = "min"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"config.train.best_mode={self.mode!r} is none of 'min', 'max'")

    def value(self, scores: Mapping[str, float]) -> float:
        """The metric of an evaluation.

        Raises:
            ValueError: it has no such metric; names those it has.
        """
        if self.metric not in scores:
            raise ValueError(
                f"config.train.best_metric={self.metric!r} is none of the evaluation's metrics: "
                f"{', '.join(sorted(scores))}"
            )
        return float(scores[self.metric])

    def improves(self, value: float, on: float | None) -> bool:
        """Whether a value is better than another, or than none; NaN is better than nothing."""
        if not math.isfinite(value):
            return False
        return on is None or (value < on if self.mode == "min" else value > on)


def choose_best(metric: str, mode: str) -> Best | None:
    """What the best checkpoint is the best in; None for the metric '': none is kept.

    Raises:
        ValueError: an unknown mode.
    """
    best = Best(metric, mode)
    return best if metric else None


def find_best(directory: epath.Path, steps: Iterable[int], best: Best) -> tuple[int, float] | None:
    """(step, value) of the best of the checkpoints in ``directory``, of equal ones the first."""
    found: tuple[int, float] | None = None
    for step in steps:
        value = recorded_scores(directory / str(step)).get(best.metric)
        if value is not None and best.improves(value, found and found[1]):
            found = (step, value)
    return found


def recorded_scores(path: epath.Path) -> dict[str, float]:
    """What was measured when a checkpoint was saved; {}: nothing, or no record to read."""
    try:
        record = json.loads((path / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    metadata = record.get("custom_metadata") if isinstance(record, dict) else None
    scores = metadata.get(SCORES) if isinstance(metadata, dict) else None
    return scores if isinstance(scores, dict) else {}


def best_step(workdir: epath.PathLike, train: Mapping[str, Any]) -> int:
    """The step of the best checkpoint of a run.

    Args:
        train: the section `config.train` of the run.

    Raises:
        ValueError: the run keeps none, or has not evaluated yet.
    """
    if not train.get("best_metric"):
        raise ValueError(
            f"--best: {workdir} has config.train.best_metric='', so none of its checkpoints is "
            "kept as the best; name a --step"
        )
    best = Best(train["best_metric"], train.get("best_mode", "min"))
    directory = epath.Path(workdir).absolute() / FOLDER
    found = find_best(directory, list_steps(workdir), best)
    if found is None:
        raise ValueError(f"--best: no checkpoint in {directory} has a finite {best.metric} yet")
    return found[0]
