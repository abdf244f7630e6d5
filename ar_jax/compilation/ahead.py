"""A generator's train step or sampler, compiled for a TPU topology without its hardware."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh

from ar_jax.backbones.decoder import Decoder
from ar_jax.build import build_objective, build_sampling, create_sampler, trains_tokenizer
from ar_jax.compilation import estimate as figures
from ar_jax.compilation.analysis import analyse
from ar_jax.compilation.chips import Chip, find_chip
from ar_jax.compilation.overflow import DoesNotFit, advise, read_overflow
from ar_jax.compilation.phases import Phase, sample_phase, train_phase
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.parallel.mesh import batch_sharding, replicated, use_mesh
from ar_jax.parallel.rules import shardings
from ar_jax.sampling.loop import image_keys
from ar_jax.train.fields import Settings, read_settings
from ar_jax.train.program import build_program

INPUTS = ("codes", "images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is compiled, and for what: a topology and its chip, the checked configuration."""

    topology: str
    chip: Chip
    config: ml_collections.ConfigDict
    settings: Settings
    objective: Any


def prepare(
    config: ml_collections.ConfigDict,
    topology: str,
    batch_size: int | None = None,
    slices: int | None = None,
) -> Target:
    """The target of a configuration.

    Args:
        config: of a generator whose backbone is a decoder; the section data is not read.
        topology: of one slice: 'v5e:4x4' and the like.
        batch_size: images of a call, over all chips; None: config.train.batch_size.
        slices: of that topology, joined by DCN; None: config.mesh.slices, or 1.

    Raises:
        ValueError: a bad field or topology, or a system of another kind.
    """
    chip = find_chip(topology)
    config = ml_collections.ConfigDict(config.to_dict())
    if batch_size is not None:
        config.train.batch_size = batch_size
    if slices is not None:
        config.mesh.slices = slices
    check_is_compiled(config)
    settings = read_settings(config, topology_devices(topology, config.mesh.get("slices", 1)))
    if config.get("attention", "auto") == "auto":  # what a TPU would choose
        dropout = config.backbone.get("attention_dropout", 0.0)
        config.attention = "xla" if dropout else "splash"
    objective: Any = build_objective(config)
    assert isinstance(objective.system.backbone, Decoder)
    return Target(
        topology=topology, chip=chip, config=config, settings=settings, objective=objective
    )


def check_is_compiled(config: ml_collections.ConfigDict) -> None:
    """Checks that the configuration is of a kind that is compiled here.

    Raises:
        ValueError: it is not.
    """
    if trains_tokenizer(config) or config.backbone.name != "decoder":
        raise ValueError(
            "compile_ahead takes generators with config.backbone.name='decoder': tokenizers and "
            "other backbones have no FLOPs formula here"
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


def compile_train_step(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    batch_size: int | None = None,
    slices: int | None = None,
    inputs: str = "codes",
) -> dict[str, Any]:
    """What the compiler says of one train step of a generator.

    Args:
        config: see `prepare`, as for ``topology``, ``batch_size`` and ``slices``.
        inputs: 'codes' (cached) or 'images', which the tokenizer encodes inside the step; its
            FLOPs are not counted in model_flops.

    Returns:
        Plain numbers: 'memory' (bytes a chip), 'fits', 'model_flops' (of all chips), 'mfu' of the
        total time and 'mfu_with_collectives', 'rooflines' (seconds) and what
        `ar_jax.compilation.analysis.analyse` returns.

    Raises:
        DoesNotFit: the program needs more memory than a chip has.
        ValueError: a bad field, argument or topology.
    """
    if inputs not in INPUTS:
        raise ValueError(f"--inputs={inputs!r} is none of {INPUTS}")
    target = prepare(config, topology, batch_size, slices)
    settings, system = target.settings, target.objective.system
    program = build_program(
        target.objective,
        settings.optimizer,
        settings.mesh,
        seed=settings.seed,
        accumulation=settings.train.accumulation,
        ema_decay=settings.ema.decay,
        ema_warmup=settings.ema.warmup,
        place=lambda key, whole: jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
    )
    tokenizer = jax.eval_shape(lambda key: init_tokenizer(system, key), jax.random.key(0))
    frozen = _placed({"tokenizer": tokenizer}, settings.mesh)
    rows = settings.train.batch_size
    batch = jax.eval_shape(lambda: dict(system.backbone.conditioner.empty(rows)))
    if inputs == "codes":
        batch["codes"] = jax.ShapeDtypeStruct((rows, system.schedule.length), jnp.int32)
    else:
        batch["image"] = jax.ShapeDtypeStruct((rows, *system.tokenizer.image_shape), jnp.uint8)
    batch = _with_sharding(batch, program.rows)
    step: Any = program.train_step
    params = program.abstract.params
    compiled = _compile(target, lambda: step.lower(program.abstract, frozen, batch, program.key))
    report = {"program": "train", "inputs": inputs, "attention": target.config.attention}
    return report | _report(target, compiled, params, train_phase, passes=3)


def compile_sampler(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    batch_size: int | None = None,
    slices: int | None = None,
) -> dict[str, Any]:
    """What the compiler says of the program that draws the codes of a batch of images.

    The batch lies over slices, data and fsdp, the heads over tensor; guidance and filters are the
    config's. The attention of a cached step is XLA's; decoding of the codes is another program.

    Returns:
        As `compile_train_step`, which also says what the arguments are and what is raised.
    """
    target = prepare(config, topology, batch_size, slices)
    system, mesh = target.objective.system, target.settings.mesh
    rows = target.settings.train.batch_size
    knobs, guidance = build_sampling(target.config)
    made: list[Any] = []

    def unstacked(key: jax.Array) -> Any:
        params = {"tokenizer": init_tokenizer(system, key), **target.objective.init(key)}
        made.append(create_sampler(system, params))
        return made[-1].params

    params = _placed(jax.eval_shape(unstacked, jax.random.key(0)), mesh)
    sampler = dataclasses.replace(made[-1], params=params)
    spread = batch_sharding(mesh)
    cond = _with_sharding(jax.eval_shape(lambda: system.backbone.conditioner.empty(rows)), spread)
    keys = _with_sharding(jax.eval_shape(lambda: image_keys(0, 0, rows)), spread)
    lower, _ = sampler.program(cond, keys, knobs=knobs, guidance=guidance)
    # Knobs and scales are arrays of this machine: of them, too, the topology gets shapes alone.
    _, *arguments = lower.args
    abstract = [_on_mesh(argument, mesh) for argument in arguments]
    guided = lower.keywords["guided"]
    compiled = _compile(target, lambda: lower.func(sampler.system, *abstract, **lower.keywords))
    trained = {name: params[name] for name in ("backbone", "head")}
    report = {"program": "sample", "guided": guided, "attention": "xla (cached)"}
    return report | _report(target, compiled, trained, sample_phase, passes=2 if guided else 1)


def _with_sharding(tree: Any, sharding: Any) -> Any:
    """Shapes of ``tree`` that all lie as ``sharding`` says."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes of parameters where the rules put them."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(tree, mesh),
    )


def _on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes of ``tree``: arrays become whole copies on every device, shapes stay as they are."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    return jax.tree.map(one, tree)


def _compile(target: Target, lower: Any) -> Any:
    settings = target.settings
    with use_mesh(settings.mesh), jax.default_matmul_precision(settings.precision):
        lowered = lower()
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            advice = advise(target.objective.system.backbone.remat, dict(settings.mesh.shape))
            verdict = read_overflow(str(error), advice, lowered.as_text())
            if verdict is None:
                raise
            raise DoesNotFit(verdict) from error


def _report(
    target: Target, compiled: Any, params: Any, phase: Phase, *, passes: int
) -> dict[str, Any]:
    chip, system = target.chip, target.objective.system
    mesh, rows = target.settings.mesh, target.settings.train.batch_size
    devices, sizes = mesh.size, dict(mesh.shape)
    memory = _memory(compiled, chip)
    flops = figures.model_flops(params, system, rows, passes=passes)
    share = figures.visible_share(system.backbone.row_steps)
    found = analyse(compiled.as_text(), chip, target.topology, sizes, phase, share)
    seconds = found["seconds"]
    at_peak = flops / (devices * chip.peak)
    return {
        "topology": target.topology,
        "devices": devices,
        "mesh": sizes,
        "batch_size": rows,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "fits": memory["peak"] <= memory["capacity"],
        "memory": memory,
        "model_flops": flops,
        "model_flops_rule": figures.FLOPS_RULE,
        "mfu": at_peak / seconds["total"],
        "mfu_with_collectives": at_peak / seconds["with_collectives"],
        "rooflines": figures.rooflines(flops, memory, chip, devices),
        **found,
    }


def _memory(compiled: Any, chip: Chip) -> dict[str, int]:
    """Bytes of one chip; the peak is what is alive together at most by the compiler's plan."""
    plan = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    found = {name: int(getattr(plan, f"{name}_size_in_bytes")) for name in names}
    peak = sum(found.values()) - 2 * found["alias"]  # aliased outputs are the arguments
    return {**found, "peak": peak, "capacity": chip.capacity}
