"""Editing: what is kept is kept bit for bit, the rest is drawn given it, one program for all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import schedules
from ar_jax.build import create_sampler
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.sampling import loop, refine
from ar_jax.sampling.edit import blend, code_mask, edit, source_codes
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.tokenizers.tokenizer import to_float, to_uint8
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import ENERGY, MIXTURE, masked_system
from tests.toy_masked_codes import masked_codes_system
from tests.toy_systems import toy_codes, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 6
CATEGORICAL = ["next_scale", "raster", "random"]
GROUPED = [
    pytest.param("instructed", marks=pytest.mark.slow),
    *("two_pass", "distant_groups", "masked_codes"),
]
GUIDED = Guidance(scale=2.0, kind="linear")
COND, KEYS = toy_labels(BATCH), image_keys(0, 0, BATCH)


@functools.cache
def sampler_of(name: str) -> Any:
    if name == "masked":
        return create_sampler(*masked_system(schedule=dict(iterations=2)))
    if name in ("masked_energy", "masked_mixture"):
        changes = ENERGY if name == "masked_energy" else MIXTURE
        return create_sampler(*masked_system(schedule=dict(iterations=2), **changes))
    if name == "masked_codes":
        return create_sampler(*masked_codes_system())
    if name == "distant_groups":
        groups = dict(name="distant_groups", grid=4, regions=4)
        return create_sampler(*toy_system("raster", backbone=dict(depth=1), schedule=groups))
    depth = 2 if name == "two_pass" else 1
    return create_sampler(*toy_system(name, backbone=dict(depth=depth)))


def some_images(seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return to_float(jnp.asarray(rng.integers(0, 256, (BATCH, 8, 8, 1)), jnp.uint8))


def some_mask(seed: int) -> np.ndarray:
    """Of no particular shape: about one cell in three is touched."""
    return np.random.default_rng(seed).random((BATCH, 8, 8)) < 0.1


@functools.cache
def edited(name: str) -> Any:
    return edit(sampler_of(name), some_images(), some_mask(0), COND, KEYS, guidance=GUIDED)


@pytest.mark.parametrize(
    "name",
    [
        *(*CATEGORICAL, "masked", *GROUPED),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("masked_energy", "masked_mixture")),
    ],
)
def test_kept_codes_are_the_sources_bit_for_bit(name):
    made, sampler = edited(name), sampler_of(name)
    keep, codes = np.asarray(made.keep), np.asarray(made.samples.codes)
    own = source_codes(sampler.system.tokenizer, sampler.params["tokenizer"], some_images())
    np.testing.assert_array_equal(made.given, own)
    assert codes.dtype == made.given.dtype
    assert codes[keep].tobytes() == np.asarray(made.given)[keep].tobytes()
    assert 0.2 < keep.mean() < 0.9 and (codes != np.asarray(made.given))[~keep].mean() > 0.5
    np.testing.assert_array_equal(made.samples.images, sampler.decode(made.samples.codes))


def noise_of(schedule: Any) -> jax.Array:
    """Gumbel noise [B, L, V] that the keys stand for, in the order of the draws."""
    drawn = [
        [
            jax.random.gumbel(jax.random.fold_in(key, step), (size, 8))
            for step, size in enumerate(schedule.sizes)
        ]
        for key in KEYS
    ]
    return jnp.stack([jnp.concatenate(steps) for steps in drawn])


@pytest.mark.parametrize(
    "name", ["next_scale", *(pytest.param(n, marks=pytest.mark.slow) for n in ("raster", "random"))]
)
def test_what_is_drawn_follows_what_is_kept(name):
    """Every code that is not kept is the one that its logits and its noise give."""
    sampler, rng = sampler_of(name), np.random.default_rng(3)
    system, length = sampler.system, sampler.system.schedule.length
    keep, rows = rng.random((BATCH, length)) < 0.5, np.arange(BATCH)[:, None]
    scale = GUIDED.scales(system.schedule.num_steps)[system.schedule.step_id][None, :, None]
    null = system.backbone.conditioner.null(COND)
    noise, run = noise_of(system.schedule), jax.jit(teacher_forced, static_argnums=0)
    drawn = []
    for seed in (5, 6):
        given = toy_codes(system, BATCH, seed)
        samples = sampler(COND, KEYS, given=given, keep=keep, guidance=GUIDED)
        order = samples.order
        taken = (rows, np.arange(length)[None] if order is None else order)
        codes = samples.codes[taken]  # in the order of the draws
        forced = (run(system, sampler.params, cond, codes, order) for cond in (COND, null))
        logits = system.head.guide(*forced, scale)
        expected = np.where(keep[taken], given[taken], (logits + noise).argmax(-1))
        np.testing.assert_array_equal(codes, expected)
        drawn.append(np.asarray(samples.codes)[~keep])
    assert (drawn[0] != drawn[1]).any()  # of the same noise, given other codes


@pytest.mark.parametrize("name", ["random", "masked", *GROUPED[:2], "masked_codes"])
def test_free_orders_take_kept_codes_first(name):
    made = edited(name)
    keep = np.take_along_axis(np.asarray(made.keep), np.asarray(made.samples.order), axis=1)
    count = np.asarray(made.keep).sum(1)
    np.testing.assert_array_equal(keep, np.arange(keep.shape[1])[None] < count[:, None])


@pytest.mark.parametrize("name", [*CATEGORICAL, "masked"])
def test_one_program_for_all_edits(name):
    program: Any = (refine if name == "masked" else loop).draw_codes
    edited(name)
    size = program._cache_size()
    for n in range(1, 20):
        knobs = Knobs(temperature=0.5 + n / 20)
        if name != "masked":
            knobs = Knobs(temperature=n % 4 / 2, top_k=n % 3, top_p=0.9 * (n % 2))
        edit(
            sampler_of(name),
            some_images(n),
            some_mask(n) if n % 3 else n % 2 == np.indices((8, 8)).sum(0) % 2,
            {"label": (COND["label"] + n) % 3},
            image_keys(n, 7, BATCH),
            keep_first=n % 3,
            coarse_share=n / 20,
            blend_pixels=True,
            feather=n % 4,
            knobs=knobs,
            guidance=Guidance(scale=1.5 + n / 10),
        )
    assert program._cache_size() == size


@pytest.mark.slow
def test_masked_sets_of_which_nothing_is_kept():
    sampler, nothing = sampler_of("masked"), jnp.zeros((BATCH, 16), bool)
    plain = sampler(COND, KEYS, guidance=GUIDED)
    none = sampler(COND, KEYS, guidance=GUIDED, given=some_latents(), keep=nothing)
    np.testing.assert_array_equal(none.order, plain.order)
    np.testing.assert_allclose(none.codes, plain.codes, rtol=1e-4, atol=1e-5)


def test_masked_sets_know_what_is_kept():
    sampler, every = sampler_of("masked"), jnp.ones((BATCH, 16), bool)
    whole = sampler(COND, KEYS, guidance=GUIDED, given=some_latents(), keep=every)
    np.testing.assert_array_equal(whole.codes, some_latents())
    # It decides what is drawn, though chance is the same.
    keep = jnp.broadcast_to(jnp.arange(16) < 5, (BATCH, 16))
    one, other = (
        sampler(COND, KEYS, guidance=GUIDED, given=given, keep=keep).codes[:, 5:]
        for given in (some_latents(), 1 - some_latents())
    )
    assert np.abs(np.asarray(one - other)).max() > 1e-3


def some_latents() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, 16, 2)), jnp.float32)


@pytest.mark.slow
def test_mixed_codes_keep_too():
    sampler = sampler_of("next_scale")
    given, keep = toy_codes(sampler.system, BATCH), np.arange(21) % 2 == 0
    keep = np.broadcast_to(keep, (BATCH, 21))
    codes = sampler(COND, KEYS, knobs=Knobs(smooth=True), given=given, keep=keep).codes
    np.testing.assert_array_equal(np.asarray(codes)[keep], np.asarray(given)[keep])
    assert (codes != given).any()


def test_codes_of_a_mask():
    schedule = schedules.next_scale(scales=(1, 2, 4))
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 1, 3] = True  # the cell (0, 1) of four by four

    def places(**fields: float) -> list[int]:
        return np.flatnonzero(code_mask(schedule, mask, **fields)[0]).tolist()

    assert places() == [5 + 1]  # a quarter of a 2x2 cell, a sixteenth of all
    assert places(coarse_share=0.2) == [1, 5 + 1]
    assert places(coarse_share=0) == [0, 1, 5 + 1]
    mask[0, 2, 0] = mask[0, 3, 3] = True  # three of four cells of the first quarter
    assert places() == [1, 5 + 1, 5 + 4, 5 + 5]
    assert code_mask(schedule, ~np.zeros((2, 8, 8), bool)).all()
    assert not code_mask(schedule, np.zeros((2, 8, 8), bool), 0).any()


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (8, 1)])
def test_a_cell_is_drawn_anew_if_any_of_its_pixels_is(grid):
    """Also of grids that do not divide the image."""
    rng = np.random.default_rng(0)
    mask = rng.random((4, 8, 8)) < 0.05
    found = code_mask(schedules.raster(grid=grid), mask).reshape(4, *grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            tall, wide = 8 / grid[0], 8 / grid[1]
            rows = slice(int(row * tall + 1e-9), int(np.ceil((row + 1) * tall - 1e-9)))
            columns = slice(int(column * wide + 1e-9), int(np.ceil((column + 1) * wide - 1e-9)))
            expected = mask[:, rows, columns].any((1, 2))
            np.testing.assert_array_equal(found[:, row, column], expected)


def test_pixels_outside_of_the_mask_can_be_kept():
    image, mask = some_images(), some_mask(0)
    settings: Any = dict(guidance=GUIDED, blend_pixels=True)
    made = edit(sampler_of("raster"), image, mask, COND, KEYS, **settings)
    plain = edited("raster").samples.images
    np.testing.assert_array_equal(made.samples.images, np.where(mask[..., None], plain, image))
    assert np.abs(np.asarray(plain - image))[~mask].max() > 0.01
    assert to_uint8(made.samples.images)[~mask].tobytes() == to_uint8(image)[~mask].tobytes()


def test_blended_pixels_fade_in():
    mask = np.zeros((1, 1, 9), bool)
    mask[..., 2:] = True
    source, made = jnp.full((1, 1, 9, 1), -1.0), jnp.ones((1, 1, 9, 1))
    for feather, first in ((0, [1.0]), (1, [0.0, 1.0]), (3, [-0.5, 0.0, 0.5, 1.0])):
        shown = np.asarray(blend(source, made, jnp.asarray(mask), feather))[0, 0, :, 0]
        expected = [-1, -1, *first, *[1.0] * (7 - len(first))]
        np.testing.assert_allclose(shown, expected, atol=1e-6)
    every = blend(source, made, jnp.ones((1, 1, 9), bool), 3)  # the image's border is none
    np.testing.assert_array_equal(every[:, :, 4:], made[:, :, 4:])


def test_the_first_parts_stay():
    """Scales of next-scale codes, rows of one grid."""
    whole = np.ones((8, 8), bool)
    for name, count, kept in (("next_scale", 2, 5), ("raster", 6, 6)):
        made = edit(
            sampler_of(name), some_images(), whole, COND, KEYS, guidance=GUIDED, keep_first=count
        )
        np.testing.assert_array_equal(made.keep.sum(1), [kept] * BATCH)
        assert made.keep[:, :kept].all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mask=np.ones((8, 7), bool)), ["mask is bool (8, 7)", "(6, 8, 8) or (8, 8)"]),
        (dict(mask=np.ones((8, 8))), ["mask is float64"]),
        (dict(image=some_images()[:3]), ["(3, 8, 8, 1)", "(6, 8, 8, 1)"]),
        (dict(image=jnp.zeros((BATCH, 8, 8, 3))), ["(6, 8, 8, 3)", "(6, 8, 8, 1)"]),
        (dict(image=jnp.zeros((BATCH, 8, 8, 1), jnp.uint8)), ["uint8", "[-1, 1]"]),
        (dict(keep_first=17), ["keep_first is 17", "between 0 and 16"]),
        (dict(coarse_share=1.0), ["coarse_share is 1.0"]),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    arguments: Any = dict(image=some_images(), mask=np.ones((8, 8), bool)) | change
    with pytest.raises(ValueError) as error:
        edit(sampler_of("raster"), cond=COND, keys=KEYS, **arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(given=jnp.zeros((BATCH, 16), int)), "given is given without keep"),
        (dict(keep=jnp.zeros((BATCH, 16), bool)), "keep is given without given"),
        (dict(given=jnp.zeros((BATCH, 15), int), keep=True), r"given has the shape \(6, 15\)"),
        (dict(given=jnp.zeros((BATCH, 16), int), keep=jnp.zeros(16)), r"keep is float32 \(16,\)"),
    ],
)
def test_a_sampler_refuses_half_of_it(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler_of("raster")(COND, KEYS, **arguments)
