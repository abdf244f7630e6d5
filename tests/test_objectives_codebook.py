"""What becomes of codebooks while tokenizers train, and of quantisers that have none."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.nn.kmeans import kmeans
from ar_jax.tokenizers.tokenizer import to_float
from tests.modules import apply
from tests.objective_calls import BATCH, KEY, close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import AUTOENCODER

pytestmark = pytest.mark.usefixtures("quick_compilation")

RAW: dict[str, dict[str, Any]] = {
    "vq": dict(codebook_size=12),
    "multiscale_vq": dict(codebook_size=12, scales=(1, 2, 4)),
    "fsq": dict(levels=(4, 3, 2, 2)),
    "lfq": dict(entropy=True, entropy_group=4),
    "bsq": dict(entropy=True),
    "multiscale_bitwise": dict(entropy=True, entropy_group=2, scales=(1, 2, 4)),
}
WITHOUT_CODEBOOK = ("fsq", "lfq", "bsq", "multiscale_bitwise")


@dataclasses.dataclass(frozen=True)
class Run:
    objective: Any
    params: Any
    batch: Any

    @functools.cached_property
    def stats(self) -> Any:
        return self.objective.init_stats(self.params)


def run_of(name: str, tokenizer: dict[str, Any] | None = None, **fields: Any) -> Run:
    section = dict(name=name, autoencoder=dict(AUTOENCODER)) | RAW[name] | (tokenizer or {})
    config = dict(dtype="float32", tokenizer=section, objective=dict(name="tokenizer", **fields))
    objective: Any = build_objective(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    images = rng.integers(0, 256, (BATCH, *objective.tokenizer.image_shape)).astype(np.uint8)
    params = jax.tree.map_with_path(draw, shapes)
    return Run(objective, params, {"image": jnp.asarray(images)})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("lfq", "bsq") else name
        for name in WITHOUT_CODEBOOK
    ],
)
def test_quantisers_without_a_codebook(name):
    """Their losses and no others, a histogram of their codes, and nothing else that moves."""
    weights: dict[str, Any] = {} if name == "fsq" else dict(commitment=0.2, entropy=0.3)
    more: dict[str, Any] = dict(diversity=0.5) if weights else {}
    run = run_of(name, usage_decay=0.0, **weights, **more)
    assert "quantizer" not in run.params
    loss, aux = loss_of(run.objective, run.params, run.stats, {}, run.batch, KEY, True)
    images = to_float(run.batch["image"])
    reconstruction, quantized = apply(run.objective.tokenizer, run.params, images)
    expected = np.square(reconstruction - images, dtype=np.float64).mean()
    if weights:
        each, mean = float(quantized.sample_entropy), float(quantized.codebook_entropy)
        assert min(each, mean) > 1e-2
        expected += 0.2 * quantized.commitment_loss.mean() + 0.3 * (each - 0.5 * mean)
        close(aux.metrics["entropy_loss"], each - 0.5 * mean)
    close(loss, expected)
    named = {metric for metric in aux.metrics if metric.endswith("_loss")}
    assert named == ({"commitment_loss", "entropy_loss"} if weights else set())
    params, stats = run.objective.finish(run.params, run.stats, aux.sums, aux.last, KEY)
    jax.tree.map(np.testing.assert_array_equal, params, run.params)
    assert stats.keys() == {"histogram"}
    index = np.asarray(run.objective.tokenizer.index(quantized.codes))
    sizes = [h * w for h, w in run.objective.tokenizer.grids]
    parts = np.split(index, np.cumsum(sizes)[:-1], axis=1)
    size = {"fsq": 48}.get(name, 16)
    counts = [np.bincount(part.ravel(), minlength=size) / part.size for part in parts]
    close(stats["histogram"], np.array(counts, np.float32))
    later = loss_of(run.objective, run.params, stats, {}, run.batch, KEY)[1].metrics
    if name == "multiscale_bitwise":
        for scale, share in enumerate(counts):
            close(later[f"usage/scale_{scale:02d}"], (share > 0).mean())
    else:
        close(later["usage"], (counts[0] > 0).mean())


@pytest.mark.parametrize(
    "name", ["lfq", pytest.param("multiscale_bitwise", marks=pytest.mark.slow)]
)
def test_entropies_of_a_batch_on_eight_devices(name):
    """The mean assignment is that of the whole batch, wherever its rows are."""
    run = run_of(name, entropy=0.1)
    one = loss_of(run.objective, run.params, run.stats, {}, run.batch, KEY, True)
    params, stats = replicated(run.params), replicated(run.stats)
    eight = loss_of(run.objective, params, stats, {}, sharded(run.batch), KEY, True)
    close(eight, one, rtol=1e-4)
    halves = [
        loss_of(run.objective, run.params, run.stats, {}, {"image": run.batch["image"][i::2]})[1]
        for i in range(2)
    ]
    mean = np.mean([half.metrics["codebook_entropy"] for half in halves])
    assert one[1].metrics["codebook_entropy"] > mean + 1e-3  # a mean over devices is another number


@pytest.mark.parametrize(("l2_norm", "update"), [(True, "ema"), (False, "gradient")])
@pytest.mark.slow
def test_codebook_starts_from_the_means_of_the_first_vectors(l2_norm, update):
    """Once, as soon as there are enough of them; four batches have 256 vectors each."""
    fields = dict(l2_norm=l2_norm, codebook_update=update)
    run = run_of("vq", fields, kmeans_vectors=600)
    params, stats, vectors = run.params, run.stats, []
    never = dataclasses.replace(run.objective, kmeans_vectors=0)
    plainly, finish = jax.jit(never.finish), jax.jit(run.objective.finish)
    for step in range(4):
        images = jnp.roll(run.batch["image"], step, axis=1)
        _, aux = loss_of(run.objective, params, stats, {}, {"image": images}, KEY, True)
        quantized = apply(run.objective.tokenizer, params, to_float(images))[1]
        vectors.append(np.asarray(quantized.vectors).reshape(-1, 4))
        key = jax.random.fold_in(KEY, step)
        plain, _ = plainly(params, stats, aux.sums, aux.last, key)
        params, stats = finish(params, stats, aux.sums, aux.last, key)
        assert int(stats["kmeans_filled"]) == min(256 * (step + 1), 600)
        codebook = params["quantizer"]["codebook"]
        if step != 2:
            close(codebook, plain["quantizer"]["codebook"])
            continue
        pool = np.concatenate(vectors)[:600]
        close(stats["kmeans_pool"], pool)
        close(codebook, kmeans(jnp.asarray(pool), 12, key, l2_norm=l2_norm), rtol=1e-4)
        close(stats["histogram"], np.full((1, 12), 1 / 12))
        if update == "ema":
            close((stats["ema_counts"], stats["ema_sums"]), (np.ones(12), codebook))


def test_a_fixed_codebook_is_moved_by_nothing():
    fields = dict(restart_below=0.5, kmeans_vectors=100, usage_decay=0.0)
    run = run_of("vq", dict(codebook_update="ema"), **fields)
    objective = dataclasses.replace(run.objective, fixed_codebook=True)
    stats = objective.init_stats(run.params)
    assert stats.keys() == {"histogram"}
    _, aux = loss_of(objective, run.params, stats, {}, run.batch, KEY, True)
    assert not aux.last
    params, later = objective.finish(run.params, stats, aux.sums, aux.last, KEY)
    jax.tree.map(np.testing.assert_array_equal, params, run.params)
    assert (later["histogram"] != stats["histogram"]).any()


@pytest.mark.parametrize(
    ("name", "update"),
    [
        pytest.param("vq", "gradient", marks=pytest.mark.slow),
        pytest.param("vq", "ema", marks=pytest.mark.slow),
        pytest.param("multiscale_vq", "gradient", marks=pytest.mark.slow),
        pytest.param("multiscale_vq", "ema", marks=pytest.mark.slow),
    ],
)
def test_codebooks_on_one_and_on_eight_devices(name, update):
    """Fifty steps of gradients, a start from k-means, the codebook's own update and restarts."""
    fields = dict(restart_below=0.5, usage_decay=0.5, ema_decay=0.8, kmeans_vectors=500)
    run = run_of(name, dict(codebook_update=update), **fields)

    @jax.jit
    def step(params: Any, stats: Any, batch: Any, key: jax.Array) -> Any:
        gradient, aux = gradient_of(run.objective, params, stats, {}, batch, key)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
        return run.objective.finish(params, stats, aux.sums, aux.last, key)

    one = (run.params, run.stats)
    eight = (replicated(run.params), replicated(run.stats))
    rows = sharded(run.batch)
    restarted = 0
    for index in range(50):
        key = jax.random.fold_in(KEY, index)
        one, eight = step(*one, run.batch, key), step(*eight, rows, key)
        jax.block_until_ready(eight)  # see conftest.py
        # What restarts has a uniform share in every scale.
        restarted += int((one[1]["histogram"] == np.float32(1 / 12)).all(0).sum())
    assert 12 < restarted < 50 * 12  # all of them by k-means, and some of them later
    assert int(one[1]["kmeans_filled"]) == 500
    close(one, eight, rtol=1e-3, atol=1e-4)
