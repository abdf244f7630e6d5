"""Codes of a data set: the same on any devices, in any batches, and after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.build import build_objective
from ar_jax.data import open_source
from ar_jax.data.records import write_records
from ar_jax.evaluation import cache
from ar_jax.evaluation.coding import encode_images
from ar_jax.evaluation.load import load_tokenizer
from ar_jax.io.checkpoint import PARAMS
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.io.run_info import record_run
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.tiny_runs import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = {"train": 21, "test": 9}
COLLECTIVES = ("all-", "collective-", "reduce-scatter")
OPTIONS: dict[str, Any] = {"copies": 2, "shard_size": 8, "progress": False}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, quick_compilation) -> Path:  # noqa: F811
    """An untrained tokenizer as a finished run, whose images are flipped in training."""
    folder, rng = tmp_path_factory.mktemp("cache"), np.random.default_rng(0)
    for split, count in IMAGES.items():
        images = [(rng.integers(0, 256, (8, 8, 1), np.uint8), index % 4) for index in range(count)]
        write_records(folder / "images" / split, images, class_names=list("abcd"))
    config = tiny_tokenizer()
    config.data.update(source=f"arrayrecord:{folder / 'images'}", flip=True)
    params = jax.jit(build_objective(config).init)(jax.random.key(0))
    checkpoints = Checkpoints(folder / "run", keep=1)
    checkpoints.save(0, {PARAMS: params})
    checkpoints.close()
    record_run(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def codes(workdir) -> Path:
    """Made by all eight devices; 12 images a batch are rounded up to 16."""
    return cache.cache_codes(workdir, workdir.parent / "codes", batch_size=12, **OPTIONS)


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_one_device_makes_the_same_files_as_eight(workdir, codes, tmp_path):
    assert len(jax.local_devices()) == 8
    cache.cache_codes(workdir, tmp_path, batch_size=5, devices=jax.devices()[:1], **OPTIONS)
    assert files(tmp_path) == files(codes)
    assert len([name for name in files(codes) if name.endswith(".arrayrecord")]) == 3 + 2
    found = {split: open_source(f"codes:{codes}", split) for split in IMAGES}
    assert {split: len(source) for split, source in found.items()} == IMAGES
    assert len(np.unique([found["train"][i]["codes"] for i in range(21)])) > 4, "all alike"
    rngs = [np.random.default_rng(seed) for seed in range(8)]
    drawn = {found["train"].fetch(i, rng)["codes"].tobytes() for i in range(21) for rng in rngs}
    assert 21 < len(drawn) < 42, "some are mirrored in the second copy, and others are not"


@pytest.mark.slow
def test_devices_say_nothing_to_each_other(workdir):
    _, tokenizer, params = load_tokenizer(workdir)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    images = jax.ShapeDtypeStruct((16, 8, 8, 1), np.uint8, sharding=NamedSharding(mesh, P("data")))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    compiled = encode_images.lower(tokenizer, params, images).compile()
    assert compiled.output_shardings.spec == P("data")
    text = compiled.as_text()
    assert text and not [name for name in COLLECTIVES if name in text]


@pytest.mark.parametrize("calls", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_an_interrupted_call_is_gone_on_with(workdir, codes, tmp_path, monkeypatch, calls):
    """On other devices, in batches of another size; whole files are left as they are."""
    done = 0

    def encode(*arguments):
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return encode_images(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "encode_images", encode)
        cache.cache_codes(workdir, tmp_path, batch_size=5, devices=jax.devices()[:1], **OPTIONS)
    # A batch takes two calls, and is written while the next one is encoded.
    whole = {name for name in files(tmp_path) if name.endswith(".arrayrecord")}
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    assert len(whole) == {1: 0, 7: 1}[calls]
    with pytest.raises(ValueError, match=r"train: holds an unfinished .* tokenizer.seed: 0 there"):
        cache.cache_codes(workdir, tmp_path, seed=1, **OPTIONS)
    cache.cache_codes(workdir, tmp_path, batch_size=12, **OPTIONS)
    assert files(tmp_path) == files(codes)
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in whole}


def test_batches_of_nothing_are_refused(workdir, tmp_path):
    with pytest.raises(ValueError, match="--batch_size=0 must be at least 1"):
        cache.cache_codes(workdir, tmp_path / "x", batch_size=0)
    assert not (tmp_path / "x").exists()
