"""Small rounding problems with correlated inputs, and the objective that rounding minimises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlib.formats import QuantizedWeight, Scheme, Segment, dequantize

Problem = tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    """problem(rows, columns, seed) -> weight [N, K] and Hessian [K, K], float32.

    Inputs are mixed by a random matrix and scaled from 1 down to 0.1, so columns are correlated and
    of unequal weight, as the inputs of real layers are.
    """

    def build(rows: int, columns: int, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
        mixing = (mixing + 0.5 * torch.eye(columns)) * torch.linspace(1, 0.1, columns)
        inputs = torch.randn(8 * columns, columns, generator=generator) @ mixing
        weight = torch.randn(rows, columns, generator=generator)
        return weight, inputs.T @ inputs / len(inputs)

    return build


@pytest.fixture(scope="session")
def error_of() -> Callable[[Tensor | QuantizedWeight, Tensor, Tensor], float]:
    """error_of(rounded, weight, hessian) = tr((W - Q) H (W - Q)^T) in float64."""

    def measure(rounded: Tensor | QuantizedWeight, weight: Tensor, hessian: Tensor) -> float:
        values = rounded if isinstance(rounded, Tensor) else dequantize(rounded)
        error = (values - weight).double()
        return float(((error @ hessian.double()) * error).sum())

    return measure


@pytest.fixture(scope="session")
def layout() -> Callable[..., tuple[Segment, ...]]:
    """layout("w4g32", 80) is one segment; layout(("w4g32", 64), ("w2g16", 16)) are two."""

    def build(*parts: str | int | tuple[str, int]) -> tuple[Segment, ...]:
        if isinstance(parts[0], str):
            name, length = parts
            return Scheme.parse(str(name)).segments(int(length))  # type: ignore[arg-type]
        segments, start = [], 0
        for name, length in parts:  # type: ignore[misc]
            (one,) = Scheme.parse(name).segments(length)
            segments.append(Segment(start, length, one.format))
            start += length
        return tuple(segments)

    return build
