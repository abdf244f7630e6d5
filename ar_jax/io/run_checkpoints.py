"""The checkpoints of a run in training: saved in the background, restored, gone back from."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ar_jax.io.best_checkpoint import SCORES, Best, find_best
from ar_jax.io.checkpoint import DATA, FOLDER, check_entries, without_copies
from ar_jax.io.checkpoint_health import (
    CHECKSUMS,
    DamagedCheckpoint,
    SaveFailed,
    find_damage,
    first_line,
    first_of_all,
    free_name,
    free_space,
    recorded_checksums,
    restore_data,
    root_cause,
)
from ar_jax.io.checksums import Checksums, find_change, tree_checksums

log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds after which a save fails on a host because another's part of it is not written: the others
# learn no earlier that it failed there, and the next save waits until they have.
HOSTS_WAIT = 1200
SLICED_FROM = 1 << 20  # bytes that each replica must have to write, for it to help the others


class Checkpoints:
    """The checkpoints of one run; all processes call every method together.

    Attributes:
        directory: ``workdir/checkpoints``.
        failed_saves: how many saves did not reach the disk so far.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep: int,
        best: Best | None = None,
        copies: bool = True,
    ) -> None:
        """Opens or makes the directory; the newest ``keep`` checkpoints are kept.

        Args:
            best: the best checkpoint is kept beside them.
            copies: False writes numpy arrays from where they lie, in no more memory than they have;
                they must not change before `wait`.

        Raises:
            ValueError: keep < 1.
        """
        if keep < 1:
            raise ValueError(f"config.train.keep_checkpoints={keep} must be at least 1")
        self.directory = epath.Path(workdir).absolute() / FOLDER
        self.failed_saves = 0
        self._keep, self._copies, self._best = keep, copies, best
        # (step, value) of the best checkpoint, and of a better one whose save is under way.
        self._found: tuple[int, float] | None = None
        self._candidate: tuple[int, float] | None = None
        self._checkpointer = self._open()
        self._find_best()
        self._watcher = ThreadPoolExecutor(1, "checkpoint-watcher")
        self._saving: Future[str] | None = None  # of what went wrong; '' if nothing did
        self._failure = ""  # of the newest save

    def _open(self) -> ocp.training.Checkpointer:
        training = ocp.training
        return training.Checkpointer(
            self.directory,
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_NewestAndBest(self._keep, self._best_steps),
            cleanup_tmp_directories=True,  # left by a save that failed or was killed
            context=_with_copies() if self._copies else without_copies(),
        )

    @property
    def steps(self) -> list[int]:
        """Steps that can be restored, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def would_be_best(self, scores: Mapping[str, float]) -> bool:
        """Whether a checkpoint that is saved with these scores now is the best so far.

        Raises:
            ValueError: the metric of the best is none of them.
        """
        if self._best is None:
            return False
        self._settle()
        return self._best.improves(self._best.value(scores), self._found and self._found[1])

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        data: Any = None,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        A save that fails (the disk is full) is logged as an error as soon as it is known, and
        raised by `wait` alone: training goes on, and the next save tries again.

        Args:
            step: number of completed steps. A step that is there already is left as it is.
            trees: name -> pytree of arrays; empty trees are left out.
            data: an iterator with get_state and set_state that knows orbax (all of Grain's do).
            scores: what the evaluation of this step measured, if it was evaluated.
        """
        self._settle()
        if step in self.steps:
            return
        parts = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
        metadata: dict[str, Any] = {CHECKSUMS: tree_checksums(parts)}
        if self._best is not None and scores is not None:
            value = self._best.value(scores)
            metadata[SCORES] = {self._best.metric: value}
            if self._best.improves(value, self._found and self._found[1]):
                self._candidate = (step, value)
        if data is not None:
            parts[DATA] = data
        self._failure, problem = "", ""
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, parts, custom_metadata=metadata
            )
        except jax.errors.JaxRuntimeError:
            raise  # of the computation whose results were to be saved
        except Exception as error:
            problem = self._report(step, error)
        else:
            assert response is not None  # the policy saves every step
            # From a thread of its own: the next save, which would see it, may be an hour away.
            self._saving = self._watcher.submit(self._watch, step, response)
        if problem := first_of_all(problem):
            self._give_up(problem)

    def restore(self, step: int, abstract: Mapping[str, Any], data: Any = None) -> dict[str, Any]:
        """Loads the parts named in ``abstract``; ``data`` is set in place.

        Args:
            step: one of `steps`.
            abstract: name -> pytree of ShapeDtypeStructs whose shardings say where arrays go; any
                mesh will do.

        Raises:
            DamagedCheckpoint: names the checkpoint, what is wrong with it and the step before it;
                on all processes, whichever saw it.
            ValueError: names the checkpoint and every entry that is missing, unknown, or of another
                shape.
        """
        self.wait()
        path = self.directory / str(step)
        wanted: dict[str, Any] = {
            name: tree for name, tree in abstract.items() if jax.tree.leaves(tree)
        }
        self._agreed(step, lambda: _check_parts(path, wanted, None if data is None else DATA))
        if data is not None and not restore_data(path / DATA, data):
            wanted[DATA] = data
        loaded = self._agreed(step, lambda: _load_parts(path, wanted))
        sums = tree_checksums({name: loaded[name] for name in wanted if name != DATA})
        self._agreed(step, lambda: _check_values(path, sums))
        return {name: loaded.get(name, tree) for name, tree in abstract.items()}

    def restore_newest(
        self, abstract: Mapping[str, Any], data: Any = None, *, skip_damaged: bool = False
    ) -> dict[str, Any]:
        """`restore` of the newest step.

        Args:
            skip_damaged: go back from damaged checkpoints to the newest one that is whole; they are
                logged as errors and moved aside to ``<step>.damaged``, where they are kept.

        Raises:
            DamagedCheckpoint: the newest is damaged; if ``skip_damaged``, all of them are.
            ValueError: as of `restore`.
        """
        damaged: list[int] = []
        for step in reversed(self.steps):
            try:
                parts = self.restore(step, abstract, data)
            except DamagedCheckpoint as error:
                if not skip_damaged or step == self.steps[0]:
                    raise
                log.error("%s", error)
                damaged.append(step)
            else:
                self._move_aside(damaged)
                return parts
        raise ValueError(f"{self.directory} holds no checkpoint")

    def wait(self) -> None:
        """Blocks until what `save` started is on disk.

        Raises:
            SaveFailed: it is not; names the directory, the reason and the free space.
        """
        self._settle()
        if self._failure:
            problem, self._failure = self._failure, ""
            raise SaveFailed(f"{problem}. The newest checkpoint is {self.steps[-1:] or 'none'}")

    def close(self) -> None:
        """Waits and releases the background threads; raises what `wait` does."""
        try:
            self.wait()
        finally:
            self._watcher.shutdown()
            self._checkpointer.close()

    def _watch(self, step: int, response: ocp.AsyncResponse[bool]) -> str:
        """Waits for what is written in the background; returns what went wrong, or ''."""
        try:
            response.result()
        except Exception as error:
            return self._report(step, error)
        return ""

    def _report(self, step: int, error: Exception) -> str:
        """Logs a failed save on the process that met it; returns what `wait` is to say."""
        problem = (
            f"saving step {step} in {self.directory} failed, {free_space(self.directory)}: "
            f"{first_line(root_cause(error))}"
        )
        log.error("%s; the next save that is due tries again", problem)
        return problem

    def _settle(self) -> None:
        """Waits for the save under way: failed for all processes if it failed on any."""
        if self._saving is None:
            return
        problem, self._saving = first_of_all(self._saving.result()), None
        if problem:
            self._give_up(problem)
        elif self._candidate is not None:
            self._found, self._candidate = self._candidate, None

    def _give_up(self, problem: str) -> None:
        """Forgets a failed save, frees what it had written, and makes another one possible."""
        if self._saving is not None:  # it failed elsewhere before it had begun there
            self._saving.result()
        self._saving, self._failure, self._candidate = None, problem, None
        self.failed_saves += 1
        with contextlib.suppress(Exception):  # orbax's manager raises the failure for ever
            self._checkpointer.close()
        self._checkpointer = self._open()

    def _agreed(self, step: int, read: Callable[[], T]) -> T:
        """``read()``, where it raises nothing on any process; see `restore` for what it raises."""
        damage, mismatch, result = "", "", None
        try:
            result = read()
        except _Damage as error:
            damage = str(error)
        except ValueError as error:
            mismatch = str(error)
        if damage := first_of_all(damage):
            earlier = [other for other in self.steps if other < step]
            way_on = (
                f"step {earlier[-1]} is the newest before it: train.skip_damaged_checkpoints=True "
                "in the config goes on from there, and keeps the damaged one beside it"
                if earlier
                else "there is no checkpoint before it"
            )
            raise DamagedCheckpoint(f"{self.directory / str(step)} is damaged: {damage}; {way_on}")
        if mismatch := first_of_all(mismatch):
            raise ValueError(mismatch)
        return cast(T, result)

    def _move_aside(self, steps: list[int]) -> None:
        """Renames checkpoints, so that their steps can be saved anew and nothing deletes them."""
        for step in steps if jax.process_index() == 0 else ():
            target = free_name(self.directory / str(step))
            (self.directory / str(step)).rename(target)
            log.error("the damaged checkpoint of step %d is kept as %s", step, target)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are moved aside")
            self._checkpointer.reload()
            self._find_best()

    def _find_best(self) -> None:
        if self._best is not None:
            self._found = find_best(self.directory, self.steps, self._best)

    def _best_steps(self) -> set[int]:
        """The best checkpoint, and the one that takes its place once it is on disk."""
        return {pair[0] for pair in (self._found, self._candidate) if pair is not None}


@dataclasses.dataclass(frozen=True)
class _NewestAndBest(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the newest ``keep`` checkpoints, and those that are the best."""

    keep: int
    best_steps: Callable[[], set[int]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        first, best = len(checkpoints) - self.keep, self.best_steps()
        return [n >= first or info.step in best for n, info in enumerate(checkpoints)]


class _Damage(Exception):
    """What is wrong with a checkpoint, without its name."""


def _check_parts(path: epath.Path, wanted: Mapping[str, Any], data: str | None) -> None:
    """Raises _Damage, or ValueError that names the entries of another model."""
    if damage := find_damage(path, wanted, data):
        raise _Damage(damage)
    for name, tree in wanted.items():
        try:
            entries = ocp.metadata(path, checkpointable_name=name).metadata
        except Exception as error:
            # Without this part's directory the checkpoint is another program's.
            if (path / name).exists():
                raise _Damage(f"{name}/: {first_line(root_cause(error))}") from error
        else:
            if not jax.tree.leaves(entries):  # a part without entries is not saved
                raise _Damage(f"{name}/ lists no entry that can be read")
        check_entries(path, name, tree)


def _load_parts(path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays and data positions; raises _Damage.

    Every process reads by itself: with orbax's barriers, those that can read would wait minutes for
    one that cannot.
    """
    context = ocp.Context()
    if jax.process_count() > 1:
        own = jax.process_index()
        context.multiprocessing.active_processes = {own}
        context.multiprocessing.primary_host = own
        context.multiprocessing.barrier_sync_key_prefix = f"read{own}"
    try:
        with context:
            return dict(ocp.load_checkpointables(path, dict(wanted)))
    except Exception as error:
        cause = root_cause(error)
        if isinstance(cause, MemoryError | jax.errors.JaxRuntimeError):
            raise  # of this machine, not of the checkpoint
        raise _Damage(first_line(cause)) from error


def _check_values(path: epath.Path, loaded: Checksums) -> None:
    """Raises _Damage where arrays were read without an error, but not as they were saved."""
    if change := find_change(recorded_checksums(path), loaded):
        raise _Damage(change)


def _with_copies() -> ocp.Context:
    """Replicas write slices of large arrays alone: the slices of each shape compile a program."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SLICED_FROM
    context.async_options.timeout_secs = HOSTS_WAIT
    return context
