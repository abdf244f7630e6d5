"""The perceptual and the Charbonnier term: values, gradients, frozen weights, what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.evaluation.classifier import load_classifier
from ar_jax.io.network_file import read_network, write_network
from ar_jax.nn.classifier import ConvClassifier, stage_features
from ar_jax.nn.lpips import lpips, param_shapes
from ar_jax.objectives.perceptual import frozen_shapes, perceptual_distance
from ar_jax.objectives.reconstruction import charbonnier
from ar_jax.train.perceptual import SHIPPED, load_perceptual
from tests.modules import apply
from tests.objective_calls import close, gradient_of, loss_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import masked_config
from tests.toy_systems import toy_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = {"image_size": 28, "multipliers": (1, 1, 1)}  # codes of 7 x 7
OBJECTIVES = ("vq", "multiscale", "kl")


def objective_of(kind: str, autoencoder: Any = SIZE, **fields: Any) -> Any:
    """A toy tokenizer's for images of 28 x 28, or what ``autoencoder`` says."""
    if kind == "kl":
        config = masked_config()
        config["tokenizer"]["autoencoder"] |= autoencoder
        return build_objective(config | {"objective": dict(name="kl_tokenizer", **fields)})
    scales: Any = {"tokenizer": {"scales": (1, 7)}} if kind == "multiscale" else {}
    name = "next_scale" if kind == "multiscale" else "raster"
    config = toy_config(name, autoencoder=autoencoder, **scales)
    return build_objective(config | {"objective": dict(name="tokenizer", **fields)})


def drawn_params(objective: Any) -> Any:
    """Normal draws, sooner made than initialised."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["vq", pytest.param("multiscale", marks=slow), pytest.param("kl", marks=slow)]
)
def test_terms_are_summands(kind):
    """Of the loss; padding rows do not count."""
    terms = dict(perceptual=0.5, perceptual_network="classifier", charbonnier=0.25)
    objective = objective_of(kind, **terms)
    params = drawn_params(objective)
    stats, frozen = objective.init_stats(params), load_perceptual(objective, "nowhere")
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    batch = {"image": jnp.asarray(images), "mask": jnp.asarray([1.0, 1.0, 0.0])}
    loss, aux = loss_of(objective, params, stats, frozen, batch)
    originals = jnp.asarray(images[:2], jnp.float32) / 127.5 - 1
    reconstruction = apply(objective.tokenizer, params, originals)[0]
    measure = jax.jit(functools.partial(perceptual_distance, network="classifier"))
    distance = measure(frozen, originals, reconstruction)
    close(aux.metrics["perceptual"], distance.mean())
    smooth = np.sqrt(np.square(np.asarray(reconstruction - originals)) + 1e-6).mean()
    close(aux.metrics["charbonnier"], smooth)
    assert float(distance.mean()) > 0.1
    weights = dict(l2=1, perceptual=0.5, charbonnier=0.25)
    weights |= dict(kl=1e-6 / 784) if kind == "kl" else dict(codebook_loss=1, commitment_loss=0.25)
    close(loss, sum(weight * aux.metrics[name] for name, weight in weights.items()))


@pytest.mark.slow
def test_the_term_lowers_its_distance():
    """A step against the gradient of the loss: it flows through the frozen network."""
    objective = objective_of("vq", l2=0.0, perceptual=1.0, perceptual_network="classifier")
    params = drawn_params(objective)
    stats, frozen = objective.init_stats(params), load_perceptual(objective, "nowhere")
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    batch = {"image": jnp.asarray(images)}
    gradient, aux = gradient_of(objective, params, stats, frozen, batch)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
    _, after = loss_of(objective, moved, stats, frozen, batch)
    assert after.metrics["perceptual"] < aux.metrics["perceptual"]


def test_charbonnier():
    error = np.array([0.0, 3e-3, -4.0])
    close(charbonnier(jnp.asarray(error), 4e-3), [4e-3, 5e-3, 4.000002])
    with pytest.raises(ValueError, match="objective.charbonnier_epsilon is 0"):
        objective_of("vq", charbonnier_epsilon=0.0)


def test_the_shipped_classifier_is_the_one_of_the_objective():
    """Its features at the end are those of the module, and equal images have no distance."""
    objective = objective_of("vq", perceptual=1.0, perceptual_network="classifier")
    frozen = load_perceptual(objective, "nowhere")
    shapes = frozen_shapes(objective)
    assert jax.tree.map(jnp.shape, frozen) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    drawn = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1)).astype(np.uint8)
    judged = load_classifier()(drawn, batch_size=2).features
    images = jnp.asarray(drawn, jnp.float32) / 127.5 - 1
    last = stage_features(ConvClassifier(), frozen["perceptual"], images)[-1]
    layer = frozen["perceptual"]["features"]
    found = np.asarray(last).reshape(2, -1) @ layer["kernel"] + layer["bias"]
    close(np.maximum(found, 0), judged, rtol=1e-3, atol=1e-3)
    same = perceptual_distance(frozen, images, images, network="classifier")
    np.testing.assert_array_equal(same, 0)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vgg", "alexnet"])
def test_lpips_of_a_file(network, tmp_path):
    """From the file to the distance, the copy in the workdir, and a file of the other network."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: np.abs(0.05 * rng.standard_normal(s.shape)).astype(np.float32),
        param_shapes(network),
    )
    file = tmp_path / "weights.npz"
    write_network(file, params, {"family": "lpips", "network": network})
    fields = dict(perceptual=1.0, perceptual_network=network, perceptual_weights=str(file))
    large = {"image_size": 32, "image_channels": 3, "multipliers": (1, 1, 1)}
    objective = objective_of("vq", large, **fields)
    frozen = load_perceptual(objective, tmp_path)
    images = jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    found = perceptual_distance(frozen, images, -images, network=network)
    close(found, lpips(params, images, -images, network=network))
    other = "alexnet" if network == "vgg" else "vgg"
    wrong = objective_of("vq", large, **fields | {"perceptual_network": other})
    with pytest.raises(ValueError, match=f"is of the network '{network}', not {other}"):
        load_perceptual(wrong, tmp_path)


COLOUR = {"image_size": 32, "image_channels": 3, "multipliers": (1, 1, 1)}


def test_a_term_without_weights_is_refused(tmp_path):
    """At build, or before anything is trained; the message says where they come from."""
    said = r"get vgg16-397923af.pth, torchvision's ImageNet weights(.|\n)*--family=lpips "
    said += r"--files=vgg16-397923af.pth,vgg.pth(.|\n)*--config.objective.perceptual=0"
    for kind in OBJECTIVES:
        large = COLOUR if kind != "multiscale" else COLOUR | {"image_size": 28}
        with pytest.raises(
            ValueError, match=rf"objective.perceptual_weights is empty. (.|\n)*{said}"
        ):
            objective_of(kind, large, perceptual=1.0)
        missing = str(tmp_path / "missing.npz")
        objective = objective_of(kind, large, perceptual=1.0, perceptual_weights=missing)
        with pytest.raises(ValueError, match=rf"missing.npz: no such file. (.|\n)*{said}"):
            load_perceptual(objective, tmp_path)
    assert load_perceptual(objective_of("vq"), tmp_path) == {}


@pytest.mark.parametrize(
    ("autoencoder", "fields", "said"),
    [
        (COLOUR, dict(perceptual_network="squeeze"), "perceptual_network is 'squeeze'; it must be"),
        (COLOUR, dict(perceptual_network="classifier"), r"knows images \(28, 28, 1\), but config"),
        ({**COLOUR, "image_channels": 4}, {}, "'vgg': images have 4 channels"),
        (SIZE, dict(perceptual_network="alexnet"), "28x28 pixels; 'alexnet' takes at least 31x31"),
        (COLOUR, dict(perceptual=-1.0), "objective.perceptual is -1.0; it must be >= 0"),
    ],
)
def test_fields_that_do_not_fit(autoencoder, fields, said):
    with pytest.raises(ValueError, match=said):
        objective_of("vq", autoencoder, **{"perceptual": 1.0, **fields})


def test_the_shipped_file_is_a_network_file():
    about, params = read_network(SHIPPED)
    assert about == {} and "down_0" in params
