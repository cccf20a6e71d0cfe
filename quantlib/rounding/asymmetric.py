"""Asymmetric calibration: rounding that sees what the layers before it have become.

Once earlier layers are rounded, a layer reads X' instead of X, and should reproduce W X from X'. GPTAQ (arXiv:2504.02692)
and Qronos (arXiv:2505.11695) minimise ||W X - Q X'||^2 over Q. That objective is a least-squares problem in Q:

    ||W X - Q X'||^2 = ||(W* - Q) X'||^2 + const,    W* = W (X X'^T) (X' X'^T)^-1

so it is ordinary GPTQ of the target W* under the Hessian of the *rounded* inputs. This form needs one linear solve and
no second sweep, and every rounding method gets it for free. `strength` < 1 moves only part of the way: the cross
moment is estimated from few tokens and a full step fits their noise (GPTAQ's code uses 0.25 for the same reason;
BASELINES of this project: one half).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import RoundingError


def asymmetric_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, strength: float = 0.5, damping: float = 0.01
) -> Tensor:
    """W + strength (W* - W), float32 [N, K].

    weight: [N, K]; hessian: X' X'^T [K, K] of the rounded inputs; cross: (X - X') X'^T [K, K], the same token weights
    and scaling as `hessian`. With `W* - W = W (X - X') X'^T (X' X'^T)^-1`.
    """
    if cross.shape != hessian.shape or weight.shape[1] != hessian.shape[0]:
        raise RoundingError(
            f"weight {list(weight.shape)}, Hessian {list(hessian.shape)} and cross moment {list(cross.shape)} disagree"
        )
    moment = hessian.to(torch.float64)
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    step = torch.linalg.solve(moment, (weight.to(torch.float64) @ cross.to(torch.float64)).T).T
    return (weight.to(torch.float64) + strength * step).to(torch.float32)
