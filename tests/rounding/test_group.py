"""`round_group` sends every layout to the rounding that can do it; stacks are rows on rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats import Segment, dequantize, quantize_rtn
from quantlib.rounding import concatenate, round_fixed, round_group, round_integers
from quantlib.rounding.stack import rows_of

MakeProblem = Callable[..., tuple[Tensor, Tensor]]
MakeLayout = Callable[..., tuple[Segment, ...]]

LAYOUTS = ("w4g32", "mxfp4", "w3t", "w2g32z4s4", "nvfp4", "fp8")


def equal(left, right) -> bool:
    return torch.equal(dequantize(left), dequantize(right))


def test_every_member_gets_every_layout_under_its_own_index(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    weight, hessian = problem(20, 64)
    weights = {"q": weight[:12], "k": weight[12:]}
    layouts = [layout(scheme, 64) for scheme in LAYOUTS]
    rounded = round_group(weights, hessian, layouts)
    assert set(rounded) == {(name, i) for name in "qk" for i in range(len(layouts))}
    for (name, index), value in rounded.items():
        assert tuple(part.segment for part in value.segments) == layouts[index]
        if LAYOUTS[index] in ("w4g32", "w2g32z4s4"):
            (alone,) = round_integers({name: weights[name]}, hessian, [layouts[index]]).values()
        else:
            alone = round_fixed(weights[name], hessian, layouts[index])
        assert equal(value, alone)


def test_a_layout_with_one_float_segment_is_rounded_with_fixed_scales(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    weight, hessian = problem(8, 64)
    mixed = layout(("w8g32", 32), ("mxfp4", 32))
    assert equal(
        round_group({"w": weight}, hessian, [mixed])["w", 0], round_fixed(weight, hessian, mixed)
    )


def test_without_a_hessian_everything_is_rounded_to_nearest(
    problem: MakeProblem, layout: MakeLayout
) -> None:
    weight, _ = problem(8, 64)
    layouts = [layout(scheme, 64) for scheme in LAYOUTS]
    for (_, index), value in round_group({"w": weight}, None, layouts).items():
        assert equal(value, quantize_rtn(weight, layouts[index]))


def test_concatenate_and_rows_of_are_inverse(problem: MakeProblem, layout: MakeLayout) -> None:
    weight, hessian = problem(30, 48)
    segments = layout(("w4g32zs6", 32), ("w2", 16))
    whole = round_group({"w": weight}, hessian, [segments])["w", 0]
    pieces = [rows_of(whole, a, b) for a, b in ((0, 7), (7, 8), (8, 30))]
    assert [piece.shape for piece in pieces] == [(7, 48), (1, 48), (22, 48)]
    assert equal(concatenate(pieces), whole)
    assert torch.equal(dequantize(pieces[2]), dequantize(whole)[8:])


@pytest.mark.parametrize("scheme", ["w4t", "fp8t", "nvfp4"])
def test_a_stack_does_not_share_a_scale_it_was_not_rounded_with(
    problem: MakeProblem,
    layout: MakeLayout,
    scheme: str,
) -> None:
    weight, hessian = problem(4, 32)
    one = round_fixed(weight, hessian, layout(scheme, 32))
    with pytest.raises(RoundingError, match="one scale for a whole tensor"):
        concatenate([one, one])


def test_what_cannot_be_stacked_is_a_sentence(problem: MakeProblem, layout: MakeLayout) -> None:
    weight, _ = problem(4, 32)
    a, b = (quantize_rtn(weight, layout(scheme, 32)) for scheme in ("w4g32", "w3g32"))
    with pytest.raises(RoundingError, match="different formats"):
        concatenate([a, b])
    with pytest.raises(RoundingError, match="nothing to concatenate"):
        concatenate([])
