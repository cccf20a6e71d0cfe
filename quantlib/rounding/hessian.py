"""Second moments made safe to factor: damping, dead inputs, and the factor GPTQ walks along."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import RoundingError


def check_weight(name: str, weight: Tensor, hessian: Tensor) -> None:
    """Raise RoundingError unless `weight` is a finite [N, K] for a Hessian [K, K]."""
    if weight.dim() != 2 or hessian.dim() != 2 or weight.shape[1] != hessian.shape[0]:
        raise RoundingError(
            f"{name} is {list(weight.shape)} and its Hessian {list(hessian.shape)}: a weight "
            "[N, K] needs one of [K, K]"
        )
    if not bool(torch.isfinite(weight).all()):
        raise RoundingError(f"{name} holds inf or nan: the source model is damaged")


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [K, K] scaled to a mean diagonal of 1, plus `damping` on its diagonal.

    An input that never fired (a zero on the diagonal) gets a diagonal of 1: its weights are then
    rounded to nearest, and compensate nobody. The scaling changes no decision of any rounding (all
    of them minimise a form that is linear in the Hessian); it keeps moments of any size, which
    gradients make very small, in the middle of float32's range.

    Returns a new float32 tensor. Raises RoundingError when it is not square, not finite, or zero.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise RoundingError(f"a Hessian is a square matrix [K, K], not {list(hessian.shape)}")
    diagonal = hessian.diagonal().to(torch.float64)
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise RoundingError("the Hessian holds inf, nan or a negative diagonal: calibrate again")
    mean = diagonal.mean()
    if not float(mean) > 0:
        raise RoundingError("the Hessian is zero: no calibration token reached this layer")
    out = (hessian.to(torch.float64) / mean).to(torch.float32)
    out.diagonal().add_(damping)
    out.diagonal()[diagonal == 0] += 1
    return out


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor U [K, K] of the inverse of a positive definite `hessian`: U^T U = H^-1.

    Row i of U is what an error in column i owes to the columns after it, and U_ii^-2 what a squared
    error there still costs once they have paid (GPTQ, arXiv:2210.17323, section 3.3). Computed in
    float64 without forming the inverse: the Cholesky factor of H with its axes reversed, read
    backwards, is an upper R with R R^T = H, and U is R^-1. Returned in float32.

    Raises RoundingError when `hessian` is not positive definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.to(torch.float64).flip(0, 1))
    if int(failed):
        raise RoundingError(
            "the Hessian is not positive definite: use more calibration tokens or more damping"
        )
    identity = torch.eye(len(lower), dtype=torch.float64)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor.to(torch.float32)
