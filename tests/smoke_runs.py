"""The Fashion-MNIST configs at smoke size: their runs, and a few of the embedded images."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import importlib
import importlib.util
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags

from ar_jax.build import build_objective, trains_tokenizer
from ar_jax.data import from_config, open_source
from ar_jax.io.metrics import read_jsonl
from ar_jax.parallel.mesh import make_mesh, put_batch, use_mesh
from ar_jax.train.fields import read_settings
from ar_jax.train.program import build_program

ROOT = Path(__file__).resolve().parent.parent
# System -> the tokenizer its config names.
SYSTEMS = {"var": "tokenizer_multiscale", "llamagen": "tokenizer_vq"}
TRAIN_IMAGES, TEST_IMAGES = 200, 120
SAMPLES, BATCH = 20, 5  # one batch size for all, so that samplers compile once
# Eight devices in every layout: the runs of both systems together use all three axes.
CUBE, DATA, FSDP = {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"data": 1, "fsdp": 8}
TOKENIZER_MESH = {"var": DATA, "llamagen": CUBE}
GENERATOR_MESH = {"var": CUBE, "llamagen": FSDP}


def smoke_config(name: str, **changes: Any) -> Any:
    """The smoke config of a file of configs/fashion_mnist; ``changes`` name fields 'a__b'."""
    config = importlib.import_module(f"configs.fashion_mnist.{name}").get_config("smoke")
    config.update_from_flattened_dict(
        {field.replace("__", "."): value for field, value in changes.items()}
    )
    return config


def write_fashion(directory: Path) -> str:
    """Writes the first embedded images as idx files; returns the source."""
    directory.mkdir(parents=True)
    for split, prefix, count in (("train", "train", TRAIN_IMAGES), ("test", "t10k", TEST_IMAGES)):
        source = open_source("embedded", split)
        items = [source[i] for i in range(count)]
        images = np.stack([item["image"][..., 0] for item in items])
        labels = np.array([item["label"] for item in items], np.uint8)
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            path = directory / f"{prefix}-{part}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))
    return f"idx:{directory}"


@dataclasses.dataclass(frozen=True)
class Runs:
    """A system's demo: workdirs of its tokenizer, its codes, and a generator trained on these."""

    system: str
    source: str
    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def codes(self) -> Path:
        return self.folder / "codes"

    @property
    def generator(self) -> Path:
        return self.folder / "generator"

    def tokenizer_config(self) -> Any:
        return self.adapted(smoke_config(SYSTEMS[self.system]))

    def generator_config(self, source: str) -> Any:
        config = self.adapted(smoke_config(self.system))
        config.tokenizer_checkpoint = str(self.tokenizer)
        config.data.source = source
        return config

    def adapted(self, config: Any) -> Any:
        """A smoke config for few images, all test images in evaluations, and eight devices."""
        config.data.source = self.source
        config.train.update(eval_batches=0, preview_every=0)
        meshes = TOKENIZER_MESH if trains_tokenizer(config) else GENERATOR_MESH
        config.mesh.update(meshes[self.system])
        return config

    def run_demo(self) -> None:
        """experiments/demo.py, on these configs and in batches that tests draw samples in too."""
        arguments = (f"--system={self.system}", f"--workdir={self.folder}", "--mode=smoke")
        with (
            script("demo", *arguments, f"--num_images={SAMPLES}") as demo,
            pytest.MonkeyPatch.context() as patch,
        ):
            load = demo.load_config
            patch.setattr(demo, "load_config", lambda *named: self.adapted(load(*named)))
            evaluate = functools.partial(demo.evaluate_workdir, batch_size=BATCH)
            patch.setattr(demo, "evaluate_workdir", evaluate)
            patch.setattr(demo, "cache_codes", functools.partial(demo.cache_codes, batch_size=64))
            demo.main(["demo"])


def losses(workdir: Path) -> list[float]:
    """Of every step of a run."""
    records = read_jsonl(workdir / "metrics.jsonl")
    return [record["train/loss"] for record in records if "train/loss" in record]


def losses_on_one_device(config: Any, frozen: Any) -> list[float]:
    """What `losses` must be, by the bare train step on one device."""
    settings = read_settings(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    data = from_config(config.data, "train")
    size = settings.train.batch_size
    with use_mesh(mesh), data.train_iterator(batch_size=size, seed=config.seed) as batches:
        program = build_program(
            build_objective(config), settings.optimizer, mesh, seed=config.seed, ema_decay=0.5
        )
        state, found = program.init(), []
        for _ in range(settings.train.steps):
            batch = put_batch(next(batches), program.rows)
            state, metrics = program.train_step(state, frozen, batch, program.key)
            found.append(float(metrics["loss"]))
    return found


@contextlib.contextmanager
def script(name: str, *arguments: str) -> Iterator[ModuleType]:
    """The module experiments/``name``.py with its flags parsed; they are gone afterwards."""
    known, command = set(flags.FLAGS), sys.argv
    spec = importlib.util.spec_from_file_location(
        f"script_{Path(name).name}", ROOT / "experiments" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.argv = [name, *arguments]  # where config flags look for overrides
    sys.modules[spec.name] = module  # where dataclasses look for the names of their annotations
    try:
        spec.loader.exec_module(module)
        flags.FLAGS(sys.argv)
        yield module
    finally:
        sys.argv = command
        del sys.modules[spec.name]
        for flag in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, flag)
