"""What a workdir says about its run, and whose workdir it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from ar_jax.io import run_info
from ar_jax.io.run_info import check_workdir, read_config, record_run


def make_config(**changes) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(
        {
            "seed": 1,
            "tokenizer": {"scales": (1, 2, (4, 4)), "name": "vq"},
            "train": {"steps": 10, "log_every": 5},
            "mesh": {"data": -1},
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def test_config_is_read_back_as_written_in_both_forms(tmp_path):
    config = make_config()
    record_run(config, tmp_path)
    assert read_config(tmp_path).to_dict() == config.to_dict()
    spec = importlib.util.spec_from_file_location("written", tmp_path / run_info.CONFIG_PY)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.get_config().to_dict() == config.to_dict()


def test_unreadable_configs_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / run_info.CONFIG).write_text('{"seed": ')
    with pytest.raises(ValueError, match="config.json is no JSON"):
        read_config(tmp_path)


def test_the_same_run_and_harmless_changes_are_let_in(tmp_path):
    check_workdir(make_config(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    record_run(make_config(), tmp_path)
    check_workdir(make_config(), tmp_path)
    moved = make_config(**{"train.log_every": 1, "mesh.data": 4})
    moved.attention, moved.mesh.slices = "xla", 2
    check_workdir(moved, tmp_path)


def test_another_run_is_refused_with_the_fields_that_differ(tmp_path):
    record_run(make_config(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = make_config(**{"train.steps": 20, "tokenizer.scales": (1, 2), "train.log_every": 1})
    other.extra = 3
    with pytest.raises(ValueError) as error:
        check_workdir(other, tmp_path)
    message = str(error.value)
    assert "config.train.steps=20 (there: 10)" in message
    assert "config.tokenizer.scales=[1, 2] (there: [1, 2, [4, 4]])" in message
    assert "config.extra=3 (there: absent)" in message
    assert "log_every=1" not in message
    assert "only these may change: config.train.log_every" in message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds checkpoints but no config.json"):
        check_workdir(make_config(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_workdir(make_config(), tmp_path / "file")
    with pytest.raises(ValueError, match="gs://bucket/run is an address"):
        check_workdir(make_config(), "gs://bucket/run")


def test_environment_gets_a_line_a_start(tmp_path):
    record_run(make_config(), tmp_path)
    record_run(make_config(), tmp_path)
    lines = (tmp_path / run_info.ENVIRONMENT).read_text().splitlines()
    assert len(lines) == 2
    found = json.loads(lines[1])
    assert found["packages"]["jax"] == jax.__version__
    assert found["devices"].startswith("8 x ")


def test_git_revision(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    source = tmp_path / "code.py"
    source.write_text("x = 1\n")
    assert run_info.git_revision(source) is None
    git("init", "-q")
    assert run_info.git_revision(source) is None  # inside a repository that does not track it
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    clean = run_info.git_revision(source)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    source.write_text("x = 2\n")
    assert run_info.git_revision(source) == {"commit": clean["commit"], "dirty": True}


def test_parameter_table():
    rows = [("a/kernel", jnp.zeros((3, 4)), "decay"), ("a/bias", jnp.zeros(1000), "")]
    table = run_info.parameter_table(rows).splitlines()
    assert table[1].split() == ["a/kernel", "(3,", "4)", "float32", "12", "decay"]
    assert table[2].split() == ["a/bias", "(1000,)", "float32", "1,000"]
    assert table[3].split() == ["total", "1,012"]
