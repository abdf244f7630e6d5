"""Which parameters of a backbone are tables with a row for every cell, or scale, of its schedule.

Whoever takes parameters to another grid or list of scales has to know what their rows mean.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ar_jax.backbones.bidirectional import Bidirectional
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.encoder_decoder import EncoderDecoder
from ar_jax.backbones.noisy_decoder import NoisyDecoder
from ar_jax.nn.resize import bicubic_matrix
from ar_jax.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class CellTable:
    """[front + L + further, D]: ``front`` rows, one for each code position, and further ones.

    The positions are in the schedule's own order, or ``by_cell``, as they lie on the grid.
    """

    front: int = 0
    by_cell: bool = False


@dataclasses.dataclass(frozen=True)
class ScaleTable:
    """[number of grids, D]."""


def position_tables(backbone: Any) -> dict[str, CellTable | ScaleTable]:
    """'a/b', a path below the backbone -> what its rows are; {} if there are none (rotary)."""
    if isinstance(backbone, EncoderDecoder):
        held = CellTable(backbone.buffer)
        if not backbone.depth:
            return {"decoder_position": held}
        return {"encoder_position": held, "decoder_position": held, "hidden_position": CellTable()}
    if isinstance(backbone, Bidirectional):
        return {"position": CellTable(1)}
    if isinstance(backbone, NoisyDecoder):
        return {"encoder_position": CellTable(), "decoder_position": CellTable()}
    if isinstance(backbone, Decoder) and backbone.positions == "learned":
        return {"position": CellTable(), "scale_embed": ScaleTable()}
    if isinstance(backbone, Decoder) and backbone.positions == "target_aware":
        table = CellTable(backbone.prefix_rows, by_cell=True)
        return {"cell_positions/held": table, "cell_positions/predicted": table}
    return {}


def resample(
    rows: np.ndarray, kind: CellTable | ScaleTable, old: Schedule, new: Schedule
) -> np.ndarray:
    """A table of the schedule ``old`` for the schedule ``new``, float32.

    The cells of a grid are resampled bicubically (as torch does) from those of the grid of the same
    place in the list of scales; of lists of other lengths, of the place nearest in proportion. Rows
    that are not of cells stay as they are. The same grids give the same rows.

    Args:
        rows: [rows, D].
    """
    sources = nearest_scales(len(old.grids), len(new.grids))
    if isinstance(kind, ScaleTable):
        return rows[sources].astype(np.float32)
    starts = np.cumsum([0, *(height * width for height, width in old.grids)]) + kind.front
    parts = [rows[: kind.front]]
    if old.cells is not None and not kind.by_cell:
        ordered = rows[kind.front : starts[-1]][np.argsort(old.cells)]
        rows = np.concatenate([*parts, ordered, rows[starts[-1] :]])
    for source, grid in zip(sources, new.grids, strict=True):
        table = rows[starts[source] : starts[source + 1]].reshape(*old.grids[source], -1)
        if grid != old.grids[source]:
            across = [bicubic_matrix(n, m) for n, m in zip(old.grids[source], grid, strict=True)]
            table = np.einsum("ih,jw,hwc->ijc", *across, table.astype(np.float64), optimize=True)
        made = table.reshape(-1, rows.shape[1])
        parts.append(made if new.cells is None or kind.by_cell else made[list(new.cells)])
    parts.append(rows[starts[-1] :])
    return np.concatenate(parts).astype(np.float32)


def nearest_scales(old: int, new: int) -> list[int]:
    """For each of ``new`` scales, the one of ``old`` in its place; first and last keep theirs."""
    if new == 1:
        return [old - 1]
    return [round(i * (old - 1) / (new - 1)) for i in range(new)]
