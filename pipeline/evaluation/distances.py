"""How far apart two samples of vectors are: Fréchet and sliced-Wasserstein distance.

Both are biased upwards for few vectors, so a distance says little by itself: it is given beside the
same distance between two samples of one distribution, each of the same number. Knows nothing of
models or videos.

Shapes: N vectors, D dimensions, P projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float64] | npt.NDArray[np.float32]
PROJECTIONS = 512


@dataclass(frozen=True)
class Distance:
    """From generated to real, beside what two samples of real clips are apart.

    Attributes:
        generated: between generated videos and real clips.
        codec: between real clips after the codec's round trip and other real clips; None where
            round trips are not compared.
        real: between two samples of real clips: what a perfect model would have.
        vectors, dimensions: of each sample.
    """

    generated: float
    codec: float | None
    real: float
    vectors: int
    dimensions: int


def frechet(a_ND: Vectors, b_ND: Vectors) -> float:
    """Fréchet distance, squared, between Gaussians fitted to two samples.

        |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^½)

    Source: Dowson and Landau 1982. The last trace is that of (A S_b A)^½ with A = S_a^½, which is
    symmetric, so that singular covariances (fewer vectors than dimensions) do no harm.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((50, 3))
    >>> round(frechet(a, a + 2), 6)
    12.0
    """
    a, b = (np.asarray(sample, dtype=np.float64) for sample in (a_ND, b_ND))
    gap = a.mean(axis=0) - b.mean(axis=0)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_a))
    # Rounding makes the zero eigenvalues of a singular covariance a little negative.
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root_a @ np.atleast_2d(covariance_b) @ root_a)
    traces = np.trace(np.atleast_2d(covariance_a)) + np.trace(np.atleast_2d(covariance_b))
    return float(gap @ gap + traces - 2 * np.sqrt(shared.clip(min=0)).sum())


def sliced_wasserstein(
    a_ND: Vectors, b_ND: Vectors, *, projections: int = PROJECTIONS, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance of two samples of equal size.

    The root of the mean, over random directions, of the squared distance between sorted
    projections. Source: Bonneel et al. 2015.

    Raises:
        ValueError: samples of different sizes.

    >>> a = np.arange(12.0).reshape(6, 2)
    >>> sliced_wasserstein(a, a[::-1])
    0.0
    """
    if len(a_ND) != len(b_ND):
        raise ValueError(
            f"samples of {len(a_ND)} and {len(b_ND)} vectors: both must be of one size; "
            "leave out the last ones of the larger"
        )
    rng = np.random.default_rng([seed, 2015])
    directions_DP = rng.standard_normal((a_ND.shape[1], projections))
    directions_DP /= np.linalg.norm(directions_DP, axis=0)
    a_NP, b_NP = (np.sort(sample @ directions_DP, axis=0) for sample in (a_ND, b_ND))
    return float(np.sqrt(np.mean((a_NP - b_NP) ** 2)))
