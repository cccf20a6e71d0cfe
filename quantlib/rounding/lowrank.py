"""A rounded weight and a few directions beside it: W ~ Q + B A, all of it in stored numbers.

What is minimised is the score's own form, sum_n f_n e_n H e_n^T of the error E = W - Q - B A, with
H the second moment of the inputs and f_n what an error of output n costs. For a fixed Q the best
rank-r factors follow from the singular vectors of f^(1/2) (W - Q) C, H = C C^T (activation-aware
SVD, as in ASVD and SVD-LLM); the rows of A are then rounded by GPTQ under H, B is fitted to the
rounded A by least squares, and is rounded under A H A^T, the second moment of what it reads.

The first Q is W rounded alone, whose error the factors take what they can of. That is noise of a
nearly flat spectrum, of which few directions hold little. So W without the factors is rounded
again, the factors are fitted to what that Q lacks, and so on (LoftQ, arXiv:2310.08659): they then
hold what they held before, and more. The best of all steps is kept, weight by weight. Factors alone
are fitted once, to W; where the first is canonical (`canonical.py`), only the last is a best one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.composite import DOWN, SPAN, UP, CompositeWeight, Part, first_factor, parts_of
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedWeight, dequantize
from quantlib.rounding.canonical import canonical_factors
from quantlib.rounding.hessian import check_weight, damped
from quantlib.rounding.integer import (
    DEFAULTS,
    Layout,
    RoundingOptions,
    is_batchable,
    round_integers,
)
from quantlib.rounding.sparsegpt import round_alone

STEPS = 2
"""Times that Q is rounded again; each takes some percent of the loss, and less than the one
before."""


@dataclass(frozen=True)
class Metric:
    """H [K, K] (damped), its lower Cholesky factor C, f [N] of mean 1 ([1] for rows that are all
    alike); float64."""

    moment: Tensor
    factor: Tensor
    importance: Tensor

    @staticmethod
    def of(hessian: Tensor, damping: float) -> Metric:
        """Of rows that are all alike. Raises RoundingError on a Hessian that is none."""
        moment = damped(hessian, damping).double()
        lower, failed = torch.linalg.cholesky_ex(moment)
        if int(failed):
            raise RoundingError(
                "the Hessian is not positive definite: use more calibration tokens or more damping"
            )
        return Metric(moment, lower, torch.ones(1, dtype=torch.float64))

    def weighing(self, importance: Tensor | None) -> Metric:
        """The same with the importance of each row, in any unit; None, or all zero: as it is."""
        if importance is None or not float(importance.sum()) > 0:
            return self
        return replace(self, importance=importance.double() / importance.double().mean())

    def loss(self, error: Tensor) -> float:
        """sum_n f_n e_n H e_n^T of an error [N, K]."""
        wide = error.double()
        return float((self.importance * ((wide @ self.moment) * wide).sum(1)).sum())

    def directions(self, error: Tensor, rank: int) -> Tensor:
        """The `rank` rows A [rank, K] with A H A^T = 1 for which some B A is nearest to `error`,
        the most important first."""
        root = self.importance.clamp(min=0).sqrt()
        whitened = root[:, None] * (error.double() @ self.factor)
        if whitened.shape[0] < whitened.shape[1]:
            left = torch.linalg.eigh(whitened @ whitened.T)[1][:, -rank:]
            right = torch.linalg.qr(whitened.T @ left.flip(1))[0]
        else:
            right = torch.linalg.eigh(whitened.T @ whitened)[1][:, -rank:].flip(1)
        return torch.linalg.solve_triangular(self.factor.T, right, upper=True).T


def round_low_rank(
    weights: Mapping[str, Tensor],
    hessian: Tensor | None,
    scheme: Scheme,
    alone: Mapping[str, QuantizedWeight],
    importance: Mapping[str, Tensor] | None = None,
    options: RoundingOptions = DEFAULTS,
) -> dict[str, CompositeWeight]:
    """Members of a linear group (name -> [N, K]) in a scheme with factors.

    hessian:    [K, K] of the shared input; None: no data reached it, all is rounded to nearest.
    alone:      the members rounded to `scheme.rest`, without factors; nothing, for factors alone.
    importance: name -> [N], what errors of its outputs cost, in any unit; None: all the same.
    Raises RoundingError on shapes that disagree, FormatError where there is no room for the rank.
    """
    if scheme.low_rank is None:
        raise RoundingError(f"{scheme} has no factors: use round_group")
    if hessian is None:
        hessian = torch.eye(next(iter(weights.values())).shape[1])
    for name, weight in weights.items():
        check_weight(name, weight, hessian)
    metric, shares = Metric.of(hessian, options.damping), importance or {}
    metrics = {name: metric.weighing(shares.get(name)) for name in weights}
    if scheme.low_rank.alone:
        return {
            name: _with_factors(weight, None, scheme, metrics[name], options)[0]
            for name, weight in weights.items()
        }
    layout = scheme.rest.segments(hessian.shape[0])
    current = {
        name: _with_factors(weight, alone[name], scheme, metrics[name], options)
        for name, weight in weights.items()
    }
    best = dict(current)
    for _ in range(STEPS):
        remainders = {
            name: weight.float() - product(current[name][0]) for name, weight in weights.items()
        }
        for name, rest in _rounded(remainders, hessian, layout, options).items():
            current[name] = _with_factors(weights[name], rest, scheme, metrics[name], options)
            best[name] = min(best[name], current[name], key=lambda found: found[1])
    return {name: weight for name, (weight, _) in best.items()}


def product(weight: CompositeWeight) -> Tensor:
    """What the factors of a weight stand for, float32 [N, K]."""
    return dequantize(weight.parts[UP]) @ dequantize(weight.parts[DOWN])


def _rounded(
    weights: Mapping[str, Tensor], hessian: Tensor, layout: Layout, options: RoundingOptions
) -> dict[str, QuantizedWeight]:
    """All weights in one layout."""
    if all(is_batchable(part.format) for part in layout):
        found = round_integers(weights, hessian, [layout], options)
        return {name: found[name, 0] for name in weights}
    return {name: round_alone(w, hessian, layout, options.damping) for name, w in weights.items()}


def _with_factors(
    weight: Tensor,
    rest: QuantizedWeight | None,
    scheme: Scheme,
    metric: Metric,
    options: RoundingOptions,
) -> tuple[CompositeWeight, float]:
    """The rest with stored factors fitted to what it lacks of the weight, and what is lost then."""
    assert scheme.low_rank is not None
    shape = (weight.shape[0], weight.shape[1])
    parts, error = parts_of(scheme, shape), weight.double()
    if rest is not None:
        error = error - dequantize(rest).double()
    first = _first_factor(error, scheme, metric, parts, options)
    read = first_factor({name: dequantize(part) for name, part in first.items()}).double()
    moment = read @ metric.moment @ read.T
    moment.diagonal().add_(1e-9 * moment.diagonal().mean().clamp(min=1e-30))
    fitted = torch.linalg.solve(moment, read @ metric.moment @ error.T).T
    second = _rounded({"": fitted.float()}, moment.float(), parts[UP].segments, options)[""]
    stored = {**({} if rest is None else {"": rest}), **first, UP: second}
    found = CompositeWeight(scheme, shape, stored)
    left = error - dequantize(second).double() @ read
    return found, metric.loss(left)


def _first_factor(
    error: Tensor,
    scheme: Scheme,
    metric: Metric,
    parts: Mapping[str, Part],
    options: RoundingOptions,
) -> dict[str, QuantizedWeight]:
    """What the input is multiplied by first, rounded, by what is added to the weight's name."""
    assert scheme.low_rank is not None
    rank, window = scheme.low_rank.rank, scheme.low_rank.window
    if window:
        strength = metric.moment.diagonal()
        vectors = canonical_factors(error, rank, window, metric.importance, strength)
        down = vectors[0] / vectors[0].norm(dim=1).max().clamp(min=1e-20).sqrt()
        spans = {f"{SPAN}{axis}": own for axis, own in enumerate(vectors[1:])}
        return {
            name: quantize_rtn(own.float(), parts[name].segments)
            for name, own in ({DOWN: down} | spans).items()
        }
    down = metric.directions(error, rank)
    # Columns of B get one length, so that one scale per row suits them all, and both factors share
    # the size of their product, so that float16 holds the scales of either.
    lengths = (error @ metric.moment @ down.T).norm(dim=0).clamp(min=1e-20)
    rows = (down * (lengths / lengths.max().sqrt())[:, None]).float()
    return _rounded({DOWN: rows}, metric.moment.float(), parts[DOWN].segments, options)
