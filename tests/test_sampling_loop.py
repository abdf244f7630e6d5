"""The cached sampler: what it draws depends on what it should, and on nothing else."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ar_jax.api import System
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, decode_codes, draw_codes, image_keys
from tests.modules import apply
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import CLASSES, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 8
GUIDED = Guidance(scale=2.5, kind="linear_excess")


@dataclasses.dataclass(frozen=True)
class Toy:
    system: System
    params: Any

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        return CachedSampler.create(self.system, self.params)

    def draw(self, count: int = BATCH, *, seed: int = 0, first: int = 0, **settings: Any):
        """Codes [count, L] of images first, first + 1, ...; classes in turn by image."""
        labels = {"label": (first + jnp.arange(count, dtype=jnp.int32)) % CLASSES}
        keys = None if "noise" in settings else image_keys(seed, first, count)
        return np.asarray(self.sampler(labels, keys, **settings).codes)

    def guided_logits(self, cond: Any, codes: Any, guidance: Guidance) -> jax.Array:
        """Teacher-forced."""
        null = self.system.backbone.conditioner.null(cond)
        run = functools.partial(_forced, self.system, self.params)
        logits, unconditional = run(cond, codes), run(null, codes)
        scales = guidance.scales(self.system.schedule.num_steps)
        scale = scales[self.system.schedule.step_id][None, :, None]
        return unconditional + scale * (logits - unconditional)


_forced = jax.jit(teacher_forced, static_argnums=0)


@pytest.fixture(scope="module", params=["next_scale", "raster"])
def toy(request) -> Toy:
    return Toy(*toy_system(request.param))


@pytest.fixture(scope="module")
def noise(toy) -> jax.Array:
    """Gumbel noise [B, L, V]."""
    rng = np.random.default_rng(0)
    shape = (BATCH, toy.system.schedule.length, toy.system.head.vocab_size)
    return jnp.asarray(rng.gumbel(size=shape), jnp.float32)


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize(
    "knobs",
    [
        Knobs(),
        Knobs(temperature=0.0),
        Knobs(temperature=0.7, top_k=5, top_p=0.8, min_p=0.02),
        Knobs(entropy_gain=2.0, entropy_width=0.7, entropy_floor=0.3),
    ],
    ids=["plain", "greedy", "filtered", "by entropy"],
)
def test_every_code_is_the_one_its_logits_and_noise_give(toy, noise, guidance, knobs):
    codes = toy.draw(noise=noise, knobs=knobs, guidance=guidance)
    logits = toy.guided_logits(toy_labels(BATCH), jnp.asarray(codes), guidance)
    perturbed = truncate(logits, knobs.as_arrays()) + (noise if knobs.temperature else 0.0)
    np.testing.assert_array_equal(codes, perturbed.argmax(-1))
    assert len(np.unique(codes)) > 2


@pytest.mark.slow
def test_a_temperature_of_its_own_for_every_step(toy, noise):
    schedule = toy.system.schedule
    factors = np.linspace(0.5, 1.5, schedule.num_steps)
    factors[-1] = 0.0  # greedy
    knobs = Knobs(temperature=0.8, step_temperatures=tuple(factors), top_k=6)
    codes = toy.draw(noise=noise, knobs=knobs)
    logits = toy.guided_logits(toy_labels(BATCH), jnp.asarray(codes), Guidance())
    for i in range(schedule.length):
        temperature = 0.8 * factors[schedule.step_id[i]]
        kept = truncate(logits[:, i], Knobs(temperature=temperature, top_k=6).as_arrays())
        perturbed = kept + (noise[:, i] if temperature else 0.0)
        np.testing.assert_array_equal(codes[:, i], perturbed.argmax(-1))
    assert (codes != toy.draw(noise=noise, knobs=Knobs(temperature=0.8, top_k=6))).any()


def test_an_image_depends_on_its_seed_and_index_alone(toy):
    alone = toy.draw(3, first=4, seed=7, guidance=GUIDED)
    together = toy.draw(BATCH, first=0, seed=7, guidance=GUIDED)
    np.testing.assert_array_equal(alone, together[4:7])
    assert (together != toy.draw(BATCH, first=0, seed=8, guidance=GUIDED)).any(1).all()
    # Three images of one class and seed differ.
    same_class = together[::CLASSES]
    assert len(np.unique(same_class, axis=0)) == len(same_class)


def test_greedy_is_deterministic_across_seeds_and_batch_sizes(toy):
    greedy = functools.partial(toy.draw, knobs=Knobs(temperature=0.0), guidance=GUIDED)
    codes = greedy()
    np.testing.assert_array_equal(codes, greedy(seed=11))
    np.testing.assert_array_equal(codes[:3], greedy(3, seed=5))
    np.testing.assert_array_equal(codes[3:6], codes[:3])  # the same three classes
    keyless = toy.sampler(toy_labels(BATCH), knobs=Knobs(temperature=0.0), guidance=GUIDED)
    np.testing.assert_array_equal(codes, keyless.codes)


def test_explicit_noise_reproduces_the_keys(toy):
    """Step s of an image draws from fold_in(key, s), [n_s, V]."""
    schedule, vocab_size = toy.system.schedule, toy.system.head.vocab_size
    drawn = [
        jnp.concatenate(
            [
                jax.random.gumbel(jax.random.fold_in(key, step), (size, vocab_size))
                for step, size in enumerate(schedule.sizes)
            ]
        )
        for key in image_keys(7, 2, BATCH)
    ]
    by_noise = toy.draw(first=2, seed=0, noise=jnp.stack(drawn), guidance=GUIDED)
    np.testing.assert_array_equal(by_noise, toy.draw(first=2, seed=7, guidance=GUIDED))


def test_one_program_for_all_settings(toy):
    programs: Any = draw_codes
    decoding: Any = decode_codes
    toy.draw(guidance=GUIDED)
    size, decoders = programs._cache_size(), decoding._cache_size()
    steps = toy.system.schedule.num_steps
    every = {"step_temperatures": (0.9,) * steps, "step_top_k": (3, 2) + (4,) * (steps - 2)}
    for seed, knobs, guidance in (
        (1, Knobs(temperature=0.0), GUIDED),
        (2, Knobs(temperature=0.5, top_k=3), Guidance(scale=1.3)),
        (3, Knobs(top_p=0.9, min_p=0.1), Guidance(scale=4.0, kind="power_cosine", power=2.0)),
        (4, Knobs(top_k=0), Guidance(scale=3, kind="linear", start=1, stop=2)),
        (5, Knobs(**every), Guidance(kind="steps", steps=(2.0,) * steps)),
        (6, Knobs(step_top_p=(0.8,) * steps, entropy_gain=2.5, entropy_floor=0.6), GUIDED),
    ):
        toy.draw(seed=seed, first=seed, knobs=knobs, guidance=guidance)
    assert (programs._cache_size(), decoding._cache_size()) == (size, decoders)
    toy.draw(BATCH + 1, guidance=GUIDED)  # the counts can tell
    assert (programs._cache_size(), decoding._cache_size()) == (size + 1, decoders + 1)


def test_scale_one_is_the_conditional_distribution(toy, noise):
    """A guided program whose only guided step is a no-op draws what the plain one does."""
    plain = toy.draw(noise=noise)
    last = toy.system.schedule.num_steps - 1
    guided = toy.draw(noise=noise, guidance=Guidance(scale=9.0, start=last))
    start = toy.system.schedule.starts[last]
    np.testing.assert_array_equal(guided[:, :start], plain[:, :start])
    assert (guided[:, start:] != plain[:, start:]).any()


def test_partial_decoding(toy, noise):
    labels, keys = toy_labels(BATCH), image_keys(0, 0, BATCH)
    samples = toy.sampler(labels, keys, noise=noise)
    np.testing.assert_array_equal(toy.sampler.decode(samples.codes), samples.images)
    steps = toy.system.schedule.num_steps
    np.testing.assert_array_equal(toy.sampler.decode(samples.codes, steps), samples.images)
    seen = toy.system.schedule.starts[2]
    other = samples.codes.at[:, seen:].set((samples.codes[:, seen:] + 1) % 8)
    early = toy.sampler.decode(samples.codes, 2)
    np.testing.assert_array_equal(early, toy.sampler.decode(other, 2))
    assert np.abs(early - samples.images).max() > 1e-3
    assert samples.images.shape == (BATCH, *toy.system.tokenizer.image_shape)
    image = apply(toy.system.tokenizer, toy.params["tokenizer"], samples.codes, method="decode")
    np.testing.assert_allclose(samples.images, image, atol=1e-6)


@pytest.mark.slow  # compiles for eight devices
def test_eight_devices_draw_what_one_does(toy):
    labels, keys = toy_labels(BATCH), image_keys(3, 0, BATCH)
    one = toy.sampler(labels, keys, guidance=GUIDED)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(toy.params, NamedSharding(mesh, PartitionSpec()))
    sampler = CachedSampler.create(toy.system, params)
    labels, keys = jax.device_put((labels, keys), rows)
    eight = sampler(labels, keys, guidance=GUIDED)
    assert len(eight.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(one.codes, eight.codes)
    np.testing.assert_allclose(one.images, eight.images, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(noise=jnp.zeros((BATCH, 5, 8))), ["noise", "(8, 5, 8)", "(8, 16)"]),
        (dict(keys=image_keys(0, 0, 3)), ["keys", "3", "8"]),
        (dict(keys=None), ["neither keys nor noise", "temperature 1.0", "one key an image"]),
        (dict(knobs=Knobs(smooth=True)), ["sampling.smooth=True", "set it to False"]),
        (dict(knobs=Knobs(step_temperatures=(1.0, 0.5))), ["step_temperatures has 2", "16 steps"]),
        (dict(knobs=Knobs(step_temperatures=(-1.0,) * 16)), ["step_temperatures", "-1.0", ">= 0"]),
        (dict(knobs=Knobs(step_top_k=(1, 2))), ["sampling.step_top_k has 2", "16 steps"]),
        (dict(knobs=Knobs(smooth=2)), ["sampling.smooth is 2"]),  # type: ignore[arg-type]
    ],
)
def test_errors(change, words):
    sampler = Toy(*toy_system("raster")).sampler
    arguments: dict[str, Any] = dict(keys=image_keys(0, 0, BATCH)) | change
    with pytest.raises(ValueError) as error:
        sampler(toy_labels(BATCH), **arguments)
    for word in words:
        assert word in str(error.value)
