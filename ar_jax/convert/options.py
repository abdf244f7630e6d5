"""What is said beside the files: options, which a configuration gives too, and what came of them.

An option is a field of a section under its bare name ('heads', 'norm_epsilon', 'l2_norm'), or
'downsample', image pixels that a code spans. A family takes those that its files cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ar_jax.build import build_tokenizer
from ar_jax.schedules import as_grids

SECTIONS = ("tokenizer", "schedule", "backbone", "head", "objective", "sampling")


def tokenizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration under the names of options."""
    section = dict(config["tokenizer"])
    return {**section, **dict(section.pop("autoencoder", {}))}


def generator_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration under the names of options.

    Raises:
        ValueError: it is of a tokenizer.
    """
    if "backbone" not in config:
        raise ValueError("the configuration is of a tokenizer: it has no section 'backbone'")
    options = {**config["schedule"], **config["backbone"], **config["objective"]}
    return options | {"image_size": tokenizer_options(config)["image_size"]}


def downsample(section: Mapping[str, Any]) -> int:
    """Pixels that a code spans, of a tokenizer."""
    built = build_tokenizer({"dtype": "float32", **section})
    return built.image_shape[0] // built.grids[-1][0]


def check_options(options: Mapping[str, Any] | None, config: Mapping[str, Any]) -> None:
    """Checks that every option came true in the configuration that was made with it.

    An option is the name of a field, or its path where several have that name.

    Raises:
        ValueError: names an option that is no field, or one whose value no field of its name has,
            with what they have instead.
    """
    fields = _fields({name: config.get(name, {}) for name in SECTIONS})
    for path, value in [item for places in fields.values() for item in places.items()]:
        fields.setdefault(path, {path: value})
    fields["downsample"] = {"the tokenizer's downsampling": downsample(config)}
    for name, value in (options or {}).items():
        if name not in fields:
            raise ValueError(f"option {name}={value!r} is unknown; there are {sorted(fields)}")
        if not any(_same(name, value, found) for found in fields[name].values()):
            found = " and ".join(f"{path} is {found!r}" for path, found in fields[name].items())
            raise ValueError(
                f"option {name}={value!r} cannot be taken: {found}, as the files, --config or the "
                "official code say"
            )


def _fields(section: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Bare name -> where in the sections it is -> value; guidance stands for its scale."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in section.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            for inner, places in _fields(value, f"{path}.").items():
                found.setdefault(inner, {}).update(places)
            if "scale" in value:
                found.setdefault(name, {})[f"{path}.scale"] = value["scale"]
        else:
            found.setdefault(name, {})[path] = value
    return found


def _same(name: str, said: Any, found: Any) -> bool:
    """Whether a field has what was said, perhaps in another form: (16, 16) for 16, 9 for '9'."""
    if name in ("grid", "image_size"):
        return as_grids([said]) == as_grids([found])
    if name == "scales":
        return as_grids(said) == as_grids(found)
    if isinstance(found, list | tuple):
        return isinstance(said, list | tuple) and tuple(said) == tuple(found)
    return said == found or (isinstance(found, str) and str(said) == found)
