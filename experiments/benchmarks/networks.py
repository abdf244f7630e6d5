"""Times the networks that judge images on this machine's devices: Inception and LPIPS.

    python experiments/benchmarks/networks.py --out=networks.json

Images per second of uint8 images of --image_size, the resize to 299x299 and the way to and from the
device included, compilation not; the weights are drawn, which changes no time. CPU seconds an image
stand beside it: on a machine that does other things meanwhile, they are what to compare.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from ar_jax.evaluation.inception import InceptionNetwork
from ar_jax.evaluation.lpips import LpipsMetric
from ar_jax.io.console import configure_logging
from ar_jax.nn import inception, lpips

IMAGE_SIZE = flags.DEFINE_integer("image_size", 256, "Side of the images.")
IMAGES = flags.DEFINE_integer("images", 64, "Timed images of each network.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Of Inception; LPIPS has its own.")
OUT = flags.DEFINE_string("out", None, "JSON file; default prints only.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    result = measure(IMAGE_SIZE.value, IMAGES.value, BATCH_SIZE.value)
    text = json.dumps(result, indent=2)
    print(text)
    if OUT.value:
        Path(OUT.value).write_text(text + "\n", encoding="utf-8")


def measure(image_size: int, count: int, batch_size: int) -> dict[str, Any]:
    """Name of a network -> {'images_per_second', 'cpu_seconds_per_image'}."""
    rng = np.random.default_rng(0)
    shape = (count, image_size, image_size, 3)
    images, others = (rng.integers(0, 256, shape).astype(np.uint8) for _ in range(2))
    devices = tuple(jax.local_devices())
    network = InceptionNetwork(drawn(inception.param_shapes(), rng), {}, devices)
    calls: dict[str, Callable[[], Any]] = {"inception": lambda: network(images, batch_size)}
    for name in lpips.NETWORKS:
        metric = LpipsMetric(drawn(lpips.param_shapes(name), rng), name, {})
        calls[metric.name] = lambda metric=metric: metric(images, others)  # type: ignore[misc]
    timed = {}
    for name, call in calls.items():
        call()  # compiles
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        timed[name] = {"images_per_second": count / wall, "cpu_seconds_per_image": cpu / count}
    return {"devices": [d.device_kind for d in devices], "image_size": image_size, **timed}


def drawn(shapes: Any, rng: np.random.Generator) -> Any:
    """Positive numbers, as variances must be."""
    return jax.tree.map(
        lambda s: np.abs(0.05 * rng.standard_normal(s.shape)).astype(np.float32), shapes
    )


if __name__ == "__main__":
    app.run(main)
