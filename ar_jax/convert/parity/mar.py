"""MAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.convert import mar
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.heads.diffusion import TIME_FEATURES, DiffusionHead
from ar_jax.nn.diffusion import Diffusion, timestep_features
from ar_jax.objectives.masked import Masked, MaskedDraws, hide
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.refine import RefineNoise, RefineSampler
from ar_jax.tokenizers.kl import Posterior

INPUTS = (
    *("image", "latent", "labels", "orders", "mask_rate", "pmv_x", "train_t"),
    *("head_target", "head_z", "head_noise", "head_t", "head_loss_mask"),
    *("train_class_drop_uniform", "*_orders", "*_noise"),
)
NOT_APPLICABLE: dict[str, str] = {}
Outputs = Iterator[tuple[str, Any]]

# Official names of the schedules of guidance over the iterations.
GUIDANCE = {"linear": "linear_known", "constant": "constant"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    generator: Part

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

    @property
    def cond(self) -> dict[str, jax.Array]:
        """The labels."""
        return {"label": jnp.asarray(self["labels"], jnp.int32)}

    @property
    def rate(self) -> float:
        """The share of hidden codes, in float64 where the spec has it."""
        return float(self.case.spec["config"].get("mask_rate", self["mask_rate"]))

    @functools.cached_property
    def codes(self) -> jax.Array:
        """The recorded latent as codes [B, L, C]."""
        return self.ask("tokenizer", "patchify", channels_last(self["latent"]))

    def ask(self, part: str, method: str | None, *args: Any) -> Any:
        """What a method of the tokenizer, backbone or head gives, compiled."""
        module = getattr(self.system, part)
        apply = functools.partial(module.apply, method=method)
        return jax.jit(apply)({"params": self.params[part]}, *args)


def channels_last(array: Any) -> jax.Array:
    """NCHW -> NHWC."""
    return jnp.asarray(np.asarray(array).transpose(0, 2, 3, 1))


def channels_first(array: Any) -> np.ndarray:
    """NHWC -> NCHW."""
    return np.asarray(array).transpose(0, 3, 1, 2)


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    config = case.spec["config"]
    net, vae = config["mar"], config["vae"]
    # The latents' side is recorded; the autoencoder need not be of the transformer's image size.
    side = net["img_size"] // net["vae_stride"]
    levels = len(vae["ch_mult"])
    tokenizer = mar.tokenizer(
        case.shapes("vae"),
        dict(
            image_size=side * 2 ** (levels - 1),
            patch=net["patch_size"],
            channels=vae["ch"],
            multipliers=tuple(vae["ch_mult"]),
            encoder_blocks=vae["num_res_blocks"],
            decoder_blocks=vae["num_res_blocks"] + 1,
            code_width=vae["embed_dim"],
        ),
    )
    generator = mar.generator(
        case.shapes("mar"),
        dict(
            width=net["encoder_embed_dim"],
            depth=net["encoder_depth"],
            heads=net["encoder_num_heads"],
            decoder_width=net["decoder_embed_dim"],
            decoder_depth=net["decoder_depth"],
            decoder_heads=net["decoder_num_heads"],
            num_classes=net["class_num"],
            buffer=net["buffer_size"],
            code_width=net["vae_embed_dim"] * net["patch_size"] ** 2,
            attention_dropout=net["attn_dropout"],
            dropout=net["proj_dropout"],
            rate_min=net["mask_ratio_min"],
            repeats=net["diffusion_batch_mul"],
            label_dropout=net["label_drop_prob"],
            sampling_steps=net["num_sampling_steps"],
            iterations=1,
        ),
    )
    built = {"dtype": "float32", **tokenizer.section, **generator.section}
    params = case.params("mar", generator, empty_params(built, "generator"))
    params["tokenizer"] = case.params("vae", tokenizer, empty_params(built, "tokenizer"))
    return Model(case, build_system(built), params, generator)


def outputs(case: Case) -> Outputs:
    """(name, array) of every output of the case."""
    model = load(case)
    yield from _tokenizer(model)
    yield from _features(model)
    yield from _head(model)
    yield from _tables(model)
    for spacing in case.spec["config"]["respacings"]:
        if f"pmv_{spacing}_mean" in case.io:
            yield from _steps(model, spacing)
    for name in case.io:
        found = re.fullmatch(r"head_sample_(.+)_cfg([\d.]+)_temp([\d.]+)", name)
        if found:
            yield name, _head_sample(model, name, found[1], float(found[2]), float(found[3]))
    yield from _training(model)
    for sampler in case.spec["config"]["samplers"]:
        yield from _sampler(model, sampler)


def _tokenizer(model: Model) -> Outputs:
    tokenizer = model.system.tokenizer
    image = channels_last(model["image"])
    # Convolutions take any size: the module for the images of the case.
    autoencoder = tokenizer.autoencoder.clone(image_size=image.shape[1:3])
    apply = functools.partial(
        autoencoder.apply, {"params": model.params["tokenizer"]["autoencoder"]}
    )
    moments = jax.jit(functools.partial(apply, method="encode"))(image)
    decode = jax.jit(functools.partial(apply, method="decode"))
    posterior = Posterior.of(moments)
    sample = posterior.sample(channels_last(model["vae_sample_noise"]))
    yield "vae_moments", channels_first(moments)
    yield "vae_std", channels_first(posterior.std)
    yield "vae_kl", posterior.kl()
    yield "vae_sample", channels_first(sample)
    yield "vae_recon_from_mean", channels_first(decode(posterior.mean))
    yield "vae_recon_from_sample", channels_first(decode(sample))


def _features(model: Model) -> Outputs:
    codes, buffer = model.codes, model.system.backbone.buffer
    masked = hide(jnp.asarray(model["orders"]), model.rate)
    encoded = np.asarray(model.ask("backbone", "encode", codes, model.cond, ~masked))
    seen = [np.flatnonzero(~row) for row in np.asarray(masked)]
    rows = [np.concatenate([np.arange(buffer), buffer + index]) for index in seen]
    yield "patchified", codes
    yield "mask", masked.astype(jnp.float32)
    yield "encoder_features", np.stack([e[index] for e, index in zip(encoded, rows, strict=True)])
    yield "decoder_features", model.ask("backbone", None, codes, model.cond, ~masked)


def _head(model: Model) -> Outputs:
    target, noise, t = (jnp.asarray(model[f"head_{name}"]) for name in ("target", "noise", "t"))
    x = model.system.head.training.add_noise(target, t, noise)
    estimate, coefficient = model.ask("head", None, model["head_z"], x, t)
    mse, bound = model.ask("head", "loss", model["head_z"], target, t, noise)
    weights = model["head_loss_mask"]
    yield "head_x_t", x
    yield "head_time_embedding_input", timestep_features(t, TIME_FEATURES)
    yield "head_raw_output", jnp.concatenate([estimate, coefficient], axis=-1)
    yield "head_loss_mse", mse
    yield "head_loss_vb", bound
    yield "head_loss_loss", mse + bound
    yield "head_loss_masked_mean", ((mse + bound) * weights).sum() / weights.sum()


def _tables(model: Model) -> Outputs:
    training = model.system.head.training
    yield "f64_train_betas", training.betas
    yield "f64_train_alphas_cumprod", training.alpha_bars
    for name in model.case.io:
        if found := re.fullmatch(r"mask_len_L(\d+)_iter(\d+)", name):
            length, iterations = int(found[1]), int(found[2])
            yield name, _unknown(schedules.masked(grid=(1, length), iterations=iterations))
        elif found := re.fullmatch(r"timestep_map_(.+)", name):
            yield name, np.asarray(Diffusion.respaced(training.steps, found[1]).timesteps)
        elif found := re.fullmatch(r"f64_betas_(.+)", name):
            yield name, Diffusion.respaced(training.steps, found[1]).betas


def _unknown(schedule: schedules.Schedule) -> np.ndarray:
    """Codes that are unknown after every iteration; officially one still is after the last."""
    return np.maximum(schedule.length - np.cumsum(schedule.sizes), 1)


def _respaced(model: Model, spacing: str) -> DiffusionHead:
    return model.system.head.clone(sampling_steps=spacing)


def _steps(model: Model, spacing: str) -> Outputs:
    """One step of the respaced process at every index, from the same x."""
    process = _respaced(model, spacing).sampling
    x, z = jnp.asarray(model["pmv_x"]), jnp.asarray(model["head_z"])

    @jax.jit
    def one(params: Any, index: jax.Array, time: jax.Array) -> Any:
        estimate, coefficient = model.system.head.apply({"params": params}, z, x, time[None])
        return process.step(x, index[None], estimate, coefficient)

    params = model.params["head"]
    steps = [one(params, jnp.int32(i), jnp.int32(t)) for i, t in enumerate(process.timesteps)]
    yield f"pmv_{spacing}_mean", np.stack([step.mean for step in steps])
    yield f"pmv_{spacing}_log_variance", np.stack([step.log_variance for step in steps])
    yield f"pmv_{spacing}_pred_xstart", np.stack([step.clean for step in steps])


def _head_sample(model: Model, name: str, spacing: str, cfg: float, temperature: float) -> Any:
    head, params = _respaced(model, spacing), model.params["head"]
    z, start = jnp.asarray(model["head_z"]), jnp.asarray(model[f"{name}_init_noise"])
    noise = jnp.asarray(model[f"{name}_step_noise"])
    if len(start) == len(z):
        draw = jax.jit(functools.partial(head.draw, temperature=temperature))
        return draw(params, z, start, noise)
    half = len(start)
    draw = jax.jit(functools.partial(head.draw, scale=cfg, temperature=temperature))
    drawn = draw(params, z[:half], start, noise[:, :half], null=z[half:])

    # The official code carries the unconditional rows along, with the guided noise estimate and
    # their own variance; nothing uses them, but they are recorded.
    def predict(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.concatenate([x[:half], x[:half]])
        estimated: Any = head.apply({"params": params}, z, first, t[None])
        estimate, coefficient = estimated
        guided = head.guide(estimate[:half], estimate[half:], cfg)
        return jnp.concatenate([guided, guided]), coefficient

    both = jnp.concatenate([start, start])
    carried = jax.jit(lambda x: head.sampling.sample(predict, x, noise, temperature))(both)
    return jnp.concatenate([drawn, carried[half:]])


def _training(model: Model) -> Outputs:
    config, system = model.case.spec["config"]["mar"], model.system
    codes, repeats = model.codes, config["diffusion_batch_mul"]
    batch, length, width = codes.shape

    def rows(name: str, *last: int) -> jax.Array:
        """Recorded rows (repeat, image, position) -> [B, R, L, ...]."""
        recorded = model[name].reshape(repeats, batch, length, *last)
        return jnp.asarray(recorded.swapaxes(0, 1))

    draws = MaskedDraws(
        order=jnp.asarray(model["train_orders"], jnp.int32),
        rate=jnp.float32(model.rate),
        times=rows("train_t").astype(jnp.int32),
        noise=rows("train_noise", width),
    )
    dropped = jnp.asarray(model["train_class_drop_uniform"] < config["label_drop_prob"])
    cond = system.backbone.conditioner.null(model.cond, dropped)
    objective = Masked(system=system, rate_min=min(config["mask_ratio_min"], model.rate))
    trained = {name: model.params[name] for name in ("backbone", "head")}

    def loss(params: Any) -> jax.Array:
        return objective.loss_of(params, codes, cond, draws)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)

    def official(key: str) -> np.ndarray:
        return official_tensor(model.generator.places, gradient, key)

    norms = [np.linalg.norm(official(key)) for key in model.case.spec["train_grad_names"]]
    yield "train_loss", value
    yield "train_grad_norms", np.asarray(norms, np.float32)
    yield "train_grad_total_norm", np.float32(np.linalg.norm(norms))
    for name in model.case.io:
        if name.startswith("grad:"):
            yield name, official(name.removeprefix("grad:"))


def _sampler(model: Model, sampler: dict[str, Any]) -> Outputs:
    """A guided or plain run of all iterations, fed the recorded orders and noise."""
    tag, system = sampler["tag"], model.system
    grid = system.schedule.grids[0]
    schedule = schedules.masked(grid=grid, iterations=sampler["num_iter"])
    backbone = system.backbone.clone(schedule=schedule)
    head = _respaced(model, sampler["steps"])
    guidance = Guidance(scale=sampler["cfg"], kind=GUIDANCE[sampler["cfg_schedule"]])
    system = dataclasses.replace(system, schedule=schedule, backbone=backbone, head=head)
    noise, parts = _recorded_noise(model, tag, schedule, len(head.sampling.timesteps))
    cond = model.cond
    if sampler.get("labels", True) is None:
        cond = backbone.conditioner.null(cond)
    run = RefineSampler.create(system, model.params)
    keys = image_keys(0, 0, len(noise.order))  # not used: the noise is given
    knobs = Knobs(temperature=sampler["temperature"])
    drawn = run(cond, keys, knobs=knobs, guidance=guidance, noise=noise)
    codes, guided = np.asarray(drawn.codes), sampler["cfg"] != 1.0
    both = backbone.conditioner.null(cond)

    @jax.jit
    def hidden(params: Any, known: jax.Array, cond: Any) -> jax.Array:
        return backbone.apply({"params": params}, jnp.asarray(codes), cond, known)

    yield f"{tag}_tokens_per_iter", np.asarray(schedule.sizes)
    yield f"{tag}_cfg_per_iter", guidance.scales(schedule.num_steps, schedule.known)
    known = np.zeros(codes.shape[:2], bool)
    images = np.arange(len(codes))[:, None]
    for i, part in enumerate(parts):
        passes = (cond, both) if guided else (cond,)
        states = [hidden(model.params["backbone"], known, labels) for labels in passes]
        picked = [np.asarray(state)[images, part].reshape(-1, state.shape[-1]) for state in states]
        yield f"{tag}_iter{i}_z", np.concatenate(picked)
        yield f"{tag}_iter{i}_tokens", codes[images, part].reshape(-1, codes.shape[-1])
        known[images, part] = True
    latent = model.ask("tokenizer", "unpatchify", drawn.codes)
    yield f"{tag}_latent", channels_first(latent)


def _recorded_noise(
    model: Model, tag: str, schedule: schedules.Schedule, steps: int
) -> tuple[RefineNoise, list[np.ndarray]]:
    """Ours from the recorded draws, and the positions [B, n] that every iteration predicts.

    Official orders are revealed from their ends; the rows of an iteration are in (image, position)
    order, and guided ones are followed by as many that nothing uses.
    """
    orders = model[f"{tag}_orders"]
    batch, length = orders.shape
    parts, starts, later, end = [], [], [], length
    for i, size in enumerate(schedule.sizes):
        parts.append(np.sort(orders[:, end - size : end], axis=1))
        end -= size
        start = model[f"{tag}_iter{i}_init_noise"][: batch * size]
        noise = model[f"{tag}_iter{i}_step_noise"][:, : batch * size]
        starts.append(start.reshape(batch, size, -1))
        later.append(noise.reshape(steps, batch, size, -1))
    return RefineNoise(
        order=jnp.asarray(np.concatenate(parts, axis=1), jnp.int32),
        start=jnp.asarray(np.concatenate(starts, axis=1)),
        steps=jnp.asarray(np.concatenate(later, axis=2)),
    ), parts
