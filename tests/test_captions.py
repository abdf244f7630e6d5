"""Captions: the file of their features, beside the items of a source, and drawn for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert import weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import write_directory
from ar_jax.convert.parity.case import Case
from ar_jax.convert.release import choose
from ar_jax.data import from_config, open_source
from ar_jax.data.captions import read_captions
from ar_jax.evaluation.samples import sample_workdir
from ar_jax.train.run import train_and_evaluate
from tests.converted_cases import GOLDEN, official
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import smoke_config

ROWS, WIDTH = 4, 3


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_captions_are_moved_to_the_end_of_the_prefix(tmp_path):
    caption = np.arange(1.0, 1 + 2 * 3 * WIDTH).reshape(2, 3, WIDTH)
    mask = np.array([[True, True, False], [False, True, True]])
    cond = read_captions(save(tmp_path / "c.npz", caption=caption, caption_mask=mask), ROWS, WIDTH)
    expected = np.zeros((2, ROWS, WIDTH), np.float32)
    expected[0, 2:], expected[1, 2:] = caption[0, :2], caption[1, 1:]
    np.testing.assert_array_equal(cond["caption"], expected)
    np.testing.assert_array_equal(cond["caption_mask"], [[False, False, True, True]] * 2)
    assert cond["caption"].dtype == np.float32 and not cond["dropped"].any()


def test_without_a_mask_all_rows_are_real(tmp_path):
    caption = np.ones((1, ROWS, WIDTH), np.float16)
    cond = read_captions(save(tmp_path / "c.npz", caption=caption), ROWS, WIDTH)
    assert cond["caption_mask"].all()


EMBEDDED = {"source": "embedded", "image_size": 28, "channels": 1, "num_classes": 10}


def write_captions(folder: Path) -> np.ndarray:
    """A caption of random features for each class of the embedded images; their features."""
    rng = np.random.default_rng(0)
    caption = rng.standard_normal((10, ROWS, WIDTH)).astype(np.float32)
    mask = np.arange(ROWS)[None] >= np.arange(10)[:, None] % ROWS  # padded in front
    for split in ("train", "test"):
        source = open_source("embedded", split)
        labels = [int(source[i]["label"]) for i in range(len(source))]
        save(folder / f"{split}.npz", caption=caption, caption_mask=mask, caption_of=labels)
    return np.where(mask[..., None], caption, 0)


def test_batches_have_the_captions_of_their_images(tmp_path):
    caption = write_captions(tmp_path)
    data = from_config(EMBEDDED | {"captions": str(tmp_path), "on_error": "skip"}, "train")
    assert data.source.caption_shape == (ROWS, WIDTH)
    with data.train_iterator(batch_size=16, seed=0) as iterator:
        batch = next(iterator)
    np.testing.assert_array_equal(batch["caption"], caption[batch["label"]])
    np.testing.assert_array_equal(batch["caption_mask"].sum(1), ROWS - batch["label"] % ROWS)
    assert batch["caption_mask"].dtype == batch["dropped"].dtype == bool and batch["image"].any()
    assert not batch["dropped"].any()
    last = list(from_config(EMBEDDED | {"captions": str(tmp_path)}, "test").eval_batches(
        batch_size=1500))[-1]  # fmt: skip
    assert last["mask"].sum() == 1000 and not last["caption"][1000:].any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, r"data.captions=.*: there is no .*train.npz; it must hold .* of the 20000 items"),
        ({}, r"train.npz has captions for 2 items, but embedded .* has 20000"),
        ({"caption_of": np.full(20_000, 2)}, "'caption_of' names caption 2, but there are 2"),
        ({"caption_of": np.zeros(20_000)}, "'caption_of' must be numbers of captions"),
    ],
)
def test_a_caption_is_needed_for_every_item(tmp_path, arrays, message):
    if arrays is not None:
        save(tmp_path / "train.npz", caption=GOOD, **arrays)
    with pytest.raises(ValueError, match=message):
        from_config(EMBEDDED | {"captions": str(tmp_path)}, "train")


@pytest.mark.parametrize(
    ("changes", "captions", "message"),
    [
        ({}, True, "nothing here is told a caption"),
        ({"condition": "text"}, False, "condition is 'text', but config.data.captions is empty"),
        (
            {"condition": "text", "caption_length": 5},
            True,
            r"4 rows of 3 a caption, but config.backbone has caption_length=5 and caption_features",
        ),
    ],
)
def test_what_is_told_captions_has_them(tmp_path, changes, captions, message):
    config = smoke_config("infinity")
    config.backbone.update(changes)
    config.data.captions = str(tmp_path) if captions else ""
    if captions:
        write_captions(tmp_path)
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(config, tmp_path / "run")


GOOD = np.ones((2, ROWS, WIDTH), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": GOOD}, "no array 'caption'"),
        ({"caption": GOOD[0]}, r"float32 \[4, 3\]; it must be float \[N, T, 3\]"),
        ({"caption": GOOD.astype(np.int32)}, "it must be float"),
        ({"caption": GOOD[..., :2]}, "4 rows of 2 a caption; the generator takes at most 4 rows"),
        ({"caption": np.ones((1, 5, WIDTH))}, "5 rows of 3 a caption"),
        ({"caption": GOOD, "caption_mask": np.ones((2, 3))}, r"\[2, 3\]; it must be \[2, 4\]"),
        ({"caption": GOOD, "caption_mask": np.eye(2, ROWS) * [[1], [0]]}, "caption 1 has no real"),
        ({"caption": GOOD * [[[1]], [[np.nan]]]}, "caption 1 has a value that is not finite"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_captions(save(tmp_path / "c.npz", **arrays), ROWS, WIDTH)
    assert "c.npz" in str(caught.value)


def test_no_npz_is_refused(tmp_path):
    (tmp_path / "c.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"c\.npz is no npz file of caption features"):
        read_captions(tmp_path / "c.npz", ROWS, WIDTH)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The golden text model, converted, with as much of the golden codebook as it knows."""
    folder, case = tmp_path_factory.mktemp("text"), Case.load(GOLDEN / "llamagen/tiny")
    model = case.spec["config"]["gpt_t2i"]
    tokenizer, codebook = official(case, "tokenizer"), "quantize.embedding.weight"
    tokenizer[codebook] = tokenizer[codebook][: model["vocab_size"]]
    files = folder / "tokenizer.pt", folder / "gpt_t2i.pt"
    for path, tensors in zip(files, (tokenizer, official(case, "gpt_t2i")), strict=True):
        weight_file.write(path, {"model": tensors})
    heads = model["n_head"]
    options = {"heads": heads, "image_size": 16}
    write_directory(convert_files(choose("llamagen"), *files, options), folder / "ours")
    return folder / "ours"


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_a_converted_model_draws_for_captions_what_the_official_code_draws(directory, tmp_path):
    case = Case.load(GOLDEN / "llamagen/tiny")
    mask = case["t2i_caption_mask"] > 0
    first = mask.argmax(1)[:, None]  # as a text encoder pads: real rows first
    right = np.take_along_axis(
        case["t2i_caption"], ((np.arange(mask.shape[1]) + first) % mask.shape[1])[..., None], axis=1
    )
    path = tmp_path / "captions.npz"
    save(path, caption=right, caption_mask=np.arange(mask.shape[1]) < mask.sum(1, keepdims=True))
    scale = case.spec["sampling"]["t2i_cfg_scale"]
    drawn = sample_workdir(
        directory,
        tmp_path / "samples.png",
        captions=path,
        sampling={"temperature": 0.0, "guidance.scale": scale},
        npz=tmp_path / "samples.npz",
        progress=False,
    )
    np.testing.assert_array_equal(drawn.codes, case["t2i_gen_ids"])
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], drawn.images)
        np.testing.assert_array_equal(file["arr_1"], [0, 1])  # the captions' numbers


@pytest.mark.slow  # two generators
def test_captions_and_classes_do_not_mix(directory, tmp_path):
    out = tmp_path / "samples.png"
    with pytest.raises(ValueError, match="--labels does not go with --captions"):
        sample_workdir(directory, out, captions=tmp_path / "c.npz", labels=[0])
    with pytest.raises(ValueError, match="sample.py draws for captions with --captions"):
        sample_workdir(directory, out, labels=[0])
    assert not out.exists()
