"""A Bayesian quadratic response surface over a few coordinates: what a score is believed to be at any point.

score = a + b·z + Σ q_k z_k² + Σ x_jk z_j z_k + noise, with independent Gaussian priors over the coefficients: linear
regression with a closed form (Bishop 2006, Pattern Recognition and Machine Learning, section 3.3), on the surfaces of
Box and Wilson 1951. A draw from the posterior is a surface too, whose highest point is what Thompson sampling tries
(Thompson 1933; Russo et al. 2018, A Tutorial on Thompson Sampling, arXiv:1707.02038).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["RADIUS", "Surface", "fit", "highest", "misfit", "squared_distances"]

Floats = npt.NDArray[np.float64]

#: Prior of the coefficients in units of the noise, k from 1: b_k sd LINEAR/√k, q_k mean -QUADRATIC/k and sd the same,
#: x_jk sd CROSS/√(jk): accuracies that move by 0.03, 0.01 and 0.01 where a trial's noise is 0.035.
LINEAR, QUADRATIC, CROSS = 0.03 / 0.035, 0.01 / 0.035, 0.01 / 0.035
INTERCEPT = 1e3
#: How much more than that a score may move, tried in turn; its logarithm's prior is normal around 0.
SIGNALS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0, 128.0, 512.0)
SIGNAL_LOG_SD = math.log(3.0)
#: What is known of the noise without a trial, as an inverse gamma: so many trials, and their noise as a share of the
#: scores' spread.
NOISE_TRIALS, NOISE_SHARE = 2.0, 0.3
#: The rival of a surface: lengths of its rest, its variance and that of the noise in units of the fitted noise's.
REST_LENGTHS, REST_VARIANCES, NOISE_SHARES = (1.0, 2.0), (0.5, 2.0), (0.6, 1.0)
RECENT = 200
#: Coordinates, in prior standard deviations, up to which a surface is believed to be quadratic.
RADIUS = 2.5


@dataclass(frozen=True)
class Surface:
    """A posterior over surfaces of k coordinates; p = 1 + 2k + k(k-1)/2 coefficients."""

    k: int
    offset: float  # the mean of the scores, which the intercept is counted from
    noise: float  # standard deviation of a trial's score
    mean: Floats  # (p,)
    root: Floats  # (p, p), upper triangular, its transpose times itself the precision in units of the noise
    prior_mean: Floats  # (p,), in units of the noise
    prior_sd: Floats  # (p,)
    evidence: float  # log probability density of the scores

    def predict(self, z: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the score without noise, `(n,)` each, at `(n, k)`."""
        phi = features(z)
        spread = np.linalg.solve(self.root.T, phi.T)
        return self.offset + phi @ self.mean, self.noise * np.sqrt((spread**2).sum(axis=0))

    def differences(self, z: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the score without noise less that at the origin, `(n,)` each, at `(n, k)`."""
        phi = features(z) - features(np.zeros((1, self.k)))
        spread = np.linalg.solve(self.root.T, phi.T)
        return phi @ self.mean, self.noise * np.sqrt((spread**2).sum(axis=0))

    def draw(self, generator: np.random.Generator) -> Floats:
        """Coefficients `(p,)` of one surface that may be the true one."""
        normal = generator.standard_normal(len(self.mean))
        drawn: Floats = self.mean + self.noise * np.linalg.solve(self.root, normal)
        return drawn


def features(z: Floats) -> Floats:
    """1, z, z², z_j z_k: `(n, k)` → `(n, p)`."""
    i, j = np.triu_indices(z.shape[1], 1)
    return np.hstack([np.ones((len(z), 1)), z, z**2, z[:, i] * z[:, j]])


def _prior(k: int, signal: float) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the coefficients, `(p,)` each, in units of the noise, times the signal."""
    rank = np.arange(1.0, k + 1)
    i, j = np.triu_indices(k, 1)
    moving = [LINEAR / np.sqrt(rank), QUADRATIC / rank, CROSS / np.sqrt(rank[i] * rank[j])]
    sd: Floats = np.concatenate([[INTERCEPT], *(signal * each for each in moving)])
    mean: Floats = np.concatenate([np.zeros(1 + k), -signal * QUADRATIC / rank, np.zeros(len(i))])
    return mean, sd


def fit(z: Floats, scores: Floats, *, noise: float | None = None, nearness: Floats | None = None) -> Surface:
    """The posterior, at the noise and the scale of the signal of the highest evidence.

    Both are taken from the trials, as scores may be shares, ratings or logarithms: for each scale in SIGNALS the noise
    that maximises the evidence has a closed form, as all coefficients are counted in it.

    Args:
        z: `(n, k)`, n > 0.
        scores: `(n,)`.
        noise: standard deviation of a score, if it is known.
        nearness: `(n,)` in (0, 1]: a trial's noise variance is divided by it; beyond RADIUS it is less anyway.
    """
    n, k = z.shape
    offset = float(np.average(scores, weights=nearness))
    y = scores - offset
    precision = (np.ones(n) if nearness is None else nearness) / _variance(z)
    scaled = features(z) * np.sqrt(precision)[:, None]
    y = y * np.sqrt(precision)
    # Scores that are all alike have no spread: what is added is below any score's last digit.
    floor = NOISE_TRIALS * (NOISE_SHARE * float(scores.std()) + 1e-9) ** 2
    gram, right, square = scaled.T @ scaled, scaled.T @ y, float(y @ y)
    best: Surface | None = None
    for signal in SIGNALS:
        mean, sd = _prior(k, signal)
        root = np.linalg.cholesky(gram + np.diag(sd**-2.0)).T.astype(np.float64, copy=False)
        log_det = 2 * float(np.log(np.diag(root)).sum() + np.log(sd).sum()) - float(np.log(precision).sum())
        # e = y/σ - Φm has covariance I + ΦSΦ'; by Woodbury's identity its squared length is that of e less what the
        # coefficients explain. With t = 1/σ it is a t² - 2 b t + c.
        of_y = np.linalg.solve(root.T, right)
        of_m = np.linalg.solve(root.T, gram @ mean)
        a = max(square - float(of_y @ of_y), 0.0) + floor
        b = float(right @ mean - of_y @ of_m)
        c = float(mean @ gram @ mean - of_m @ of_m)
        # Highest where a t² - b t - n = 0.
        count = n + NOISE_TRIALS
        t = 1 / noise if noise else (b + math.sqrt(b * b + 4 * a * count)) / (2 * a)
        evidence = -0.5 * (a * t * t - 2 * b * t + c) + count * math.log(t) - 0.5 * log_det
        evidence -= 0.5 * (math.log(signal) / SIGNAL_LOG_SD) ** 2
        if best is None or evidence > best.evidence:
            posterior = np.linalg.solve(root, np.linalg.solve(root.T, right * t + mean / sd**2)) / t
            best = Surface(k, offset, 1 / t, posterior, root, mean, sd, evidence)
    assert best is not None, "there are signals to try"
    return best


def _variance(z: Floats) -> Floats:
    """Variance of the trials' scores in units of the noise's; beyond RADIUS, where no quadratic is expected, more."""
    variance: Floats = 1 + 4 * np.maximum(np.abs(z).max(axis=1, initial=0.0) - RADIUS, 0.0) ** 2
    return variance


def misfit(surface: Surface, z: Floats, scores: Floats) -> float:
    """How much better the scores are predicted if what the surface leaves over depends on the place.

    The rival is the surface plus a Gaussian process (Rasmussen and Williams 2006, section 2.7), of the greatest
    evidence over a few lengths and variances.

    Args:
        surface: fitted to these trials, or to fewer.
        z: `(n, k)`.
        scores: `(n,)`.

    Returns:
        Logarithm of the Bayes factor against the surface. Of many trials the last RECENT are looked at.
    """
    z, scores = z[-RECENT:], scores[-RECENT:]
    phi, variance = features(z), np.diag(_variance(z))
    scale = surface.prior_sd
    error = (scores - surface.offset) / surface.noise - phi @ surface.prior_mean
    known = phi * scale @ (phi * scale).T
    distance = squared_distances(z)
    alone = max(_log_density(error, known + share * variance) for share in NOISE_SHARES)
    best = alone
    for length in REST_LENGTHS:
        rest = np.exp(-0.5 * distance / length**2)
        for share in NOISE_SHARES:
            for size in REST_VARIANCES:
                best = max(best, _log_density(error, known + share * variance + size * rest))
    return best - alone


def squared_distances(z: Floats) -> Floats:
    """Between all pairs, `(n, k)` → `(n, n)`."""
    lengths = (z**2).sum(axis=1)
    squared: Floats = np.maximum(lengths[:, None] + lengths - 2 * z @ z.T, 0.0)
    return squared


def _log_density(error: Floats, covariance: Floats) -> float:
    """Of a normal distribution, up to a constant; the sum over trials of their one-step-ahead predictions'."""
    root = np.linalg.cholesky(covariance)
    innovations = np.linalg.solve(root, error)
    return float(-0.5 * innovations @ innovations - np.log(np.diag(root)).sum())


def highest(coefficients: Floats, *, low: Floats, high: Floats, starts: Floats, sweeps: int = 40) -> Floats:
    """The highest point of a surface in a box, by ascent along one coordinate after another from each start.

    Along a coordinate a quadratic has its highest point at a closed form or at an end, so that no step goes down; of
    the ends that the starts come to the highest is taken.

    Args:
        coefficients: `(p,)`.
        low: `(k,)`.
        high: `(k,)`.
        starts: `(s, k)`.
        sweeps: rounds over all coordinates, fewer if nothing moves.

    Returns:
        `(k,)`.
    """
    k = starts.shape[1]
    slope, curvature, cross = coefficients[1 : 1 + k], coefficients[1 + k : 1 + 2 * k], np.zeros((k, k))
    i, j = np.triu_indices(k, 1)
    cross[i, j] = cross[j, i] = coefficients[1 + 2 * k :]
    z = np.clip(starts, low, high)
    for _ in range(sweeps):
        before = z.copy()
        for m in range(k):
            along = slope[m] + z @ cross[m]
            if curvature[m] < 0:
                z[:, m] = np.clip(-along / (2 * curvature[m]), low[m], high[m])
            else:
                rise = along * (high[m] - low[m]) + curvature[m] * (high[m] ** 2 - low[m] ** 2)
                z[:, m] = np.where(rise > 0, high[m], low[m])
        if np.abs(z - before).max() < 1e-6:
            break
    values = features(z) @ coefficients
    found: Floats = z[int(np.argmax(values))]
    return found
