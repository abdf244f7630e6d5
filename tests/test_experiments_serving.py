"""The benchmark of continuous batching: every request is served, and waiting is counted right."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.sampling.continuous import ContinuousBatch, Request
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import script
from tests.toy_systems import toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_times_go_from_arrival_to_end(tmp_path):
    sampler = CachedSampler.create(
        *toy_system("raster", schedule=dict(grid=2), autoencoder=dict(image_size=4))
    )
    keys = image_keys(0, 0, 5)
    requests = [
        Request(cond={"label": jnp.int32(0)}, key=keys[n], length=n % 4 + 1) for n in range(5)
    ]
    arrivals = np.array([0.0, 1e6, 1e6, 1e6, 2e6])  # long after the work for those before them
    with script("benchmarks/serving", f"--workdir={tmp_path}") as module:
        batch = ContinuousBatch(sampler, slots=2, codes_per_call=1)
        for serve in (module.serve_continuously(batch), module.serve_fixed(sampler, 2)):
            ends = serve(requests, arrivals)
            assert (ends > arrivals).all() and (ends[1:] - arrivals[1:] < 1e5).all()
        found = module.figures(lambda *_: arrivals + [1, 2, 3, 4, 10], requests, arrivals)
    assert found["mean_seconds"] == pytest.approx(4.0)
    assert found["images_per_second"] == pytest.approx(5 / 2_000_010)
    assert 8 < found["seconds_of_95_percent"] <= 10
