"""report.json and report.md: numbers, each with a sentence that says what was measured.

A report is a plain dict of sections, in the order they are written:

    {"generation": {
        "title": "Generated images",
        "about": "1,000 images, 100 per class, guidance 2.",
        "metrics": {"class_accuracy": {"value": 0.9, "measured": "share of images ..."}},
        "tables": {"Per class": {"columns": ["class", "accuracy"], "rows": [["Bag", 0.97]]}},
        "pictures": {"One row per class.": "samples.png"}}}

All but `title` may be missing. The json holds the same dict; numpy values become lists and numbers,
and a number that JSON cannot hold becomes "inf", "-inf" or "nan". No date and no path is added, so
the same numbers give the same files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

REPORT_JSON = "report.json"
REPORT_MD = "report.md"

_SECTION_KEYS = ("title", "about", "metrics", "tables", "pictures")


def metric(value: float | np.number | None, measured: str) -> dict[str, Any]:
    """A metric: its value (None where it does not apply) and what was measured, in a sentence."""
    return {"value": value, "measured": measured}


def table(columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    """A table: its column heads, and rows of as many cells."""
    return {"columns": columns, "rows": rows}


def _plain(value: Any, where: str) -> Any:
    """Numpy scalars and arrays, tuples and non-finite floats to what JSON holds."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where}: {type(value).__name__} cannot be written into a report")


def _check(sections: Mapping[str, Any], directory: Path) -> None:
    for name, section in sections.items():
        unknown = sorted(set(section) - set(_SECTION_KEYS))
        if unknown:
            raise ValueError(f"sections.{name}: unknown keys {unknown}; known are {_SECTION_KEYS}")
        if not section.get("title"):
            raise ValueError(f"sections.{name}.title: missing")
        for key, entry in section.get("metrics", {}).items():
            where = f"sections.{name}.metrics.{key}"
            if not isinstance(entry, Mapping) or set(entry) != {"value", "measured"}:
                raise ValueError(f"{where}: {entry!r}, expected {{'value': ..., 'measured': ...}}")
            if not str(entry["measured"]).strip():
                raise ValueError(f"{where}.measured: empty; say what was measured")
        for key, entry in section.get("tables", {}).items():
            for row in entry["rows"]:
                if len(row) != len(entry["columns"]):
                    raise ValueError(
                        f"sections.{name}.tables.{key}: a row of {len(row)} cells under "
                        f"{len(entry['columns'])} columns: {row!r}"
                    )
        for caption, picture in section.get("pictures", {}).items():
            if os.path.isabs(picture):
                raise ValueError(
                    f"sections.{name}.pictures: {picture!r} is absolute; name it relative to the "
                    "report, so that the folder can be moved"
                )
            if not (directory / picture).is_file():
                raise ValueError(
                    f"sections.{name}.pictures: {picture!r} ({caption!r}) is not in {directory}"
                )


def format_value(value: Any) -> str:
    """A cell: counts in full, other numbers to four digits, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _rows(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(format_value, columns)) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(map(format_value, row)) + " |" for row in rows]


def markdown(title: str, sections: Mapping[str, Any]) -> str:
    """The report's text, from sections that hold plain values."""
    lines = [f"# {title}", ""]
    for section in sections.values():
        lines += [f"## {section['title']}", ""]
        if section.get("about"):
            lines += [section["about"], ""]
        if section.get("metrics"):
            rows = [[k, m["value"], m["measured"]] for k, m in section["metrics"].items()]
            lines += [*_rows(["metric", "value", "what was measured"], rows), ""]
        for caption, entry in section.get("tables", {}).items():
            lines += [f"**{caption}**", "", *_rows(entry["columns"], entry["rows"]), ""]
        for caption, picture in section.get("pictures", {}).items():
            lines += [f"![{caption}]({picture})", "", caption, ""]
    return "\n".join(lines)


def write_report(
    directory: str | Path, title: str, sections: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Writes report.json and report.md into `directory`; returns their paths.

    Args:
        directory: made if missing; pictures are named relative to it and must be there.
        title: of the report.
        sections: see the module's docstring.

    Raises:
        ValueError: an unknown key, a metric that does not say what was measured, a row that does
            not fit its table, a picture that is missing.
    """
    directory = Path(directory)
    _check(sections, directory)
    plain = _plain(sections, "sections")
    directory.mkdir(parents=True, exist_ok=True)
    json_path, md_path = directory / REPORT_JSON, directory / REPORT_MD
    json_text = json.dumps({"title": title, "sections": plain}, indent=2, allow_nan=False)
    json_path.write_text(json_text + "\n", encoding="utf-8")
    md_path.write_text(markdown(title, plain), encoding="utf-8")
    return json_path, md_path


def read_report(directory: str | Path) -> dict[str, Any]:
    """The sections of the report.json in `directory`, as plain values."""
    path = Path(directory) / REPORT_JSON
    if not path.is_file():
        raise ValueError(f"{path}: no such file; experiments/evaluate.py writes it")
    return json.loads(path.read_text(encoding="utf-8"))["sections"]
