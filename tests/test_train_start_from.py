"""Starting from converted releases: what is taken over, started anew or interpolated, and training.

The releases are golden cases in the layout of the official files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.backbones.position_tables import (
    CellTable,
    ScaleTable,
    nearest_scales,
    position_tables,
    resample,
)
from ar_jax.build import build_objective, build_system
from ar_jax.convert import weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import export_directory, write_directory
from ar_jax.convert.places import flat_leaves
from ar_jax.convert.release import choose
from ar_jax.entities import next_entity
from ar_jax.io.checkpoint import load_params, load_tree
from ar_jax.io.run_info import read_config
from ar_jax.nn.resize import enlarge
from ar_jax.parallel.mesh import use_mesh
from ar_jax.train.fields import read_settings
from ar_jax.train.program import build_program
from ar_jax.train.run import train_and_evaluate
from ar_jax.train.start_from import InitFrom, decide, initial_params, read_init_from
from ar_jax.train.state import INIT
from tests.config_files import Case
from tests.converted_cases import OPTIONS, convert, write_files
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES = "backbone/condition/class_embed/embedding"
LAST = {  # official keys of the heads
    "var": "head.weight",
    "llamagen": "output.weight",
    "rar": "lm_head.weight",
    "mar": "diffloss.net.final_layer.linear.weight",
}
POSITION, SCALES = "backbone/position", "backbone/scale_embed"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """family -> the directory of its converted case."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            write_directory(convert(family, write_files(family, folder)), folder / "ours")
            made[family] = folder / "ours"
        return made[family]

    return make


def configure(start: Path | str, **changes: Any) -> Any:
    """The converted configuration for a short run on synthetic images."""
    config = read_config(start)
    config.init_from = dict(workdir=str(start), reinitialise=(), interpolate=())
    changed = dict(source="synthetic", crop="none", flip=False, num_workers=0)
    config.data = {name: v for name, v in config.data.items() if name != "margin"} | changed
    config.train.update(
        steps=2, batch_size=8, eval_every=0, preview_every=0, checkpoint_every=2, log_every=1
    )
    config.optimizer.update(learning_rate=1e-3, warmup_steps=1)
    config.update_from_flattened_dict(changes)
    return config


def start(config: Any, workdir: Path) -> dict[str, np.ndarray]:
    """'a/b/c' -> what a run starts from, on eight devices."""
    settings = read_settings(config)
    objective: Any = build_objective(config)
    with use_mesh(settings.mesh):
        program = build_program(
            objective, settings.optimizer, settings.mesh, seed=settings.seed, ema_decay=0.9
        )
        params = initial_params(config, objective, program, workdir)
        assert params is not None
        places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract.params)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == places
        return flat_leaves(jax.device_get(params))


def test_everything_is_taken_over(release, tmp_path):
    """Tables that are interpolated to the scales that they have included."""
    config = configure(release("var"), **{"init_from.interpolate": (POSITION, SCALES)})
    found = start(config, tmp_path / "run")
    expected = flat_leaves(jax.device_get(load_params(release("var"), "params")))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, name)


@pytest.mark.slow
def test_other_classes(release, tmp_path):
    changes = {"backbone.num_classes": 4, "data.num_classes": 4}
    config = configure(
        release("var"), **changes, **{"init_from.reinitialise": ("backbone/condition",)}
    )
    found = start(config, tmp_path / "run")
    there = flat_leaves(load_params(release("var"), "params"))
    key = jax.random.fold_in(jax.random.key(config.seed), INIT)
    new = flat_leaves(jax.jit(build_objective(config).init)(key))
    assert found[CLASSES].shape == (5, *there[CLASSES].shape[1:])
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, new[name] if name == CLASSES else there[name], name)


def test_listed_parameters_start_anew_whatever_their_shape(release, tmp_path):
    config = configure(release("var"), **{"init_from.reinitialise": ("head",)})
    found = start(config, tmp_path / "run")
    there = flat_leaves(load_params(release("var"), "params"))
    changed = {n for n, leaf in found.items() if not np.array_equal(leaf, there[n])}
    assert changed == {"head/bias", "head/kernel"}


def larger(start: Path, **changes: Any) -> Any:
    """Images of 5/4 of the size, and another list of scales."""
    side = read_config(start).tokenizer.autoencoder.image_size * 5 // 4
    sizes = {"data.image_size": side, "tokenizer.autoencoder.image_size": side}
    scales = {"tokenizer.scales": (1, 2, 3, 5), "schedule.scales": (1, 2, 3, 5)}
    return configure(start, **sizes, **scales, **changes)


def test_another_list_of_scales(release, tmp_path):
    config = larger(release("var"), **{"init_from.interpolate": (POSITION,)})
    found = start(config, tmp_path / "run")
    there = flat_leaves(load_params(release("var"), "params"))
    np.testing.assert_array_equal(found[POSITION][:14], there[POSITION][:14])
    finest = np.asarray(there[POSITION][14:]).reshape(1, 4, 4, -1)
    wanted = np.asarray(enlarge(jnp.asarray(finest), (5, 5))).reshape(25, -1)
    np.testing.assert_allclose(found[POSITION][14:], wanted, rtol=1e-5, atol=1e-6)
    for name in found.keys() - {POSITION}:
        np.testing.assert_array_equal(found[name], there[name], name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone.num_classes": 4},
            rf"'{CLASSES}' is \(5, 128\) here and \(11, 128\) there: list it in reinitialise$",
        ),
        ({"init_from.reinitialise": ("backbone/class",)}, "names 'backbone/class', which is no"),
        (
            {"init_from.interpolate": (CLASSES,)},
            rf"'{CLASSES}' is no table of positions to interpolate \({POSITION}, {SCALES}\)",
        ),
        (
            {"init_from.interpolate": (SCALES,), "init_from.reinitialise": ("backbone",)},
            rf"both reinitialise and interpolate name '{SCALES}'",
        ),
        ({"backbone.depth": 1}, "'backbone/stack/blocks/.* is .*list it in reinitialise"),
        ({"backbone.modulation": "shared"}, "is there, but no parameter of this run"),
        ({"init_from.workdir": "nowhere"}, "nowhere"),
        ({"init_from.reinitialise": "head"}, "reinitialise='head' must be a tuple"),
        (
            {"init_from.workdir": "", "init_from.reinitialise": ("head",)},
            "config.init_from.workdir is empty: a run that starts anew has nothing to change",
        ),
    ],
)
def test_mistaken_lists_are_refused(release, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        if isinstance(changes.get("init_from.reinitialise"), str):
            InitFrom(workdir="a", reinitialise=changes["init_from.reinitialise"])
        start(configure(release("var"), **changes), tmp_path / "run")


def test_other_scales_must_be_listed(release, tmp_path):
    message = (
        rf"'{POSITION}' is \(39, 128\) here and \(30, 128\) there: .*reinitialise or interpolate"
    )
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(larger(release("var")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_fields_are_named():
    with pytest.raises(ValueError, match="config.init_from.workdirs='a' is no field"):
        read_init_from({"init_from": {"workdirs": "a"}})


def test_first_rows_can_stay(release, tmp_path):
    changes = {"backbone.num_classes": 4, "data.num_classes": 4}
    config = configure(release("var"), **changes, **{"init_from.reinitialise": (f"{CLASSES}[3:]",)})
    found = start(config, tmp_path / "run")[CLASSES]
    there = flat_leaves(load_params(release("var"), "params"))[CLASSES]
    np.testing.assert_array_equal(found[:3], there[:3])
    assert found.shape[0] == 5 and not np.isin(found[3:], there).any()
    for rows, shape in ((6, (11, 128)), (3, (11, 64))):
        fields = InitFrom(workdir="a", reinitialise=(f"{CLASSES}[{rows}:]",))
        with pytest.raises(ValueError, match=f"the first {rows} rows of '{CLASSES}' cannot stay"):
            decide(fields, {CLASSES: (5, 128)}, {CLASSES: shape})


def test_many_problems_are_cut_short():
    ours = {f"w{i}": (i,) for i in range(20)}
    with pytest.raises(ValueError, match="; and 12 more$"):
        decide(InitFrom(workdir="a"), ours, {})


def test_kinds_are_not_mixed(release, tmp_path):
    config = configure(release("var"))
    for name in ("schedule", "backbone", "head", "sampling", "tokenizer_checkpoint"):
        del config[name]
    config.objective = ml_collections.ConfigDict({"name": "tokenizer"})
    with pytest.raises(ValueError, match="holds a generator, but this run trains a tokenizer"):
        start(config, tmp_path / "run")


def test_a_converted_directory_is_not_trained_in(release):
    config = read_config(release("var"))
    config.data.source = "synthetic"
    before = sorted(release("var").rglob("*"))
    with pytest.raises(ValueError, match="no run to go on with: name a new --workdir"):
        start(config, release("var"))
    assert sorted(release("var").rglob("*")) == before


@pytest.mark.slow
def test_another_tokenizer_is_refused(release, tmp_path):
    config = configure(release("var"))
    other = convert("var", write_files("var", tmp_path), scales=(1, 2, 3, 4))
    other.params["tokenizer"]["quantizer"]["codebook"][0, 0] += 1
    alone = convert("var", (tmp_path / "tokenizer.pt", None))  # type: ignore[arg-type]
    alone.params.update(other.params["tokenizer"])
    write_directory(alone, tmp_path / "tokenizer")
    config.tokenizer_checkpoint = str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="is not the tokenizer that config.init_from.workdir="):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["var", "llamagen", "rar", "mar"])
def test_a_release_trains_on_and_goes_back(release, family, tmp_path):
    """Eight devices, other classes; the exported files read back are the live parameters."""
    changes = {"backbone.num_classes": 4, "data.num_classes": 4, "mesh.data": 4, "mesh.fsdp": 2}
    # RAR keeps its classes behind the 128 codes of the one table.
    listed = "backbone/token_embed/embedding[128:]" if family == "rar" else CLASSES
    config = configure(release(family), **changes, **{"init_from.reinitialise": (listed,)})
    outcome = train_and_evaluate(config, tmp_path / "run")
    assert outcome.finished and int(outcome.state.bad_total) == 0
    live = jax.device_get(outcome.state.params)
    there = flat_leaves(load_params(release(family), "params"))
    moved = [not np.array_equal(leaf, there[n]) for n, leaf in flat_leaves(live).items()]
    assert sum(moved) > 0.9 * len(moved)

    files = tmp_path / "transformer.safetensors", tmp_path / "tokenizer.pth"
    export_directory(choose(family), tmp_path / "run", files)
    assert LAST[family] in weight_file.read(files[0])
    back = convert_files(choose(family), files[1], files[0], OPTIONS[family]).params
    tokenizer = load_tree(release(family) / "tokenizer" / "params")
    for name, leaf in flat_leaves({**live, "tokenizer": tokenizer}).items():
        np.testing.assert_array_equal(flat_leaves(back)[name], leaf, name)

    if family not in ("var", "llamagen"):
        return
    # The same command again finds the run finished, and starts from nothing else.
    again = train_and_evaluate(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state.params), live)


def one_grid(side: int) -> schedules.Schedule:
    return schedules.raster(grid=side)


def test_tables_keep_rows_that_are_not_of_cells():
    rows = np.arange(3 * (2 + 16 + 1), dtype=np.float32).reshape(-1, 3)
    found = resample(rows, CellTable(2), one_grid(4), one_grid(6))
    assert found.shape == (2 + 36 + 1, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:2], rows[:2])
    np.testing.assert_array_equal(found[-1], rows[-1])
    np.testing.assert_array_equal(resample(rows, CellTable(2), one_grid(4), one_grid(4)), rows)
    wanted = enlarge(jnp.asarray(rows[2:18].reshape(1, 4, 4, 3)), (6, 6)).reshape(36, 3)
    np.testing.assert_allclose(found[2:-1], wanted, rtol=1e-5, atol=1e-5)


def test_tables_in_an_order_of_their_own():
    """Rows of cells stay with their cells, whatever entities they are in before and after."""
    grid = np.random.default_rng(0).standard_normal((36, 3)).astype(np.float32)
    cells = next_entity(grid=6, entity="cell", parts=2)
    apart = next_entity(grid=6, entity="subsample", parts=3)
    rows = grid[list(cells.cells or ())]
    found = resample(rows, CellTable(), cells, apart)
    np.testing.assert_array_equal(found, grid[list(apart.cells or ())])
    larger = resample(rows, CellTable(), cells, one_grid(9))
    np.testing.assert_array_equal(larger, resample(grid, CellTable(), one_grid(6), one_grid(9)))


def test_lists_of_scales_of_other_lengths():
    assert nearest_scales(4, 4) == [0, 1, 2, 3]
    assert nearest_scales(10, 14)[0] == 0 and nearest_scales(10, 14)[-1] == 9
    assert nearest_scales(3, 1) == [2]
    old, new = schedules.next_scale(scales=(1, 2)), schedules.next_scale(scales=(1, 1, 2, 4))
    rows = np.array([[7.0], [1], [1], [1], [1]], np.float32)
    found = resample(rows, CellTable(), old, new)
    np.testing.assert_allclose(found[:, 0], [7, 7, *[1] * 20], rtol=1e-6)
    assert resample(np.array([[1.0], [2]]), ScaleTable(), old, new).tolist() == [[1], [1], [2], [2]]


@pytest.mark.parametrize(
    ("file", "count"),
    [("rar.py", 2), ("mar.py", 3), ("var.py", 2), ("maskgit.py", 1), ("xar.py", 2)],
)
def test_tables_are_where_they_are_said_to_be(file, count):
    objective: Any = build_objective(Case(f"configs/fashion_mnist/{file}", "smoke").config)
    params = flat_leaves(jax.eval_shape(objective.init, jax.random.key(0))["backbone"])
    tables = position_tables(objective.system.backbone)
    assert len(tables) == count
    for path, kind in tables.items():
        schedule = objective.system.schedule
        rows = len(schedule.grids)
        if isinstance(kind, CellTable):
            rows = kind.front + schedule.length
        assert params[path].shape[0] >= rows, path


@pytest.mark.slow
def test_tables_of_families(release):
    for family, paths in (("var", {"position", "scale_embed"}), ("llamagen", set())):
        system = build_system(read_config(release(family)))
        assert set(position_tables(system.backbone)) == paths
