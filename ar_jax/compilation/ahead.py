"""A train step, a sampler or a decoder, compiled for a TPU topology without its hardware."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ar_jax.api import Params
from ar_jax.backbones.cross_decoder import CrossDecoder
from ar_jax.backbones.decoder import Decoder
from ar_jax.build import (
    build_objective,
    build_sampling,
    create_sampler,
    sampler_of,
    trains_tokenizer,
)
from ar_jax.compilation import estimate as figures
from ar_jax.compilation import products
from ar_jax.compilation.phases import decode_phase, sample_phase, train_phase
from ar_jax.compilation.target import (
    Target,
    compile_for,
    on_mesh,
    placed,
    prepare,
    report,
    with_sharding,
)
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.objectives.perceptual import frozen_shapes
from ar_jax.parallel.mesh import batch_sharding
from ar_jax.sampling import confidence, flow, loop, nested, refine
from ar_jax.sampling.confidence import ConfidenceSampler
from ar_jax.sampling.flow import FlowSampler
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.sampling.nested import NestedSampler
from ar_jax.sampling.refine import RefineSampler
from ar_jax.train.program import build_program

INPUTS = ("codes", "images")
DECODERS: dict[type, Any] = {
    CachedSampler: loop.decode_codes,
    RefineSampler: refine.decode_codes,
    ConfidenceSampler: loop.decode_codes,
    FlowSampler: refine.decode_codes,
    NestedSampler: loop.decode_codes,
}
# Programs of samplers that run rows more often than once, whose products are counted.
UNCACHED: dict[type, Any] = {
    RefineSampler: refine.draw_codes,
    ConfidenceSampler: confidence.draw_steps,
    FlowSampler: flow.draw_codes,
    NestedSampler: nested.draw_pixels,
}


def compile_train_step(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    batch_size: int | None = None,
    slices: int | None = None,
    inputs: str | None = None,
) -> dict[str, Any]:
    """What the compiler says of one train step of a generator or a tokenizer.

    Args:
        config: see `ar_jax.compilation.target.prepare`, as for ``topology``, ``batch_size`` and
            ``slices``.
        inputs: 'codes' (cached) or 'images', which a generator's tokenizer encodes inside the
            step; its FLOPs are not counted in model_flops. None: codes, images for a tokenizer.

    Returns:
        Plain numbers: 'memory' (bytes a chip), 'fits', 'model_flops' (of all chips, as
        'model_flops_rule' says), 'mfu' of the total time and 'mfu_with_collectives', 'rooflines'
        (seconds) and what `ar_jax.compilation.analysis.analyse` returns.

    Raises:
        DoesNotFit: the program needs more memory than a chip has.
        ValueError: a bad field, argument or topology.
    """
    inputs = check_inputs(config, inputs)
    target = prepare(config, topology, batch_size, slices, program="train")
    settings, mesh = target.settings, target.mesh
    program = build_program(
        target.objective,
        settings.optimizer,
        mesh,
        seed=settings.seed,
        accumulation=settings.train.accumulation,
        ema_decay=settings.ema.decay,
        ema_warmup=settings.ema.warmup,
        adversary_optimizer=settings.discriminator_optimizer,
        place=lambda key, whole: jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
    )
    frozen = placed(frozen_params(target.objective), mesh)
    batch = with_sharding(batch_shapes(target.objective, target.rows, inputs), program.rows)
    step: Any = program.train_step
    params = program.abstract.params
    compiled = compile_for(target, lambda: step.lower(program.abstract, frozen, batch, program.key))
    attention = "xla" if trains_tokenizer(config) else target.config.attention
    flops, rule = _train_flops(target, params)
    found = report(target, compiled, params, train_phase, flops, rule)
    return found | {"inputs": inputs, "attention": attention}


def check_inputs(config: ml_collections.ConfigDict, inputs: str | None) -> str:
    """What a train step of ``config`` reads: ``inputs``, or the default where it is None.

    Raises:
        ValueError: there are no such inputs.
    """
    if trains_tokenizer(config):
        if inputs == "codes":
            raise ValueError("--inputs='codes': a tokenizer trains on images")
        inputs = inputs or "images"
    inputs = inputs or "codes"
    if inputs not in INPUTS:
        raise ValueError(f"--inputs={inputs!r} is none of {INPUTS}")
    return inputs


def compile_sampler(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    batch_size: int | None = None,
    slices: int | None = None,
) -> dict[str, Any]:
    """What the compiler says of the program that draws the codes of a batch of images.

    The batch lies over slices, data and fsdp, the heads over tensor; guidance and filters are the
    config's. Cached steps of 128 rows and more attend by the kernel, see
    `ar_jax.nn.splash.attend_newest`; `compile_decoder` decodes the codes.

    Returns:
        As `compile_train_step`, which also says what the arguments are and what is raised.
    """
    target = prepare(config, topology, batch_size, slices, program="sample")
    system, mesh, rows = target.objective.system, target.mesh, target.rows
    knobs, guidance = build_sampling(target.config)
    made: list[Any] = []

    def unstacked(key: jax.Array) -> Any:
        params = {"tokenizer": init_tokenizer(system, key), **target.objective.init(key)}
        made.append(create_sampler(system, params))
        return made[-1].params

    params = placed(jax.eval_shape(unstacked, jax.random.key(0)), mesh)
    sampler = dataclasses.replace(made[-1], params=params)
    spread = batch_sharding(mesh)
    cond = with_sharding(jax.eval_shape(lambda: system.backbone.conditioner.empty(rows)), spread)
    keys = with_sharding(jax.eval_shape(lambda: image_keys(0, 0, rows)), spread)
    lower, _ = sampler.program(cond, keys, knobs=knobs, guidance=guidance)
    # Knobs and scales are arrays of this machine: of them, too, the topology gets shapes alone.
    _, *arguments = lower.args
    abstract = [on_mesh(argument, mesh) for argument in arguments]
    guided = lower.keywords["guided"]
    compiled = compile_for(target, lambda: lower.func(sampler.system, *abstract, **lower.keywords))
    trained = {name: params[name] for name in ("backbone", "head")}
    if isinstance(sampler, CachedSampler):
        passes = 2 if guided else 1
        flops = figures.model_flops(trained, sampler.system, rows, passes=passes)
        rule, attention = figures.FLOPS_RULE, f"{target.config.attention} (cached)"
    else:
        backbone = sampler.system.backbone.clone(attention="xla")  # a kernel hides its products
        counted = dataclasses.replace(sampler.system, backbone=backbone)
        draw = functools.partial(UNCACHED[type(sampler)], counted, **lower.keywords)
        flops = products.count_products(draw, *arguments)
        cached = isinstance(sampler, FlowSampler)
        rule, attention = products.CALL_RULE, "xla (cached)" if cached else target.config.attention
    found = report(target, compiled, trained, sample_phase, flops, rule)
    return found | {"guided": guided, "attention": attention}


def compile_decoder(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    batch_size: int | None = None,
    slices: int | None = None,
) -> dict[str, Any]:
    """What the compiler says of the program that decodes the codes of a batch into images.

    It is the one that follows the sampler's, with the generator's tokenizer, which computes in
    float32; the batch lies over slices, data and fsdp.

    Returns:
        As `compile_train_step`, which also says what the arguments are and what is raised.
    """
    target = prepare(config, topology, batch_size, slices, program="decode")
    system, mesh = target.objective.system, target.mesh
    params = placed(frozen_params(target.objective), mesh)["tokenizer"]
    shape = (target.rows, *system.tokenizer.codes_shape)
    dtype = system.tokenizer.codes_dtype
    codes = jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
    decode = DECODERS[sampler_of(system)]
    compiled = compile_for(target, lambda: decode.lower(system, params, codes, None))
    flops = products.count_products(lambda *arrays: decode(system, *arrays, None), params, codes)
    found = report(target, compiled, params, decode_phase, flops, products.CALL_RULE)
    return found | {"attention": "xla"}


def frozen_params(objective: Any) -> Params:
    """Shapes of the parameters that the objective is given and does not train."""
    if not hasattr(objective, "system"):
        return frozen_shapes(objective)
    tokenizer = jax.eval_shape(lambda key: init_tokenizer(objective.system, key), jax.random.key(0))
    return {"tokenizer": tokenizer}


def batch_shapes(objective: Any, rows: int, inputs: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a train step reads."""
    system = getattr(objective, "system", None)
    batch, tokenizer = {}, objective.tokenizer if system is None else system.tokenizer
    if system is not None:
        batch = jax.eval_shape(lambda: dict(system.backbone.conditioner.empty(rows)))
    if inputs == "images":
        image = jax.ShapeDtypeStruct((rows, *tokenizer.image_shape), jnp.uint8)
        return {**batch, "image": image}
    codes = jax.ShapeDtypeStruct((rows, *tokenizer.encoding_shape), tokenizer.codes_dtype)
    return {**batch, "codes": codes}


def _train_flops(target: Target, params: Any) -> tuple[float, str]:
    """(FLOPs of a step over all chips, how they are counted)."""
    objective, tokenizer = target.objective, trains_tokenizer(target.config)
    plain = not tokenizer and isinstance(objective.system.backbone, Decoder | CrossDecoder)
    if plain and sampler_of(objective.system) is CachedSampler:
        flops = figures.model_flops(params, objective.system, target.rows)
        return flops, figures.FLOPS_RULE
    counted = _countable(target)

    def loss(*arguments: Any) -> jax.Array:
        return counted.loss(*arguments, True)[0]

    arguments = (
        *(params, jax.eval_shape(objective.init_stats, params), frozen_params(objective)),
        *(batch_shapes(objective, target.rows, "images" if tokenizer else "codes"),),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    return 3 * products.count_products(loss, *arguments), products.TRAINING_RULE


def _countable(target: Target) -> Any:
    """The objective with attention by XLA: a kernel hides its products."""
    config = ml_collections.ConfigDict(target.config.to_dict())
    config.attention = "xla"
    return build_objective(config)
