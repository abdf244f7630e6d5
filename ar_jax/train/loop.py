"""The training loop, the same for tokenizers and generators."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from ar_jax.api import Objective, Params
from ar_jax.io.best_checkpoint import choose_best
from ar_jax.io.checkpoint import PARAMS, save_tree
from ar_jax.io.images import save_png
from ar_jax.io.metrics import open_writers
from ar_jax.io.progress import Progress
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.io.run_info import check_workdir, config_dict, record_run, write_parameter_table
from ar_jax.parallel.mesh import put_batch, put_whole, use_mesh
from ar_jax.parallel.rules import shardings
from ar_jax.train.fields import read_settings
from ar_jax.train.preemption import StopRequest
from ar_jax.train.program import build_program, describe_parameters, evaluate, start_state
from ar_jax.train.report import Reporter
from ar_jax.train.start_from import initial_params
from ar_jax.train.state import TrainState, sampling_params, to_parts
from ar_jax.train.watchdog import BATCH, Watchdog

log = logging.getLogger(__name__)

T = TypeVar("T")
HostBatch = Mapping[str, np.ndarray]
# (params, frozen) -> name -> picture, uint8 [H, W, C]
Preview = Callable[[Params, Params], Mapping[str, np.ndarray]]
Measure = Callable[[Params, Params], Mapping[str, float]]

PREVIEWS = "previews"


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: the train state.
        step: completed steps.
        finished: False if it was told to stop before its last step; the same command goes on.
    """

    state: TrainState
    step: int
    finished: bool


def train(
    config: Mapping[str, Any],
    objective: Objective,
    frozen: Params,
    workdir: str | Path,
    train_data: Iterator[HostBatch],
    eval_data: Iterable[HostBatch] | None = None,
    preview: Preview | None = None,
    measure: Measure | None = None,
    counts: Callable[[], Mapping[str, float]] | None = None,
) -> Outcome:
    """Trains from the newest checkpoint in ``workdir``, or from nothing, to ``config.train.steps``.

    Args:
        config: the sections train, optimizer, discriminator_optimizer, ema, mesh and init_from, and
            seed and precision, are read here.
        frozen: name -> parameters the objective needs but does not train; {} if none. Kept in
            ``workdir/<name>/params``, so that the workdir holds all of the system.
        train_data: endless batches of this process's rows, whose position orbax can save.
        eval_data: batches with ``mask``, iterated anew by every evaluation; None: no evaluation.
        preview: pictures of the current parameters (the EMA's, if there is one).
        measure: scores of the current parameters' samples, taken with every evaluation.
        counts: name -> value, of what is written with every evaluation's metrics.

    Raises:
        ValueError: a bad field, or a workdir of another run; nothing is written then.
        TrainingDiverged: after ``config.train.max_bad_steps`` skipped steps in a row; a checkpoint
            with the last finite parameters is saved.
        DamagedCheckpoint: the newest checkpoint cannot be read, and
            ``config.train.skip_damaged_checkpoints`` is off or there is none that can.
        SaveFailed: the last checkpoint, at the end or when told to stop, is not on disk.
    """
    check_workdir(config, workdir)
    settings = read_settings(config)
    fields, mesh = settings.train, settings.mesh
    main, folder = jax.process_index() == 0, Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(mesh))
        stack.enter_context(jax.default_matmul_precision(settings.precision))
        program = build_program(
            objective,
            settings.optimizer,
            mesh,
            seed=settings.seed,
            accumulation=fields.accumulation,
            ema_decay=settings.ema.decay,
            ema_warmup=settings.ema.warmup,
            adversary_optimizer=settings.discriminator_optimizer,
        )
        # Before it is kept: several processes can save arrays of all devices only.
        frozen = put_whole(frozen, shardings(frozen, mesh))
        initial = initial_params(config, objective, program, folder)
        stop = stack.enter_context(StopRequest())
        if main:
            record_run(config, folder)
            rows = describe_parameters(program.abstract.params, settings.optimizer)
            log.info("parameters:\n%s", write_parameter_table(folder, rows))
        keep_frozen(frozen, folder)
        best = choose_best(fields.best_metric, fields.best_mode)
        checkpoints = Checkpoints(folder, keep=fields.keep_checkpoints, best=best)
        stack.callback(checkpoints.close)
        state = start_state(
            program,
            checkpoints,
            train_data,
            initial,
            skip_damaged=fields.skip_damaged_checkpoints,
        )
        del initial  # donated
        first = int(state.step)
        announce(folder, mesh, first, fields.steps)
        progress = stack.enter_context(Progress(fields.steps, initial=first, enabled=main))
        writers = open_writers(
            folder,
            step=first,
            console=progress.write,
            wandb=config_dict(config) if fields.wandb else None,
            main=main,
        )
        stack.callback(writers.close)
        reporter = Reporter(
            writers,
            progress,
            log_every=fields.log_every,
            last_step=fields.steps,
            batch_size=fields.batch_size,
            tokens_per_image=getattr(objective, "tokens_per_image", 0),
        )
        watchdog = stack.enter_context(Watchdog(fields.stuck_after_seconds))

        def save(step: int, scores: Mapping[str, float] | None = None) -> None:
            watchdog.begin("save", step)
            before = checkpoints.failed_saves
            checkpoints.save(step, to_parts(state), train_data, scores)
            if checkpoints.failed_saves > before:
                reporter.write(step, {"checkpoint/failed_saves": float(checkpoints.failed_saves)})

        step, stopping, pending = first, False, None
        while step < fields.steps and not stopping:
            watchdog.begin(BATCH, step + 1)
            batch = put_batch(next(train_data), program.rows)
            watchdog.begin("training", step + 1)
            with jax.transfer_guard("disallow"):
                state, metrics = program.step_at(step)(state, frozen, batch, program.key)
            reporter.settle(pending)  # of the step before, while the device is busy with this one
            step, pending = step + 1, (step + 1, metrics)
            stopping = stop.requested(step)
            evaluating = eval_data is not None and fields.due(step, fields.eval_every)
            previewing = preview is not None and fields.due(step, fields.preview_every)
            saving = fields.due(step, fields.checkpoint_every) or step == fields.steps
            if stopping or evaluating or previewing or saving:
                reporter.settle(pending)  # a checkpoint's metrics are on disk before it is
                pending = None
            if reporter.bad_steps >= fields.max_bad_steps:
                log.error("loss or gradient not finite in %d steps in a row", reporter.bad_steps)
                save(step)
                checkpoints.wait()
                raise TrainingDiverged(diverged_message(reporter.bad_steps, step, folder))
            if stopping:  # at once: the platform may end the process soon
                save(step)
                checkpoints.wait()
            scores: dict[str, float] | None = None
            with reporter.paused():
                if evaluating:
                    assert eval_data is not None
                    watchdog.begin("evaluation", step)
                    batches = watched(eval_data, watchdog, step)
                    means = evaluate(program, state, frozen, batches)
                    scores = {f"eval/{name}": value for name, value in means.items()}
                    if measure is not None:
                        watchdog.begin("evaluation of samples", step)
                        judged = measure(sampling_params(state), frozen)
                        scores |= {f"samples/{name}": value for name, value in judged.items()}
                    reporter.write(step, {**scores, **(counts() if counts else {})})
                    saving = saving or checkpoints.would_be_best(scores)
                if previewing:
                    assert preview is not None
                    watchdog.begin("preview", step)
                    pictures = preview(sampling_params(state), frozen)
                    for name, picture in pictures.items() if main else ():
                        try:
                            save_png(folder / PREVIEWS / f"{name}_{step:08d}.png", picture)
                        except OSError as error:  # of a full disk: no reason to end the run
                            log.error("picture %s of step %d is not written: %s", name, step, error)
                if saving:
                    save(step, scores)
        checkpoints.wait()
        if stopping and step < fields.steps:
            progress.write(f"told to stop: saved step {step}; the same command goes on from there")
        return Outcome(state, step, step == fields.steps)


def watched(batches: Iterable[T], watchdog: Watchdog, step: int) -> Iterator[T]:
    """``batches`` of the evaluation of ``step``: each counts as progress once it is used."""
    for batch in batches:
        yield batch
        watchdog.begin("evaluation", step)


def keep_frozen(frozen: Params, folder: Path) -> None:
    """Writes what is not in the workdir yet; all processes call it together."""
    for name, tree in frozen.items():
        if not (folder / name / PARAMS).exists():
            save_tree(folder / name / PARAMS, tree)


def announce(folder: Path, mesh: jax.sharding.Mesh, step: int, steps: int) -> None:
    """First lines of the log: who runs where."""
    devices = jax.devices()
    log.info(
        "process %d/%d, %d of %d devices (%s), mesh %s",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        len(devices),
        devices[0].device_kind,
        dict(mesh.shape),
    )
    what = "starting" if step == 0 else "finished already" if step >= steps else "going on"
    log.info("workdir %s: %s at step %d of %d", folder, what, step, steps)


def diverged_message(count: int, step: int, folder: Path) -> str:
    """What happened, what is kept, what to do."""
    return (
        f"loss or gradient was not finite in {count} steps in a row, up to step {step}; the "
        f"parameters before them are saved as step {step} in {folder}. Lower "
        "config.optimizer.learning_rate or clip_norm, or look for bad values in the data; "
        "config.train.max_bad_steps sets the number"
    )
