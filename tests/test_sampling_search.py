"""Search: the best of the draws that it says it makes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.evaluation.samples import generate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.sampling.search import BestOf, candidate_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS, COND = image_keys(3, 0, 5), toy_labels(5)
CODES = jnp.zeros((1, 4), jnp.int32)


def brightness(images: jax.Array, cond: dict[str, jax.Array]) -> jax.Array:
    """Of some classes the brightest, of others the darkest."""
    return images.mean((1, 2, 3)) * jnp.where(cond["label"] % 2 == 0, 1.0, -1.0)


@pytest.fixture(scope="module")
def sampler() -> CachedSampler:
    return CachedSampler.create(
        *toy_system("raster", schedule=dict(grid=2), autoencoder=dict(image_size=4))
    )


def test_one_candidate_is_plain_sampling(sampler):
    guidance = Guidance(scale=2.0)
    found = BestOf(sampler=sampler, score=brightness, candidates=1)(COND, KEYS, guidance=guidance)
    for ours, plain in zip(
        jax.tree.leaves(found), jax.tree.leaves(sampler(COND, KEYS, guidance=guidance)), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)


def test_the_best_of_all_draws_is_kept(sampler):
    draws = [sampler(COND, candidate_keys(KEYS, number)) for number in range(6)]
    scores = np.array([brightness(drawn.images, COND) for drawn in draws])  # [6, B]
    assert len({drawn.codes.tobytes() for drawn in map(jax.device_get, draws)}) == 6
    best = scores.argmax(0)
    assert len(set(best)) > 1  # not one candidate for all
    found = BestOf(sampler=sampler, score=brightness, candidates=6)(COND, KEYS)
    for row, number in enumerate(best):
        np.testing.assert_array_equal(found.codes[row], draws[number].codes[row])
        np.testing.assert_array_equal(found.images[row], draws[number].images[row])


def test_it_is_used_as_a_sampler(sampler):
    search = BestOf(sampler=sampler, score=brightness, candidates=2)
    drawn = generate(search, [0, 1, 2], batch_size=2)
    plain = generate(sampler, [0, 1, 2], batch_size=2)
    assert drawn.images.shape == plain.images.shape and drawn.images.dtype == np.uint8
    assert not np.array_equal(drawn.codes, plain.codes)
    np.testing.assert_array_equal(search.decode(CODES), sampler.decode(CODES))


def test_what_it_cannot_do_is_refused(sampler):
    with pytest.raises(ValueError, match="candidates is 0; it must be at least 1"):
        BestOf(sampler=sampler, score=brightness, candidates=0)
    with pytest.raises(ValueError, match="noise leaves nothing to choose from"):
        BestOf(sampler=sampler, score=brightness, candidates=2)(COND, KEYS, noise=jnp.zeros(1))
