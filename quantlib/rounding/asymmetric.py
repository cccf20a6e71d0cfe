"""Asymmetric calibration: rounding that sees what the layers before it have become.

Once earlier layers are rounded, a layer reads X' instead of X. What should come out of it is not
W X' but something else, Y: the output W X of the exact layer (GPTAQ, arXiv:2504.02692; Qronos,
arXiv:2505.11695), or, for a layer that writes to the residual stream, what the *stream* still lacks
behind it, so that errors of all layers before are made good and not only its own. Minimising
||Y - Q X'||^2 over Q is a least-squares problem:

    ||Y - Q X'||^2 = ||(W* - Q) X'||^2 + const,    W* = W + (Y - W X') X'^T (X' X'^T)^-1

so it is ordinary GPTQ of a target W* under the Hessian of the rounded inputs. This is Qronos, which
differs only in how it rounds the very first column; GPTAQ corrects each column for its own
deviation while the sweep passes it, with a larger error (`tests/rounding/test_asymmetric.py` shows
both).

What is missing, Y - W X', is mostly noise to this layer, and K numbers fitted to few tokens fit the
noise: a full step can make the model worse. So a step is damped by a ridge, and ridge and length
are those with the largest gain on windows that were not fitted. In closed form: the error of W + s
S on those windows is a parabola in s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.rounding.hessian import check_weight

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidates for what is added to the Hessian's diagonal, as fractions of its mean."""


@dataclass
class Moments:
    """Sums over tokens t, with weights w_t, of one linear group.

    hessian: sum of w x' x'^T, float32 [K, K].
    missing: sum of w e x'^T, float32 [N, K], with e [N] what the outputs of the exact weights (one
             above the other) lack on the rounded inputs x'.
    """

    hessian: Tensor
    missing: Tensor

    @staticmethod
    def zeros(outputs: int, inputs: int) -> Moments:
        return Moments(torch.zeros(inputs, inputs), torch.zeros(outputs, inputs))

    def add(self, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Add tokens: x' [T, K], e [T, N], w [T]."""
        scaled = inputs * weights[:, None]
        self.hessian.addmm_(scaled.T, inputs)
        self.missing.addmm_(missing.T, scaled)

    def together(self, other: Moments) -> Moments:
        """The sums over both sets of tokens."""
        return Moments(self.hessian + other.hessian, self.missing + other.missing)


@dataclass(frozen=True)
class Target:
    """What to round instead of a weight: `weight` [N, K] float32, and the step that led there.

    gain: what the step saves of the missing outputs' squares on the windows that were not fitted,
          in the units of the moments; 0 when there was nothing to be had.
    """

    weight: Tensor
    strength: float
    ridge: float
    gain: float


def least_squares_step(moments: Moments, ridge: float) -> Tensor:
    """(Y - W X') X'^T (X' X'^T + ridge)^-1, float32 [N, K]; `ridge` in mean diagonals.

    Raises RoundingError on inf or nan, and on a Hessian that is zero or cannot be inverted.
    """
    hessian, missing = moments.hessian.to(torch.float64), moments.missing.to(torch.float64)
    if missing.dim() != 2 or missing.shape[1] != len(hessian):
        raise RoundingError(
            f"what outputs lack {list(missing.shape)} does not belong to a Hessian "
            f"{list(hessian.shape)}: it needs a column for each of its inputs"
        )
    if not bool(torch.isfinite(hessian).all() and torch.isfinite(missing).all()):
        raise RoundingError("moments of rounded inputs hold inf or nan: calibrate again")
    mean = hessian.diagonal().mean()
    if not float(mean) > 0:
        raise RoundingError("the Hessian is zero: no calibration token reached this layer")
    damped = hessian / mean
    damped.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise RoundingError(
            "the Hessian is not positive definite: use more calibration tokens or more damping"
        )
    return torch.cholesky_solve((missing / mean).T, lower).T.to(torch.float32)


def least_squares_targets(
    weights: Mapping[str, Tensor], fit: Moments, held: Moments, most: float = 1.0
) -> dict[str, Target]:
    """The target of each member (name -> [N, K]) of a group.

    fit, held: of different windows; rows of `missing` are the members', in their order.
    most: the longest step allowed, in least-squares steps; 0 keeps the weights.
    Raises what `least_squares_step` raises.
    """
    for name, weight in weights.items():
        check_weight(name, weight, fit.hessian)
    targets = {name: Target(w.to(torch.float32), 0.0, 0.0, 0.0) for name, w in weights.items()}
    if most <= 0:
        return targets
    sizes = [len(weight) for weight in weights.values()]
    for ridge in RIDGES:
        steps = least_squares_step(fit, ridge).split(sizes)
        lacks = held.missing.split(sizes)
        for (name, weight), step, missing in zip(weights.items(), steps, lacks, strict=True):
            strength, gain = best_length(step, Moments(held.hessian, missing), most)
            if gain > targets[name].gain:
                moved = weight.to(torch.float32) + strength * step
                targets[name] = Target(moved, strength, ridge, gain)
    return targets


def best_length(step: Tensor, held: Moments, most: float = 1.0) -> tuple[float, float]:
    """(s, gain): the s in [0, most] with which W + s step [N, K] misses least on the windows of
    `held`, and the error that this saves there."""
    slope = float((held.missing * step).sum(dtype=torch.float64))
    curvature = float(((step @ held.hessian) * step).sum(dtype=torch.float64))
    if not (slope > 0 and curvature > 0):
        return 0.0, 0.0
    length = min(most, slope / curvature)
    return length, 2 * length * slope - length * length * curvature
