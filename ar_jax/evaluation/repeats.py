"""Figures of runs that are repeated over seeds: kept in a JSON file as they come; their spread."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunTable:
    """A JSON file of the figures of runs, all of one mode, and the table beside it as Markdown.

    Attributes:
        path: of the JSON file; the table has the same name with '.md'.
        mode: argument of the configurations.
        runs: name -> figures, as far as there are any.
        markdown: the table's text, of ``runs``.
    """

    path: Path
    mode: str
    runs: dict[str, Figures]
    markdown: Callable[[Mapping[str, Figures]], str]

    @classmethod
    def open(
        cls, path: str | Path, mode: str, markdown: Callable[[Mapping[str, Figures]], str]
    ) -> RunTable:
        """The table at ``path``, empty if there is none.

        Raises:
            ValueError: it has runs of another mode.
        """
        path = Path(path)
        kept: dict[str, Any] = {"mode": mode, "runs": {}}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["mode"] != mode:
            raise ValueError(f"--out={path} has runs of --mode={kept['mode']}; name another file")
        return cls(path=path, mode=mode, runs=kept["runs"], markdown=markdown)

    def add(self, name: str, figures: Figures) -> None:
        """Keeps the figures of a run and writes both files."""
        self.runs[name] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"mode": self.mode, "runs": self.runs}
        self.path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(self.markdown(self.runs), encoding="utf-8")


def of_variant(runs: Mapping[str, Figures], variant: str) -> list[Figures]:
    """Figures of the runs that are named 'variant: seed n'."""
    return [figures for name, figures in runs.items() if name.split(": ")[0] == variant]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and, of several, standard deviation (of a sample, n - 1)."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
