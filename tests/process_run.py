"""Jobs of several processes on this machine: training of the smoke configs, and of a toy for ever.

Run as a script this is one process of a job. `Job` starts all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.build import build_objective
from ar_jax.data import CodesWriter
from ar_jax.io.checkpoint import PARAMS, tree_digest
from ar_jax.io.console import configure_logging
from ar_jax.io.metrics import JSONL, read_jsonl
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.io.run_info import record_run
from ar_jax.parallel.distributed import connect
from ar_jax.train.run import train_and_evaluate
from tests.local_processes import free_address, start_modules
from tests.smoke_runs import SYSTEMS, smoke_config
from tests.toy_training import toy_config, toy_train

TOY, ENDLESS = "toy", 1_000_000
# System -> its layout, whose -1 takes the devices there are: both systems together split batch,
# parameters and single products over the processes.
MESHES = {
    "var": {"data": 1, "fsdp": -1, "tensor": 1},
    "llamagen": {"data": -1, "fsdp": 1, "tensor": 2},
}
TOKENIZERS, CODES = "tokenizers", "codes"
IMAGES = {"train": 24, "test": 12}  # two epochs a run, and a last batch of evaluation half full


def system_config(system: str, folder: Path) -> Any:
    """A smoke config on what `write_inputs` wrote: the encoder would cost most of a compilation."""
    config = smoke_config(system, data__source=f"codes:{folder / CODES / system}", ema__decay=0.5)
    config.tokenizer_checkpoint = str(folder / TOKENIZERS / system)
    config.train.update(eval_batches=0)
    if system == "var":  # a sampler takes as long to compile as all else
        config.train.preview_every = 0
    config.backbone.depth = 1
    config.mesh.update(MESHES[system])
    return config


def write_inputs(system: str, folder: Path) -> None:
    """An untrained tokenizer of ``system`` as a finished run, and random codes as if by it."""
    workdir = folder / TOKENIZERS / system
    config = smoke_config(SYSTEMS[system], data__source="synthetic")
    objective: Any = build_objective(config)
    params = jax.jit(objective.init)(jax.random.key(0))
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(0, {PARAMS: params})
    checkpoints.wait()
    checkpoints.close()
    record_run(config, workdir)
    generator: Any = build_objective(system_config(system, folder))
    sizes, vocabulary = generator.system.schedule.stored_sizes, objective.tokenizer.codebook_size
    rng = np.random.default_rng(0)
    for split, images in IMAGES.items():
        with CodesWriter(
            folder / CODES / system / split,
            split,
            sizes=sizes,
            copies=1,
            vocabulary_size=vocabulary,
            num_classes=10,
            tokenizer={"digest": tree_digest(params)},
            image_size=28,
            channels=1,
        ) as writer:
            codes = rng.integers(0, vocabulary, (images, sum(sizes)))
            writer.write(codes, rng.integers(0, 10, images))


@dataclasses.dataclass(frozen=True)
class Job:
    """Processes that train ``systems``, one after the other, each in ``folder``/SYSTEM.

    Attributes:
        processes: how many, of ``devices`` virtual devices each; log of process N: ``folder``/N.log
        heartbeat: seconds of silence after which a process counts as dead.
        started: its processes, in order.
    """

    folder: Path
    systems: tuple[str, ...]
    processes: int
    devices: int
    heartbeat: int = 100
    started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def __enter__(self) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)  # or goes on
        arguments = [str(self.folder), *self.systems, f"--devices={self.devices}"]
        arguments += [f"--processes={self.processes}", f"--address={free_address()}"]
        arguments += [f"--heartbeat={self.heartbeat}"]
        self.started.extend(
            start_modules("tests.process_run", arguments, self.processes, self.folder, quick=True)
        )
        return self

    def __exit__(self, *unused: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    def log_path(self, index: int) -> Path:
        return self.folder / f"{index}.log"

    def log(self, index: int) -> str:
        return self.log_path(index).read_text()

    def finish(self, timeout: float = 300.0) -> None:
        """Returns once all processes have ended well."""
        for index, process in enumerate(self.started):
            assert process.wait(timeout=timeout) == 0, self.log(index)[-4000:]

    def wait_for_step(self, system: str, step: int, timeout: float = 120.0) -> None:
        """Returns once ``step`` of ``system`` is in the metrics file."""
        path = self.folder / system / JSONL
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and all(p.poll() is None for p in self.started):
            if path.exists() and any(record["step"] >= step for record in read_jsonl(path)):
                return
            time.sleep(0.05)
        raise AssertionError(f"never reached step {step}: {self.log(0)[-4000:]}")


def main() -> None:
    """One process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("systems", nargs="+")
    parser.add_argument("--address", required=True)
    for name in ("devices", "process", "processes", "heartbeat"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    configure_logging()
    jax.config.update("jax_num_cpu_devices", given.devices)
    if given.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        connect(
            coordinator_address=given.address,
            num_processes=given.processes,
            process_id=given.process,
            heartbeat_timeout=given.heartbeat,
        )
    assert jax.device_count() == given.devices * given.processes
    for system in given.systems:
        workdir = given.folder / system
        if system == TOY:
            toy_train(toy_config(train__steps=ENDLESS, mesh__fsdp=2), workdir, delay=0.002)
        else:
            train_and_evaluate(system_config(system, given.folder.parent), workdir)


if __name__ == "__main__":
    main()
