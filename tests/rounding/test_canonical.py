"""Canonical factors hold filters that are such products, and put what matters first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats import Scheme, dequantize_stored, pack_stored, unpack_stored
from quantlib.formats.composite import has_room, stored_bytes
from quantlib.rounding import RoundingOptions, round_low_rank
from quantlib.rounding.canonical import canonical_factors

OPTIONS = RoundingOptions(passes=1)


def products(rank: int, *sizes: int, seed: int = 0) -> Tensor:
    """[N, the other sizes multiplied]: filters that are sums of `rank` products."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rank, sizes[0], generator=generator).double()
    for size in sizes[1:]:
        own = torch.randn(rank, size, generator=generator).double()
        found = (found[:, :, None] * own[:, None]).flatten(1)
    return found.sum(0).view(sizes[0], -1).float()


def inputs(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4 * columns, columns, generator=generator)
    return x.T @ x / len(x)


@pytest.mark.parametrize("window", [(3, 3), (5,), (2, 3, 2)])
def test_filters_that_are_products_are_found_again(window: tuple[int, ...]) -> None:
    weight = products(4, 20, 8, *window)
    name = f"c4k{'x'.join(map(str, window))}w8"
    scheme, hessian = Scheme.parse(name), inputs(weight.shape[1])
    found = round_low_rank({"w": weight}, hessian, scheme, {}, None, OPTIONS)["w"]
    relative = float((dequantize_stored(found) - weight).norm() / weight.norm())
    assert relative < 0.03  # 8 bits in each of three or more vectors


def test_more_products_lose_less() -> None:
    weight, hessian = products(12, 24, 8, 3, 3), inputs(72)
    lost = []
    for rank in (2, 4, 8, 16):
        scheme = Scheme.parse(f"c{rank}k3x3w8")
        found = round_low_rank({"w": weight}, hessian, scheme, {}, None, OPTIONS)["w"]
        error = dequantize_stored(found) - weight
        lost.append(float(((error @ hessian) * error).sum()))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.1 * lost[0]


def test_filters_and_channels_that_matter_are_served_first() -> None:
    weight = products(40, 16, 8, 3, 3)
    rows, strength = torch.ones(16), torch.ones(72)
    rows[:2], strength[:18] = 100.0, 100.0
    errors = []
    for f, h in ((torch.ones(16), torch.ones(72)), (rows, strength)):
        vectors = canonical_factors(weight, 6, (3, 3), f, h)
        read = vectors[0]
        for own in vectors[1:]:
            read = (read[:, :, None] * own[:, None]).flatten(1)
        last = torch.linalg.lstsq(read.T, weight.double().T).solution.T
        left = (last @ read - weight.double()).square()
        errors.append(float(left[:2, :18].sum()))
    assert errors[1] < 0.5 * errors[0]


def test_packed_and_counted_as_other_factors_are() -> None:
    weight, scheme = products(6, 20, 8, 3, 3), Scheme.parse("c6k3x3w4")
    found = round_low_rank({"w": weight}, inputs(72), scheme, {}, None, OPTIONS)["w"]
    tensors = pack_stored(found)
    assert sum(t.nbytes for t in tensors.values()) == stored_bytes((20, 72), scheme)
    assert {name.rpartition("_")[0] for name in tensors if name.endswith("packed")} == {
        "_down",
        "_span0",
        "_span1",
        "_up",
    }
    again = dequantize_stored(unpack_stored(tensors, (20, 72), scheme))
    assert torch.equal(again, dequantize_stored(found))


def test_names_are_read_and_other_windows_refused() -> None:
    assert str(Scheme.parse("c16k3x3w8")) == "c16k3x3w8"
    scheme = Scheme.parse("c4k3x3w8")
    assert has_room(scheme, (20, 72), (3, 3))
    assert not has_room(scheme, (20, 72), (9,))
    assert not has_room(scheme, (20, 72))
    assert not has_room(Scheme.parse("c20k3x3w8"), (20, 72), (3, 3))
    for wrong in ("c4w8", "c4k3x3", "w4+c4k3x3w8", "c0k3w8"):
        with pytest.raises(FormatError):
            Scheme.parse(wrong)
