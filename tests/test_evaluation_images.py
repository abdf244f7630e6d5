"""MSE, PSNR and SSIM against an independent implementation; code and likelihood counters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats

from ar_jax.evaluation.codebook import CodeCounter, codebook_result, perplexity
from ar_jax.evaluation.likelihood import LikelihoodMeter
from ar_jax.evaluation.reconstruction import (
    ReconstructionMeter,
    evaluate_reconstruction,
    mse,
    psnr,
    ssim,
    to_uint8,
)


def pair(shape: tuple[int, ...], noise: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = rng.uniform(0, 255, shape).cumsum(axis=1) % 256
    return smooth.astype(np.uint8), np.clip(smooth + rng.normal(0, noise, shape), 0, 255).astype(
        np.uint8
    )


def ssim_of_channel(x: np.ndarray, y: np.ndarray, sigma: float = 1.5) -> float:
    """Wang et al. 2004, equation 13, with a 2-D window and centred moments."""
    x, y = x.astype(np.float64) / 255, y.astype(np.float64) / 255
    grid = np.arange(11) - 5
    window = np.exp(-(grid[:, None] ** 2 + grid[None, :] ** 2) / (2 * sigma**2))
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mean_a) ** 2).sum()
            var_b = (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_a * mean_b + c1)
                * (2 * cov + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (1, 13, 17, 3), (1, 11, 11, 1)])
def test_ssim_agrees_with_the_definition(shape: tuple[int, ...]) -> None:
    x, y = pair(shape)
    want = [
        np.mean([ssim_of_channel(x[n, ..., c], y[n, ..., c]) for c in range(shape[-1])])
        for n in range(shape[0])
    ]
    np.testing.assert_allclose(ssim(x, y), want, rtol=1e-10)
    wrong = ssim_of_channel(x[0, ..., 0], y[0, ..., 0], sigma=1.6)
    assert abs(wrong - ssim_of_channel(x[0, ..., 0], y[0, ..., 0])) > 1e-5
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=1e-12)
    np.testing.assert_allclose(ssim(x, y), ssim(y, x), rtol=1e-12)


def test_ssim_of_a_larger_image_by_scipy_convolution() -> None:
    x, y = (a[0, ..., 0].astype(np.float64) for a in pair((1, 64, 48, 1)))
    window = np.outer(*[scipy.signal.windows.gaussian(11, 1.5)] * 2)
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        return scipy.signal.convolve2d(image, window, mode="valid")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    want = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    got = ssim(*(a.astype(np.uint8)[None, ..., None] for a in (x, y)))
    np.testing.assert_allclose(got, [want], rtol=1e-10)


def test_mse_and_psnr_of_known_errors() -> None:
    x = np.full((3, 12, 12, 2), 100, np.uint8)
    y = x.copy()
    y[1] += 51  # 0.2 of the range everywhere: 0.04, 13.98 dB
    y[2, :6] -= 51  # a half of it
    np.testing.assert_allclose(mse(x, y), [0.0, 0.04, 0.02], rtol=1e-12)
    np.testing.assert_allclose(psnr(x, y)[1:], [-10 * math.log10(0.04), -10 * math.log10(0.02)])
    assert psnr(x, y)[0] == math.inf
    result = evaluate_reconstruction(x[1:], y[1:])
    np.testing.assert_allclose(result.psnr, -5 * math.log10(0.04 * 0.02))
    np.testing.assert_allclose(result.psnr_of_mse, -10 * math.log10(0.03))
    assert result.psnr_of_mse < result.psnr
    exact = evaluate_reconstruction(x, x)
    assert (exact.mse, exact.psnr, exact.psnr_of_mse) == (0.0, math.inf, math.inf)


def test_a_meter_weighs_images_not_batches() -> None:
    x, y = pair((7, 14, 12, 3))
    meter = ReconstructionMeter()
    meter.add(x[:5], y[:5])
    meter.add(x[5:], y[5:])
    whole = evaluate_reconstruction(x, y, batch_size=3)
    got = meter.result()
    assert got.count == whole.count == 7 and got.ssim is not None
    np.testing.assert_allclose(
        [got.mse, got.psnr, got.psnr_of_mse, got.ssim],
        [mse(x, y).mean(), psnr(x, y).mean(), whole.psnr_of_mse, ssim(x, y).mean()],
        rtol=1e-12,
    )
    with pytest.raises(ValueError, match="no images"):
        ReconstructionMeter().result()
    small = evaluate_reconstruction(x[:, :10], y[:, :10])  # no window fits in ten rows
    assert small.ssim is None
    np.testing.assert_allclose(small.mse, mse(x[:, :10], y[:, :10]).mean())


def test_rounding_inverts_the_normalisation() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(codes.astype(np.float32) / 127.5 - 1), codes)
    np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0])), [0, 255])
    with pytest.raises(ValueError, match="dtype uint8"):
        to_uint8(codes)
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([np.nan]))


def test_reconstructions_that_are_refused() -> None:
    x, y = pair((2, 12, 12, 1))
    with pytest.raises(ValueError, match=r"10x12 pixels.*11x11"):
        ssim(x[:, :10], y[:, :10])
    with pytest.raises(ValueError, match="reconstructions: dtype float64"):
        mse(x, y / 255.0)
    with pytest.raises(ValueError, match="disagree"):
        mse(x, y[:1])
    with pytest.raises(ValueError, match=r"expected \[N, H, W, C\]"):
        mse(x[0], y[0])


def test_usage_and_perplexity_of_constructed_codes() -> None:
    # Steps of 1 and 4 codes, 8 entries. Step 0: entries 0 and 1 equally; step 1: 2..5 equally.
    counter = CodeCounter((1, 4), vocab_size=8)
    counter.add(np.array([[0, 2, 3, 4, 5], [1, 5, 4, 3, 2]], np.int32))
    counter.add(np.array([[0, 2, 3, 4, 5], [1, 5, 4, 3, 2]], np.int32))
    result = counter.result()
    assert result.codes.tolist() == [4, 16]
    np.testing.assert_allclose(result.usage, [2 / 8, 4 / 8])
    np.testing.assert_allclose(result.perplexity, [2.0, 4.0])
    assert result.overall_usage == 6 / 8
    frequencies = np.array([2, 2, 4, 4, 4, 4]) / 20
    np.testing.assert_allclose(result.overall_perplexity, np.exp(scipy.stats.entropy(frequencies)))
    np.testing.assert_array_equal(counter.counts.sum(axis=0)[[6, 7]], 0)
    skewed = np.array([7, 1, 0, 0])
    np.testing.assert_allclose(perplexity(skewed), np.exp(scipy.stats.entropy(skewed)))
    assert np.isnan(codebook_result(np.array([[0, 0], [1, 1]])).perplexity[0])


def test_codes_that_are_refused() -> None:
    counter = CodeCounter((1, 4), vocab_size=8)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), expected \[B, 5\].*\(1, 4\)"):
        counter.add(np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match="values from 0 to 8, but the codebook has 8"):
        counter.add(np.array([[0, 0, 0, 0, 8]]))
    with pytest.raises(ValueError, match="values from -1"):
        counter.add(np.array([[0, 0, 0, 0, -1]]))
    with pytest.raises(ValueError, match="dtype float64"):
        counter.add(np.zeros((2, 5)))
    with pytest.raises(ValueError, match="not all zero"):
        counter.result()
    with pytest.raises(ValueError, match="sizes"):
        CodeCounter((1, 0), vocab_size=8)


def test_likelihood_per_step_ignores_padding() -> None:
    rng = np.random.default_rng(0)
    nll, correct = rng.uniform(0, 5, (6, 5)), rng.random((6, 5)) < 0.3
    meter = LikelihoodMeter((1, 4))
    meter.add(nll[:4], correct[:4])
    padding = np.full((2, 5), np.nan)
    meter.add(
        np.concatenate([nll[4:], padding]),
        np.concatenate([correct[4:], np.ones((2, 5), bool)]),
        mask=np.array([1.0, 1.0, 0.0, 0.0]),
    )
    result = meter.result()
    assert result.count == 6
    np.testing.assert_allclose(result.nats_per_image, nll.sum(axis=1).mean())
    np.testing.assert_allclose(result.bits_per_code, nll.mean() / math.log(2))
    np.testing.assert_allclose(result.nll_per_step, [nll[:, 0].mean(), nll[:, 1:].mean()])
    np.testing.assert_allclose(
        result.accuracy_per_step, [correct[:, 0].mean(), correct[:, 1:].mean()]
    )
    np.testing.assert_allclose(result.accuracy, correct.mean())
    with pytest.raises(ValueError, match="NaN for image 6"):
        meter.add(padding, np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"expected \[B, 5\]"):
        meter.add(nll[:, :4], correct[:, :4])
    with pytest.raises(ValueError, match="mask"):
        meter.add(nll, correct, mask=np.ones(3))
