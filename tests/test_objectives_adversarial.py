"""Adversarial losses, LeCam, weights over training, and the fields that are refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.nn.discriminators import PatchDiscriminator
from ar_jax.objectives.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    Adversary,
    lecam,
)
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

PATCH = dict(name="patchgan", channels=4, layers=1)


def adversary(**fields: Any) -> Adversary:
    network = PatchDiscriminator(channels=4, layers=1)
    fields = dict(weight=0.5) | fields
    return Adversary(discriminator=network, image_shape=(8, 8, 1), **fields)


def softplus(x: Any) -> Any:
    return np.log1p(np.exp(x))


def test_losses_equal_numpy():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(2, 3, 4)).astype(np.float32) * 2
    hinge = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2
    logistic = softplus(-real).mean() + softplus(fake).mean()
    expected = {"hinge": hinge, "vanilla": logistic / 2, "non_saturating": logistic}
    expected["swapped"] = ((1 - real).mean() + softplus(-np.float32(1)) + np.log(2)) / 2
    for name, loss in DISCRIMINATOR_LOSSES.items():
        np.testing.assert_allclose(loss(real, fake), expected[name], rtol=1e-5)
    made = {"hinge": -fake.mean(), "vanilla": -softplus(fake).mean()}
    made["non_saturating"] = softplus(-fake).mean()
    made["swapped"] = (1 - fake).mean() + softplus(-np.float32(1))
    for name, deceit in GENERATOR_LOSSES.items():
        np.testing.assert_allclose(deceit(fake), made[name], rtol=1e-5)
        slopes = jax.grad(lambda x, deceit=deceit: deceit(x).sum())(jnp.asarray(fake))
        assert (np.asarray(slopes) < 0).all()  # what looks more real is better


def test_lecam_is_zero_until_logits_pass_the_other_kind_s_mean():
    running = {"real": 0.5, "fake": -0.25}
    running = jax.tree.map(jnp.float32, running)

    def penalty(real: float, fake: float) -> float:
        return float(lecam({"real": jnp.float32(real), "fake": jnp.float32(fake)}, running))

    assert penalty(-0.3, 0.6) == 0
    np.testing.assert_allclose(penalty(0.75, 0.6), 1.0)
    np.testing.assert_allclose(penalty(-0.3, 0.2), 0.09, rtol=1e-5)


def test_the_weight_starts_and_grows():
    late = adversary(start=10, warmup_steps=4)
    weights = [float(late.weight_at(step)) for step in (0, 9, 10, 11, 13, 14, 1000)]
    assert weights == [0, 0, 0.125, 0.25, 0.5, 0.5, 0.5]
    at_once = adversary(start=3)
    assert [float(at_once.weight_at(jnp.int32(step))) for step in (2, 3, 4)] == [0, 0.5, 0.5]


def test_balance_is_the_ratio_of_norms_and_bounded():
    cautious = adversary(adaptive=True, max_adaptive=50.0)
    plain = jnp.full((2, 3), 2.0, jnp.bfloat16)
    ratio = cautious.balance(plain, jnp.full((2, 3), 0.5))
    assert ratio.dtype == jnp.float32
    np.testing.assert_allclose(ratio, 4.0, rtol=1e-3)
    assert float(cautious.balance(plain, jnp.zeros((2, 3)))) == 50
    assert float(adversary(max_adaptive=1e9).balance(plain, jnp.zeros((2, 3)))) > 1e4


def test_judging_keeps_means_of_logits_and_counts_right_ones():
    one = adversary(lecam=0.1, lecam_decay=0.75)
    params, stats = one.init(jax.random.key(0))
    real, fake = np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 1)).astype(np.float32)
    loss, (after, metrics) = jax.jit(one.judge)(params, stats, real, 0.1 * fake)
    means = {name: metrics[f"discriminator/{name}_logit"] for name in ("real", "fake")}
    for name, mean in means.items():
        np.testing.assert_allclose(after["logits"][name], 0.25 * mean, rtol=1e-6)
    plain, _ = jax.jit(adversary().judge)(params, stats, real, 0.1 * fake)
    penalty = lecam(means, stats["logits"])
    assert penalty > 1e-5
    np.testing.assert_allclose(loss - plain, 0.1 * penalty, rtol=1e-2)
    variables = {"params": params, "batch_stats": stats["norms"]}
    logits = [
        np.asarray(one.discriminator.apply(variables, x, mutable=["batch_stats"])[0])
        for x in (real, 0.1 * fake)
    ]
    right = ((logits[0] > 0).mean() + (logits[1] < 0).mean()) / 2
    np.testing.assert_allclose(metrics["discriminator/accuracy"], right, rtol=1e-6)
    assert not np.array_equal(after["norms"]["norm1"]["mean"], stats["norms"]["norm1"]["mean"])


def tokenizer_config(**fields: Any) -> dict[str, Any]:
    section = dict(weight=0.5, discriminator=PATCH) | fields
    config = toy_config("raster")
    return config | {"objective": dict(name="tokenizer", adversarial=section)}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(weight=-1.0), ["adversarial.weight", "-1.0"]),
        (dict(start=-1), ["adversarial.start", "-1"]),
        (dict(start=1.5), ["adversarial.start", "1.5", "int"]),
        (dict(lecam_decay=1.0), ["adversarial.lecam_decay", "1.0"]),
        (dict(max_adaptive=0.0), ["adversarial.max_adaptive", "0.0"]),
        (dict(loss="wasserstein"), ["adversarial.loss", "'wasserstein'", "'hinge'"]),
        (dict(generator_loss="ns"), ["adversarial.generator_loss", "'ns'", "'non_saturating'"]),
        (dict(surplus=1), ["adversarial.surplus", "max_adaptive"]),
        (dict(discriminator=PATCH | dict(layers=2)), ["discriminator.layers is 2", "12 pixels"]),
        (dict(discriminator=PATCH | dict(channels=0)), ["discriminator.channels is 0"]),
        (dict(discriminator=PATCH | dict(name="dino")), ["discriminator.name", "'dino'"]),
        (dict(discriminator=dict(name="pooled", groups=3)), ["groups is 3", "channels 128"]),
        (dict(discriminator=dict(name="stylegan", width=0)), ["discriminator.width is 0"]),
    ],
)
@pytest.mark.parametrize("weight", ["on", "off"])
def test_wrong_fields_are_refused_by_name(fields, parts, weight):
    """Where the weight is 0 too."""
    if weight == "off" and "weight" not in fields:
        fields = fields | {"weight": 0.0}
    with pytest.raises(ValueError) as error:
        build_objective(tokenizer_config(**fields))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_weight_zero_is_no_discriminator():
    def built(config: Any) -> Any:
        return build_objective(config)

    assert built(tokenizer_config(weight=0.0)).adversary is None
    without = tokenizer_config()
    del without["objective"]["adversarial"]
    assert built(without).adversary is None
    assert built(tokenizer_config(weight=0.0)) == built(without)
    assert isinstance(built(tokenizer_config()).adversary, Adversary)
