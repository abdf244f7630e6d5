"""The floors of the house: which file may import which, how long it may be, its possible names.

Only `ast` reads the code, nothing is imported. Every checker is run on the repository, where it
must find nothing, and on a small synthetic tree, where it must find exactly what was planted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ar_jax"
CODE_FOLDERS = (PACKAGE, "configs", "experiments", "tests")
MAX_LINES = 400
VAGUE_WORDS = {"util", "utils", "common", "helper", "helpers", "misc"}

# A unit is a module or folder directly below ar_jax/. From top to bottom, a unit may import itself
# and what is listed here; experiments/ may import everything.
BASE = {"api", "schedules", "entities", "mask_rule", "nn"}
MODELS = {"tokenizers", "backbones", "heads"}
BUILT = BASE | MODELS | {"sampling", "objectives", "build"}
LEAVES = {"parallel", "data", "io"}
MAY_IMPORT: dict[str, set[str]] = {
    "train": BUILT | LEAVES | {"field_types", "evaluation"},
    "evaluation": BUILT | LEAVES,
    "compilation": BUILT | LEAVES | {"train"},
    "convert": BUILT | LEAVES | {"evaluation"},
    "build": (BUILT - {"build"}) | {"io", "axes", "consistency", "field_types"},
    "axes": BUILT - {"build"},
    "consistency": BASE | MODELS,
    "sampling": BASE,
    "objectives": BASE,
    **dict.fromkeys(MODELS, BASE),
    "api": {"schedules", "nn"},
    "nn": {"schedules", "api"},
    "entities": {"schedules"},
    "schedules": {"mask_rule"},
    "mask_rule": set(),
    "field_types": set(),
    **{leaf: set() for leaf in LEAVES},
}
# Only training knows the data, the mesh and the disk together.
KNOWS_ALL_LEAVES = "train"
# Schedules are static: they are hashed and compared outside of any trace.
NUMPY_ONLY = "schedules"
TRACED_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "chex", "orbax"}

TOP_LEVEL = {
    *(".ci", ".gitignore", ".gitattributes", "LICENSE", "Makefile", "README.md"),
    *("pyproject.toml", "ar_jax", "configs", "experiments", "tests", "docs"),
}


def python_files(root: Path, folders: Iterable[str] = CODE_FOLDERS) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def module_name(root: Path, path: Path) -> str:
    """Dotted name of a file; a package's `__init__.py` has the name of the package."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it, `a.b.c` for `from a.b import c`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ""
            name = function.id if isinstance(function, ast.Name) else name
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield str(argument.value)


def import_graph(root: Path) -> dict[str, set[str]]:
    """Module -> imported names: repository modules in full, other packages by their first word."""
    paths = {module_name(root, path): path for path in python_files(root)}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        graph[module] = set()
        for name in imported_names(path, module):
            # `from a.b import c`: the module a.b.c if there is one, else a.b holding an object c.
            parent = name.rpartition(".")[0]
            target = next((known for known in (name, parent) if known in paths), None)
            if target is None:
                inside = name.split(".")[0] in CODE_FOLDERS
                target = name if inside else name.split(".")[0]
            if target != module:
                graph[module].add(target)
    return graph


def unit(module: str) -> str:
    """Unit of a module of the package; '' for the package's own `__init__`."""
    return module.split(".")[1] if "." in module else ""


def wrong_arrows(root: Path) -> list[str]:
    """Imports inside the repository that the table of floors does not allow."""
    found = []
    for module, targets in import_graph(root).items():
        folder = module.split(".")[0]
        for target in sorted(targets):
            target_folder = target.split(".")[0]
            if target_folder not in CODE_FOLDERS:
                if module.startswith(f"{PACKAGE}.{NUMPY_ONLY}") and target in TRACED_LIBRARIES:
                    found.append(f"{module} -> {target}")
            elif folder != PACKAGE:
                # Tests see everything, experiments all but tests, configs only each other.
                sees = {"tests": set(CODE_FOLDERS), "experiments": set(CODE_FOLDERS) - {"tests"}}
                if target_folder not in sees.get(folder, {folder}):
                    found.append(f"{module} -> {target}")
            elif target_folder != PACKAGE or unit(target) not in {
                unit(module),
                *MAY_IMPORT.get(unit(module), set()),
            }:
                found.append(f"{module} -> {target}")
    return found


def all_leaves_together(root: Path) -> list[str]:
    """Units besides training that import data, parallel and io."""
    known: dict[str, set[str]] = {}
    for module, targets in import_graph(root).items():
        if module.split(".")[0] == PACKAGE:
            known.setdefault(unit(module), set()).update(map(unit, targets))
    return sorted(u for u, seen in known.items() if u != KNOWS_ALL_LEAVES and seen >= LEAVES)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a directed graph as a list of nodes, the first repeated last; [] if none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def unit_graph(root: Path) -> dict[str, set[str]]:
    """The import graph of the package with every unit drawn as one node."""
    units: dict[str, set[str]] = {}
    for module, targets in import_graph(root).items():
        if module.split(".")[0] == PACKAGE:
            inside = {unit(t) for t in targets if t.split(".")[0] == PACKAGE}
            units.setdefault(unit(module), set()).update(inside - {unit(module)})
    return units


def import_cycle(root: Path) -> list[str]:
    return cycle(import_graph(root))


def unit_cycle(root: Path) -> list[str]:
    return cycle(unit_graph(root))


def long_files(root: Path) -> list[str]:
    counts = {p: len(p.read_text().splitlines()) for p in python_files(root)}
    return [f"{p.relative_to(root)}: {n} lines" for p, n in counts.items() if n > MAX_LINES]


def vague_names(root: Path) -> list[str]:
    """Files and folders named after no subject, as `utils.py` or `loss_helpers/`."""
    found = set()
    for path in python_files(root):
        for part in path.relative_to(root).with_suffix("").parts:
            if VAGUE_WORDS & set(part.lower().split("_")):
                found.add(str(path.relative_to(root)))
    return sorted(found)


def unknown_units(root: Path) -> list[str]:
    """Python modules and folders of the package that no floor names."""
    modules = {module_name(root, path) for path in python_files(root, [PACKAGE])}
    return sorted({unit(module) for module in modules} - {"", *MAY_IMPORT})


def missing_inits(root: Path) -> list[str]:
    """Folders of the package with code but no `__init__.py`: they would be left out of a wheel."""
    folders = {path.parent for path in python_files(root, [PACKAGE])}
    return sorted(str(f.relative_to(root)) for f in folders if not (f / "__init__.py").exists())


CHECKS = [
    wrong_arrows,
    all_leaves_together,
    import_cycle,
    unit_cycle,
    long_files,
    vague_names,
    unknown_units,
    missing_inits,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_repository(check):
    assert check(ROOT) == []


def test_top_level_is_fixed(tracked_files):
    assert {path.relative_to(ROOT).parts[0] for path in tracked_files} <= TOP_LEVEL


def test_the_repository_is_seen():
    graph = import_graph(ROOT)
    assert PACKAGE in graph
    assert {unit(m) for m in graph if m.startswith(PACKAGE)} >= LEAVES
    assert "tests.test_architecture" in graph


def make_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.parents:
            if root in folder.parents and folder.relative_to(root).parts[0] == PACKAGE:
                (folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("files", "arrow"),
    [
        ({"nn/a.py": "import ar_jax.heads"}, "ar_jax.nn.a -> ar_jax.heads"),
        ({"heads/a.py": "from ..sampling import b"}, "ar_jax.heads.a -> ar_jax.sampling.b"),
        ({"heads/a.py": "import ar_jax.backbones.b"}, "ar_jax.heads.a -> ar_jax.backbones.b"),
        ({"sampling/a.py": "from ar_jax import build"}, "ar_jax.sampling.a -> ar_jax.build"),
        ({"build.py": "def f():\n  from .train import b"}, "ar_jax.build -> ar_jax.train.b"),
        ({"io/a.py": "from ar_jax import api"}, "ar_jax.io.a -> ar_jax.api"),
        ({"data/a.py": "from .. import io"}, "ar_jax.data.a -> ar_jax.io"),
        ({"evaluation/a.py": "import ar_jax.train.b"}, "ar_jax.evaluation.a -> ar_jax.train.b"),
        ({"convert/a.py": "import ar_jax.train.b"}, "ar_jax.convert.a -> ar_jax.train.b"),
        ({"schedules.py": "import jax.numpy as jnp"}, "ar_jax.schedules -> jax"),
        ({"__init__.py": "from . import api"}, "ar_jax -> ar_jax.api"),
        ({"api.py": "from experiments import a"}, "ar_jax.api -> experiments.a"),
        (
            {"train/a.py": "import importlib\nimportlib.import_module('configs.a')"},
            "ar_jax.train.a -> configs.a",
        ),
    ],
)
def test_wrong_arrow_is_found(tmp_path, files, arrow):
    targets = ["heads/__init__.py", "sampling/b.py", "backbones/b.py"]
    targets += ["train/b.py", "evaluation/b.py", "io/__init__.py", "api.py", "build.py"]
    tree = {f"{PACKAGE}/{name}": "" for name in targets}
    tree |= {"experiments/a.py": "", "configs/a.py": ""}
    make_tree(tmp_path, tree)
    assert wrong_arrows(tmp_path) == []
    make_tree(tmp_path, {f"{PACKAGE}/{name}": text for name, text in files.items()})
    assert wrong_arrows(tmp_path) == [arrow]


def test_configs_see_only_configs(tmp_path):
    make_tree(tmp_path, {"configs/b.py": "import ar_jax.api", "ar_jax/api.py": ""})
    make_tree(tmp_path, {"configs/a.py": "from configs import b\nimport ml_collections"})
    assert wrong_arrows(tmp_path) == ["configs.b -> ar_jax.api"]


def test_allowed_arrows_are_not_found(tmp_path):
    make_tree(
        tmp_path,
        {
            "ar_jax/schedules.py": "import numpy as np",
            "ar_jax/nn/a.py": "import jax\nfrom ar_jax import schedules",
            "ar_jax/heads/a.py": "from ..nn.a import f\nfrom . import b",
            "ar_jax/heads/b.py": "from ar_jax.schedules import raster",
            "ar_jax/io/a.py": "",
            "ar_jax/build.py": "from ar_jax.heads import a",
            "ar_jax/train/a.py": "from ar_jax import build\nfrom ar_jax.io import a",
            "experiments/a.py": "from ar_jax.train import a\nfrom experiments import b",
            "experiments/b.py": "import configs",
            "tests/test_a.py": "import ar_jax.train.a\nimport experiments.a",
        },
    )
    for check in CHECKS:
        assert check(tmp_path) == []


def test_all_leaves_together_is_found(tmp_path):
    text = "from ar_jax import data, io, parallel"
    files = {f"ar_jax/{leaf}/__init__.py": "" for leaf in LEAVES}
    make_tree(tmp_path, files | {"ar_jax/train/a.py": text, "ar_jax/evaluation/a.py": text})
    assert all_leaves_together(tmp_path) == ["evaluation"]


def test_cycle_is_found(tmp_path):
    make_tree(
        tmp_path,
        {
            "ar_jax/heads/a.py": "from .b import f",
            "ar_jax/heads/b.py": "def g():\n    from ar_jax.heads import c",
            "ar_jax/heads/c.py": "import ar_jax.heads.a",
        },
    )
    names = [f"ar_jax.heads.{x}" for x in "abca"]
    assert import_cycle(tmp_path) == names
    assert wrong_arrows(tmp_path) == []


def test_cycle_between_units_is_found(tmp_path):
    files = {"ar_jax/api.py": "from ar_jax.nn import a", "ar_jax/nn/a.py": ""}
    make_tree(tmp_path, files | {"ar_jax/nn/b.py": "from ar_jax import api"})
    assert import_cycle(tmp_path) == []
    assert unit_cycle(tmp_path) == ["api", "nn", "api"]


def test_long_file_is_found(tmp_path):
    make_tree(tmp_path, {"ar_jax/api.py": "\n" * MAX_LINES, "tests/a.py": "\n" * (MAX_LINES + 1)})
    assert long_files(tmp_path) == [f"tests/a.py: {MAX_LINES + 1} lines"]


@pytest.mark.parametrize("name", ["utils.py", "helpers/__init__.py", "loss_common.py", "Misc.py"])
def test_vague_name_is_found(tmp_path, name):
    make_tree(tmp_path, {"ar_jax/nn/commonest.py": "", f"ar_jax/nn/{name}": ""})
    assert vague_names(tmp_path) == [f"ar_jax/nn/{name}"]


def test_unknown_unit_and_missing_init_are_found(tmp_path):
    make_tree(tmp_path, {"ar_jax/extra/a.py": "", "ar_jax/more.py": "", "ar_jax/nn/a.py": ""})
    (tmp_path / "ar_jax/nn/__init__.py").unlink()
    assert unknown_units(tmp_path) == ["extra", "more"]
    assert missing_inits(tmp_path) == ["ar_jax/nn"]
