"""Damaged checkpoints: named, told from another model's, gone back from and kept."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.io.checkpoint import (
    FOLDER,
    holds_only_params,
    list_steps,
    load_params,
    load_tree,
    save_tree,
    tree_metadata,
)
from ar_jax.io.checkpoint_health import CHECKSUMS, RECORD, DamagedCheckpoint
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.parallel.mesh import make_mesh
from tests.test_io_checkpoint import abstract, make_data, make_parts

# Orbax leaves coroutines that it never awaits where a part cannot be read.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def coroutines_are_dropped_here() -> Iterator[None]:
    """Not in whichever test comes next."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with steps 1, 2 and 3, of which N went N batches far."""
    workdir, data = tmp_path_factory.mktemp("saved"), make_data()
    store = Checkpoints(workdir, keep=3)
    for step in (1, 2, 3):
        next(data)
        store.save(step, make_parts(make_mesh(), seed=step), data)
        store.wait()
    store.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def data_file(checkpoint: Path) -> Path:
    """The largest file of the arrays of params."""
    files = (checkpoint / "params" / "ocdbt.process_0" / "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def change_value(checkpoint: Path, name: str = "params/mlp/up/kernel") -> None:
    """Flips the sign of one entry of a parameter, in files that are as good as before."""
    part, _, key = name.partition("/")
    change_entry(checkpoint / part, key)


def change_entry(folder: Path, name: str) -> None:
    """Flips one bit, the sign, of an array below ``folder``."""
    path = {"driver": "ocdbt", "base": f"file://{folder}/"}
    path["path"] = name.replace("/", ".") + "/"
    array = tensorstore.open({"driver": "zarr3", "kvstore": path}, open=True).result()
    place = (1,) * array.rank
    array[place].write(-array[place].read().result()).result()


def drop_checksums(checkpoint: Path) -> None:
    """As checkpoints were saved before there were any."""
    record = json.loads((checkpoint / RECORD).read_text())
    assert record["custom_metadata"].pop(CHECKSUMS)
    (checkpoint / RECORD).write_text(json.dumps(record))


CHANGED = "not the values that were saved"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "arrays cut": (lambda c: truncate(data_file(c)), "Error reading"),
    "arrays gone": (lambda c: data_file(c).unlink(), "Error reading"),
    "garbage": (lambda c: (c / "params/_METADATA").write_text("{x"), "params/_METADATA"),
    "manifest cut": (lambda c: truncate(c / "ema/manifest.ocdbt"), "ema/ lists no entry"),
    "manifest gone": (lambda c: (c / "ema/manifest.ocdbt").unlink(), "ema/manifest.ocdbt is missi"),
    "part gone": (lambda c: shutil.rmtree(c / "state"), "state/ is missing, which"),
    "position cut": (
        lambda c: truncate(c / "data/process_0-of-1.json"),
        "data/process_0-of-1.json is no JSON",
    ),
    "position gone": (
        lambda c: (c / "data/process_0-of-1.json").unlink(),
        "data/process_.*there are 0",
    ),
    "parameter changed": (change_value, f"params/mlp/up/kernel: {CHANGED}"),
    "EMA changed": (
        lambda c: change_value(c, "ema/mlp/up/bias"),
        f"damaged: ema/mlp/up/bias: {CHANGED}",
    ),
    "moments changed": (
        lambda c: change_value(c, "state/opt_state.1.mu.mlp.up.kernel"),
        f"state/opt_state/1/mu/mlp/up/kernel: {CHANGED}",
    ),
    "all gone": (empty, "_CHECKPOINT_METADATA cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_with_the_step_before_it(workdir, name):
    damage, message = DAMAGES[name]
    damage(workdir / FOLDER / "3")
    before = sorted(workdir.rglob("*"))
    assert not holds_only_params(workdir)
    store = Checkpoints(workdir, keep=3)
    wanted = abstract(make_parts(make_mesh()), make_mesh())
    with pytest.raises(DamagedCheckpoint, match=message) as error:
        store.restore_newest(wanted, make_data())
    store.close()
    assert str(error.value).startswith(f"{workdir / FOLDER / '3'} is damaged: ")
    assert "step 2 is the newest before it: train.skip_damaged_checkpoints=True" in str(error.value)
    assert sorted(workdir.rglob("*")) == before


def test_goes_back_and_keeps_what_is_damaged(workdir, caplog):
    """Two of three are damaged; their steps are saved anew, and many after them."""
    truncate(data_file(workdir / FOLDER / "3"))
    (workdir / FOLDER / "2" / "data" / "process_0-of-1.json").write_text("")
    lost = {step: sorted((workdir / FOLDER / step).rglob("*")) for step in ("2", "3")}
    mesh, data, expected = make_mesh(), make_data(), make_data()
    parts = make_parts(mesh)
    with caplog.at_level(logging.ERROR):
        store = Checkpoints(workdir, keep=2)
        restored = store.restore_newest(abstract(parts, mesh), data, skip_damaged=True)
    assert int(restored["state"]["step"]) == 1
    next(expected)
    np.testing.assert_array_equal(next(data), next(expected))
    for step in ("3", "2"):
        assert f"{workdir / FOLDER / step} is damaged: " in caplog.text
        assert f"step {step} is kept as {workdir / FOLDER / step}.damaged" in caplog.text
    assert store.steps == [1] == list_steps(workdir)
    for number in range(2, 7):
        store.save(number, make_parts(mesh, seed=number))
    store.wait()
    assert store.steps == [5, 6] == list_steps(workdir)
    store.close()
    for step, paths in lost.items():
        moved = workdir / FOLDER / f"{step}.damaged"
        there = [moved / path.relative_to(workdir / FOLDER / step) for path in paths]
        assert sorted(moved.rglob("*")) == there


def test_changed_values_go_unseen_without_checksums(workdir, caplog):
    """The same change is restored from an older checkpoint, and gone back from in a new one."""
    change_value(workdir / FOLDER / "3")
    mesh = make_mesh(data=2, fsdp=4)
    saved = make_parts(mesh, seed=3)["params"]["mlp"]["up"]["kernel"]
    wanted = abstract(make_parts(mesh), mesh)
    shutil.copytree(workdir, workdir.with_name("older"))
    drop_checksums(workdir.with_name("older") / FOLDER / "3")

    store = Checkpoints(workdir.with_name("older"), keep=3)
    kernel = store.restore_newest(wanted, make_data())["params"]["mlp"]["up"]["kernel"]
    store.close()
    assert np.argwhere(np.asarray(kernel != saved)).tolist() == [[1, 1]]

    store = Checkpoints(workdir, keep=3)
    restored = store.restore_newest(wanted, make_data(), skip_damaged=True)
    store.close()
    assert int(restored["state"]["step"]) == 2
    assert f"{workdir / FOLDER / '3'} is damaged: params/mlp/up/kernel: {CHANGED}" in caplog.text
    assert (workdir / FOLDER / "3.damaged").is_dir()


@pytest.mark.parametrize("which", ["params", "ema"])
def test_changed_parameters_are_not_loaded_alone(workdir, which):
    """For sampling and the like, on one device, split, or some of them split; others are whole."""
    checkpoint, mesh = workdir / FOLDER / "3", make_mesh(data=2, fsdp=4)
    change_value(checkpoint, f"{which}/mlp/up/kernel")
    rows = NamedSharding(mesh, P("fsdp"))
    for sharding in (None, rows, {"mlp/up/kernel": rows}, {"mlp/up/bias": rows}):
        with pytest.raises(DamagedCheckpoint) as error:
            load_params(workdir, which, sharding=sharding)
        expected = f"{checkpoint} is damaged: {which}/mlp/up/kernel: {CHANGED} (checksums differ)"
        assert str(error.value) == expected
    load_params(workdir, which, step=2)
    load_params(workdir, "params" if which == "ema" else "ema")
    drop_checksums(checkpoint)
    load_params(workdir, which)


def test_a_changed_tree_is_not_loaded(tmp_path):
    """What a generator's workdir keeps of its tokenizer."""
    tree = make_parts(make_mesh())["params"]
    save_tree(tmp_path / "tree", tree)
    assert tree_metadata(tmp_path / "tree") == {}
    load_tree(tmp_path / "tree")
    change_entry(next((tmp_path / "tree").rglob("ocdbt.process_0")).parent, "mlp/up/bias")
    for wanted in (None, abstract({"params": tree}, make_mesh())["params"]):
        with pytest.raises(DamagedCheckpoint, match=f"tree is damaged: mlp/up/bias: {CHANGED}"):
            load_tree(tmp_path / "tree", wanted)


def test_a_second_damaged_checkpoint_of_a_step_is_kept_beside_the_first(workdir):
    (workdir / FOLDER / "3.damaged").mkdir()
    shutil.rmtree(workdir / FOLDER / "3" / "params")
    store = Checkpoints(workdir, keep=2)
    wanted = abstract(make_parts(make_mesh()), make_mesh())
    store.restore_newest(wanted, make_data(), skip_damaged=True)
    store.close()
    names = sorted(path.name for path in (workdir / FOLDER).iterdir())
    assert names == ["1", "2", "3.damaged", "3.damaged.2"]


def test_nothing_starts_anew_where_all_are_damaged(workdir):
    for checkpoint in (workdir / FOLDER).iterdir():
        shutil.rmtree(checkpoint / "state")
    store = Checkpoints(workdir, keep=3)
    wanted = abstract(make_parts(make_mesh()), make_mesh())
    with pytest.raises(DamagedCheckpoint, match=r"/1 is damaged: .*no checkpoint before it"):
        store.restore_newest(wanted, make_data(), skip_damaged=True)
    store.close()
    assert list_steps(workdir) == [1, 2, 3]


def test_another_model_is_no_damage(workdir):
    mesh = make_mesh()
    wanted = abstract(make_parts(mesh), mesh)
    wanted["params"]["mlp"]["up"]["scale"] = wanted["params"]["mlp"]["up"].pop("bias")
    store = Checkpoints(workdir, keep=3)
    with pytest.raises(ValueError, match="3/params does not fit this model: mlp/up/scale") as error:
        store.restore_newest(wanted, make_data(), skip_damaged=True)
    assert not isinstance(error.value, DamagedCheckpoint)
    with pytest.raises(ValueError, match="holds no part 'other'") as error:
        store.restore_newest({"other": wanted["ema"]}, skip_damaged=True)
    assert not isinstance(error.value, DamagedCheckpoint)
    store.close()
    assert list_steps(workdir) == [1, 2, 3]
