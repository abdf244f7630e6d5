"""What is compiled: a configuration checked for a program and a topology, and its report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from ar_jax.build import build_objective, sampler_of, trains_tokenizer
from ar_jax.compilation import estimate as figures
from ar_jax.compilation.analysis import analyse
from ar_jax.compilation.chips import Chip, find_chip
from ar_jax.compilation.overflow import DoesNotFit, advise, read_overflow
from ar_jax.compilation.phases import Phase
from ar_jax.parallel.mesh import replicated, use_mesh
from ar_jax.parallel.rules import shardings
from ar_jax.sampling.loop import CachedSampler
from ar_jax.train.fields import Settings, read_settings

PROGRAMS = ("train", "sample", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is compiled, and for what: a topology and its chip, the checked configuration."""

    program: str
    topology: str
    chip: Chip
    config: ml_collections.ConfigDict
    settings: Settings
    objective: Any

    @property
    def rows(self) -> int:
        """Images of a call, over all chips."""
        return self.settings.train.batch_size

    @property
    def mesh(self) -> Mesh:
        """Of the topology's devices."""
        return self.settings.mesh

    @property
    def remat(self) -> str | None:
        """config.backbone.remat; None where there is nothing to rematerialise."""
        if self.program != "train" or trains_tokenizer(self.config):
            return None
        return self.objective.system.backbone.remat


def prepare(
    config: ml_collections.ConfigDict,
    topology: str,
    batch_size: int | None = None,
    slices: int | None = None,
    *,
    program: str,
) -> Target:
    """The target of a configuration.

    Args:
        config: the section data is not read.
        topology: of one slice: 'v5e:4x4' and the like.
        batch_size: images of a call, over all chips; None: config.train.batch_size.
        slices: of that topology, joined by DCN; None: config.mesh.slices, or 1.
        program: one of `PROGRAMS`.

    Raises:
        ValueError: a bad field or topology, or a system that has no such program.
    """
    chip = find_chip(topology)
    config = ml_collections.ConfigDict(config.to_dict())
    if batch_size is not None:
        config.train.batch_size = batch_size
    if slices is not None:
        config.mesh.slices = slices
    check_program(config, program)
    settings = read_settings(config, topology_devices(topology, config.mesh.get("slices", 1)))
    if not trains_tokenizer(config):
        if program != "train" and config.backbone.get("attention_dropout", 0.0):
            config.backbone.attention_dropout = 0.0  # training alone drops, and it bars the kernel
        if config.get("attention", "auto") == "auto":  # what a TPU would choose
            dropout = config.backbone.get("attention_dropout", 0.0)
            config.attention = "xla" if dropout else "splash"
    return Target(
        program=program,
        topology=topology,
        chip=chip,
        config=config,
        settings=settings,
        objective=build_objective(config),
    )


def check_program(config: ml_collections.ConfigDict, program: str) -> None:
    """Checks that there is such a program of the configuration's system.

    Raises:
        ValueError: there is not.
    """
    if program not in PROGRAMS:
        raise ValueError(f"--program={program!r} is none of {PROGRAMS}")
    if program != "train" and trains_tokenizer(config):
        raise ValueError(
            f"--program={program} is of generators, but config.objective.name="
            f"{config.objective.name!r} trains a tokenizer: of it there is --program=train, and "
            "a generator's --program=decode runs its decoder"
        )


def topology_devices(topology: str, slices: int) -> list[jax.Device]:
    """Chips of ``slices`` times the topology.

    Raises:
        ValueError: there is no such number of slices.
    """
    if slices < 1:
        raise ValueError(
            f"config.mesh.slices={slices} is not a number of slices: use 1, or as many of "
            f"{topology} as there are"
        )
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=slices
    ).devices


def with_sharding(tree: Any, sharding: Any) -> Any:
    """Shapes of ``tree`` that all lie as ``sharding`` says."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes of parameters where the rules put them."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(tree, mesh),
    )


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes of ``tree``: arrays become whole copies on every device, shapes stay as they are."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    return jax.tree.map(one, tree)


def compile_for(target: Target, lower: Callable[[], Any]) -> Any:
    """The compiled program that ``lower`` lowers.

    Raises:
        DoesNotFit: it needs more memory than a chip has.
    """
    settings = target.settings
    with use_mesh(settings.mesh), jax.default_matmul_precision(settings.precision):
        lowered = lower()
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            sizes, trains = dict(settings.mesh.shape), target.program == "train"
            advice = advise(target.remat, sizes, accumulates=trains)
            verdict = read_overflow(str(error), advice, lowered.as_text())
            if verdict is None:
                raise
            raise DoesNotFit(verdict) from error


def report(
    target: Target, compiled: Any, params: Any, phase: Phase, flops: float, rule: str
) -> dict[str, Any]:
    """What the compiler says of a program.

    Args:
        params: whose numbers are counted.
        phase: see `ar_jax.compilation.analysis.analyse`.
        flops: of the model, of one call over all chips; ``rule`` says how they are counted.

    Returns:
        See `ar_jax.compilation.ahead.compile_train_step`.
    """
    chip, mesh = target.chip, target.mesh
    devices, sizes = mesh.size, dict(mesh.shape)
    memory = _memory(compiled, chip)
    share = _visible_share(target)
    found = analyse(compiled.as_text(), chip, target.topology, sizes, phase, share)
    seconds = found["seconds"]
    at_peak = flops / (devices * chip.peak)
    return {
        "program": target.program,
        "topology": target.topology,
        "devices": devices,
        "mesh": sizes,
        "batch_size": target.rows,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "fits": memory["peak"] <= memory["capacity"],
        "memory": memory,
        "model_flops": flops,
        "model_flops_rule": rule,
        "mfu": at_peak / seconds["total"],
        "mfu_with_collectives": at_peak / seconds["with_collectives"],
        "rooflines": figures.rooflines(flops, memory, chip, devices),
        **found,
    }


def _visible_share(target: Target) -> float:
    """Share of the attention kernel's blocks that are computed; all where no step hides any."""
    system = getattr(target.objective, "system", None)
    steps = getattr(system and system.backbone, "row_steps", None)
    if target.program == "sample" and system is not None and sampler_of(system) is CachedSampler:
        return 1.0  # a cached step's kernel gets what it sees and no more
    return 1.0 if steps is None else figures.visible_share(steps)


def _memory(compiled: Any, chip: Chip) -> dict[str, int]:
    """Bytes of one chip; the peak is what is alive together at most by the compiler's plan."""
    plan = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    found = {name: int(getattr(plan, f"{name}_size_in_bytes")) for name in names}
    peak = sum(found.values()) - 2 * found["alias"]  # aliased outputs are the arguments
    return {**found, "peak": peak, "capacity": chip.capacity}
