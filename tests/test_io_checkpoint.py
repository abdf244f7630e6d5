"""Checkpoints: what is kept, where it is restored, and what the errors name."""

from __future__ import annotations

import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.io import checkpoint
from ar_jax.io.checkpoint import list_steps, load_params, load_tree, save_tree
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.parallel.mesh import make_mesh
from ar_jax.parallel.rules import shardings


def make_parts(mesh, *, seed: int = 0, ema: bool = True):
    """The parts of a state like the loop's, placed on ``mesh``."""
    kernel = jax.random.normal(jax.random.key(seed), (16, 32))
    params = {"mlp": {"up": {"kernel": kernel, "bias": jnp.arange(32.0)}}}
    moments = optax.chain(optax.identity(), optax.scale_by_adam()).init(params)
    parts = {
        "params": params,
        "ema": jax.tree.map(lambda x: x + 1, params) if ema else {},
        "state": {"step": jnp.int32(seed), "opt_state": moments, "stats": {}},
    }
    return jax.device_put(parts, shardings(parts, mesh))


def abstract(parts, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        parts,
        shardings(parts, mesh),
    )


def make_data():
    return iter(
        grain.MapDataset.range(50).seed(1).shuffle().repeat(None).batch(4).to_iter_dataset()
    )


def assert_equal(a, b):
    assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_restores_on_another_mesh_with_the_data_in_place(tmp_path):
    mesh = make_mesh(data=1, fsdp=8)
    parts, data = make_parts(mesh), make_data()
    next(data)
    store = Checkpoints(tmp_path, keep=2)
    store.save(7, parts, data)
    store.close()
    expected = next(data)

    other, fresh = make_mesh(data=2, fsdp=2, tensor=2), make_data()
    store = Checkpoints(tmp_path, keep=2)
    restored = store.restore(7, abstract(parts, other), fresh)
    store.close()
    assert_equal(restored, parts)
    kernel = restored["params"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == shardings(parts, other)["params"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 16)}
    np.testing.assert_array_equal(next(fresh), expected)


def test_data_positions_of_other_process_counts(tmp_path):
    data = make_data()
    next(data)
    store = Checkpoints(tmp_path, keep=1)
    mesh = make_mesh()
    parts = make_parts(mesh)
    store.save(1, parts, data)
    store.wait()
    expected, folder = next(data), tmp_path / checkpoint.FOLDER / "1" / checkpoint.DATA
    own = folder / "process_0-of-1.json"
    shutil.copy(own, folder / "process_0-of-2.json")
    own.rename(folder / "process_1-of-2.json")
    fresh = make_data()
    store.restore(1, abstract(parts, mesh), fresh)
    np.testing.assert_array_equal(next(fresh), expected)

    (folder / "process_1-of-2.json").write_text('{"next_index": 5}')
    with pytest.raises(ValueError, match="of 2 processes, which differ: go on with that number"):
        store.restore(1, abstract(parts, mesh), make_data())
    store.close()


def test_keeps_the_newest_and_leaves_a_step_that_is_there(tmp_path):
    mesh = make_mesh()
    store = Checkpoints(tmp_path, keep=2)
    for step in (3, 5, 9, 12):
        store.save(step, make_parts(mesh, seed=step))
    store.save(12, make_parts(mesh, seed=99))
    store.wait()
    assert store.steps == [9, 12] == list_steps(tmp_path)
    restored = store.restore(12, abstract(make_parts(mesh), mesh))
    store.close()
    assert int(restored["state"]["step"]) == 12
    with pytest.raises(ValueError, match="config.train.keep_checkpoints=0"):
        Checkpoints(tmp_path, keep=0)


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    mesh = make_mesh()
    parts = make_parts(mesh)
    kept = jax.device_get(parts)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    store = Checkpoints(tmp_path, keep=1)
    store.save(1, parts)
    for _ in range(5):
        parts = spoil(parts)
    restored = store.restore(1, abstract(kept, mesh))
    store.close()
    assert_equal(jax.device_get(restored), kept)


def test_a_save_that_was_killed_is_no_checkpoint(tmp_path):
    mesh = make_mesh()
    store = Checkpoints(tmp_path, keep=3)
    store.save(1, make_parts(mesh))
    store.close()
    half = tmp_path / checkpoint.FOLDER / "2.orbax-checkpoint-tmp-123"
    half.mkdir()
    (half / "params").write_text("cut")
    assert list_steps(tmp_path) == [1]
    store = Checkpoints(tmp_path, keep=3)
    assert store.steps == [1]
    store.save(2, make_parts(mesh, seed=2))
    store.close()
    assert list_steps(tmp_path) == [1, 2]
    assert not half.exists()


def test_load_params(tmp_path):
    mesh = make_mesh(data=4, fsdp=2)
    parts = make_parts(mesh)
    store = Checkpoints(tmp_path / "a", keep=3)
    store.save(2, make_parts(mesh, seed=2))
    store.save(4, parts)
    store.close()
    assert_equal(load_params(tmp_path / "a"), parts["ema"])
    assert_equal(load_params(tmp_path / "a", "auto"), parts["ema"])
    assert_equal(load_params(tmp_path / "a", "params"), parts["params"])
    assert_equal(load_params(tmp_path / "a", "params", 2), make_parts(mesh, seed=2)["params"])
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; there are \[2, 4\]"):
        load_params(tmp_path / "a", step=3)
    with pytest.raises(ValueError, match="which='best' is none of"):
        load_params(tmp_path / "a", "best")
    with pytest.raises(ValueError, match="nothing/checkpoints holds no checkpoint"):
        load_params(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()

    parts = make_parts(mesh, ema=False)
    store = Checkpoints(tmp_path / "b", keep=3)
    store.save(1, parts)
    restored = store.restore(1, abstract(parts, mesh))
    store.close()
    assert restored["ema"] == {}
    assert_equal(load_params(tmp_path / "b", "auto"), parts["params"])
    with pytest.raises(ValueError, match=r"holds no 'ema'.*config.ema.decay=0"):
        load_params(tmp_path / "b", "ema")


def test_another_model_is_refused_by_name_and_shape(tmp_path):
    mesh = make_mesh()
    parts = make_parts(mesh)
    store = Checkpoints(tmp_path, keep=1)
    store.save(5, parts)
    store.wait()
    wanted = abstract(parts, mesh)
    up = wanted["params"]["mlp"]["up"]
    up["kernel"] = jax.ShapeDtypeStruct((16, 48), jnp.float32, sharding=up["kernel"].sharding)
    up["scale"] = up.pop("bias")
    with pytest.raises(ValueError) as error:
        store.restore(5, wanted)
    store.close()
    message = str(error.value)
    assert "checkpoints/5/params does not fit" in message
    assert "mlp/up/scale is missing" in message
    assert "mlp/up/bias is not expected" in message
    assert "mlp/up/kernel has shape (16, 32), expected (16, 48)" in message


def test_trees(tmp_path):
    tree = {"encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    save_tree(tmp_path / "x", tree, {"scales": [1, 2]})
    assert_equal(load_tree(tmp_path / "x"), tree)
    assert checkpoint.tree_metadata(tmp_path / "x") == {"scales": [1, 2]}
    with pytest.raises(ValueError, match="exists already"):
        save_tree(tmp_path / "x", tree)
    with pytest.raises(ValueError, match="holds no saved parameters"):
        load_tree(tmp_path / "y")
    shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"encoder/kernel has shape \(2, 3\), expected \(2, 4\)"):
        load_tree(tmp_path / "x", {"encoder": {"kernel": shape}})


def test_host_arrays_are_written_from_where_they_lie(tmp_path):
    """Compressed, every leaf of the tree would wait in memory for the last one."""
    tree = {name: np.ones((64, 1024), np.float32) for name in ("a", "b")}
    save_tree(tmp_path / "tree", tree)
    run = Checkpoints(tmp_path / "run", keep=1, copies=False)
    run.save(0, {"params": tree})
    run.close()
    for folder in (tmp_path / "tree", tmp_path / "run"):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert size > 2 * 64 * 1024 * 4
    np.testing.assert_array_equal(load_tree(tmp_path / "tree")["a"], tree["a"])
    np.testing.assert_array_equal(load_params(tmp_path / "run", "params")["b"], tree["b"])


def test_load_system_params_joins_generator_and_tokenizer(tmp_path):
    tokenizer = {"quantizer": {"codebook": np.ones((4, 2), np.float32)}}
    store = Checkpoints(tmp_path, keep=1)
    generator = {"backbone": {"w": jnp.ones(2)}, "head": {"kernel": jnp.zeros((2, 4))}}
    store.save(1, {"params": generator})
    store.close()
    with pytest.raises(ValueError, match="tokenizer does not exist"):
        checkpoint.load_system_params(tmp_path)
    save_tree(tmp_path / checkpoint.TOKENIZER / checkpoint.PARAMS, tokenizer)
    assert_equal(checkpoint.load_system_params(tmp_path), {"tokenizer": tokenizer, **generator})


def test_tree_digest_sees_names_shapes_and_values():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    digest = checkpoint.tree_digest(tree)
    assert digest == checkpoint.tree_digest({"b": jnp.ones(2), "a": jnp.zeros((2, 3))})
    changed = [
        {**tree, "a": np.zeros((3, 2), np.float32)},
        {**tree, "b": np.array([1, 1 + 1e-7], np.float32)},
        {"a": tree["a"], "c": tree["b"]},
    ]
    assert len({digest, *map(checkpoint.tree_digest, changed)}) == 4
