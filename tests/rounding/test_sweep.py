"""GPTQ against a float64 reference in plain loops, and both sweeps against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlib.formats import Scheme, Segment, quantize_rtn
from quantlib.rounding import RoundingOptions, round_integers
from quantlib.rounding.grid import RowGrid
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.rounding.sweep import Span, SpanState, _descend_block, descend, gptq_sweep

MakeProblem = Callable[..., tuple[Tensor, Tensor]]
MakeLayout = Callable[..., tuple[Segment, ...]]
ErrorOf = Callable[..., float]

NEAR_TIE = 1e-3
"""Steps closer than this to a half may round either way: float32 sums of 100 terms of size 10."""


def spans_of(layout, rows: int) -> list[Span]:
    return [
        Span(
            part.start,
            part.start + part.length,
            part.format.group_size or part.length,
            RowGrid.build([part.format], rows),
        )
        for part in layout
    ]


def reference_gptq(
    weight: Tensor, hessian: Tensor, spans: list[Span], states: list[SpanState], codes: Tensor
) -> int:
    """GPTQ of `weight` [N, K] in float64, one number at a time, with the scales of `states`.

    Asserts that every code equals that of `codes` [N, K], except next to a tie, where the given one
    is followed. Returns the number of ties.
    """
    rows, columns = weight.shape
    inverse = torch.linalg.inv(hessian.double())
    factor = torch.linalg.cholesky(inverse).mT.tolist()
    ties = 0
    for n in range(rows):
        w = weight[n].double().tolist()
        for span, state in zip(spans, states, strict=True):
            top = float(span.grid.top[0])
            for k in range(span.start, span.stop):
                group = (k - span.start) // span.group_size
                scale, zero = float(state.scale[group, n]), float(state.zero[group, n])
                step = w[k] / scale + zero
                code = min(max(round(step), 0), top)
                given = int(codes[n, k])
                if abs(step - math.floor(step) - 0.5) < NEAR_TIE:
                    ties += code != given
                    code = given
                assert code == given, f"row {n}, column {k}: {given} instead of {code} ({step})"
                error = (w[k] - (code - zero) * scale) / factor[k][k]
                for j in range(k, columns):
                    w[j] -= error * factor[k][j]
    return ties


def codes_of(result: Tensor, spans: list[Span], states: list[SpanState]) -> Tensor:
    """Codes [N, K] of a dequantized result [K, N]."""
    out = torch.empty_like(result)
    for span, state in zip(spans, states, strict=True):
        for index, (first, last) in enumerate(span.groups()):
            out[first:last] = (result[first:last] / state.scale[index] + state.zero[index]).round()
    return out.T


@pytest.mark.parametrize(
    "parts",
    [
        [("w4", 40)],
        [("w2g16", 40)],
        [("w3g16z", 40)],
        [("w2g16z4s4", 40)],
        [("w8g32", 24), ("w3g16z", 10), ("w2g16zs6", 6)],
        [("w3g64z", 150)],
    ],
    ids=str,
)
def test_gptq_equals_the_float64_reference(
    problem: MakeProblem,
    layout: MakeLayout,
    parts: list[tuple[str, int]],
) -> None:
    columns = sum(length for _, length in parts)
    weight, hessian = problem(6, columns, seed=columns)
    hessian = damped(hessian, 0.01)
    spans = spans_of(layout(*parts), 6)
    result, states = gptq_sweep(weight.T.clone(), inverse_factor(hessian), spans)
    codes = codes_of(result, spans, states)
    ties = reference_gptq(weight, hessian, spans, states, codes)
    assert ties <= 0.01 * codes.numel()


def test_a_channel_wider_than_a_block_is_compensated_across_blocks(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    """150 columns with one scale: the update crosses SUB_BLOCK = 128."""
    weight, hessian = problem(4, 150)
    hessian = damped(hessian, 0.01)
    spans = spans_of(layout("w3", 150), 4)
    result, states = gptq_sweep(weight.T.clone(), inverse_factor(hessian), spans)
    assert reference_gptq(weight, hessian, spans, states, codes_of(result, spans, states)) <= 6


def objective(weight: Tensor, result: Tensor, hessian: Tensor) -> Tensor:
    """(w - q) H (w - q)^T per row, float64 [R], for matrices [K, R]."""
    error = (weight - result).double()
    return ((hessian.double() @ error) * error).sum(0)


def brute_force(weight: Tensor, hessian: Tensor, span: Span, state: SpanState) -> Tensor:
    """The least objective [R] over all codes of one group [K, R], its scale and zero point held."""
    columns, top = weight.shape[0], int(span.grid.top[0])
    best = torch.full((weight.shape[1],), torch.inf, dtype=torch.float64)
    for codes in itertools.product(range(top + 1), repeat=columns):
        values = (torch.tensor(codes)[:, None] - state.zero[0]) * state.scale[0]
        best = torch.minimum(best, objective(weight, values, hessian))
    return best


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("scheme", ["w2", "w2g16z", "w2g16z4s4"])
def test_tiny_problems_are_near_the_brute_force_optimum(
    problem: MakeProblem,
    layout: MakeLayout,
    columns: int,
    scheme: str,
) -> None:
    """All 4^K codes of 200 rows: descent lies between optimum and GPTQ, and finds most optima."""
    weight, hessian = problem(200, columns, seed=columns)
    target, spans = weight.T.contiguous(), spans_of(layout(scheme, columns), 200)
    hessian = damped(hessian, 0.01)
    result, (state,) = gptq_sweep(target.clone(), inverse_factor(hessian), spans)
    optimum = brute_force(target, hessian, spans[0], state)
    before = objective(target, result, hessian)
    for _ in range(4):
        gradient = hessian @ (target - result)
        grid = spans[0].grid
        _descend_block(result, gradient, hessian, grid, state.scale[0], state.zero[0])
    after = objective(target, result, hessian)
    slack = 1e-5 * before.max()  # float32 rounding of values and gradients
    assert bool((after <= before + slack).all())
    assert bool((after >= optimum - slack).all())
    assert bool((before >= optimum - slack).all())
    found = float((after <= optimum + slack).double().mean())
    assert found > 0.8, f"only {found:.0%} of the rows are optimal"


def test_descent_ends_where_no_single_code_can_improve(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    weight, hessian = problem(64, 4, seed=9)
    target, spans = weight.T.contiguous(), spans_of(layout("w2g16z", 4), 64)
    result, (state,) = gptq_sweep(target.clone(), inverse_factor(hessian), spans)
    for _ in range(20):
        gradient = hessian @ (target - result)
        _descend_block(result, gradient, hessian, spans[0].grid, state.scale[0], state.zero[0])
    best = objective(target, result, hessian)
    for k, code in itertools.product(range(4), range(4)):
        other = result.clone()
        other[k] = (code - state.zero[0]) * state.scale[0]
        assert bool((objective(target, other, hessian) >= best * (1 - 1e-5) - 1e-6).all())


@pytest.mark.parametrize(
    "scheme",
    ["w2", "w2g16", "w2g16z", "w2g16z2s4", "w3g32z4s4", "w3g32s4", "w4g32z5s5", "w8g64zs8"],
)
@pytest.mark.parametrize("seed", range(3))
def test_no_pass_of_descent_raises_the_objective(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
    seed: int,
) -> None:
    """Scales and zero points move too, and are stored coarsely: still never up, in any row."""
    weight, hessian = problem(64, 72, seed)
    target, spans = weight.T.contiguous(), spans_of(layout(scheme, 72), 64)
    hessian = damped(hessian, 0.01)
    result, states = gptq_sweep(target.clone(), inverse_factor(hessian), spans)
    values = [objective(target, result, hessian)]
    for _ in range(4):
        descend(target, result, hessian, spans, states)
        values.append(objective(target, result, hessian))
    for before, after in itertools.pairwise(values):
        # Float32 gradients of 72 terms: a step that is a tie may be taken the wrong way.
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(values[-1].sum()) < 0.999 * float(values[0].sum()), "four passes did nothing"


@pytest.mark.parametrize(
    ("scheme", "share"), [("w2g32", 0.95), ("w2g32z4s4", 0.95), ("w3g32z", 0.97), ("w4g32z", 0.99)]
)
def test_gptq_beats_plain_rounding_and_descent_beats_gptq(
    problem: MakeProblem,
    error_of: ErrorOf,
    scheme: str,
    share: float,
) -> None:
    """Over 24 random correlated problems; ratios of Hessian error, geometric mean.

    What descent adds to GPTQ shrinks with the step: `share` of its error is left at most.
    """
    layout = Scheme.parse(scheme).segments(64)
    logs = torch.zeros(24, 3, dtype=torch.float64)
    for seed in range(24):
        weight, hessian = problem(24, 64, seed)
        candidates = [quantize_rtn(weight, layout)]
        for passes in (0, 3):
            options = RoundingOptions(passes=passes)
            candidates += round_integers({"w": weight}, hessian, [layout], options).values()
        for index, rounded in enumerate(candidates):
            logs[seed, index] = math.log(error_of(rounded, weight, hessian))
    gptq, descent = logs.diff(dim=1).mean(0).exp().tolist()
    assert gptq < 0.75, f"GPTQ is {gptq:.2f} of plain rounding"
    assert descent < share, f"descent is {descent:.2f} of GPTQ"
