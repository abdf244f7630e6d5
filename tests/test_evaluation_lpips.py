"""LPIPS of reconstructions: its value over batches, its place in the report, what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.evaluation import lpips as evaluation
from ar_jax.evaluation.illustrated import reconstruction_section
from ar_jax.evaluation.lpips import LpipsMetric, load_lpips
from ar_jax.evaluation.measure import Evaluation, Reconstructions
from ar_jax.evaluation.reconstruction import ReconstructionMeter
from ar_jax.io.network_file import write_network
from ar_jax.nn.lpips import lpips, param_shapes
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

ABOUT = {"family": "lpips", "network": "alexnet", "files": {"alex.pth": "0123456789abcdef"}}


def images_of(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def metric(tmp_path_factory) -> LpipsMetric:
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: np.abs(0.05 * rng.standard_normal(s.shape)).astype(np.float32),
        param_shapes("alexnet"),
    )
    path = tmp_path_factory.mktemp("weights") / "alex.npz"
    write_network(path, params, ABOUT)
    return load_lpips(path, (32, 32, 1))


@pytest.mark.slow
def test_pairs_over_batches(metric, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 1)  # eight on eight devices
    originals, others = images_of(9, 1), images_of(9, 2)
    others[3] = originals[3]
    found = metric(originals, others)
    a, b = (jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (others, originals))
    wanted = jax.jit(lambda p, a, b: lpips(p, a, b, network="alexnet"))(metric.params, a, b)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert found[3] == 0 and min(found[:3]) > 0


def test_the_report_names_the_network(metric, tmp_path):
    meter = ReconstructionMeter()
    meter.add(images_of(2, 1), images_of(2, 2))
    seen = Reconstructions(meter.result(), None, images_of(2, 1), images_of(2, 2), None, lpips=0.25)
    fields: Any = dict(data={}, judge=None, no_judge="", directory=tmp_path, num_images=2)
    fields |= dict(likelihood_images=None, batch_size=2, seed=0, progress=False)
    section = reconstruction_section(seen, Evaluation(**fields, lpips=metric))
    entry = section["metrics"]["lpips_alexnet"]
    assert entry["value"] == 0.25
    assert entry["measured"] == (
        "LPIPS v0.1 with AlexNet (sha256 of alex.pth 0123456789ab), mean over images; 2 test images"
    )
    without = reconstruction_section(seen, Evaluation(**fields))["metrics"]
    assert section["metrics"].keys() - without.keys() == {"lpips_alexnet"}


def test_what_is_refused(metric, tmp_path):
    with pytest.raises(ValueError, match="no such file: experiments/convert.py --family=lpips"):
        load_lpips(tmp_path / "no.npz", (32, 32, 3))
    write_network(tmp_path / "x.npz", {"a": np.ones(1)}, {"family": "inception"})
    with pytest.raises(ValueError, match="of the family 'inception'"):
        load_lpips(tmp_path / "x.npz", (32, 32, 3))
    write_network(tmp_path / "small.npz", metric.params, ABOUT)
    with pytest.raises(ValueError, match=r"small.npz: images have 28x28 pixels; 'alexnet' takes"):
        load_lpips(tmp_path / "small.npz", (28, 28, 1))
