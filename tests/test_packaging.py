"""What a person who installs the project relies on: metadata, package data, clean files."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import importlib.resources
import re
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
DEV = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]

# Written in pieces, so that this file does not hold what it looks for.
HOSTS = [".".join(p) for p in (("pypi", "org"), ("pythonhosted", "org"), ("registry", "npmjs"))]
HOSTS += [".".join(["download", "pytorch"]), "jax-" + "releases"]
OPTIONS = ["--" + option for option in ("index-url", "extra-index-url", "find-links")]
OPTIONS += [option.strip("-").replace("-", "_").upper() for option in OPTIONS]
FOLDERS = "|".join(["work", "root", "home", "tmp"])
MACHINE_PATH = re.compile(rf"(?<![\w.~:/>-])/(?:{FOLDERS})\b")
LOCK_FILES = {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pylock.toml", "pixi.lock"}


def forbidden_text(text: str) -> list[str]:
    """Package registries, options that name one, and paths of one machine."""
    found = [word for word in HOSTS + OPTIONS if word in text]
    return found + MACHINE_PATH.findall(text)


def test_no_machine_or_registry_in_the_tree(tracked_files):
    found = {}
    for path in tracked_files:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures and compressed arrays
        if words := forbidden_text(text):
            found[str(path.relative_to(ROOT))] = words
    assert found == {}
    assert not LOCK_FILES & {path.name for path in tracked_files}


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("--workdir=/" + "tmp/var", 1),
        ("see '/" + "work/main'", 1),
        (f"pip install {OPTIONS[0]} https://{HOSTS[0]}/simple", 2),
        ("https://github.com/a/" + "work/b, ~/" + "work, a/" + "tmp, ../" + "root", 0),
    ],
)
def test_forbidden_text(text, hits):
    assert len(forbidden_text(text)) == hits


@pytest.mark.parametrize("requirement", CORE + DEV, ids=str)
def test_installed_version_is_in_range(requirement):
    installed = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(installed), f"{requirement.name} {installed}"


def test_every_requirement_has_a_lower_bound():
    for requirement in CORE + DEV:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators, requirement
        assert "==" not in operators, requirement


def test_metadata():
    assert PROJECT["name"] == "ar_jax"
    assert importlib.metadata.version("ar_jax") == PROJECT["version"]
    requires = SpecifierSet(PROJECT["requires-python"])
    assert "3.11.0" in requires
    assert "3.10.9" not in requires
    assert PROJECT["license"] == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert {"dev", "tpu", "notebook", "wandb"} <= set(PROJECT["optional-dependencies"])


def module_level_imports(tree: ast.Module) -> set[str]:
    """First words of the imports that run when the file is imported, those in `try` left out."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_are_declared(tracked_files):
    core = {canonicalize_name(requirement.name) for requirement in CORE}
    providers = importlib.metadata.packages_distributions()
    own = {"ar_jax", "experiments", "configs"} | {p.stem for p in ROOT.glob("experiments/*.py")}
    undeclared = set()
    for path in tracked_files:
        folder = path.relative_to(ROOT).parts[0]
        if path.suffix != ".py" or folder not in ("ar_jax", "experiments", "configs"):
            continue
        for name in module_level_imports(ast.parse(path.read_text())) - own:
            distributions = {canonicalize_name(d) for d in providers.get(name, [name])}
            if name not in sys.stdlib_module_names and not distributions & core:
                undeclared.add((str(path.relative_to(ROOT)), name))
    assert undeclared == set()


def test_module_level_imports():
    source = "import a.b\nfrom c import d\nfrom . import e\ntry:\n import f\nexcept: pass\n"
    assert module_level_imports(ast.parse(source + "def g():\n import h\n")) == {"a", "c"}


def test_package_data_reach_a_wheel(tracked_files):
    globs = PYPROJECT["tool"]["setuptools"]["package-data"]["ar_jax"]
    data = [
        str(path.relative_to(ROOT / "ar_jax"))
        for path in tracked_files
        if path.is_relative_to(ROOT / "ar_jax") and path.suffix != ".py"
    ]
    lost = [name for name in data if not any(fnmatch.fnmatch(name, glob) for glob in globs)]
    assert lost == []
    package = importlib.resources.files("ar_jax")
    for name in data:
        assert package.joinpath(name).is_file(), name


@pytest.mark.parametrize("folder", ["data/embedded", "evaluation/weights"])
def test_package_data_are_there(folder):
    names = [entry.name for entry in importlib.resources.files("ar_jax").joinpath(folder).iterdir()]
    assert any(not name.startswith((".", "__")) for name in names)


def test_session_has_eight_devices_and_strict_broadcasting():
    assert len(jax.devices()) == 8
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_continuous_integration_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines.index("make lint") < lines.index("make test")
