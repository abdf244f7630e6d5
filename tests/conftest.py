"""Test session set-up: eight virtual CPU devices, strict broadcasting, parsed flags."""

from __future__ import annotations

import os

# Before jax is imported; set in the environment so that scripts started by tests inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags

DEVICES = 8

# Before any other jax call: the backend is made once, by the first of them.
jax.config.update("jax_num_cpu_devices", DEVICES)
# `[B, L, D] + [D]` must be written out: silent rank promotion hides transposed and missing axes.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Modules that define absl flags are imported by tests without app.run.
flags.FLAGS.mark_as_parsed()
