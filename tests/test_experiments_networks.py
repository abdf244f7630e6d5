"""The benchmark of the networks that judge images."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ar_jax.nn.lpips import NETWORKS
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import script

with script("benchmarks/networks") as benchmark:  # its flags are another script's too
    pass

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]


def test_every_network_is_timed(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    result = benchmark.measure(32, 1, 1)
    assert result.keys() == {"devices", "image_size", "inception"} | {
        f"lpips_{n}" for n in NETWORKS
    }
    for timed in list(result.values())[2:]:
        assert all(np.isfinite(x) and x > 0 for x in timed.values())
