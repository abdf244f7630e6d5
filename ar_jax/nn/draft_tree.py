"""The shape of a tree of drafts: which node stands behind which. numpy only."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class DraftTree:
    """Static and hashable. Node 0 is the last code that is settled, the others are drafts.

    Nodes are numbered level by level; the children of a node follow each other.

    Attributes:
        branches: children of every node of level 0, 1, ...; (1, 1, 1) is a chain of three drafts,
            (4, 1, 1) are four chains, (3, 2, 1) a tree of 3 + 6 + 6 drafts.

    Raises:
        ValueError: no level, or one without a child.
    """

    branches: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.branches or min(self.branches) < 1:
            raise ValueError(
                f"branches is {self.branches}; it must be a positive number of children for each "
                "level of the tree, one level at least"
            )

    @property
    def depth(self) -> int:
        """D, levels of drafts."""
        return len(self.branches)

    @property
    def size(self) -> int:
        """N, drafts: all nodes but the first."""
        return len(self.depths) - 1

    @property
    def chain(self) -> bool:
        """Whether no node has two children."""
        return max(self.branches) == 1

    @functools.cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(first node, end) of level 0, 1, ..., D."""
        ends = np.cumsum(np.cumprod((1, *self.branches)))
        return tuple(zip((0, *map(int, ends[:-1])), map(int, ends), strict=True))

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """Level of every node, int32 [N + 1]."""
        counts = [end - first for first, end in self.levels]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @functools.cached_property
    def first_child(self) -> np.ndarray:
        """Of every node, int32 [N + 1]; of the last level 0."""
        children = np.zeros(self.size + 1, np.int32)
        for (first, end), (below, _), count in zip(
            self.levels, self.levels[1:], self.branches, strict=False
        ):
            children[first:end] = below + count * np.arange(end - first)
        return children

    @functools.cached_property
    def sees(self) -> np.ndarray:
        """Bool [N + 1, N + 1]: node i is node j or stands behind it."""
        seen = np.eye(self.size + 1, dtype=bool)
        for node, (child, depth) in enumerate(zip(self.first_child, self.depths, strict=True)):
            if depth < self.depth:
                for number in range(self.branches[depth]):
                    seen[child + number] |= seen[node]
        return seen
