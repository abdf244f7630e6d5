"""Official files to a directory and back, and what the directory is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert import weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import export_directory, write_directory
from ar_jax.convert.parity.case import Case
from ar_jax.convert.release import choose
from ar_jax.evaluation.load import load_system, load_tokenizer
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.evaluation.samples import sample_workdir, sampling_of
from ar_jax.io import checkpoint
from ar_jax.io.checkpoint import PARAMS, TOKENIZER, load_params, load_tree
from ar_jax.io.checkpoint_health import DamagedCheckpoint
from ar_jax.io.checksums import tree_checksums
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.converted_cases import (
    CASES,
    GOLDEN,
    OPTIONS,
    PARTS,
    convert,
    official,
    write_files,
)
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")
FAMILIES = (pytest.param("var", marks=pytest.mark.slow), "llamagen")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    """Holds the official files and the directory 'ours' made of them."""
    folder = tmp_path_factory.mktemp(family)
    write_directory(convert(family, write_files(family, folder)), folder / "ours")
    return folder


@pytest.fixture(scope="module")
def case(family) -> Case:
    return Case.load(GOLDEN / CASES[family])


def test_the_directory_samples_what_the_official_code_samples(family, folder, case):
    config, system, params = load_system(folder / "ours")
    assert config["dtype"] == "float32" and config["precision"] == "highest"
    sampler = CachedSampler.create(system, params)
    guidance = {"var": {"guidance.scale": 1.5}, "llamagen": {"guidance.scale": 2.0}}[family]
    if family == "var":
        label, steps = case["label"], range(system.schedule.num_steps)
        drawn = np.concatenate([case[f"greedy.idx_{k}"] for k in steps], axis=1)
    else:
        label, drawn = case["gpt_labels"], case["gen_cfg_ids"]
    _, strength = sampling_of(config, guidance)
    with jax.default_matmul_precision(config["precision"]):
        samples = sampler(
            {"label": jnp.asarray(label, jnp.int32)},
            image_keys(0, 0, len(label)),
            knobs=Knobs(temperature=0.0),
            guidance=strength,
        )
    np.testing.assert_array_equal(samples.codes, drawn)


@pytest.mark.slow
def test_sample_command(family, folder, tmp_path):
    drawn = sample_workdir(
        folder / "ours",
        tmp_path / "samples.png",
        labels=[2, 3],
        sampling={"guidance.scale": 4.0, "top_k": 20, "top_p": 0.95, "smooth": family == "var"},
        progress=False,
    )
    assert drawn.images.shape[0] == 2 and (tmp_path / "samples.png").exists()


def exported(family: str, part: str, path: Path) -> dict[str, np.ndarray]:
    """The state_dict of a file, which lies where the official code looks for it."""
    content = weight_file.read(path)
    if path.suffix == ".safetensors":
        return content
    names = {"llamagen": ["model"], "mar": ["model"]}.get(family, [])
    if part == "mar":  # its trainer's file: of the trained and of the averaged weights
        names = ["model", "model_ema"]
    assert not names or list(content) == names
    for name in names:
        assert all(np.shares_memory(t, content[names[0]][k]) for k, t in content[name].items())
    return content[names[0]] if names else content


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_round_trip_is_exact(family, folder, case, tmp_path, suffix):
    outs = tmp_path / f"transformer.{suffix}", tmp_path / f"tokenizer.{suffix}"
    lines = export_directory(choose(family), folder / "ours", outs)
    assert len(lines) == 2
    for out, part in zip(outs, reversed(PARTS[family]), strict=True):
        wanted, found = official(case, part), exported(family, part, out)
        assert found.keys() == wanted.keys()
        kinds = {tensor["key"]: tensor["kind"] for tensor in case.tensors(part)}
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
            if kinds[key] == "param":
                np.testing.assert_array_equal(found[key], tensor, key)


@pytest.mark.parametrize("name", [pytest.param("rar", marks=pytest.mark.slow), "mar"])
def test_round_trip_of_other_families(name, tmp_path):
    write_directory(convert(name, write_files(name, tmp_path)), tmp_path / "ours")
    outs = tmp_path / "generator.pth", tmp_path / "tokenizer.safetensors"
    lines = export_directory(choose(name), tmp_path / "ours", outs)
    assert lines[0].endswith("under 'model' and 'model_ema'") == (name == "mar")
    case = Case.load(GOLDEN / CASES[name])
    for out, part in zip(outs, reversed(PARTS[name]), strict=True):
        wanted, found = official(case, part), exported(name, part, out)
        assert found.keys() == wanted.keys()
        for key, tensor in case.state_dict(part).items():
            np.testing.assert_array_equal(found[key], tensor, key)
    if name == "rar":
        evaluate(tmp_path / "ours", tmp_path / "report")


def evaluate(directory: Path, out: Path) -> None:
    """The real images must be named: the directory's own source is a placeholder."""
    counts: Any = dict(num_images=10, likelihood_images=10, batch_size=10)
    with pytest.raises(ValueError, match="data/imagenet"):
        evaluate_workdir(directory, out, **counts, progress=False)
    report = evaluate_workdir(directory, out, source="synthetic", **counts, progress=False)
    assert np.isfinite(report["likelihood"]["metrics"]["nats_per_image"]["value"])
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (10, 16, 16, 3)


@pytest.mark.slow  # converts once more
def test_exported_buffers_of_var(tmp_path):
    write_directory(convert("var", write_files("var", tmp_path)), tmp_path / "ours")
    export_directory(choose("var"), tmp_path / "ours", [tmp_path / "transformer.safetensors"])
    found = weight_file.read(tmp_path / "transformer.safetensors")
    assert found["lvl_1L"].dtype == np.int64
    sizes = np.square(OPTIONS["var"]["scales"])
    level = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(found["lvl_1L"], level[None])
    mask = found["attn_bias_for_masking"][0, 0]
    np.testing.assert_array_equal(mask == 0, level[:, None] >= level)
    assert np.isneginf(mask[mask != 0]).all()
    assert not found["blocks.1.attn.zero_k_bias"].any()


def test_a_tokenizer_alone(family, folder, case, tmp_path):
    files = folder / "tokenizer.pt", None
    write_directory(convert(family, files), tmp_path / "ours")
    config, tokenizer, _ = load_tokenizer(tmp_path / "ours")
    size = OPTIONS[family].get("image_size", 64)
    assert tokenizer.image_shape == (size, size, 3) and config["data"]["image_size"] == size
    assert "backbone" not in config
    export_directory(choose(family), tmp_path / "ours", [tmp_path / "back.pth"])
    found = exported(family, "tokenizer", tmp_path / "back.pth")
    for key, tensor in case.state_dict("tokenizer").items():
        np.testing.assert_array_equal(found[key], tensor, key)


def test_a_converted_directory_that_changes_is_noticed(family, folder, monkeypatch):
    """Whether a part has checksums shows by what is said where a value is not the one saved."""
    folder = folder / "ours"
    for load in (
        lambda: load_params(folder, "params"),
        lambda: load_tree(folder / TOKENIZER / PARAMS),
    ):
        load()
        with monkeypatch.context() as patch, pytest.raises(DamagedCheckpoint, match="checksums"):
            patch.setattr(checkpoint, "tree_checksums", lambda tree: altered(tree_checksums(tree)))
            load()


def altered(sums):
    """One of the sums is another."""
    name, (dtype, total) = next(iter(sums.items()))
    return sums | {name: [dtype, total ^ 1]}


def test_trainer_checkpoints_of_var(tmp_path):
    """One file holds both, among much else."""
    case = Case.load(GOLDEN / CASES["var"])
    trainer = {
        "config": {"depth": 2},
        "var_wo_ddp": official(case, "transformer"),
        "vae_local": official(case, "tokenizer"),
    }
    path = tmp_path / "ar-ckpt-last.pth"
    weight_file.write(path, {"epoch": 1, "iter": 2, "trainer": trainer})
    converted = convert("var", (path, path))
    assert converted.params["tokenizer"]["quantizer"]["codebook"].shape == (64, 8)


def test_nothing_is_overwritten(family, folder, tmp_path):
    converted = convert(family, (folder / "tokenizer.pt", folder / "transformer.pt"))
    with pytest.raises(ValueError, match="exists already"):
        write_directory(converted, folder / "ours")
    (tmp_path / "there.pth").write_text("mine")
    with pytest.raises(ValueError, match=r"there\.pth exists already"):
        export_directory(choose(family), folder / "ours", [tmp_path / "there.pth"])
    with pytest.raises(ValueError, match="suffix"):
        export_directory(choose(family), folder / "ours", [tmp_path / "a.npz"])
    with pytest.raises(ValueError, match="not 3"):
        outs = [tmp_path / f"{i}.pth" for i in range(3)]
        export_directory(choose(family), folder / "ours", outs)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]


def test_a_configuration_is_checked_and_taken_over(family, folder):
    config = convert(family, (folder / "tokenizer.pt", folder / "transformer.pt")).config
    config["backbone"] |= {"drop_path": 0.25}
    config["train"] |= {"steps": 77}
    files = folder / "tokenizer.pt", folder / "transformer.pt"
    taken = convert_files(choose(family), *files, None, config).config
    assert taken["backbone"]["drop_path"] == 0.25 and taken["train"]["steps"] == 77
    wrong = config | {"backbone": config["backbone"] | {"norm_epsilon": 0.5, "num_classes": 9}}
    with pytest.raises(ValueError, match=r"transformer\.pt: num_classes is 9, but .* says 10"):
        convert_files(choose(family), *files, None, wrong)
    with pytest.raises(ValueError, match="option headz=2 is unknown; there are .*'heads'"):
        convert(family, files, headz=2)
    other = "silu" if family == "var" else "relu"
    wrong = config | {"backbone": config["backbone"] | {"activation": other}}
    with pytest.raises(ValueError, match=rf"config\.backbone\.activation is '{other}', but .*\.pt"):
        convert_files(choose(family), *files, None, wrong)
