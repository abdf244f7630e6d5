"""From a source to the training batches of this host.

Training is one endless stream, a pure function of (seed, source, transform):

    position p = epoch * N + k  ->  item pi_epoch(k), augmented by a generator of (seed, p)

where pi_epoch is a permutation of the N items. Batch t of the whole job is the positions
[t * B, (t + 1) * B), and host h of n reads the block of B / n positions that begins at
t * B + h * B / n. Consequences:

* Every item is visited exactly once per epoch, over all hosts; no remainder is ever dropped, a
  batch may span two epochs. Hosts are disjoint at every step.
* Blocks in host order, joined, are the same array for any number of hosts, threads and workers
  (`jax.make_array_from_process_local_data` joins them so where devices are in process order).
* The iterator's state is the number of the next batch; it may be restored on another number of
  hosts, threads or workers. It holds what fixes the stream (B, seed, N) and refuses another.

Evaluation goes through the items in order; see `ar_jax.data.eval_pipeline`.
"""

from __future__ import annotations

from typing import Any

import grain
import numpy as np
from absl import flags

from ar_jax.data.host import MAX_SEED, Batch, Fetch, Host, read_options, this_host
from ar_jax.data.source import Source
from ar_jax.data.transforms import ImageTransform


class HostBlocks(grain.MapDataset):
    """The part of an endless stream that one host reads: its block of every global batch."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, host: Host) -> None:
        super().__init__(parent)
        self._batch_size = batch_size
        self._block = batch_size // host.count
        self._offset = host.index * self._block

    def __len__(self) -> int:
        # Whole batches, and a little less than the largest int so that no arithmetic overflows.
        return len(self._parent) // self._batch_size * self._block

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._block)
        return self._parent[step * self._batch_size + self._offset + row]


class TrainIterator(grain.DatasetIterator):
    """Endless iterator of this host's training batches.

    Yields {'image': uint8 [b, H, W, C] | 'codes': int32 [b, L], float32 [b, L, W] or int8
    [b, L, bits], 'label': int32 [b]} with b = batch_size / hosts. Close it (or use it as a context
    manager) to end its threads and worker processes; an exception in the pipeline closes it too,
    and then reaches the caller.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        fingerprint: dict[str, int],
        read_options: grain.ReadOptions,
        num_workers: int,
    ) -> None:
        super().__init__()
        self._batches = batches
        self._fingerprint = fingerprint
        self._read_options = read_options
        self._num_workers = num_workers
        self._next = 0
        self._inner: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._inner is None:
            self._inner = self._start()
        try:
            batch = next(self._inner)
        except Exception:
            self.close()
            raise
        self._next += 1
        if self._num_workers:
            # Out of the workers' shared memory: what still lives there at exit counts as leaked.
            batch = {key: np.array(value) for key, value in batch.items()}
        return batch

    def get_state(self) -> dict[str, int]:
        """{'next_index': number of the next batch} and what fixes the stream; plain integers."""
        return {"next_index": self._next, **self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a state of `get_state`, of any number of hosts and workers.

        Raises ValueError where the state belongs to another stream.
        """
        for key, value in self._fingerprint.items():
            if key not in state or int(state[key]) != value:
                raise ValueError(
                    f"data iterator state: {key}={state.get(key)} in the checkpoint, {value} in "
                    "this run; the order of the data would differ, so resume with the same "
                    "batch_size, seed and source, or start in an empty workdir"
                )
        if int(state.get("next_index", -1)) < 0:
            raise ValueError(f"data iterator state: next_index={state.get('next_index')} is bad")
        self._stop()
        self._next = int(state["next_index"])

    def start_prefetch(self) -> None:
        """Begins to read ahead before the first batch is asked for."""
        self._assert_not_closed()
        if self._inner is None:
            self._inner = self._start()
        self._inner.start_prefetch()

    def close(self) -> None:
        """Ends threads and worker processes; may be called twice."""
        self._stop()
        super().close()

    def __enter__(self) -> TrainIterator:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __str__(self) -> str:
        return f"TrainIterator({self.get_state()})"

    def _start(self) -> grain.DatasetIterator:
        dataset = self._batches[self._next :].to_iter_dataset(self._read_options)
        if self._num_workers:
            # grain reads absl flags when it starts workers, and raises if nobody parsed them, as in
            # a notebook or a plain script.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            # After batching: workers take whole batches in turn, so none is lost or reordered.
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=2
                )
            )
        return iter(dataset)

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def train_iterator(
    source: Source,
    transform: ImageTransform | None,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    num_threads: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> TrainIterator:
    """Shuffled, augmented, endless batches of this host; see the module's text for their order.

    Args:
        source: opened for this split.
        transform: for images; None for codes.
        batch_size: B, over all hosts.
        seed: in [0, 2**32).
        num_workers: worker processes; 0 reads in threads of this process. The script that starts
            workers needs the usual `if __name__ == '__main__'`.
        num_threads: threads per process, each making a whole batch; default 1 for sources in
            memory, else the number of cores, at most 16.
        process_index, process_count: this host and all hosts; default what jax says.

    Raises:
        ValueError: a field out of range, or `batch_size` not divisible by the number of hosts.
    """
    host = this_host(batch_size, process_index, process_count)
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed={seed} must lie in 0..{MAX_SEED - 1}")
    if num_workers < 0:
        raise ValueError(f"data.num_workers={num_workers} must be 0 (no processes) or more")
    stream = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .random_map(Fetch(source, transform))
        .repeat(None)
    )
    batches = HostBlocks(stream, batch_size, host).batch(
        batch_size // host.count, drop_remainder=True
    )
    fingerprint = {"global_batch": batch_size, "seed": seed, "items": len(source)}
    return TrainIterator(batches, fingerprint, read_options(source, num_threads), num_workers)
