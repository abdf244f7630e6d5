"""Converts files of a release's real shapes, with random numbers, and samples from the result.

    python experiments/benchmarks/convert_release.py --family=var \
        --config=configs/imagenet256/var.py:d16 --folder=runs/var_d16 --out=var_d16.json

Writes the official files of the configuration's model, then runs experiments/convert.py on them and
experiments/sample.py on what that makes, each in a process of its own, whose wall time and peak
memory are reported (on Linux, whose /proc tells). The peak counts the pages of mapped files that a
process has touched, which the system takes back when it needs them; "private" is without them,
sampled twenty times a second.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ar_jax.convert import weight_file
from ar_jax.convert.part import GENERATOR, TOKENIZER, empty_params, release_shapes
from ar_jax.convert.release import FAMILIES, Family, choose
from ar_jax.io.run_info import config_dict

ROOT = Path(__file__).resolve().parent.parent.parent
STD = 0.02  # of matrices; vectors of norms are ones

FAMILY = flags.DEFINE_enum("family", None, sorted(FAMILIES), "Whose layout.")
CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration of the generator.")
FOLDER = flags.DEFINE_string("folder", None, "Made; holds the files and what they become.")
LABELS = flags.DEFINE_string("labels", "207,388", "Of the images to sample.")
OUT = flags.DEFINE_string("out", None, "JSON file; default prints only.")


class RandomTensors(Mapping[str, np.ndarray]):
    """An official state_dict whose tensors are drawn when they are asked for.

    Attributes:
        shapes: key -> shape of every parameter.
        buffers: key -> function that makes it.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], kind: str) -> None:
        part = (family.tokenizer_part if kind == TOKENIZER else family.generator_part)(config)
        self.shapes = release_shapes(part, empty_params(config, kind))
        makers = {key: buffer.make for key, buffer in part.buffers.items()}
        self.buffers = {key: make for key, make in makers.items() if make is not None}

    def __getitem__(self, key: str) -> np.ndarray:
        if key in self.buffers:
            return self.buffers[key]()
        shape = self.shapes[key]
        if len(shape) == 1 and key.endswith("weight"):
            return np.ones(shape, np.float32)
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        return rng.standard_normal(shape, np.float32) * np.float32(STD)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.shapes, *self.buffers))

    def __len__(self) -> int:
        return len(self.shapes) + len(self.buffers)


def write_release(family: Family, config: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The files of tokenizer and generator, as torch.save writes them: kind -> path."""
    paths = {kind: folder / f"{kind}.pth" for kind in (TOKENIZER, GENERATOR)}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, path in paths.items():
        weight_file.write(path, RandomTensors(family, config, kind))
    return paths


def run(*command: str) -> dict[str, float]:
    """Seconds and peaks of memory, MiB, of a script of this repository.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        memory = Memory(process.pid)
        memory.start()
        printed = process.stdout.read()
        memory.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{printed[-3000:]}")
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "peak_mib": round(memory.peaks["VmHWM"] / 1024),
        "peak_private_mib": round(memory.peaks["RssAnon"] / 1024),
    }


class Memory(threading.Thread):
    """Watches the memory of a process; ``peaks`` in KiB, 0 where /proc does not tell.

    Not by wait4: what it calls a process's peak includes that of its parent, who forked it.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.peaks = {"VmHWM": 0, "RssAnon": 0}
        self._status, self._over = Path(f"/proc/{process}/status"), threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            try:
                text = self._status.read_text()
            except OSError:
                return
            for name in self.peaks:
                if found := re.search(rf"{name}:\s+(\d+)", text):
                    self.peaks[name] = max(self.peaks[name], int(found[1]))

    def stop(self) -> None:
        self._over.set()
        self.join()


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    family, folder = choose(str(FAMILY.value)), Path(str(FOLDER.value)).absolute()
    if folder.exists():
        raise app.UsageError(f"--folder={folder} exists already; name another")
    paths = write_release(family, config_dict(CONFIG.value), folder)
    directory = folder / "converted"
    result: dict[str, Any] = {
        "family": FAMILY.value,
        "file_mib": {kind: round(path.stat().st_size / 2**20) for kind, path in paths.items()},
        "import_only": run("-c", "import jax, ar_jax.convert.directory"),
        "convert": run(
            "experiments/convert.py",
            f"--family={FAMILY.value}",
            f"--tokenizer={paths[TOKENIZER]}",
            f"--transformer={paths[GENERATOR]}",
            f"--out={directory}",
        ),
        "sample": run(
            "experiments/sample.py",
            f"--checkpoint={directory}",
            f"--labels={LABELS.value}",
            f"--out={folder / 'samples.png'}",
        ),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if OUT.value:
        Path(OUT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in ("family", "config", "folder"):
        flags.mark_flag_as_required(name)
    app.run(main)
