"""Asymmetric calibration: rounding that sees what the layers before it have become.

Once earlier layers are rounded, a layer reads X' instead of X, and should reproduce W X from X'.
GPTAQ (arXiv:2504.02692) and Qronos (arXiv:2505.11695) minimise ||W X - Q X'||^2 over Q. That is a
least-squares problem in Q:

    ||W X - Q X'||^2 = ||(W* - Q) X'||^2 + const,    W* = W X X'^T (X' X'^T)^-1

so it is ordinary GPTQ of the target W* under the Hessian of the *rounded* inputs. GPTAQ instead
corrects each column for its own deviation while the sweep passes it; the form here needs one linear
solve, no second sweep, and works with every rounding method. `tests/rounding/test_asymmetric.py`
compares the two: this one's error is the lower.

`strength` < 1 moves only part of the way: the cross moment is estimated from few tokens and a full
step fits their noise (GPTAQ's code takes a quarter of its correction for the same reason).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.rounding.hessian import check_weight, damped


def asymmetric_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, strength: float = 0.5, damping: float = 0.01
) -> Tensor:
    """W + strength (W* - W), float32 [N, K], with W* - W = W (X - X') X'^T (X' X'^T)^-1.

    weight:  [N, K].
    hessian: X' X'^T [K, K] of the rounded inputs.
    cross:   (X - X') X'^T [K, K], with the token weights and the scaling of `hessian`.
    damping: as in `RoundingOptions`; it holds the target near W where X' says little.
    Raises RoundingError on shapes that disagree, inf or nan, and a Hessian that cannot be inverted.
    """
    check_weight("the weight", weight, hessian)
    if cross.shape != hessian.shape or not bool(torch.isfinite(cross).all()):
        raise RoundingError(
            f"the cross moment {list(cross.shape)} of a Hessian {list(hessian.shape)} has another "
            "shape, or holds inf or nan"
        )
    moment = damped(hessian, damping).to(torch.float64)
    mean = hessian.diagonal().to(torch.float64).mean()
    lower, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        raise RoundingError(
            "the Hessian is not positive definite: use more calibration tokens or more damping"
        )
    pull = weight.to(torch.float64) @ (cross.to(torch.float64) / mean)
    step = torch.cholesky_solve(pull.T, lower).T
    return (weight.to(torch.float64) + strength * step).to(torch.float32)
