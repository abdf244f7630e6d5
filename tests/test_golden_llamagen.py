"""LlamaGen: our layers with official weights against what the official code computed.

Tolerances: ten times the float32-against-float64 differences that the case's README records.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.nn.blocks import Block
from ar_jax.nn.positions import rope_2d
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from tests.golden_llamagen import Gpt, build_gpt, case_tokenizer_places
from tests.golden_weights import (
    GOLDEN,
    Case,
    to_official,
)
from tests.quick_compilation import quick_compilation  # noqa: F401

CASE = "llamagen/tiny"


@pytest.fixture(scope="module", autouse=True)
def highest_precision(quick_compilation):  # noqa: F811
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(CASE)


@pytest.fixture(scope="module")
def close(case):
    """Compares with a recorded array within ten times its own float32 error."""
    readme = (GOLDEN / CASE / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d.e+-]+) \| ([\d.e+-]+) \|$", readme, re.MULTILINE)
    errors = {name: (float(absolute), float(relative)) for name, absolute, relative in rows}
    assert len(errors) == 32

    def compare(ours: Any, name: str) -> None:
        ours, reference = np.asarray(ours, np.float64), case.io[name].astype(np.float64)
        assert ours.shape == reference.shape
        absolute, relative = errors[name]
        difference = np.abs(ours - reference)
        assert difference.max() <= 10 * absolute
        assert np.linalg.norm(difference) <= 10 * relative * np.linalg.norm(reference)

    return compare


@pytest.fixture(scope="module")
def gpt(case, highest_precision) -> Gpt:
    """The class-conditional transformer, with the tokenizer of the case."""
    return build_gpt(case, "gpt_c2i")


@pytest.fixture(scope="module")
def text(case, highest_precision) -> Gpt:
    """The text-conditional transformer."""
    return build_gpt(case, "gpt_t2i")


def labels(case: Case) -> dict[str, jax.Array]:
    return {"label": jnp.asarray(case.io["gpt_labels"])}


def captions(case: Case) -> dict[str, jax.Array]:
    return {
        "caption": jnp.asarray(case.io["t2i_caption"]),
        "caption_mask": jnp.asarray(case.io["t2i_caption_mask"]) > 0,
        "dropped": jnp.zeros(len(case.io["t2i_caption"]), bool),
    }


def nchw(x: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


@pytest.mark.parametrize("model", ["gpt", "text"])
def test_every_parameter_has_its_place(case, model, request):
    model = request.getfixturevalue(model)
    ours = jax.eval_shape(Likelihood(system=model.system).init, jax.random.key(0))
    objective = TokenizerObjective(tokenizer=model.system.tokenizer)
    ours["tokenizer"] = jax.eval_shape(objective.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, model.params) == jax.tree.map(jnp.shape, ours)
    for key, tensor in case.state_dict(model.part).items():
        np.testing.assert_array_equal(to_official(model.places, model.params, key), tensor, key)


def test_tokenizer(case, gpt, close):
    def passes(module, images):
        encoder, encode = module.autoencoder.encoder, module.autoencoder.encode
        reconstruction, quantized = module(images)
        decoded = module.autoencoder.decode(module.quantizer.lookup(quantized.codes))
        return encoder(images), encode(images), quantized, reconstruction, decoded

    @jax.jit
    def run(params, images):
        return gpt.system.tokenizer.apply({"params": params}, images, method=passes)

    images = jnp.asarray(np.moveaxis(case.io["tok_images"], 1, -1))
    encoded, features, quantized, reconstruction, decoded = run(gpt.params["tokenizer"], images)
    close(nchw(encoded), "tok_encoder_out")
    close(nchw(features), "tok_prequant")
    np.testing.assert_array_equal(quantized.codes, case.io["tok_ids"])
    close(nchw(quantized.features), "tok_quant")
    close(nchw(reconstruction), "tok_recon")
    close(nchw(decoded), "tok_decode_code")
    settings = case.spec["config"]["tokenizer"]
    close(quantized.codebook_loss.mean(), "tok_vq_loss")
    commitment = settings["commit_loss_beta"] * quantized.commitment_loss.mean()
    close(commitment, "tok_commit_loss")
    close(settings["entropy_loss_ratio"] * quantized.entropy_loss, "tok_entropy_loss")
    close(jnp.square(reconstruction - images).mean(), "tok_rec_l2")
    # The reference's usage counts the zeros that its ring buffer starts with as code 0.
    used = {0, *np.asarray(quantized.codes).flat}
    close(len(used) / settings["codebook_size"], "tok_usage")


def test_tokenizer_gradients(case, gpt, close):
    settings = case.spec["config"]["tokenizer"]
    weights = dict(commitment=settings["commit_loss_beta"], entropy=settings["entropy_loss_ratio"])
    images = jnp.asarray(np.moveaxis(case.io["tok_images"], 1, -1))

    @jax.jit
    @jax.grad
    def gradient(params):
        # The recorded images are floats between the uint8 levels that our objective takes.
        reconstruction, quantized = gpt.system.tokenizer.apply({"params": params}, images)
        return (
            jnp.square(reconstruction - images).mean()
            + quantized.codebook_loss.mean()
            + weights["commitment"] * quantized.commitment_loss.mean()
            + weights["entropy"] * quantized.entropy_loss
        )

    grads = gradient(gpt.params["tokenizer"])
    places = case_tokenizer_places(case, case.state_dict("tokenizer"))
    official = functools.partial(to_official, places, grads)
    keys = case.spec["tokenizer"]["grad_norm_keys"]
    assert sorted(keys) == sorted(places)
    close([np.linalg.norm(official(key)) for key in keys], "tok_grad_norms")
    close(official("quant_conv.weight")[:, :, 0, 0], "tok_grad_quant_conv_w")
    close(official("quantize.embedding.weight")[:16], "tok_grad_codebook_head")


def test_rope_table(case, gpt, close):
    net = case.spec["config"]["gpt_c2i"]
    head_width = net["dim"] // net["n_head"]
    table = rope_2d(gpt.system.schedule.coords[:, 1:], head_width)
    condition = np.zeros((net["cls_token_num"], *table.shape[1:]), np.float32)
    close(np.concatenate([condition, table]), "rope_table")


def test_gpt_logits_and_loss(case, gpt, close):
    codes = jnp.asarray(case.io["gpt_idx"])
    logits = gpt.forward(labels(case), codes)
    close(logits, "gpt_logits")
    close(gpt.system.head.loss(logits, codes).mean(), "gpt_loss")
    drop = case.io["gpt_drop_u"] < case.spec["config"]["gpt_c2i"]["class_dropout_prob"]
    assert drop.tolist() == [False, True]
    dropped = gpt.system.backbone.conditioner.null(labels(case), jnp.asarray(drop))
    logits = gpt.forward(dropped, codes)
    close(logits[1, 0], "gpt_logits_drop_row1_pos0")
    close(gpt.system.head.loss(logits, codes).mean(), "gpt_loss_drop")


def test_gpt_hidden_state(case, gpt, close):
    system = dataclasses.replace(gpt.system, backbone=gpt.system.backbone.clone(scan=False))
    _, backbone = gpt.system.backbone.for_sampling(gpt.params["backbone"])
    states: list[jax.Array] = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, Block) and context.method_name == "__call__":
            states.append(out[0])
        return out

    @jax.jit
    def first_block(params):
        with nn.intercept_methods(record):
            teacher_forced(system, params, labels(case), jnp.asarray(case.io["gpt_idx"]))
        return states[0]

    close(first_block(gpt.params | {"backbone": backbone}), "gpt_hidden_after_layer0")


def test_gpt_gradients(case, gpt, close):
    loss, gradient = gpt.gradients(labels(case), case.io["gpt_idx"])
    close(loss, "gpt_loss")
    close(gpt.norms(gradient), "gpt_grad_norms")
    official = functools.partial(to_official, gpt.places, gradient)
    close(official("layers.0.attention_norm.weight"), "gpt_grad_layer0_attention_norm")
    close(official("tok_embeddings.weight")[:8], "gpt_grad_tok_emb_head")


@pytest.mark.parametrize("run", ["cfg", "nocfg", "interval", "sampled"])
def test_generation(case, gpt, close, run):
    settings = case.spec["sampling"]
    scale = settings["cfg_scale"]
    guidance = {
        "cfg": Guidance(scale=scale),
        "nocfg": Guidance(),
        # The official interval counts from the second token.
        "interval": Guidance(scale=scale, stop=settings["cfg_interval"] + 2),
        "sampled": Guidance(scale=scale),
    }[run]
    knobs = Knobs(**settings["sampled"]) if run == "sampled" else Knobs(temperature=0.0)
    noise = jnp.asarray(case.io["gen_sampled_gumbel"]).transpose(1, 0, 2)
    samples = gpt.sampler(
        labels(case), image_keys(0, 0, 2), knobs=knobs, guidance=guidance, noise=noise
    )
    np.testing.assert_array_equal(samples.codes, case.io[f"gen_{run}_ids"])
    if run == "cfg":
        image = gpt.system.tokenizer.apply(
            {"params": gpt.params["tokenizer"]},
            samples.codes,
            method=lambda m, codes: m.autoencoder.decode(m.quantizer.lookup(codes)),
        )
        close(nchw(image), "gen_cfg_image")
        np.testing.assert_allclose(samples.images, np.clip(image, -1, 1), atol=1e-5)
        scales = guidance.scales(gpt.system.schedule.num_steps)
        logits, _ = stepwise_logits(gpt.system, gpt.params, labels(case), samples.codes, scales)
        close(logits[:, :: settings["step_logits_stride"]], "gen_cfg_step_logits")


def test_filter(case):
    knobs = Knobs(**case.spec["sampling"]["sampled"])
    unscaled = dataclasses.replace(knobs, temperature=1.0).as_arrays()
    ours = np.asarray(truncate(jnp.asarray(case.io["filter_in"]), unscaled))
    np.testing.assert_array_equal(ours, case.io["filter_out"])


def test_text_attention_mask(case, text):
    """Causal, padded caption rows hidden, the diagonal on."""
    packed = np.unpackbits(case.io["t2i_attn_mask_packed"], axis=-1).astype(bool)
    expected = packed[:, :-1, :-1]  # the last token is never an input
    rows = text.system.backbone.rows
    mask = text.system.backbone._mask(None, 0, rows, captions(case)["caption_mask"])
    np.testing.assert_array_equal(np.broadcast_to(mask, (2, 1, rows, rows))[:, 0], expected)


def test_text_logits_and_losses(case, text, close):
    codes = jnp.asarray(case.io["t2i_idx"])
    logits = text.forward(captions(case), codes)
    close(logits, "t2i_logits")
    nll = text.system.head.loss(logits, codes)
    close(nll.mean(), "t2i_loss")
    objective = Likelihood(system=text.system)
    batch = captions(case) | {"codes": codes, "mask": jnp.float32(case.io["t2i_valid10"])}
    loss, _ = objective.loss(text.params, {}, text.params, batch, jax.random.key(0), False)
    close(loss, "t2i_loss_valid10")
    drop = case.io["t2i_drop_u"] < case.spec["config"]["gpt_t2i"]["class_dropout_prob"]
    assert drop.tolist() == [True, False]
    dropped = text.system.backbone.conditioner.null(captions(case), jnp.asarray(drop))
    logits = text.forward(dropped, codes)
    close(logits[0, 0], "t2i_logits_drop_row0_pos0")
    close(text.system.head.loss(logits, codes).mean(), "t2i_loss_drop")


def test_text_gradients(case, text, close):
    loss, gradient = text.gradients(captions(case), case.io["t2i_idx"])
    close(loss, "t2i_loss")
    close(text.norms(gradient), "t2i_grad_norms")


@pytest.mark.parametrize("masked", [True, False])
def test_text_generation(case, text, close, masked):
    settings = case.spec["sampling"]
    cond = captions(case)
    if not masked:
        cond["caption_mask"] = jnp.ones_like(cond["caption_mask"])
    guidance = Guidance(scale=settings["t2i_cfg_scale"])
    keys, knobs = image_keys(0, 0, 2), Knobs(temperature=0.0)
    codes = text.sampler(cond, keys, knobs=knobs, guidance=guidance).codes
    np.testing.assert_array_equal(codes, case.io[f"t2i_gen_{'' if masked else 'nomask_'}ids"])
    if masked:
        scales = guidance.scales(text.system.schedule.num_steps)
        logits, _ = stepwise_logits(text.system, text.params, cond, codes, scales)
        close(logits[:, :: settings["t2i_step_logits_stride"]], "t2i_gen_step_logits")
