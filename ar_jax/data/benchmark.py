"""How fast the training pipeline reads, by the CPU time that it takes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.data.config import Data
from ar_jax.data.source import Item, Source


class CountedSource(Source):
    """A source that appends a byte to a file for every item read, in whichever process.

    Batches that were taken say less: what is read ahead costs CPU time too.
    """

    def __init__(self, source: Source, log: str) -> None:
        self.name, self.decodes = source.name, source.decodes
        self._source, self._log = source, log
        self._handle: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}  # every process opens the file for itself

    def __len__(self) -> int:
        return len(self._source)

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        item = self._source.fetch(index, rng)
        if self._handle is None:
            self._handle = os.open(self._log, os.O_WRONLY | os.O_APPEND)
        os.write(self._handle, b".")
        return item


def measure(data: Data, *, batch_size: int, seconds: float) -> dict[str, Any]:
    """Takes batches of the training pipeline for at least ``seconds``.

    Args:
        data: one split; its transform and its number of workers are what is measured.
        batch_size: of this host, which is taken to be the only one.
        seconds: counted once every worker has made a batch.

    Returns:
        {'workers', 'images' (read), 'seconds', 'cpu_seconds' (of this process and its workers),
        'images_per_second', 'images_per_core_second'}, and 'codes_per_core_second' of codes.

    Raises:
        RuntimeError: there are workers, and no /proc to ask for their time.
    """
    with tempfile.NamedTemporaryFile(prefix="ar_jax_read_") as log:
        counted = dataclasses.replace(data, source=CountedSource(data.source, log.name))
        with counted.train_iterator(
            batch_size=batch_size, seed=0, process_index=0, process_count=1
        ) as batches:
            for _ in range(data.num_workers + 1):
                batch = next(batches)
            first, begun, used = os.path.getsize(log.name), time.perf_counter(), cpu_seconds()
            while time.perf_counter() - begun < seconds or os.path.getsize(log.name) == first:
                batch = next(batches)
            count = os.path.getsize(log.name) - first
            wall, used = time.perf_counter() - begun, cpu_seconds() - used
    result = {
        "workers": data.num_workers,
        "images": count,
        "seconds": wall,
        "cpu_seconds": used,
        "images_per_second": count / wall,
        "images_per_core_second": count / used,
    }
    if "codes" in batch:
        result["codes_per_core_second"] = result["images_per_core_second"] * batch["codes"].shape[1]
    return result


def cpu_seconds() -> float:
    """CPU time of this process and of the living ones that it started.

    Raises:
        RuntimeError: there are some, and no /proc to ask for their time.
    """
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            text = Path(f"/proc/{child.pid}/stat").read_text()
        except FileNotFoundError as error:
            raise RuntimeError("the CPU time of workers is read in /proc, on Linux") from error
        user, system = text.rpartition(")")[2].split()[11:13]  # the name before may hold anything
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total
