"""2:4 pruning: the pattern holds, the others make up for what is dropped, and zeros stay zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats import (
    QuantizedWeight,
    Scheme,
    Segment,
    dequantize,
    pack,
    quantize_rtn,
    unpack,
)
from quantlib.formats.sparse import check_mask, compress, expand
from quantlib.rounding import round_fixed, round_group
from quantlib.rounding.sparsegpt import prune, round_sparse

MakeProblem = Callable[..., tuple[Tensor, Tensor]]
ErrorOf = Callable[[Tensor | QuantizedWeight, Tensor, Tensor], float]


def by_size(weight: Tensor) -> Tensor:
    """The two largest weights of every four, the others zero."""
    fours = weight.view(weight.shape[0], -1, 4)
    kept = fours.abs().topk(2, dim=2).indices
    return (fours * torch.zeros(fours.shape).scatter_(2, kept, 1.0)).view(weight.shape)


def test_pruned_weights_are_two_of_four_and_lose_less_than_dropping_the_small_ones(
    problem: MakeProblem, error_of: ErrorOf
) -> None:
    for seed in range(3):
        weight, hessian = problem(24, 96, seed)
        pruned, mask = prune(weight, hessian)
        check_mask(mask)
        assert not pruned[~mask].any()
        assert error_of(pruned, weight, hessian) < 0.8 * error_of(by_size(weight), weight, hessian)


def test_independent_inputs_keep_the_weights_that_cost_most(problem: MakeProblem) -> None:
    """Nothing can be passed on under a diagonal Hessian: losses are those of single weights."""
    weight, _ = problem(8, 64)
    hessian = torch.diag(torch.linspace(1, 3, 64))
    pruned, mask = prune(weight, hessian, damping=0.0)
    loss = (weight.square() * hessian.diagonal()).view(8, -1, 4)
    best = torch.zeros(loss.shape, dtype=torch.bool)
    best.scatter_(2, loss.topk(2, dim=2).indices, True)
    assert torch.equal(mask, best.view(8, 64))
    assert torch.allclose(pruned, weight * mask)


@pytest.mark.parametrize("scheme", ["w4g32", "w4", "w4g32z", "w8g32", "mxfp4", "fp8"])
def test_rounded_zeros_are_zeros_and_the_form_holds_the_rest(
    problem: MakeProblem, scheme: str
) -> None:
    weight, hessian = problem(16, 64)
    segments = Scheme.parse(scheme).segments(64)
    found = round_sparse(weight, hessian, segments)
    values = dequantize(found.rounded)
    assert not values[~found.mask].any()
    (part,) = found.rounded.segments
    zeros = part.codes.masked_fill(found.mask, 0)  # where kept, any code will do
    codes, mask = expand(compress(part.codes, found.mask), zeros)
    assert torch.equal(codes, part.codes)
    assert torch.equal(mask, found.mask)


def test_rounding_adds_little_to_what_pruning_loses(
    problem: MakeProblem, error_of: ErrorOf
) -> None:
    """At 8 bits nearly nothing; and zeros cost more than 4 bits do, or something is wrong."""
    weight, hessian = problem(24, 96)
    alone = error_of(prune(weight, hessian)[0], weight, hessian)
    errors = {}
    for scheme in ("w8g32", "w4g32"):
        found = round_sparse(weight, hessian, Scheme.parse(scheme).segments(96))
        errors[scheme] = error_of(found.rounded, weight, hessian)
    assert errors["w8g32"] == pytest.approx(alone, rel=0.02)
    assert alone < errors["w4g32"] < 1.6 * alone
    dense = round_fixed(weight, hessian, Scheme.parse("w4g32").segments(96))
    assert error_of(dense, weight, hessian) < alone


def test_segments_of_two_widths_are_pruned_together(problem: MakeProblem) -> None:
    weight, hessian = problem(8, 64)
    (low,) = Scheme.parse("w4g32").segments(32)
    (high,) = Scheme.parse("w8g32").segments(32)
    segments = (low, Segment(32, 32, high.format))
    found = round_sparse(weight, hessian, segments)
    check_mask(found.mask)
    assert [part.segment for part in found.rounded.segments] == list(segments)


@pytest.mark.parametrize(("scheme", "columns"), [("w4g32:2of4", 62), ("w4g16:2of4h8/4", 61)])
def test_sparse_formats_are_pruned_and_wide_columns_are_not(
    problem: MakeProblem, error_of: ErrorOf, scheme: str, columns: int
) -> None:
    """Of columns that four does not divide, too: two of the last ones are kept."""
    weight, hessian = problem(16, 64)
    weight, hessian = weight[:, :columns], hessian[:columns, :columns]
    segments = Scheme.parse(scheme).segments(columns)
    rounded = round_group({"own": weight}, hessian, [segments])["own", 0]
    low = segments[0].length
    zeros = (dequantize(rounded) == 0)[:, : low // 4 * 4].view(16, -1, 4).sum(2)
    assert (zeros >= 2).all()
    wide = dequantize(rounded)[:, low:]
    assert (wide == 0).sum() <= 0.1 * wide.numel()
    again = unpack(pack(rounded), rounded.shape, segments)
    assert torch.equal(dequantize(again), dequantize(rounded))
    plain = quantize_rtn(weight, segments)
    assert error_of(rounded, weight, hessian) < 0.9 * error_of(plain, weight, hessian)


def test_what_cannot_be_done_is_said(problem: MakeProblem) -> None:
    weight, hessian = problem(4, 64)
    with pytest.raises(RoundingError, match="inf or nan"):
        prune(weight.index_fill(1, torch.tensor(3), torch.nan), hessian)
