"""How far two sets of pictures, or of vectors, lie apart.

Pixels are float in 0..1, [pictures, 3, rows, columns]; vectors are [samples, D].
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

HIGHEST_PSNR = 100.0
"""dB given to equal pictures, whose ratio is infinite: beyond what 16 bits a pixel can show."""


def psnr(pixels: Tensor, expected: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of each picture, 10 log10(1 / mean squared error)."""
    error = (pixels.double() - expected.double()).square().flatten(1).mean(1)
    least = 10 ** (-HIGHEST_PSNR / 10)
    found: list[float] = (-10 * error.clamp(min=least).log10()).tolist()
    return found


def frechet_distance(first: Matrix, second: Matrix) -> float:
    """Of two normal distributions with the means and covariances of two sets [samples, D].

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, FID). With fewer samples than
    D it is defined, and large by chance alone: compare only figures of equal numbers of samples.
    """
    apart = first.mean(0) - second.mean(0)
    one, two = _covariance(first), _covariance(second)
    # tr (C1 C2)^(1/2) = sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2)
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    crossed = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(min=0)).sum()
    distance = apart @ apart + np.trace(one) + np.trace(two) - 2 * crossed
    return max(float(distance), 0.0)


def relative_errors(vectors: Tensor, expected: Tensor) -> list[float]:
    """|vectors - expected|^2 / |expected|^2 of each sample, over all its numbers."""
    error = (vectors.double() - expected.double()).square().flatten(1).sum(1)
    power = expected.double().square().flatten(1).sum(1)
    found: list[float] = (error / power.clamp(min=torch.finfo(torch.float64).tiny)).tolist()
    return found


def cosines(vectors: Tensor, expected: Tensor) -> list[float]:
    """Cosine of the angle between them, for each sample: the mean over its vectors [..., D]."""
    both = torch.nn.functional.cosine_similarity(vectors.double(), expected.double(), dim=-1)
    found: list[float] = both.reshape(len(vectors), -1).mean(1).tolist()
    return found


def _covariance(samples: Matrix) -> Matrix:
    if len(samples) < 2:
        return np.zeros((samples.shape[1], samples.shape[1]))
    found: Matrix = np.atleast_2d(np.cov(samples, rowvar=False))
    return found
