"""Tests that ask the TPU's compiler, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest

NEEDS_COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install -e '.[ahead]'",
)
