"""EAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert import ear
from ar_jax.convert.parity import masked_sets
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.masked_sets import Model
from ar_jax.convert.parity.readings import said

NOT_APPLICABLE: dict[str, str] = {}
ADDED = 1e-5  # to ten times what was measured: "plus 1e-5 relative"
HALF = np.float32(0.5)  # what the official code subtracts from uniform draws
NUMBER = r"([\d.]+)"


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    runs = [sampler["tag"] for sampler in masked_sets.samplers(case)]
    return (
        *("latent", "labels", "orders", "mask_rate"),
        *("head_z", "head_target", "head_noise", "head_loss_mask"),
        *("train_orders", "train_class_drop_uniform", "train_uniform", "head_sample_*_uniform"),
        *(f"{run}_orders" for run in runs),
        *(f"{run}_iter*_uniform" for run in runs),
    )


def summarised(name: str) -> str | None:
    """The array whose mean or sum a loss is."""
    return "head_output_train_temp1" if name.startswith("head_loss_") else None


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    model = functools.cache(functools.partial(load, case))
    yield Section(("mask",), with_model(masked_sets.mask, model))
    yield Section(("decoder_features",), with_model(_features, model))
    yield Section(("head_output_*",), with_model(_outputs, model))
    yield Section(("head_loss_*",), with_model(_losses, model))
    yield Section(("head_sample_*",), with_model(_head_samples, model))
    yield Section(("train_*", "grad:*"), with_model(_training, model))
    for sampler in masked_sets.samplers(case):
        yield Section((f"{sampler['tag']}_*",), with_model(_sampling, model, sampler))


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    net = case.config("ear")
    options = said(
        net,
        width="decoder_embed_dim",
        decoder_depth="decoder_depth",
        decoder_heads="decoder_num_heads",
        mlp_ratio="mlp_ratio",
        num_classes="class_num",
        buffer="buffer_size",
        attention_dropout="attn_dropout",
        dropout="proj_dropout",
        rate_min="mask_ratio_min",
        repeats="score_batch_mul",
        label_dropout="label_drop_prob",
        noise_width="noise_channels",
        alpha="alpha",
        train_temperature="train_temperature",
    )
    patch = net.get("patch_size", 1)
    if "vae_embed_dim" in net:
        options["code_width"] = net["vae_embed_dim"] * patch**2
    generator = ear.generator(case.shapes("ear"), options | {"iterations": 1})
    head = generator.section["head"]
    for field, name in (("depth", "scoreloss_d"), ("width", "scoreloss_w")):
        if net.get(name, head[field]) != head[field]:
            raise ValueError(f"{name} is {net[name]}, but the tensors say {head[field]}")
    return Model.load(case, "ear", generator, patch)


def _features(model: Model) -> Outputs:
    yield "decoder_features", model.ask("backbone", None, model.codes, model.cond, ~model.hidden)


def _outputs(model: Model) -> Outputs:
    """In training the official head takes no notice of a temperature."""
    twice = np.concatenate([model["head_z"]] * 2)
    for name, found in model.case.names(f"head_output_(train|eval)_temp{NUMBER}"):
        temperature = 1.0 if found[1] == "train" else float(found[2])
        yield name, model.ask("head", None, twice, model["head_noise"], temperature)


def _losses(model: Model) -> Outputs:
    noise, weights = _two(model["head_noise"]), model["head_loss_mask"]
    for name, found in model.case.names(f"head_loss_(masked_)?alpha{NUMBER}_tt{NUMBER}"):
        head = model.system.head.clone(alpha=float(found[2]), train_temperature=float(found[3]))
        apply = jax.jit(functools.partial(head.apply, method="loss"))
        variables = {"params": model.params["head"]}
        loss, _ = apply(variables, model["head_z"], model["head_target"], noise)
        yield name, (loss * weights).sum() / weights.sum() if found[1] else loss


def _head_samples(model: Model) -> Outputs:
    """Codes of the head alone: of all states, or of the first half guided away from the second."""
    z = jnp.asarray(model["head_z"])
    for name, found in model.case.names(f"head_sample_cfg{NUMBER}_temp{NUMBER}"):
        noise = model[f"{name}_uniform"] - HALF
        half, more = len(noise), {}
        if half < len(z):
            more = dict(null=z[half:], scale=float(found[1]))
        draw = jax.jit(functools.partial(model.system.head.draw, temperature=float(found[2])))
        yield name, draw(model.params["head"], z[:half], noise, **more)


def _training(model: Model) -> Outputs:
    """The uniform draws of all first samples, then those of all second ones."""
    uniform = model["train_uniform"]
    first, second = np.split(uniform.reshape(2, -1, *model.codes.shape[:2], uniform.shape[-1]), 2)
    draws = np.stack([first[0], second[0]], axis=-2).swapaxes(0, 1) - HALF  # [B, R, L, 2, noise]
    return masked_sets.training(model, model.case.config("ear"), jnp.asarray(draws))


def _two(noise: Any) -> jax.Array:
    """Rows of all first samples, then of all second ones, as [N, 2, noise]."""
    return jnp.stack(jnp.split(jnp.asarray(noise), 2), axis=1)


def _sampling(model: Model, sampler: dict[str, Any]) -> Outputs:
    def read(start: str, rows: int) -> np.ndarray:
        return model[f"{start}_uniform"][:rows] - HALF

    return masked_sets.sampling(model, sampler, model.system.head, read)
