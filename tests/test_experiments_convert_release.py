"""The benchmark of conversions writes the files that the official code would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert import weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.part import GENERATOR, TOKENIZER, shapes_of
from ar_jax.convert.release import choose
from tests.config_files import Case as ConfigFile
from tests.converted_cases import OPTIONS, convert, write_files
from tests.smoke_runs import script

with script("benchmarks/convert_release") as benchmark:  # its flags are another script's too
    pass
KEYS = Path(__file__).parent / "golden" / "llamagen" / "release_keys.json"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["var", "llamagen"])
def test_files_have_the_layout_of_the_release(family, tmp_path):
    official = write_files(family, tmp_path)
    config = convert(family, official).config
    made = benchmark.write_release(choose(family), config, tmp_path / "made")
    for kind, path in zip((TOKENIZER, GENERATOR), official, strict=True):
        wanted = weight_file.read(path)
        wanted = wanted.get("model", wanted)
        assert shapes_of(weight_file.read(made[kind])) == shapes_of(wanted)
    again = convert_files(choose(family), made[TOKENIZER], made[GENERATOR], OPTIONS[family])
    assert again.config == config


def test_shapes_of_the_released_size():
    config = ConfigFile("configs/imagenet256/llamagen.py", "B").config
    tensors = benchmark.RandomTensors(choose("llamagen"), config, GENERATOR)
    released = json.loads(KEYS.read_text())
    assert tensors.shapes == {key: tuple(shape) for key, shape in released["c2i B"].items()}
    assert sum(np.prod(shape) for shape in tensors.shapes.values()) == 110_888_448


def test_processes_are_measured():
    found = benchmark.run("-c", "import time; block = b'x' * (300 << 20); time.sleep(1)")
    assert 1 <= found["seconds"] < 60
    if Path("/proc/self/status").exists():
        assert 300 <= found["peak_private_mib"] <= found["peak_mib"] < 400
    with pytest.raises(RuntimeError, match="no such luck"):
        benchmark.run("-c", "raise SystemExit('no such luck')")
