"""Every item once, in order: the evaluation batches of this host."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from ar_jax.data.host import MAX_SEED, Batch, Fetch, Host, read_options, this_host
from ar_jax.data.source import Item, Source
from ar_jax.data.transforms import ImageTransform


class EvalBatches:
    """This host's evaluation batches, in order; iterate as often as needed.

    Yields training's keys plus 'mask' float32 [b]. Global batch t is the next `batch_size` items
    and host h of n holds the h-th block of it, so joined blocks are the items in order on any
    number of hosts. Every host yields the same number of batches: missing rows of the last one are
    zeros with mask 0. With `max_batches` the items are a subset spread evenly over the source (a
    folder lists one class after the other). Threads end with each pass, also one left early.
    """

    def __init__(
        self,
        fetch: Fetch,
        indices: np.ndarray,
        batch_size: int,
        host: Host,
        read_options: grain.ReadOptions,
        augment_seed: int | None,
        first: int,
    ) -> None:
        self._fetch = fetch
        self._indices = indices
        self._batch_size = batch_size
        self._host = host
        self._read_options = read_options
        self._augment_seed = augment_seed
        self._first = first

    @property
    def num_items(self) -> int:
        """Items over all hosts, padding not counted."""
        return len(self._indices) - self._first

    def __len__(self) -> int:
        return -(-self.num_items // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = grain.MapDataset.range(len(self)).map(self._read)
        iterator = iter(batches.to_iter_dataset(self._read_options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def _read(self, step: int) -> Batch:
        block = self._batch_size // self._host.count
        start = self._first + int(step) * self._batch_size + self._host.index * block
        items = [self._item(p) for p in range(start, min(start + block, len(self._indices)))]
        # A host whose whole block is padding still needs the shapes.
        template = items[0] if items else self._item(0)
        batch = {}
        for key, value in template.items():
            rows = np.zeros((block, *np.shape(value)), np.asarray(value).dtype)
            for row, item in enumerate(items):
                rows[row] = item[key]
            batch[key] = rows
        batch["mask"] = (np.arange(block) < len(items)).astype(np.float32)
        return batch

    def _item(self, position: int) -> Item:
        rng = None
        if self._augment_seed is not None:
            rng = np.random.Generator(np.random.Philox(key=[self._augment_seed, position]))
        return self._fetch(self._indices[position], rng)


def eval_batches(
    source: Source,
    transform: ImageTransform | None,
    *,
    batch_size: int,
    max_batches: int | None = None,
    augment_seed: int | None = None,
    first: int = 0,
    num_threads: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> EvalBatches:
    """Every item once, in order, padded and masked; see `EvalBatches`.

    `augment_seed` applies the training transform (and draws among stored copies), as a function of
    (augment_seed, item); without it the deterministic transform and the first copy are used.
    Items before `first` are left out, and change nothing of those after them.

    Raises:
        ValueError: a field out of range, or `batch_size` not divisible by the number of hosts.
    """
    host = this_host(batch_size, process_index, process_count)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches} must be at least 1, or None for all")
    if augment_seed is not None and not 0 <= augment_seed < MAX_SEED:
        raise ValueError(f"augment_seed={augment_seed} must lie in 0..{MAX_SEED - 1}")
    total = len(source)
    count = total if max_batches is None else min(total, max_batches * batch_size)
    if not 0 <= first <= count:
        raise ValueError(f"first={first} must lie in 0..{count}, the number of items")
    indices = np.arange(count) * total // count
    return EvalBatches(
        Fetch(source, transform),
        indices,
        batch_size,
        host,
        read_options(source, num_threads),
        augment_seed,
        first,
    )
