"""Trained tokenizers and generators from their workdirs, and the images behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ar_jax.api import Objective, Params, System
from ar_jax.build import AnyTokenizer, build_objective, build_tokenizer, trains_tokenizer
from ar_jax.data import CodesSource, open_source
from ar_jax.io.checkpoint import list_steps, load_params, load_system_params
from ar_jax.io.run_info import read_config
from ar_jax.objectives.likelihood import init_tokenizer

CODES = "codes:"


def load_tokenizer(
    workdir: str | Path, which: str = "auto", step: int | None = None
) -> tuple[ml_collections.ConfigDict, AnyTokenizer, Params]:
    """A trained tokenizer.

    Args:
        workdir: of a run that trained one.
        which: 'ema', 'params', or 'auto': the EMA if the run keeps one.
        step: None for the newest checkpoint.

    Returns:
        (configuration, module computing in float32, parameters as a dict tree of float32 arrays).

    Raises:
        ValueError: no such run or checkpoint, a generator's workdir, parameters of another shape.
    """
    config = read_config(workdir)
    objective = _read_objective(config, workdir)
    if not trains_tokenizer(config):
        raise ValueError(
            f"{workdir} holds a generator (config.objective.name={config['objective']['name']!r}): "
            "name the workdir of a tokenizer"
        )
    params = load_params(workdir, which, step)
    _check_shapes(params, jax.eval_shape(objective.init, jax.random.key(0)), workdir)
    return config, build_tokenizer(config, jnp.float32), params


def load_system(
    workdir: str | Path, which: str = "auto", step: int | None = None
) -> tuple[ml_collections.ConfigDict, System, Params]:
    """A trained generator with the tokenizer kept in its workdir.

    Args: as of `load_tokenizer`.

    Returns:
        (configuration, system, parameters ``{'tokenizer', 'backbone', 'head'}``).

    Raises:
        ValueError: no such run or checkpoint, a tokenizer's workdir, parameters of another shape.
    """
    config = read_config(workdir)
    objective = _read_objective(config, workdir)
    if trains_tokenizer(config):
        raise ValueError(
            f"{workdir} holds a tokenizer (config.objective.name='tokenizer'), which generates "
            "nothing by itself: name the workdir of a generator trained on its codes"
        )
    system = objective.system
    params = load_system_params(workdir, which, step)
    shapes = jax.eval_shape(
        lambda key: {"tokenizer": init_tokenizer(system, key), **objective.init(key)},
        jax.random.key(0),
    )
    _check_shapes(params, shapes, workdir)
    return config, system, params


def describe_weights(workdir: str | Path, config: Any, step: int | None = None) -> str:
    """Which parameters `which='auto'` loads, for reports: 'EMA parameters of step 700'."""
    kind = "EMA parameters" if config["ema"]["decay"] > 0 else "parameters"
    return f"{kind} of step {list_steps(workdir)[-1] if step is None else step:,}"


def image_section(config: Any, source: str | None = None) -> dict[str, Any]:
    """The section `config.data` of the images behind a run, also of one that trained on codes.

    Args:
        config: of the run.
        source: replaces the section's source; a `codes:` directory stands for itself then.

    Raises:
        ValueError: cached codes that do not say which images they were made of.
    """
    section = dict(config["data"])
    if section["source"].startswith(CODES) and not (source or "").startswith(CODES):
        codes = open_source(section["source"], "train")
        assert isinstance(codes, CodesSource)
        made_of = codes.tokenizer.get("data")
        if made_of is not None:
            section = dict(made_of)
        elif source is None:
            raise ValueError(
                f"{codes.name} does not say which images it was made of: name them with --source, "
                f"or --source={section['source']} to do without images"
            )
    if source is not None:
        section["source"] = source
        if source.startswith(CODES):
            section |= {"crop": "none", "flip": False}
    return section


def _read_objective(config: Any, workdir: str | Path) -> Any:
    if "objective" not in config:
        raise ValueError(f"{workdir}: config.json has no section 'objective'; is it a run's?")
    objective: Objective = build_objective(config)
    return objective


def _check_shapes(params: Params, expected: Params, workdir: str | Path) -> None:
    found = jax.tree.map(lambda leaf: leaf.shape, params)
    if found != jax.tree.map(lambda leaf: leaf.shape, expected):
        raise ValueError(
            f"{workdir}: the saved parameters do not have the names and shapes of its config.json; "
            "was it trained by another version?"
        )
