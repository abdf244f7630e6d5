"""Edits from files: what they say of a picture or a mask that does not fit, and what they write."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ar_jax.evaluation.edit_sources import label_each, read_images, read_mask
from ar_jax.evaluation.edits import EditedImages
from ar_jax.evaluation.grids import save_frames
from ar_jax.evaluation.samples import check_outputs
from ar_jax.io.images import save_gif, save_png

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 6, 8, 1), np.uint8)


def test_pictures_and_npz_are_read(tmp_path):
    path = tmp_path / "shoe.png"
    save_png(path, IMAGES[0])
    images, labels = read_images(path, (6, 8, 1))
    np.testing.assert_array_equal(images, IMAGES[:1])
    assert labels is None
    np.savez(tmp_path / "some.npz", IMAGES, np.array([2, 0, 1]))
    images, labels = read_images(tmp_path / "some.npz", (6, 8, 1))
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, [2, 0, 1])
    with pytest.raises(ValueError, match=r"shoe\.png: 6x8 pixels; .* have 8x8"):
        read_images(path, (8, 8, 1))
    with pytest.raises(ValueError, match=r"shoe\.png: 1 channels; .* have 3"):
        read_images(path, (6, 8, 3))
    with pytest.raises(ValueError, match=r"gone\.png: neither"):
        read_images(tmp_path / "gone.png", (6, 8, 3))


def test_masks(tmp_path):
    drawn = RNG.random((6, 8)) < 0.5
    path = tmp_path / "mask.png"
    save_png(path, np.where(drawn[..., None], 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(read_mask(str(path), 2, (6, 8)), np.stack([drawn] * 2))
    for shape in ((6, 8), (2, 6, 8)):
        mask = RNG.random(shape) < 0.5
        np.savez(tmp_path / "mask.npz", mask)
        found = read_mask(str(tmp_path / "mask.npz"), 2, (6, 8))
        np.testing.assert_array_equal(found, np.broadcast_to(mask, (2, 6, 8)))
    box = np.zeros((6, 8), bool)
    box[1:4, 2:8] = True
    np.testing.assert_array_equal(read_mask("box:1,2,4,8", 1, (6, 8))[0], box)
    np.testing.assert_array_equal(read_mask("around:1,2,4,8", 1, (6, 8))[0], ~box)
    assert read_mask("all", 3, (6, 8)).all()


@pytest.mark.parametrize("text", ["box:1,2,7,8", "box:1,2,4", "around:3,2,3,8", "box:a,b,c,d"])
def test_boxes_outside_of_the_image_are_refused(text):
    with pytest.raises(ValueError, match=rf"--mask={text}: .* inside images of 6x8"):
        read_mask(text, 1, (6, 8))


def test_masks_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "mask.png"
    save_png(path, IMAGES[0])
    with pytest.raises(ValueError, match=r"mask\.png: 6x8; the images are 1 of 8x8"):
        read_mask(str(path), 1, (8, 8))
    with pytest.raises(ValueError, match=r"--mask=gone\.png is no file"):
        read_mask("gone.png", 1, (8, 8))
    np.savez(tmp_path / "mask.npz", np.zeros((3, 6, 8), bool))
    with pytest.raises(ValueError, match=r"mask\.npz: 3x6x8; the images are 2 of 6x8"):
        read_mask(str(tmp_path / "mask.npz"), 2, (6, 8))


def test_classes_of_images():
    own = np.array([3, 1])
    assert label_each("a.npz", "labels", None, own, 2, 5).tolist() == [3, 1]
    assert label_each("a.npz", "labels", [4], own, 2, 5).tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"a\.png does not say .* give --source_labels"):
        label_each("a.png", "source_labels", None, None, 1, 5)
    with pytest.raises(ValueError, match=r"--labels: 3 classes for the 2 images of a\.npz"):
        label_each("a.npz", "labels", [1, 2, 3], own, 2, 5)
    with pytest.raises(ValueError, match="label 7 is no class"):
        label_each("a.npz", "labels", [7], own, 2, 5)


def test_the_picture_shows_source_mask_and_edits():
    mask = RNG.random((3, 6, 8)) < 0.5
    edits = RNG.integers(0, 256, (6, 6, 8, 1), np.uint8)
    codes = np.zeros((6, 4))
    made = EditedImages(edits, np.zeros(6, int), IMAGES, mask, codes, codes > 0)
    picture = made.picture
    assert picture.shape == (3, 4, 6, 8, 1)
    np.testing.assert_array_equal(picture[:, 0], IMAGES)
    assert (picture[:, 1][mask] == 128).all()
    np.testing.assert_array_equal(picture[:, 1][~mask], IMAGES[~mask])
    np.testing.assert_array_equal(picture[:, 2:].reshape(edits.shape), edits)


def test_files_are_not_overwritten(tmp_path):
    out = tmp_path / "a.png"
    check_outputs(out, None, None, overwrite=False)
    out.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png exists"):
        check_outputs(out, None, None, overwrite=False)
    check_outputs(out, tmp_path / "a.npz", tmp_path / "a.gif", overwrite=True)
    with pytest.raises(ValueError, match=r"--frames=a\.mp4 must end in \.gif or \.png"):
        check_outputs(out, None, "a.mp4", overwrite=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_has_its_frames(tmp_path, channels):
    frames = RNG.integers(0, 16, (4, 6, 8, channels), np.uint8) * 16
    save_gif(tmp_path / "a.gif", frames, milliseconds=100, rest=700)
    with Image.open(tmp_path / "a.gif") as opened:
        assert len(ImageSequence.all_frames(opened)) == 4
        for index, frame in enumerate(frames):
            opened.seek(index)
            assert opened.info["duration"] == (700 if index == 3 else 100)
            shown = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
            np.testing.assert_array_equal(shown.reshape(frame.shape), frame)
    with pytest.raises(ValueError, match="frames of dtype float64"):
        save_gif(tmp_path / "b.gif", frames / 2)


def test_frames_become_a_gif_or_a_strip(tmp_path):
    stages = RNG.integers(0, 256, (5, 2, 64, 64, 1), np.uint8)
    save_frames(tmp_path / "a.gif", stages)
    with Image.open(tmp_path / "a.gif") as opened:
        assert len(ImageSequence.all_frames(opened)) == 5 and opened.size == (130, 64)
    save_frames(tmp_path / "a.png", stages)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (5 * 66 - 2, 130)
