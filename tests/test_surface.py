"""Quadratic response surfaces, against closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tvmerge.samplers.surface import (
    LINEAR,
    NOISE_SHARE,
    NOISE_TRIALS,
    RADIUS,
    SIGNAL_LOG_SD,
    features,
    fit,
    highest,
    misfit,
)

Floats = NDArray[np.float64]


def bowl(z: Floats, top: Floats, *, scale: float, height: float = 0.7) -> Floats:
    lowered: Floats = height - scale * ((z - top) ** 2).sum(axis=1)
    return lowered


def trials(n: int, k: int, *, scale: float, noise: float, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    z, top = np.clip(rng.standard_normal((n, k)), -2.4, 2.4), rng.uniform(-1.5, 1.5, k)
    return z, bowl(z, top, scale=scale) + noise * rng.standard_normal(n), top


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_posterior_is_that_of_the_textbook(k: int) -> None:
    z, scores, _ = trials(40, k, scale=0.02, noise=0.03)
    surface = fit(z, scores, noise=0.03)
    phi, sd = features(z), surface.noise * surface.prior_sd
    # Bishop 2006, equations 3.50 and 3.51, with a precision and no Cholesky factor.
    precision = phi.T @ phi / 0.03**2 + np.diag(sd**-2.0)
    right = phi.T @ (scores - surface.offset) / 0.03**2 + surface.noise * surface.prior_mean / sd**2
    assert np.allclose(surface.mean, np.linalg.solve(precision, right), atol=1e-8)
    mean, spread = surface.predict(z[:3])
    assert np.allclose(mean, surface.offset + phi[:3] @ surface.mean)
    assert np.allclose(spread**2, np.diag(phi[:3] @ np.linalg.inv(precision) @ phi[:3].T))


def test_the_evidence_is_that_of_the_scores_together() -> None:
    z, scores, _ = trials(30, 3, scale=0.02, noise=0.03)
    surface = fit(z, scores, noise=0.03)
    phi = features(z)
    covariance = np.eye(30) + phi * surface.prior_sd**2 @ phi.T
    error = (scores - surface.offset) / 0.03 - phi @ surface.prior_mean
    density = -0.5 * error @ np.linalg.solve(covariance, error) - 0.5 * np.linalg.slogdet(covariance)[1]
    # What is believed of noise and signal without a trial.
    floor = NOISE_TRIALS * (NOISE_SHARE * scores.std()) ** 2
    prior = -0.5 * floor / 0.03**2 + (30 + NOISE_TRIALS) * np.log(1 / 0.03)
    prior -= 0.5 * (np.log(surface.prior_sd[1] / LINEAR) / SIGNAL_LOG_SD) ** 2
    assert surface.evidence == pytest.approx(density + prior, abs=1e-4)


def test_the_noise_is_that_of_the_highest_evidence() -> None:
    z, scores, _ = trials(30, 3, scale=0.02, noise=0.03)
    free = fit(z, scores)
    assert all(fit(z, scores, noise=free.noise * factor).evidence < free.evidence for factor in (0.9, 1.1))


def test_draws_have_the_posterior_s_mean_and_spread() -> None:
    z, scores, _ = trials(40, 2, scale=0.02, noise=0.03)
    surface = fit(z, scores)
    rng = np.random.default_rng(0)
    drawn = np.array([features(z[:1]) @ surface.draw(rng) + surface.offset for _ in range(4000)])
    mean, sd = surface.predict(z[:1])
    assert drawn.mean() == pytest.approx(mean[0], abs=4 * sd[0] / 4000**0.5)
    assert drawn.std() == pytest.approx(sd[0], rel=0.1)


@pytest.mark.parametrize(("scale", "noise"), [(0.02, 0.035), (0.02, 0.0), (5.0, 0.4), (2e-4, 1e-4), (300.0, 20.0)])
def test_scores_of_any_scale_are_understood(scale: float, noise: float) -> None:
    z, scores, top = trials(150, 4, scale=scale, noise=noise)
    surface = fit(z, scores)
    assert surface.noise == pytest.approx(noise, rel=0.25, abs=0.2 * scale)
    box = np.full(4, RADIUS)
    assert highest(surface.mean, low=-box, high=box, starts=np.zeros((1, 4))) == pytest.approx(top, abs=0.5)


def test_the_interval_holds_the_true_height_as_often_as_it_says() -> None:
    held = []
    for seed in range(100):
        z, scores, top = trials(40, 3, scale=0.02, noise=0.03, seed=seed)
        mean, sd = fit(z, scores).predict(top[None])
        held.append(abs(mean[0] - 0.7) < 1.96 * sd[0])
    assert 0.88 <= np.mean(held) <= 1.0


@given(st.integers(1, 12), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_nothing_is_ever_nan(n: int, offset: float, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = 4 * rng.standard_normal((n, 3))
    z[n // 2 :] = z[0]
    surface = fit(z, offset + scale * rng.standard_normal(n))
    found = highest(surface.draw(rng), low=np.full(3, -2.0), high=np.full(3, 2.0), starts=np.zeros((1, 3)))
    for values in (*surface.predict(z), found, np.array(misfit(surface, z, offset + z[:, 0]))):
        assert np.isfinite(values).all()
    assert surface.noise > 0


@pytest.mark.parametrize("seed", range(10))
def test_the_highest_point_is_no_lower_than_any_of_a_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    coefficients = rng.standard_normal(10)
    low, high = -rng.uniform(0.5, 2, 3), rng.uniform(0.5, 2, 3)
    corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
    found = highest(coefficients, low=low, high=high, starts=np.vstack([corners, np.zeros(3)]))
    grid = np.array(list(itertools.product(*(np.linspace(a, b, 15) for a, b in zip(low, high, strict=True)))))
    assert (found >= low).all()
    assert (found <= high).all()
    assert features(found[None]) @ coefficients >= (features(grid) @ coefficients).max() - 1e-2


def test_a_quadratic_fits_and_a_cliff_does_not() -> None:
    fits, breaks = [], []
    for seed in range(8):
        z, scores, _ = trials(80, 3, scale=0.01, noise=0.03, seed=seed)
        fits.append(misfit(fit(z, scores), z, scores))
        scores = scores - 0.2 * (z[:, 0] > 0.3)
        breaks.append(misfit(fit(z, scores), z, scores))
    assert np.median(fits) < 2
    assert max(fits) < 4
    assert np.median(breaks) > 4


def test_distant_trials_count_less() -> None:
    z = np.array([[0.0], [0.5], [-0.5], [6.0]])
    scores = np.array([0.7, 0.69, 0.69, 0.1])
    local = fit(z, scores, nearness=np.array([1.0, 1.0, 1.0, 1e-6]))
    assert local.predict(np.zeros((1, 1)))[0][0] == pytest.approx(0.69, abs=0.02)
