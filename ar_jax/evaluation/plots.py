"""Plots as PNG: training curves, bars per step of the schedule and per class, neighbours.

Figures are made without pyplot, so nothing depends on or changes a notebook's backend, and carry no
date or version, so the same numbers give the same file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ar_jax.evaluation.grids import to_rgb, upscale
from ar_jax.evaluation.memorisation import MemorisationResult, Neighbours
from ar_jax.io.metrics import read_jsonl

_DPI = 100
_BAR = "#4c72b0"
_REFERENCE = "#c44e52"

Series = dict[str, tuple[np.ndarray, np.ndarray]]


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG, making its folder; returns the path."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: {str(path)!r} must end in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
    return path


def read_metrics(path: str | Path) -> Series:
    """Every number in a metrics.jsonl: name -> (steps [n] int, values [n] float), steps ascending.

    Lines are objects `{"step": int, name: number, ...}`; any name may be missing from any line and
    values that are not numbers are left out. A step written twice counts with its last value.

    Raises:
        ValueError: the file is missing, holds a line that is no such object, or no number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a training run writes it into its workdir")
    points: dict[str, dict[int, float]] = {}
    for record in read_jsonl(path):
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}: {record!r} is no object with a step")
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, {})[int(record["step"])] = float(value)
    if not points:
        raise ValueError(f"{path}: no line of the form {{'step': 1, 'name': value}}")
    return {
        name: (np.array(sorted(values)), np.array([values[step] for step in sorted(values)]))
        for name, values in points.items()
    }


def group_panels(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Panel title -> {line label -> name}.

    `train/loss` and `eval/loss` share a panel; `train/nll/scale_00` and `train/nll/scale_01` share
    another, apart from `train/nll`, which is their mean.
    """
    panels: dict[str, dict[str, str]] = {}
    for name in names:
        split, _, metric = name.partition("/")
        metric, _, part = metric.partition("/")
        if not metric:
            title, label = split, split
        elif part:
            title, label = f"{metric} of each part, {split}", part
        else:
            title, label = metric, split
        panels.setdefault(title, {})[label] = name
    return panels


def save_training_curves(
    metrics: str | Path | Series,
    path: str | Path,
    include: Sequence[str] = (".*",),
    columns: int = 3,
) -> Path:
    """Metrics over the training step, one panel for each group of `group_panels`.

    Args:
        metrics: a metrics.jsonl, or what `read_metrics` made of one.
        path: the PNG to write.
        include: regular expressions; a metric is drawn where one matches its whole name.
        columns: panels side by side.

    Raises:
        ValueError: no metric matches.
    """
    series = metrics if isinstance(metrics, dict) else read_metrics(metrics)
    chosen = {n: s for n, s in series.items() if any(re.fullmatch(p, n) for p in include)}
    if not chosen:
        raise ValueError(f"include: {list(include)} match none of {sorted(series)}")
    panels = group_panels(chosen)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(2, len(lines))))
        for position, (label, name) in enumerate(lines.items()):
            steps, values = chosen[name]
            colour = f"C{position}" if len(lines) <= 3 else colours[position]
            marker = "o" if len(steps) == 1 else None
            axis.plot(steps, values, label=label, color=colour, marker=marker, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if list(lines) != [title]:
            axis.legend(fontsize=7, ncols=-(-len(lines) // 6))
    return save_figure(figure, path)


def save_bars(
    panels: Mapping[str, np.ndarray | Sequence[float]],
    labels: Sequence[str],
    path: str | Path,
    references: Mapping[str, tuple[str, float]] | None = None,
    xlabel: str = "",
) -> Path:
    """Bars side by side: one panel per metric, one bar per label.

    Args:
        panels: title -> a value for every label (accuracy per scale, per class, per guidance ...).
        labels: under the bars.
        path: the PNG to write.
        references: title -> (what it is, value), a line across that panel, such as a floor.
        xlabel: what the labels are.

    Raises:
        ValueError: a panel with another number of values than there are labels.
    """
    if not panels or not labels:
        raise ValueError("panels, labels: expected at least one of each")
    references = references or {}
    unknown = sorted(set(references) - set(panels))
    if unknown:
        raise ValueError(f"references: {unknown} are no panels; those are {list(panels)}")
    width = max(3.2, 1.0 + 0.5 * len(labels))
    figure = Figure(figsize=(width * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        if len(values) != len(labels):
            raise ValueError(f"{title}: {len(values)} values for {len(labels)} labels")
        bars = axis.bar(range(len(labels)), values, color=_BAR)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        if max(map(len, labels)) > 5:
            axis.set_xticks(range(len(labels)), labels, fontsize=8, rotation=45, ha="right")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.margins(y=0.12)
        if title in references:
            what, value = references[title]
            axis.axhline(value, color=_REFERENCE, linestyle="--", linewidth=1.2, label=what)
            axis.legend(fontsize=7, loc="lower right")
    return save_figure(figure, path)


def save_sweep(
    points: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    metrics: Sequence[str],
    path: str | Path,
) -> Path:
    """Metrics over the first axis, a panel each, and a line for each setting of the other axes.

    Args:
        points: {'settings': axis -> value, 'metrics': name -> number}.
        axes: names of the settings.
        metrics: to draw.
        path: the PNG to write.
    """
    first, *others = axes
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        name = ", ".join(f"{axis} {point['settings'][axis]}" for axis in others)
        lines.setdefault(name, []).append(point)
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, metric in zip(panels, metrics, strict=False):
        for name, line in lines.items():
            where = [point["settings"][first] for point in line]
            panel.plot(where, [p["metrics"][metric] for p in line], marker="o", label=name)
        panel.set_title(metric)
        panel.set_xlabel(first)
        if others:
            panel.legend(fontsize=7)
    for panel in panels[len(metrics) :]:
        panel.remove()
    return save_figure(figure, path)


def save_memorisation(result: MemorisationResult, path: str | Path, limit: int = 10) -> Path:
    """Generated images over their nearest training images, with distance and percentile.

    Three rows: generated, nearest by pixels, nearest by classifier features. The `limit` images
    nearest to a training image in pixels are shown, the nearest first: a copy cannot hide.
    """
    order = np.argsort(result.pixels.distance, kind="stable")[:limit]
    figure = Figure(figsize=(1.25 * len(order) + 1.0, 5.2), layout="constrained")
    axes = figure.subplots(3, len(order), squeeze=False)
    rows: tuple[tuple[str, np.ndarray, Neighbours | None], ...] = (
        ("generated", result.generated, None),
        ("nearest\n(pixels)", result.nearest_pixels, result.pixels),
        ("nearest\n(features)", result.nearest_features, result.features),
    )
    for row, (name, images, found) in enumerate(rows):
        for column, index in enumerate(order):
            axis = axes[row, column]
            axis.imshow(upscale(to_rgb(images[index])), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if found is not None:
                caption = f"{found.distance[index]:.3g}\n{found.percentile[index]:.0f}%"
                axis.set_xlabel(caption, fontsize=8)
        axes[row, 0].set_ylabel(name, fontsize=9)
    figure.suptitle(
        "distance to the training image, and % of held-out images at least as near", fontsize=9
    )
    return save_figure(figure, path)
