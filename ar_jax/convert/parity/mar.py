"""MAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import build_tokenizer
from ar_jax.convert import mar
from ar_jax.convert.parity import masked_sets
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.masked_sets import Model, channels_last
from ar_jax.convert.parity.readings import nchw, said
from ar_jax.convert.part import empty_params
from ar_jax.heads.diffusion import TIME_FEATURES, DiffusionHead
from ar_jax.mask_rule import MaskRule
from ar_jax.nn.diffusion import Diffusion, timestep_features
from ar_jax.tokenizers.kl import Posterior

NOT_APPLICABLE: dict[str, str] = {}
ADDED = 1e-5  # to ten times what was measured: "plus 1e-5 relative"
SUMS = {"vae_kl": "vae_moments", "train_loss": "head_raw_output"}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    runs = [sampler["tag"] for sampler in masked_sets.samplers(case)]
    return (
        *("image", "vae_sample_noise", "latent", "labels", "orders", "mask_rate", "pmv_x"),
        *("head_target", "head_z", "head_noise", "head_t", "head_loss_mask"),
        *("train_orders", "train_class_drop_uniform", "train_t", "train_noise"),
        *("head_sample_*_init_noise", "head_sample_*_step_noise"),
        *(f"{run}_orders" for run in runs),
        *(f"{run}_iter*_{noise}_noise" for run in runs for noise in ("init", "step")),
    )


def summarised(name: str) -> str | None:
    """The array whose mean or sum a loss is."""
    return "head_raw_output" if name.startswith("head_loss_") else SUMS.get(name)


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    model = functools.cache(functools.partial(load, case))
    yield Section(("vae_*",), functools.partial(_autoencoder, case))
    yield Section(("patchified",), lambda: [("patchified", model().codes)])
    yield Section(("mask",), with_model(masked_sets.mask, model))
    yield Section(("encoder_features", "decoder_features"), with_model(_features, model))
    yield Section(("head_x_t", "head_raw_output", "head_loss_*"), with_model(_head, model))
    yield Section(("head_time_embedding_input",), functools.partial(_time, case))
    yield Section(("f64_*", "timestep_map_*"), functools.partial(_tables, case))
    yield Section(("mask_len_*",), functools.partial(_lengths, case))
    spacings = case.names("pmv_(.+)_(?:mean|log_variance|pred_xstart)")
    for spacing in dict.fromkeys(found[1] for _, found in spacings):
        outputs = tuple(f"pmv_{spacing}_{of}" for of in ("mean", "log_variance", "pred_xstart"))
        yield Section(outputs, with_model(_steps, model, spacing))
    for name, found in case.names(r"head_sample_(.+)_cfg([\d.]+)_temp([\d.]+)"):
        how = name, found[1], float(found[2]), float(found[3])
        yield Section((name,), with_model(_head_sample, model, *how))
    yield Section(("train_*", "grad:*"), with_model(_training, model))
    for sampler in masked_sets.samplers(case):
        yield Section((f"{sampler['tag']}_*",), with_model(_sampling, model, sampler))


def respaced(model: Model, spacing: str) -> DiffusionHead:
    """The head that samples with other steps."""
    return model.system.head.clone(sampling_steps=spacing)


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    net = case.config("mar")
    options = said(
        net,
        width="encoder_embed_dim",
        depth="encoder_depth",
        heads="encoder_num_heads",
        decoder_width="decoder_embed_dim",
        decoder_depth="decoder_depth",
        decoder_heads="decoder_num_heads",
        mlp_ratio="mlp_ratio",
        num_classes="class_num",
        buffer="buffer_size",
        attention_dropout="attn_dropout",
        dropout="proj_dropout",
        rate_min="mask_ratio_min",
        repeats="diffusion_batch_mul",
        label_dropout="label_drop_prob",
    )
    patch = net.get("patch_size", 1)
    if "vae_embed_dim" in net:
        options["code_width"] = net["vae_embed_dim"] * patch**2
    # Officially no spacing at all means every step.
    options["sampling_steps"] = net.get("num_sampling_steps") or str(DiffusionHead.steps)
    generator = mar.generator(case.shapes("mar"), options | {"iterations": 1})
    return Model.load(case, "mar", generator, patch)


def _autoencoder(case: Case) -> Outputs:
    image = channels_last(case["image"])
    options = said(
        case.config("vae"),
        channels="ch",
        multipliers="ch_mult",
        encoder_blocks="num_res_blocks",
        code_width="embed_dim",
    )
    if "encoder_blocks" in options:
        options["decoder_blocks"] = options["encoder_blocks"] + 1
    part = mar.tokenizer(case.shapes("vae"), options | {"image_size": image.shape[1:3]})
    built = {"dtype": "float32", **part.section}
    params = case.params("vae", part, empty_params(built, "tokenizer"))
    tokenizer: Any = build_tokenizer(built)
    apply = functools.partial(tokenizer.autoencoder.apply, {"params": params["autoencoder"]})
    moments = jax.jit(functools.partial(apply, method="encode"))(image)
    decode = jax.jit(functools.partial(apply, method="decode"))
    posterior = Posterior.of(moments)
    yield "vae_moments", nchw(moments)
    yield "vae_std", nchw(posterior.std)
    yield "vae_kl", posterior.kl()
    yield "vae_recon_from_mean", nchw(decode(posterior.mean))
    if {"vae_sample", "vae_recon_from_sample"} & case.io.keys():
        sample = posterior.sample(channels_last(case["vae_sample_noise"]))
        yield "vae_sample", nchw(sample)
        yield "vae_recon_from_sample", nchw(decode(sample))


def _features(model: Model) -> Outputs:
    codes, buffer = model.codes, model.system.backbone.buffer
    masked = model.hidden
    encoded = np.asarray(model.ask("backbone", "encode", codes, model.cond, ~masked))
    seen = [np.flatnonzero(~row) for row in np.asarray(masked)]
    rows = [np.concatenate([np.arange(buffer), buffer + index]) for index in seen]
    yield "encoder_features", np.stack([e[index] for e, index in zip(encoded, rows, strict=True)])
    yield "decoder_features", model.ask("backbone", None, codes, model.cond, ~masked)


def _head(model: Model) -> Outputs:
    target, noise = jnp.asarray(model["head_target"]), jnp.asarray(model["head_noise"])
    t = jnp.asarray(model["head_t"], jnp.int32)
    x = model.system.head.training.add_noise(target, t, noise)
    yield "head_x_t", x
    estimate, coefficient = model.ask("head", None, model["head_z"], x, t)
    yield "head_raw_output", jnp.concatenate([estimate, coefficient], axis=-1)
    draws = {"times": t, "noise": noise}
    loss, parts = model.ask("head", "loss", model["head_z"], target, draws)
    yield "head_loss_mse", parts["noise_error"]
    yield "head_loss_vb", parts["bound_bits"]
    yield "head_loss_loss", loss
    if "head_loss_masked_mean" in model.case.io:
        weights = model["head_loss_mask"]
        yield "head_loss_masked_mean", (loss * weights).sum() / weights.sum()


def _time(case: Case) -> Outputs:
    times = jnp.asarray(case["head_t"], jnp.int32)
    yield "head_time_embedding_input", timestep_features(times, TIME_FEATURES)


def _tables(case: Case) -> Outputs:
    training = Diffusion.training(DiffusionHead.steps)
    yield "f64_train_betas", training.betas
    yield "f64_train_alphas_cumprod", training.alpha_bars
    for name, found in case.names("(f64_betas|timestep_map)_(.+)"):
        process = Diffusion.respaced(training.steps, found[2])
        table = found[1] == "timestep_map"
        yield name, np.asarray(process.timesteps) if table else process.betas


def _lengths(case: Case) -> Outputs:
    for name, found in case.names(r"mask_len_L(\d+)_iter(\d+)"):
        yield name, MaskRule().lengths(int(found[1]), int(found[2]))


def _steps(model: Model, spacing: str) -> Outputs:
    """One step of the respaced process at every index, from the same x."""
    process = respaced(model, spacing).sampling
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


def _head_sample(model: Model, name: str, spacing: str, cfg: float, temperature: float) -> Outputs:
    """Codes of the head alone, rows of the conditional and of the unconditional half."""
    head, params = respaced(model, spacing), model.params["head"]
    z, start = jnp.asarray(model["head_z"]), jnp.asarray(model[f"{name}_init_noise"])
    noise = jnp.asarray(model[f"{name}_step_noise"])
    half = len(start)
    rows = {"start": start, "steps": noise[:, :half].swapaxes(0, 1)}
    if half == len(z):
        draw = jax.jit(functools.partial(head.draw, temperature=temperature))
        yield name, draw(params, z, rows)
        return
    draw = jax.jit(functools.partial(head.draw, scale=cfg, temperature=temperature))
    drawn = draw(params, z[:half], rows, null=z[half:])

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
    yield name, jnp.concatenate([drawn, carried[half:]])


def _training(model: Model) -> Outputs:
    width = model.codes.shape[-1]
    draws = {
        "times": model.rows("train_t").astype(jnp.int32),
        "noise": model.rows("train_noise", width),
    }
    return masked_sets.training(model, model.case.config("mar"), draws)


def _sampling(model: Model, sampler: dict[str, Any]) -> Outputs:
    head = respaced(model, sampler["steps"]) if "steps" in sampler else model.system.head

    def read(start: str, rows: int) -> dict[str, np.ndarray]:
        steps = model[f"{start}_step_noise"][:, :rows]
        return {"start": model[f"{start}_init_noise"][:rows], "steps": steps.swapaxes(0, 1)}

    return masked_sets.sampling(model, sampler, head, read)
