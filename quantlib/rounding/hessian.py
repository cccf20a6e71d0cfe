"""Second moments made safe to factor: damping, dead inputs, and the Cholesky factor GPTQ walks along."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import RoundingError


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [K, K] plus `damping` times its mean diagonal; inputs that never fired get a unit diagonal.

    Returns a new float32 tensor. Raises RoundingError when it is not square, not finite, or all zero.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise RoundingError(f"a Hessian is a square matrix [K, K], not {list(hessian.shape)}")
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()) or bool((diagonal < 0).any()):
        raise RoundingError("the Hessian holds inf, nan or a negative diagonal: calibrate again")
    mean = diagonal.mean()
    if not float(mean) > 0:
        raise RoundingError("the Hessian is zero: no calibration token reached this layer")
    out = hessian.to(torch.float32).clone()
    out.diagonal().add_(damping * mean)
    out.diagonal()[diagonal == 0] += mean
    return out


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor U [K, K] of the inverse of a positive definite `hessian`: `U^T U = H^-1`.

    Factored in float64 (GPTQ, arXiv:2210.17323, section 3.3, keeps all of its information in this factor),
    returned in float32. Row i of U is what an error in column i owes to the columns after it.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.to(torch.float64))
    if int(failed):
        raise RoundingError("the Hessian is not positive definite: use more calibration tokens or more damping")
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
