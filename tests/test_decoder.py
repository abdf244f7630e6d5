"""The decoder: visibility, its cache, its scan, recomputation, stochastic depth, its start."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.api import System
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.nn import splash
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.parallel.mesh import make_mesh, use_mesh
from ar_jax.sampling.guidance import Guidance
from tests.modules import apply
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_captions, toy_codes, toy_labels, toy_params, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 3
KEY = jax.random.key(0)
RECTANGLE = (1, (2, 3), (4, 6))
TEXT = dict(condition="text", caption_length=5, caption_features=6)


def scales(values: tuple) -> dict[str, Any]:
    return dict(tokenizer=dict(scales=values), schedule=dict(scales=values))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "next_scale": ("next_scale", {}),
    "shared": ("next_scale", dict(backbone=dict(modulation="shared", qk_norm="none"))),
    "wide start": ("next_scale", scales((2, 4))),
    "rectangles": ("next_scale", scales(RECTANGLE) | dict(autoencoder=dict(image_size=(8, 12)))),
    "equal sizes": (
        "next_scale",
        scales(((1, 4), (2, 2), (4, 1), (4, 4))),
    ),
    "rotary scales": (
        "next_scale",
        dict(backbone=dict(positions="rope", modulation="none", norm="rmsnorm")),
    ),
    "raster": ("raster", {}),
    "raster rectangle": (
        "raster",
        dict(schedule=dict(grid=(4, 6)), autoencoder=dict(image_size=(8, 12))),
    ),
    "fewer key heads": ("raster", dict(backbone=dict(heads=4, kv_heads=2))),
    "text": ("raster", dict(backbone=TEXT)),
}


@functools.cache
def system_of(variant: str) -> tuple[System, Any]:
    family, changes = VARIANTS[variant]
    if variant not in ("next_scale", "raster"):
        changes = changes | dict(backbone=dict(depth=1) | changes.get("backbone", {}))
    return toy_system(family, **changes)


def condition_of(system: System) -> dict[str, jax.Array]:
    backbone = system.backbone
    if backbone.condition == "text":
        return toy_captions(BATCH, backbone.caption_length, backbone.caption_features)
    return toy_labels(BATCH)


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("rectangles", "equal sizes") else ())
        for name in VARIANTS
    ],
)
def test_cached_logits_equal_teacher_forced_ones(variant):
    system, params = system_of(variant)
    cond, codes = condition_of(system), toy_codes(system, BATCH)
    forward = jax.jit(functools.partial(teacher_forced, system))
    full = forward(params, cond, codes)
    null = forward(params, system.backbone.conditioner.null(cond), codes)
    assert np.linalg.norm(full - null) > 0.1 * np.linalg.norm(full)
    strength = Guidance(scale=3.0, kind="linear").scales(system.schedule.num_steps)
    guided = null + strength[system.schedule.step_id][None, :, None] * (full - null)
    cached, contexts = stepwise_logits(system, params, cond, codes, strength)
    assert np.linalg.norm(cached - guided) < 1e-5 * np.linalg.norm(guided)
    if variant in ("next_scale", "raster"):
        cached, contexts = stepwise_logits(system, params, cond, codes, None)
        assert np.linalg.norm(cached - full) < 1e-5 * np.linalg.norm(full)
    forced = apply(system.tokenizer, params["tokenizer"], codes, method="contexts")
    np.testing.assert_allclose(jnp.concatenate(contexts, axis=1), forced, atol=1e-6)


def test_the_cache_is_divided_over_samples_and_heads():
    system, _ = system_of("raster")
    with use_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        cache = jax.jit(lambda: system.backbone.init_cache(8))()
    for rows in jax.tree.leaves(cache):
        batch, heads, length, width = rows.shape
        assert rows.sharding.shard_shape(rows.shape) == (batch // 4, heads // 2, length, width)


def influence(system: System, params: Any) -> np.ndarray:
    """[L, L - n_1]: size of the gradient of each hidden state in each embedded context."""
    codes, cond = toy_codes(system, 1), jax.tree.map(lambda a: a[:1], condition_of(system))
    context = apply(system.tokenizer, params["tokenizer"], codes, method="contexts")

    def hidden(delta: jax.Array) -> jax.Array:
        def shift(call, args, kwargs, info):
            out = call(*args, **kwargs)
            shifted = info.module.name == "token_embed" and info.method_name == "__call__"
            return out + delta if shifted else out

        with nn.intercept_methods(shift):
            out: Any = system.backbone.apply({"params": params["backbone"]}, context, cond)
        return out[0][0]

    zeros = jnp.zeros((1, context.shape[1], system.backbone.width))
    jacobian = jax.jit(jax.jacrev(hidden))(zeros)  # [L, D, 1, L - n_1, D]
    return np.sqrt(np.square(jacobian).sum((1, 2, 4)))


def is_causal(system: System, matrix: np.ndarray) -> bool:
    """Whether hidden state i depends on context j exactly if j's step is not later than i's."""
    steps = system.schedule.step_id
    visible = steps[:, None] >= steps[None, system.schedule.sizes[0] :]
    return not matrix[~visible].any() and bool((matrix[visible] > 1e-6).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_causality_by_gradients(variant):
    system, params = system_of(variant)
    assert is_causal(system, influence(system, params))


@pytest.mark.parametrize("variant", ["next_scale", "raster"])
@pytest.mark.parametrize(
    "rule",
    [
        lambda queries, keys: keys[None, :] <= queries[:, None] + 1,
        lambda queries, keys: (keys[None, :] <= queries[:, None]) & (keys[None, :] != 1),
    ],
    ids=["one step ahead", "a step is lost"],
)
def test_a_broken_mask_is_not_causal(variant, rule, monkeypatch):
    monkeypatch.setattr(splash, "visibility", rule)
    assert not is_causal(system_of(variant)[0], influence(*system_of(variant)))


def test_captions_are_seen_and_their_padding_is_not():
    system, params = system_of("text")
    codes = toy_codes(system, BATCH)
    cond = condition_of(system)

    def total(caption: jax.Array) -> jax.Array:
        logits = teacher_forced(system, params, cond | {"caption": caption}, codes)
        return jnp.square(logits).sum(-1)  # [B, L]

    gradient = jax.jit(jax.jacrev(total))(cond["caption"])  # [B, L, B, T, F]
    seen = np.abs(gradient).sum(-1)
    mask = np.asarray(cond["caption_mask"])
    for sample in range(BATCH):
        own = seen[sample, :, sample]  # [L, T]
        if cond["dropped"][sample]:
            assert not own.any()
        else:
            # The last caption row predicts the first code, so it sees the rows before itself.
            assert (own[:, mask[sample]] > 0).all()
            assert not own[:, ~mask[sample]].any()
        others = np.delete(seen[sample], sample, axis=1)
        assert not others.any()


@pytest.mark.parametrize("variant", ["next_scale", "raster"])
def test_the_scan_equals_the_unrolled_stack(variant):
    system, params = system_of(variant)
    codes, cond = toy_codes(system, BATCH), condition_of(system)
    backbone, unstacked = system.backbone.for_sampling(params["backbone"])
    assert not backbone.scan
    unrolled = dataclasses.replace(system, backbone=backbone)
    forward = jax.jit(teacher_forced, static_argnums=0)
    ours = forward(system, params, cond, codes)
    np.testing.assert_allclose(
        forward(unrolled, params | {"backbone": unstacked}, cond, codes), ours, atol=1e-5
    )
    # Layers in the other order are another function: the test can fail.
    stack = unstacked["stack"]
    swapped = stack | {"blocks_0": stack["blocks_1"], "blocks_1": stack["blocks_0"]}
    other = forward(unrolled, params | {"backbone": unstacked | {"stack": swapped}}, cond, codes)
    assert np.abs(other - ours).max() > 0.1


def test_kernels_cast_once_give_what_those_cast_in_every_call_give():
    system, params = system_of("next_scale")
    half = dataclasses.replace(system, backbone=system.backbone.clone(dtype=jnp.bfloat16))
    backbone, cast = half.backbone.for_sampling(params["backbone"])
    _, whole = system.backbone.for_sampling(params["backbone"])
    kernels = [
        [leaf for path, leaf in jax.tree.leaves_with_path(one["stack"]) if path[-1].key == "kernel"]
        for one in (cast, whole)
    ]
    assert {leaf.dtype for leaf in kernels[0]} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in kernels[1]} == {jnp.dtype(jnp.float32)}
    unrolled = dataclasses.replace(half, backbone=backbone)
    codes, cond = toy_codes(system, BATCH), condition_of(system)
    forward = jax.jit(teacher_forced, static_argnums=0)
    ours, theirs = (
        forward(unrolled, params | {"backbone": one}, cond, codes) for one in (cast, whole)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(ours - forward(system, params, cond, codes)).max() > 0


def test_a_cache_needs_the_unrolled_stack():
    system, params = system_of("raster")
    cache = system.backbone.init_cache(BATCH)
    with pytest.raises(ValueError, match="scan=False"):
        system.backbone.apply(
            {"params": params["backbone"]}, None, condition_of(system), step=0, cache=cache
        )


@pytest.mark.slow  # two gradients of a model each
@pytest.mark.parametrize(
    ("variant", "policy"),
    [("next_scale", "block"), pytest.param("raster", "dots", marks=pytest.mark.slow)],
)
def test_recomputation_changes_no_gradient(variant, policy):
    system, params = system_of(variant)
    context = apply(
        system.tokenizer, params["tokenizer"], toy_codes(system, BATCH), method="contexts"
    )
    rngs = {"dropout": jax.random.key(1), "drop_path": jax.random.key(2)}

    def gradient(**fields: Any) -> Any:
        backbone = system.backbone.clone(
            drop_path=0.3, token_dropout=0.2, residual_dropout=0.2, mlp_dropout=0.2, **fields
        )

        def loss(params: Any) -> jax.Array:
            out: Any = backbone.apply(
                {"params": params}, context, condition_of(system), train=True, rngs=rngs
            )
            return jnp.square(out[0]).sum()

        return jax.jit(jax.grad(loss))(params["backbone"])

    kept = gradient(remat="none")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(a).max())),
        gradient(remat=policy),
        kept,
    )


@pytest.mark.slow  # compiles four times
def test_dropout_only_in_training():
    system, params = system_of("raster")
    context = toy_codes(system, BATCH)[:, :-1]
    rates = dict(token_dropout=0.2, residual_dropout=0.2, mlp_dropout=0.2, drop_path=0.5)
    rates |= dict(attention_dropout=0.2, mlp_hidden_dropout=0.2)

    @functools.partial(jax.jit, static_argnames=("train", "fields"))
    def run(seed: int, train: bool, fields: tuple) -> Any:
        backbone = system.backbone.clone(**dict(fields))
        rngs = {"dropout": jax.random.key(seed), "drop_path": jax.random.key(seed + 1)}
        variables = {"params": params["backbone"]}
        out: Any = backbone.apply(variables, context, toy_labels(BATCH), train=train, rngs=rngs)
        return out[0]

    plain = run(0, False, ())
    np.testing.assert_array_equal(run(0, False, tuple(rates.items())), plain)
    np.testing.assert_allclose(run(0, True, ()), plain, atol=1e-6)
    for name, rate in rates.items():
        field = ((name, rate),)
        noisy = run(0, True, field)
        assert np.abs(noisy - plain).max() > 1e-3, name
        np.testing.assert_array_equal(run(0, True, field), noisy)
        assert np.abs(noisy - run(5, True, field)).max() > 1e-3, name


def test_stochastic_depth_grows_from_none_to_its_rate():
    """At a rate near one the last block is skipped, the first one never is."""
    system, params = system_of("next_scale")
    batch = 64
    codes = toy_codes(system, batch)
    context = apply(system.tokenizer, params["tokenizer"], codes, method="contexts")
    backbone = system.backbone.clone(drop_path=0.9)
    short = system.backbone.clone(depth=1)
    first = jax.tree.map(lambda leaf: leaf[:1], params["backbone"]["stack"])
    cond = toy_labels(batch)

    @jax.jit
    def run(params: Any) -> Any:
        rngs = {"drop_path": jax.random.key(0), "dropout": jax.random.key(1)}
        deep: Any = backbone.apply({"params": params}, context, cond, train=True, rngs=rngs)
        shallow: Any = short.apply({"params": params | {"stack": first}}, context, cond)
        return deep[0], shallow[0]

    deep, shallow = run(params["backbone"])
    skipped = np.abs(deep - shallow).max((1, 2)) < 1e-4  # [B]
    expected = 0.9**2  # both branches
    assert abs(skipped.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / batch)
    assert not skipped.all()


@pytest.mark.parametrize("variant", [pytest.param("next_scale", marks=pytest.mark.slow), "raster"])
def test_bfloat16(variant):
    """Float32 parameters and hidden states; bfloat16 cache; values near the float32 ones."""
    system, params = system_of(variant)
    half = dataclasses.replace(
        system,
        backbone=system.backbone.clone(dtype=jnp.bfloat16),
        head=system.head.clone(dtype=jnp.bfloat16),
    )
    params = jax.tree.map(lambda a: 0.3 * a, params)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(toy_params(half))}
    assert dtypes == {jnp.dtype("float32")}
    assert half.backbone.init_cache(1).k[0].dtype == jnp.bfloat16
    codes, cond = toy_codes(system, BATCH), condition_of(system)
    forward = jax.jit(teacher_forced, static_argnums=0)
    exact, rounded = (forward(s, params, cond, codes) for s in (system, half))
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05
    cached, _ = stepwise_logits(half, params, cond, codes, None)
    assert np.linalg.norm(cached - rounded) / np.linalg.norm(rounded) < 0.02


def start(system: System) -> Any:
    """Initial parameters of the backbone, from a generator that compiles quickly."""
    codes, cond = toy_codes(system, 1), system.backbone.conditioner.empty(1)
    _, params = system_of("raster" if system.schedule.equal_steps else "next_scale")
    context = apply(system.tokenizer, params["tokenizer"], codes, method="contexts")
    return jax.jit(system.backbone.init)(jax.random.key(0, impl="rbg"), context, cond)["params"]


def test_initial_values():
    """The official starts: VAR's by default, a head of zeros for LlamaGen."""
    width, depth = 96, 4
    fields = dict(width=width, depth=depth, heads=2, mlp_hidden=4 * width)
    changes = dict(depth_scaled_init=True, gate_init=1e-2, modulation_init=0.5)
    system, _ = toy_system("next_scale", backbone=fields | changes)
    params = start(system)
    blocks, std = params["stack"]["blocks"], math.sqrt(1 / (3 * width))

    def spread(leaf: Any, expected: float) -> None:
        assert np.std(leaf) == pytest.approx(expected, rel=0.06)

    spread(blocks["attention"]["query"]["kernel"], std)
    spread(blocks["attention"]["out"]["kernel"], std / math.sqrt(2 * depth))
    spread(blocks["mlp"]["up"]["kernel"], std)
    spread(blocks["mlp"]["down"]["kernel"], std / math.sqrt(2 * depth))
    kernel = blocks["modulation"]["kernel"]  # [depth, D, 6, D]
    spread(kernel[:, :, :2], 1e-2 * std)
    spread(kernel[:, :, 2:], 0.5 * std)
    spread(params["final_modulation"]["kernel"], 0.5 * std)
    spread(params["position"], std)
    np.testing.assert_allclose(blocks["attention"]["log_scale"], math.log(4))
    for layer in range(1, depth):  # a scan must not start all layers alike
        query = blocks["attention"]["query"]["kernel"]
        assert np.abs(query[0] - query[layer]).max() > std

    system, _ = toy_system(
        "raster", backbone=fields | dict(init_std=0.02), head=dict(bias=False, init_std=0)
    )
    params = {"backbone": start(system)}
    spread(params["backbone"]["token_embed"]["embedding"], 0.02)
    spread(params["backbone"]["stack"]["blocks"]["attention"]["out"]["kernel"], 0.02)
    head = system.head.init(jax.random.key(0), jnp.zeros((1, width)))["params"]
    assert not np.any(head["kernel"])
    batch = toy_labels(2) | {"codes": toy_codes(system, 2)}
    frozen = {"tokenizer": system_of("raster")[1]["tokenizer"]}
    loss = jax.jit(lambda p: Likelihood(system=system).loss(p, {}, frozen, batch, KEY, False)[0])
    uniform = math.log(system.head.vocab_size)
    assert float(loss(params | {"head": head})) == pytest.approx(uniform, rel=1e-6)
