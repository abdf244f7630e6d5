"""Diffusion of one code: respacing, the exact sampler of known densities, and the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.heads.diffusion import DiffusionHead
from ar_jax.nn.diffusion import Diffusion, binned_log_likelihood, normal_kl, respace
from tests.modules import init

COUNT = 20_000
# A mixture on the line: weights, means, deviations.
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.3, 0.5])


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("5", (0, 2, 4, 7, 9)),  # 2.25, 4.5 (to even), 6.75
        ("1", (0,)),
        ("10", tuple(range(10))),
        ("2,3", (0, 4, 5, 7, 9)),
        ("ddim5", (0, 2, 4, 6, 8)),
    ],
)
def test_respacing(spacing, expected):
    assert respace(10, spacing) == expected


@pytest.mark.parametrize("spacing", ["11", "ddim7", "6,1", "0", "a", "ddim", "3,"])
def test_impossible_respacing_is_an_error(spacing):
    with pytest.raises(ValueError, match="spacing"):
        respace(10, spacing)


def test_respaced_process_has_the_same_marginals():
    whole, part = Diffusion.training(1000), Diffusion.respaced(1000, "37")
    kept = whole.alpha_bars[list(part.timesteps)]
    np.testing.assert_allclose(part.alpha_bars, kept, rtol=1e-9)
    assert part.posterior_variance[0] == 0 and np.isfinite(part.posterior_log_variance).all()


def score(process: Diffusion, x, t):
    """The mixture's exact noise estimate: -sqrt(1 - a) times the score of x_t's density."""
    bar = jnp.asarray(process.alpha_bars, jnp.float32)[t]
    means = jnp.sqrt(bar) * jnp.asarray(MEANS, jnp.float32)[None]
    variances = bar * jnp.asarray(STDS**2, jnp.float32)[None] + 1 - bar
    logits = jnp.log(jnp.asarray(WEIGHTS, jnp.float32))[None] - 0.5 * jnp.log(variances)
    logits = logits - 0.5 * jnp.square(x - means) / variances  # x [N, 1] -> [N, 2]
    pull = (jax.nn.softmax(logits, -1) * (means - x) / variances).sum(-1, keepdims=True)
    return -jnp.sqrt(1 - bar) * pull


def draw(temperature: float, spoil: float = 0.0):
    """Samples [N] of the mixture, by ancestral steps with the exact noise estimate."""
    process = Diffusion.training(1000)
    respaced = Diffusion.respaced(1000, "200")
    start_key, key = jax.random.split(jax.random.key(0))

    def predict(x, t):
        estimate = (1 + spoil) * score(process, x, t)
        return estimate, jnp.full_like(x, -1.0)  # the posterior's own variance

    def noise(n):
        return jax.random.normal(jax.random.fold_in(key, n), (COUNT, 1))

    # x_T of the last step is standard normal but for the signal's trace.
    start = jax.random.normal(start_key, (COUNT, 1))
    run = jax.jit(lambda x: respaced.sample(predict, x, noise, temperature))
    return np.asarray(run(start))[:, 0]


def moments(x) -> np.ndarray:
    """Share, mean and deviation of the right component, mean and deviation of the left one."""
    right = x > -0.5
    return np.array(
        [right.mean(), x[right].mean(), x[right].std(), x[~right].mean(), x[~right].std()]
    )


EXPECTED = np.array([0.7, 1.0, 0.5, -1.5, 0.3])


def test_exact_estimates_sample_the_mixture():
    np.testing.assert_allclose(moments(draw(1.0)), EXPECTED, rtol=0.05)


def test_a_wrong_estimate_is_found():
    assert np.abs(moments(draw(1.0, spoil=0.1)) / EXPECTED - 1).max() > 0.05


def test_temperature_narrows():
    cold = moments(draw(0.7))
    assert cold[2] < 0.9 * EXPECTED[2] and cold[4] < 0.9 * EXPECTED[4]


def test_kl_and_bins():
    zero = jnp.zeros(1)
    assert float(normal_kl(zero, zero, zero, zero)[0]) == 0
    np.testing.assert_allclose(normal_kl(zero, zero, zero + 1, zero), 0.5, rtol=1e-6)
    # All bins between -1 and 1, the outer ones to infinity, hold all the mass.
    bins = jnp.asarray(np.linspace(-1, 1, 256), jnp.float32)
    mass = jnp.exp(binned_log_likelihood(bins, jnp.full(256, 0.3), jnp.full(256, -1.0)))
    np.testing.assert_allclose(mass.sum(), 1.0, atol=1e-5)


@pytest.fixture(scope="module")
def trained():
    """A small head that has learned N(m(h), s(h)) for two hidden states, in a few hundred steps."""
    import optax

    head = DiffusionHead(code_width=2, width=48, depth=1, steps=100, sampling_steps="ddim25")
    hidden = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    params = init(head, jax.random.key(0), hidden, hidden, jnp.zeros(2, jnp.int32))
    mean = jnp.asarray([[1.0, -0.5], [-1.0, 0.5]])
    std = jnp.asarray([[0.2, 0.5], [0.6, 0.3]])
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, 1500))

    def loss(params, key):
        class_key, code_key, *head_keys = jax.random.split(key, 4)
        which = jax.random.randint(class_key, (512,), 0, 2)
        codes = mean[which] + std[which] * jax.random.normal(code_key, (512, 2))
        draws = head.draws(jnp.stack(head_keys), (512,))
        losses, _ = head.apply({"params": params}, hidden[which], codes, draws, method="loss")
        return losses.mean()

    @jax.jit
    def train(params):
        def step(carry, i):
            params, state = carry
            grads = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(1), i))
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1500))[0][0]

    return head, train(params), hidden, mean, std


def head_samples(trained, scale: float = 1.0, temperature: float = 1.0):
    head, params, hidden, *_ = trained
    rows = jnp.repeat(hidden, 4000, axis=0)
    null = jnp.repeat(hidden[::-1], 4000, axis=0) if scale != 1.0 else None
    noise = jax.vmap(head.noise)(jax.random.split(jax.random.key(2), len(rows)))
    assert noise["start"].shape == rows.shape and noise["steps"].shape == (len(rows), 25, 2)
    run = jax.jit(
        lambda rows, null: head.draw(
            params, rows, noise, null=null, scale=scale, temperature=temperature
        )
    )
    return np.asarray(run(rows, null)).reshape(2, 4000, 2)


@pytest.mark.slow  # trains
def test_a_trained_head_samples_what_it_saw(trained):
    *_, mean, std = trained
    drawn = head_samples(trained)
    np.testing.assert_allclose(drawn.mean(1), mean, atol=0.08)
    np.testing.assert_allclose(drawn.std(1), std, rtol=0.2)


def test_guidance_leaves_the_null_condition_and_temperature_narrows(trained):
    *_, mean, std = trained
    apart = head_samples(trained, scale=1.5).mean(1)
    assert (np.abs(apart) > 1.1 * np.abs(np.asarray(mean))).all()
    assert (head_samples(trained, temperature=0.5).std(1) < 0.9 * np.asarray(std)).all()
    # Without weight on the null condition its hidden state plays no part.
    np.testing.assert_allclose(
        head_samples(trained, scale=1.0 + 1e-7), head_samples(trained), atol=1e-3
    )


def test_the_bound_teaches_the_variance_only(trained):
    head, params, hidden, *_ = trained
    codes, t, noise = hidden * 0.3, jnp.asarray([40, 7]), jnp.ones((2, 2))

    def bound(params):
        draws = {"times": t, "noise": noise}
        parts = head.apply({"params": params}, hidden, codes, draws, method="loss")[1]
        return parts["bound_bits"].sum()

    bias = jax.jit(jax.grad(bound))(params)["output"]["bias"]
    np.testing.assert_array_equal(bias[:2], 0.0)  # of the noise estimate
    assert (np.abs(bias[2:]) > 0).all()
