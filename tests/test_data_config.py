"""config.data: every field is read and checked against the source."""

from __future__ import annotations

from typing import Any

import ml_collections
import numpy as np
import pytest
from PIL import Image

from ar_jax.data import CodesWriter, from_config
from ar_jax.data.config import DEFAULTS, REQUIRED

EMBEDDED = {"source": "embedded", "image_size": 28, "channels": 1, "num_classes": 10}


def config(**changes) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(EMBEDDED | changes)


def test_training_and_evaluation_from_a_locked_config():
    section = config(crop="none", flip=True, on_error="raise", num_workers=0).lock()
    data = from_config(section, "train")
    assert (len(data.source), data.source.num_classes, data.num_workers) == (20_000, 10, 0)
    assert data.transform is not None and data.transform.flip
    with data.train_iterator(batch_size=4, seed=0) as iterator:
        assert next(iterator)["image"].shape == (4, 28, 28, 1)
    test = from_config(section, "test").eval_batches(batch_size=300)
    assert len(test) == 14 and test.num_items == 4_000


def test_every_field_reaches_what_it_is_for(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            Image.new("L", (40, 30), i).save(tmp_path / name / f"{i}.png")
    section = config(
        source=f"folder:{tmp_path}", image_size=16, channels=3, num_classes=2, crop="random",
        flip=True, min_crop=0.5, max_crop=0.75, margin=1.5, on_error="skip", num_workers=2,
        holdout=0.3, captions="",
    )  # fmt: skip
    data = from_config(section, "train")
    assert data.num_workers == 2 and data.source.channels == 3 and data.source.skipped == 0
    assert data.transform is not None
    for field in ("crop", "flip", "min_crop", "max_crop", "margin"):
        assert getattr(data.transform, field) == section[field]
    assert data.transform.size == 16 and data.source.caption_shape is None
    held_out = len(from_config(section, "test").source)
    assert 14 <= held_out <= 34 and held_out + len(data.source) == 80
    assert set(section) == set(REQUIRED) | set(DEFAULTS), "this test covers every field"


def test_conversion_and_resizing_are_allowed_where_asked_for():
    data = from_config(config(image_size=32, channels=3, crop="center"), "test")
    (batch,) = data.eval_batches(batch_size=4, max_batches=1)
    assert batch["image"].shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(batch["image"][..., 0], batch["image"][..., 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, r"data.image_size=32, but embedded \(train\): its images are 28x28; "
                             r"set data.image_size=28, or data.crop='center'"),
        ({"channels": 2}, r"cannot turn 1 channel\(s\) into channels=2"),
        ({"num_classes": 11}, r"data.num_classes=11, .* set data.num_classes=10"),
        ({"source": "mnist"}, r"data.source='mnist' is not known; use one of embedded"),
        ({"crop": "centre"}, r"data.crop='centre' is not known"),
        ({"on_error": "ignore"}, r"data.on_error='ignore'"),
        ({"num_workers": -1}, r"data.num_workers=-1 must be 0 or more"),
        ({"image_size": "28"}, r"data.image_size='28' must be of type int"),
        ({"image_size": True}, r"data.image_size=True must be of type int"),
        ({"flip": 1}, r"data.flip=1 must be of type bool"),
        ({"min_crop": 2}, r"data.min_crop=2.0"),
        ({"images_size": 28}, r"data.images_size=28 is not a field; known: source, image_size"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_config(config(**changes), "train")


def test_a_missing_field_is_named():
    section = config()
    del section["num_classes"]
    with pytest.raises(ValueError, match="data.num_classes is missing; it must be of type int"):
        from_config(section, "train")


def test_codes_are_checked_against_the_images_behind_them(tmp_path):
    with CodesWriter(
        tmp_path / "train", "train", sizes=[2], copies=1, vocabulary_size=8, num_classes=10,
        tokenizer={}, image_size=28, channels=1,
    ) as writer:  # fmt: skip
        writer.write(np.zeros((5, 2), int), np.arange(5))
    source = f"codes:{tmp_path}"
    data = from_config(config(source=source), "train")
    assert data.transform is None
    with data.train_iterator(batch_size=2, seed=0) as iterator:
        assert next(iterator)["codes"].shape == (2, 2)
    (first, *_) = data.eval_batches(batch_size=2)
    assert sorted(first) == ["codes", "label", "mask"]
    faults: list[tuple[dict[str, Any], str]] = [
        ({"image_size": 32}, r"data.image_size=32, but codes:.*made at 28x28; set data.image_size"),
        ({"channels": 3}, r"data.channels=3, .* set data.channels=1"),
        ({"num_classes": 9}, r"set data.num_classes=10"),
        ({"flip": True}, r"data.flip=True: codes:.*set data.crop='none' and data.flip=False"),
        ({"crop": "center"}, r"data.crop='center'"),
    ]
    for changes, message in faults:
        with pytest.raises(ValueError, match=message):
            from_config(config(source=source, **changes), "train")
