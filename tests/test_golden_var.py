"""VAR: our layers with official weights against what the official code computed.

Tolerances are those of the cases' README (tests/golden/var/*/README.md).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_system
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.nn.blocks import Block
from ar_jax.nn.resize import area_matrix, bicubic_matrix
from ar_jax.objectives.likelihood import Likelihood, empty_cond
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.tokenizers.quantizers import phi_indices
from tests.golden_var import Var, var_config
from tests.golden_weights import Case, to_official, to_ours, tokenizer_places, var_places
from tests.quick_compilation import quick_compilation  # noqa: F401

RELATIVE, LOGITS, FEATURES = 5e-5, 2e-4, 5e-5
RUNS = ("greedy", "plain", "topkp")


@pytest.fixture(scope="module", autouse=True)
def highest_precision(quick_compilation):  # noqa: F811
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=["tiny_a", "tiny_b"])
def var(request, highest_precision) -> Var:
    case = Case.load(f"var/{request.param}")
    system = build_system(var_config(case.spec))
    tokenizer, transformer = case.state_dict("tokenizer"), case.state_dict("transformer")
    places = {
        "tokenizer": tokenizer_places(
            tokenizer,
            family="var",
            levels=len(system.tokenizer.autoencoder.multipliers),
        ),
        "transformer": var_places(
            transformer, width=system.backbone.width, heads=system.backbone.heads
        ),
    }
    params = to_ours(places["transformer"], transformer)
    params["tokenizer"] = to_ours(places["tokenizer"], tokenizer)
    return Var(case, system, jax.tree.map(jnp.asarray, params), places)


def close(ours, reference, relative: float = RELATIVE, absolute: float | None = None) -> None:
    """Relative L2 norm of the difference, and its largest entry."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    difference = np.abs(ours - reference)
    assert np.linalg.norm(difference) <= relative * np.linalg.norm(reference)
    if absolute is not None:
        assert difference.max() <= absolute


def nchw(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def test_every_parameter_has_its_place(var):
    objective = Likelihood(system=var.system)
    ours = jax.eval_shape(objective.init, jax.random.key(0))
    tokenizer = TokenizerObjective(tokenizer=var.system.tokenizer)
    ours["tokenizer"] = jax.eval_shape(tokenizer.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, var.params) == jax.tree.map(jnp.shape, ours)
    for part in ("tokenizer", "transformer"):
        tree = var.params["tokenizer"] if part == "tokenizer" else var.params
        for key, tensor in var.case.state_dict(part).items():
            np.testing.assert_array_equal(to_official(var.places[part], tree, key), tensor, key)


def test_encoder_and_training_pass(var):
    def passes(module, image):
        autoencoder = module.autoencoder
        features = autoencoder.encoder(image), autoencoder.encode(image)
        return *features, module.encode(image), module(image)[0]

    image = var.image / np.float32(127.5) - 1
    run = jax.jit(functools.partial(var.tokenizer, passes))
    encoded, features, codes, reconstruction = run(image)
    close(nchw(encoded), var["tok.enc"], absolute=FEATURES)
    close(nchw(features), var["tok.f"], absolute=FEATURES)
    np.testing.assert_array_equal(codes, var.codes)
    recorded = nchw(reconstruction)[:, :, ::2, ::2]
    close(recorded, var["vqtrain.recon_unclamped"], absolute=FEATURES)


def test_quantizer(var):
    lookup = lambda steps: var.tokenizer(lambda m: m.quantizer.lookup(var.codes, steps))  # noqa: E731
    f_hats = [nchw(lookup(steps + 1)) for steps in range(var.system.schedule.num_steps)]
    close(np.stack(f_hats), var["tok.fhat"], absolute=FEATURES)
    np.testing.assert_array_equal(lookup(None), lookup(len(f_hats)))
    close(var.tokenizer("contexts", var.codes), var["tok.var_input"], absolute=FEATURES)
    phis = var.system.tokenizer.quantizer.phis
    expected = var.case.spec["config"]["tokenizer"]["phi_index_per_scale"]
    assert phi_indices(len(f_hats), phis) == tuple(expected)


def test_reconstruction(var):
    image = nchw(var.sampler.decode(var.codes))
    close(image, var["tok.recon"], absolute=FEATURES)
    close(image.mean((2, 3)), var["tok.recon_mean"])
    close(image.std((2, 3)), var["tok.recon_std"])
    decode = functools.partial(var.tokenizer, "decode", steps=1)
    first = nchw(jax.jit(decode)(var.codes))[:, :, ::4, ::4]
    close(first, var["tok.recon_scale0"], absolute=FEATURES)


def test_quantizer_loss_and_gradients(var):
    beta = var.case.spec["config"]["tokenizer"]["beta"]

    def loss(params, features):
        quantized = var.system.tokenizer.apply(
            {"params": params}, features, method=lambda m, f: m.quantizer.quantize(f)
        )
        total = (quantized.codebook_loss + beta * quantized.commitment_loss).mean()
        return total, quantized.features

    grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, f_hat), (dparams, dfeatures) = grads(var.params["tokenizer"], nhwc(var["tok.f"]))
    close(value, var["vqtrain.vq_loss"])
    close(nchw(f_hat), var["vqtrain.fhat_st"], absolute=FEATURES)
    close(nchw(dfeatures), var["vqtrain.dvq_df"])
    official = functools.partial(to_official, var.places["tokenizer"], dparams)
    close(official("quantize.embedding.weight"), var["vqtrain.dvq_dcodebook"])
    phi_keys = [key for key in var.places["tokenizer"] if "quant_resi" in key]
    close([np.linalg.norm(official(key)) for key in phi_keys], var["vqtrain.dvq_dphi_norms"])
    close(official(phi_keys[0])[:4, :4], var["vqtrain.dvq_dphi0_w"])


def test_tokenizer_gradients(var):
    """Of our tokenizer objective: straight-through to every parameter."""
    beta = var.case.spec["config"]["tokenizer"]["beta"]
    objective = TokenizerObjective(tokenizer=var.system.tokenizer, commitment=beta)
    params, batch = var.params["tokenizer"], {"image": jnp.asarray(var.image)}
    stats = objective.init_stats(params)
    grads = jax.jit(
        jax.value_and_grad(
            lambda p: objective.loss(p, stats, {}, batch, jax.random.key(0), True), has_aux=True
        ),
    )
    (loss, _), gradient = grads(params)
    close(loss, var["vqtrain.total_loss"])
    official = functools.partial(to_official, var.places["tokenizer"], gradient)
    names = [str(name) for name in var["vqtrain.grad_names"]]
    assert sorted(names) == sorted(var.places["tokenizer"])
    norms = np.array([np.linalg.norm(official(name)) for name in names])
    close(norms, var["vqtrain.grad_norms"], relative=2e-4)
    recorded = {
        "encoder.conv_in.weight": np.s_[:8],
        "quant_conv.bias": np.s_[:],
        "quantize.embedding.weight": np.s_[:],
        "post_quant_conv.weight": np.s_[:4],
        "decoder.conv_out.bias": np.s_[:],
    }
    for name, part in recorded.items():
        close(official(name)[part], var[f"vqtrain.grad.{name}"])


def test_hidden_states(var):
    system = dataclasses.replace(var.system, backbone=var.system.backbone.clone(scan=False))
    _, backbone = var.system.backbone.for_sampling(var.params["backbone"])
    states: list[jax.Array] = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, Block) and context.method_name == "__call__":
            states.extend([args[0], out[0]] if not states else [out[0]])
        return out

    @jax.jit
    def hidden_states(params):
        with nn.intercept_methods(record):
            teacher_forced(system, params, var.cond, var.codes)
        return states

    hidden = np.stack(hidden_states(var.params | {"backbone": backbone}))
    close(hidden[..., :8], var["tf.hidden"])
    close(np.sqrt(np.square(hidden).mean((1, 2, 3))), var["tf.hidden_rms"])


def test_teacher_forced_logits_and_losses(var):
    schedule = var.system.schedule
    for cond, name in ((var.cond, "cond"), (var.null, "null")):
        logits = var.forward(cond, var.codes)
        close(logits, var[f"tf.logits_{name}"], absolute=LOGITS)
        nll = var.system.head.loss(logits, jnp.asarray(var.codes))
        close(nll.mean(), var[f"tf.ce_mean_{name}"])
        per_scale = [
            nll[:, start : start + size].mean()
            for start, size in zip(schedule.starts, schedule.sizes, strict=True)
        ]
        close(per_scale, var[f"tf.ce_scale_{name}"])
        if name == "cond":
            smoothed = var.system.head.loss(logits, jnp.asarray(var.codes), label_smoothing=0.1)
            close(smoothed.mean(), var["tf.ce_mean_cond_ls0.1"])


def test_likelihood_gradients(var):
    objective = Likelihood(system=var.system, label_dropout=0.0)
    trained = {name: var.params[name] for name in ("backbone", "head")}
    batch = {"codes": jnp.asarray(var.codes), **var.cond}
    loss = lambda p: objective.loss(p, {}, var.params, batch, jax.random.key(0), False)  # noqa: E731
    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    close(value, var["grad.loss"])
    close(aux.metrics["nll/scale_00"], var["tf.ce_scale_cond"][0])
    official = functools.partial(to_official, var.places["transformer"], gradient)
    names = [str(name) for name in var["grad.names"]]
    assert sorted(names) == sorted(var.places["transformer"])
    norms = np.array([np.linalg.norm(official(name)) for name in names])
    close(norms, var["grad.norms"], relative=2e-4)
    close(np.linalg.norm(norms), var["grad.total_norm"])
    parts: dict[str, Any] = {
        "word_embed.weight": np.s_[:16],
        "word_embed.bias": np.s_[:16],
        "class_emb.weight": np.s_[:, :8],
        "pos_start": np.s_[:, :, :16],
        "lvl_embed.weight": np.s_[:, :16],
        "pos_1LC": np.s_[:, ::4, :8],
        "attn.mat_qkv.weight": np.s_[::64, :16],
        "attn.q_bias": np.s_[:32],
        "attn.v_bias": np.s_[:32],
        "attn.proj.weight": np.s_[:8, :16],
        "ffn.fc1.weight": np.s_[:8, :16],
        "ffn.fc2.bias": np.s_[:32],
        "head.bias": np.s_[:],
        "head.weight": np.s_[:8, :16],
        "head_nm.ada_lin.1.weight": np.s_[::32, :8],
        "head_nm.ada_lin.1.bias": np.s_[::8],
        "attn.scale_mul_1H11": np.s_[:],
        "ada_lin.1.weight": np.s_[::32, :8],
        "ada_lin.1.bias": np.s_[::16],
        "ada_gss": np.s_[:, :, :, :16],
        "shared_ada_lin.1.weight": np.s_[::32, :8],
        "shared_ada_lin.1.bias": np.s_[::16],
    }
    recorded = [n.removeprefix("grad.") for n in var.case.io if n.startswith("grad.")]
    recorded = [name for name in recorded if name in names]
    assert len(recorded) >= 17
    for name in recorded:
        part = parts[name.split(".", 2)[2] if name.startswith("blocks.") else name]
        relative = 5e-4 if "scale_mul" in name else RELATIVE
        close(official(name)[part], var[f"grad.{name}"], relative=relative)


@pytest.mark.parametrize("run", RUNS)
def test_sampling(var, run):
    settings = var.case.spec["config"]["sampling"][run]
    assert not settings["more_smooth"]
    if run == "greedy":
        assert settings["top_k"] == 1
        knobs, noise = Knobs(temperature=0.0), jnp.asarray(var["plain.gumbel"])
    else:
        knobs = Knobs(top_k=settings["top_k"], top_p=settings["top_p"])
        noise = jnp.asarray(var[f"{run}.gumbel"])
    guidance = Guidance(kind="linear_excess", scale=settings["cfg"])
    samples = var.sampler(
        var.cond, image_keys(0, 0, len(var.image)), knobs=knobs, guidance=guidance, noise=noise
    )
    np.testing.assert_array_equal(samples.codes, var.drawn(run))
    image = (nchw(samples.images) + 1) / 2
    close(image, var[f"{run}.image"], absolute=FEATURES)
    close(image.mean((2, 3)), var[f"{run}.image_mean"])
    f_hat = var.tokenizer(lambda m: m.quantizer.lookup(samples.codes))
    close(nchw(f_hat), var[f"{run}.fhat"], absolute=FEATURES)
    scales = guidance.scales(var.system.schedule.num_steps)
    logits, _ = stepwise_logits(var.system, var.params, var.cond, samples.codes, scales)
    close(logits, var[f"{run}.logits"], absolute=LOGITS)


def test_cached_greedy_logits_equal_teacher_forced_ones(var):
    codes = jnp.asarray(var.drawn("greedy"))
    unguided = np.ones(var.system.schedule.num_steps, np.float32)
    cached, _ = stepwise_logits(var.system, var.params, var.cond, codes, unguided)
    full = var.forward(var.cond, codes)
    close(cached, full, relative=1e-5, absolute=LOGITS)


def test_filters(var):
    logits = jnp.asarray(var["filter.logits"])
    filtered = jax.jit(truncate)
    for (top_k, top_p), expected in zip(var["filter.kp"], var["filter.out"], strict=True):
        knobs = Knobs(top_k=int(top_k), top_p=float(top_p)).as_arrays()
        same_filter(filtered(logits, knobs), expected)
    ties = filtered(jnp.asarray(var["filter.tie_logits"]), Knobs(top_k=5).as_arrays())
    same_filter(ties, var["filter.tie_out"])
    kept = np.isfinite(ties).sum(-1)
    np.testing.assert_array_equal(kept, var["filter.tie_kept"])


def same_filter(ours, expected: np.ndarray) -> None:
    """The same entries removed, the others unchanged."""
    ours = np.asarray(ours)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    kept = np.isfinite(expected)
    close(ours[kept], expected[kept], relative=1e-6)


def test_resampling(var):
    checked = 0
    for side in (4, 16):
        full = var[f"unit.T{side}.full"]
        prefix = f"unit.T{side}.area_"
        for name in [n for n in var.case.io if n.startswith(prefix)]:
            pn = int(name.removeprefix(prefix))
            shrink, enlarge = area_matrix(side, pn), bicubic_matrix(pn, side)
            small = shrink @ full @ shrink.T
            close(small, var[name], relative=1e-6)
            large = enlarge @ small @ enlarge.T
            close(large, var[f"unit.T{side}.bicubic_{pn}"], relative=1e-6)
            checked += 1
    assert checked >= 10


def test_empty_condition_has_the_shapes_of_the_case(var):
    shapes = jax.tree.map(jnp.shape, empty_cond(var.system, len(var.image)))
    assert shapes == jax.tree.map(jnp.shape, var.cond)
