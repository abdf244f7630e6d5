"""Test session set-up: eight virtual CPU devices, strict broadcasting, parsed flags."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

# Before jax is imported; set in the environment so that scripts started by tests inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Scripts that are started again and again, and tests that build a program anew, compile it once.
# A folder for each worker, as jax does not write the files of the cache atomically.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ar_jax_programs_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Most of the suite's time is XLA compiling small programs, which its older emitters do in half the
# time. Later releases do not have them, and end the process for a flag they do not know. Scripts
# inherit it: a run that is compared bit for bit with one of this process needs the same programs.
if Version(version("jaxlib")) < Version("0.11"):
    flags_of_xla = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags_of_xla} --xla_cpu_use_fusion_emitters=false".strip()

import jax
import pytest
from absl import flags

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8

# Before any other jax call: the backend is made once, by the first of them. On jax 0.10 some 30
# and more sharded programs in flight deadlock the CPU client's threads, which then aborts the
# process after 40 s: a loop over a sharded step must wait for a result every few steps.
jax.config.update("jax_num_cpu_devices", DEVICES)
# `[B, L, D] + [D]` must be written out: silent rank promotion hides transposed and missing axes.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Modules that define absl flags are imported by tests without app.run.
flags.FLAGS.mark_as_parsed()


# Each compiled program takes a few of the 65,530 memory mappings that Linux grants a process by
# default; the program that gets none crashes it, deep in XLA.
MAPPINGS, ENOUGH = Path("/proc/self/maps"), 45_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Forgets compiled programs after a file of tests, once there are many."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > ENOUGH:
        jax.clear_caches()


@pytest.fixture
def no_flags_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """For scripts that start libtpu, which ends the process for a flag of the CPU's compiler."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Files of the project: those in version control, or all where the tree came without it."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files"]
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
        entries = [entry for entry in ROOT.iterdir() if entry.name not in ignored]
        paths = [path for entry in entries for path in [entry, *entry.rglob("*")]]
        paths = [p for p in paths if not {"__pycache__", "ar_jax.egg-info"} & set(p.parts)]
    return [path for path in paths if path.is_file()]
