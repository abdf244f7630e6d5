"""What training and evaluation pipelines share: reading one item, this host, threads."""

from __future__ import annotations

import dataclasses
import os

import grain
import jax
import numpy as np

from ar_jax.data.source import Item, Source
from ar_jax.data.transforms import ImageTransform

Batch = dict[str, np.ndarray]

MAX_SEED = 2**32  # grain's shuffle takes 32 bits


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Reads and transforms one item; runs in threads and in worker processes."""

    source: Source
    transform: ImageTransform | None

    def __call__(self, index: int, rng: np.random.Generator | None) -> Item:
        item = self.source.fetch(int(index), rng)
        if self.transform is None:
            return item
        try:
            return {**item, "image": self.transform(item["image"], rng)}
        except ValueError as error:
            raise ValueError(f"{self.source.describe(int(index))}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Host:
    """This process among all."""

    index: int
    count: int


def this_host(batch_size: int, index: int | None, count: int | None) -> Host:
    """The host given, or else the one jax reports. ValueError unless it can share the batch."""
    host = Host(
        jax.process_index() if index is None else index,
        jax.process_count() if count is None else count,
    )
    if not 0 <= host.index < host.count:
        raise ValueError(f"process_index={host.index} must lie in 0..{host.count - 1}")
    if batch_size < 1 or batch_size % host.count:
        below = batch_size // host.count * host.count
        choices = f"{below} or {below + host.count}" if below > 0 else f"{host.count}"
        raise ValueError(
            f"batch_size={batch_size} does not divide over {host.count} host(s); set it to "
            f"{choices}"
        )
    return host


def read_options(source: Source, num_threads: int | None) -> grain.ReadOptions:
    """Threads and look-ahead for a pipeline whose elements are whole batches."""
    if num_threads is None:
        num_threads = min(16, os.cpu_count() or 1) if source.decodes else 1
    if num_threads < 0:
        raise ValueError(f"num_threads={num_threads} must be 0 (read when asked) or more")
    # The buffer counts batches, not items: enough to keep every thread busy, no more.
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
