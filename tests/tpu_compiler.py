"""Tests that ask the TPU's compiler, where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest


def needs_compiler(test: Any) -> Any:
    """Skips the test where there is none, and hides this process's flags of XLA from it."""
    missing = pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install -e '.[ahead]'",
    )
    return missing(pytest.mark.usefixtures("no_flags_of_xla")(test))
