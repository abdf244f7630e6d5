"""The Makefile, run with a stand-in for Python that notes how it is called.

The stand-in understands what the Makefile asks of an interpreter: its version, `-m venv`, `-m pip`
and an import check; nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("python3", "python3.13", "python3.12", "python3.11", "python")

STAND_IN = r"""#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  --version) echo "Python @MAJOR@.@MINOR@.0" ;;
  *"sys.exit(sys.version_info"*) [ @MAJOR@ -eq 3 ] && [ @MINOR@ -ge 11 ] ;;
  *"print(*sys.version_info"*) echo "@MAJOR@ @MINOR@" ;;
  "-m venv "*)
    [ -z "$NO_ENSUREPIP" ] || { echo "ensurepip is not available"; exit 1; }
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install"*) [ -z "$PIP_FAILS" ] || exit 1 ;;
esac
"""


class Clone:
    """A folder with the Makefile, and a PATH on which only stand-ins are called Python."""

    def __init__(self, folder: Path, version: tuple[int, int] | None):
        self.folder = folder / "clone of the project"
        self.folder.mkdir()
        self.path = folder / "bin"
        self.path.mkdir()
        self.calls = folder / "calls"
        shutil.copy(ROOT / "Makefile", self.folder)
        self.touch_pyproject(0)
        for name in NAMES:
            self.add(name, version)

    def add(self, name: str, version: tuple[int, int] | None) -> None:
        """An interpreter of that name and version; one that does not start for None."""
        script = "#!/bin/sh\nexit 1\n"
        if version is not None:
            major, minor = map(str, version)
            script = STAND_IN.replace("@MAJOR@", major).replace("@MINOR@", minor)
        (self.path / name).write_text(script)
        (self.path / name).chmod(0o755)

    def touch_pyproject(self, seconds: int) -> None:
        """Modifies pyproject.toml; its time is that of the stamp of .venv, if any, plus seconds."""
        (self.folder / "pyproject.toml").touch()
        stamp = self.folder / ".venv" / ".installed"
        if stamp.exists():
            time = stamp.stat().st_mtime + seconds
            os.utime(self.folder / "pyproject.toml", (time, time))

    def make(self, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """Exit status, output, and what the interpreters were asked to do that takes long."""
        self.calls.write_text("")
        # What a `make test` around this test was given would change the inner make.
        outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "SYSTEM", "EXTRAS", "TESTARGS")
        environment = {key: text for key, text in os.environ.items() if key not in outer}
        environment |= {"PATH": f"{self.path}:{environment['PATH']}", "CALLS": str(self.calls)}
        done = subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        work = [
            line
            for line in self.calls.read_text().splitlines()
            if not line.startswith(("-c", "--version", "-m pip --version"))
        ]
        return done.returncode, done.stdout, work


VENV_CALL = "-m venv .venv"
PIP_CALL = "-m pip install --disable-pip-version-check -e .[dev]"
COMPILER_CALL = "-m pip install --disable-pip-version-check -q -e .[ahead]"


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path, (3, 11))


def test_installs_once(clone):
    assert clone.make()[::2] == (0, [VENV_CALL, PIP_CALL])
    assert clone.make()[::2] == (0, [])
    assert clone.make("install")[::2] == (0, [])


@pytest.mark.parametrize(
    ("target", "calls"),
    [
        (("demo",), ["experiments/demo.py --system=var --workdir=demo/var"]),
        (
            ("demo", "SYSTEM=llamagen"),
            ["experiments/demo.py --system=llamagen --workdir=demo/llamagen"],
        ),
        (("test",), ["-m pytest -n 2 --dist worksteal"]),
        (("test", "TESTARGS=-k name"), ["-m pytest -n 2 --dist worksteal -k name"]),
        (("lint",), ["-m ruff check .", "-m mypy"]),
    ],
)
def test_targets_install_first(clone, target, calls):
    compiler = [COMPILER_CALL] * (target[0] == "test")
    assert clone.make(*target)[::2] == (0, [VENV_CALL, PIP_CALL, *compiler, *calls])
    assert clone.make(*target)[::2] == (0, calls)


def test_a_target_of_a_folder_name_still_runs(clone):
    for name in ("demo", "test", "lint", "install"):
        (clone.folder / name).mkdir()
    clone.make()
    assert clone.make("demo")[2] == ["experiments/demo.py --system=var --workdir=demo/var"]


def test_new_metadata_installs_again_into_the_same_environment(clone):
    clone.make()
    clone.touch_pyproject(10)
    assert clone.make()[::2] == (0, [PIP_CALL])


def test_failed_installation_starts_afresh(clone):
    status, output, work = clone.make(PIP_FAILS="1")
    assert (status, work) == (2, [VENV_CALL, PIP_CALL])
    assert "the installation failed" in output
    assert clone.make()[::2] == (0, [VENV_CALL, PIP_CALL])


def test_dead_interpreter_is_replaced(clone):
    clone.make()
    python = clone.folder / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("removed-by-an-upgrade")
    assert clone.make()[::2] == (0, [VENV_CALL, PIP_CALL])


def test_empty_folder_is_replaced(clone):
    (clone.folder / ".venv").mkdir()
    assert clone.make()[::2] == (0, [VENV_CALL, PIP_CALL])


def test_moved_clone_is_installed_anew(clone):
    clone.make()
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    assert clone.make()[::2] == (0, [VENV_CALL, PIP_CALL])
    assert clone.make()[::2] == (0, [])


def test_environment_made_by_hand_is_kept(clone):
    clone.make()
    (clone.folder / ".venv" / ".installed").unlink()
    assert clone.make()[::2] == (0, [PIP_CALL])


def test_old_interpreters_are_passed_over(tmp_path):
    clone = Clone(tmp_path, (3, 10))
    clone.add("python3.12", (3, 12))
    status, output, work = clone.make()
    assert (status, work) == (0, [VENV_CALL, PIP_CALL])
    assert "(python3.12)" in output


@pytest.mark.parametrize("version", [(3, 10), (2, 7), None])
def test_no_interpreter(tmp_path, version):
    clone = Clone(tmp_path, version)
    status, output, work = clone.make("test")
    assert (status, work) == (2, [])
    assert "no Python 3.11 or newer found (tried: python3 python3.13" in output
    assert not (clone.folder / ".venv").exists()


def test_named_interpreter(clone):
    clone.add("python3.13", (3, 13))
    clone.make()
    # Another version was asked for; afterwards it stays, named or not.
    assert clone.make("PYTHON=python3.13")[::2] == (0, [VENV_CALL, PIP_CALL])
    assert clone.make("PYTHON=python3.13")[::2] == (0, [])
    assert clone.make()[::2] == (0, [])


def test_named_interpreter_that_is_too_old(clone):
    clone.add("old", (3, 10))
    clone.make()
    status, output, work = clone.make("PYTHON=old")
    assert (status, work) == (2, [])
    assert "no Python 3.11 or newer found (tried: old)" in output
    # The environment that was there is still good.
    assert clone.make()[::2] == (0, [])


def test_missing_ensurepip_is_explained(clone):
    status, output, _ = clone.make(NO_ENSUREPIP="1")
    assert status == 2
    assert "apt-get install python3-venv" in output
    assert clone.make()[::2] == (0, [VENV_CALL, PIP_CALL])
