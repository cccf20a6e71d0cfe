"""Learned rounding: offsets of codes and clip factors of groups, by signed gradient descent on a
block's output (AutoRound, arXiv:2309.05516), for every format.

All weights of a block are learned together, from a solution that is good already. A weight's place
on its grid is a real number, `base` = the code that the solution chose, plus half of what the
original weight lies off it (a quarter of a code at most, so that the first step is the solution
itself, and no weight falls back before its gradient has said so many times over). Its code is

    round(base + V),  V in [-1/2, 1/2]

and the range of its group reaches from beta * low to alpha * high, from which scale and zero point
are computed and *stored*: every forward pass runs on `dequantize(QuantizedWeight)`, so what is
judged is what ships. Gradients pass straight through every rounding. Small floats are the same,
with the rank of a value among the values of its type in place of an integer code.

Sign descent moves every offset by the same amount in a step; with a step that falls linearly from
1 / iterations to 0, an offset can go as far as half a code and no farther. Windows held back from
the fit judge the result, and the best of the judged states is returned: never worse on them than
the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats.elements import code_book, decode_float
from quantlib.formats.groups import group_blocks
from quantlib.formats.weight import (
    QuantizedSegment,
    QuantizedWeight,
    decode_scales,
    decode_zeros,
    dequantize,
)
from quantlib.formats.weight_format import TENSOR
from quantlib.rounding.scales import nearest_scale, unit_values

LEAN = 0.5
"""Share of what a weight lies off its code that its base has. With all of it, the weights that
error compensation moved farthest stand at the edge of their cell, and the first steps undo it."""


@dataclass(frozen=True)
class LearningOptions:
    """How long and how fast.

    iterations: steps of sign descent; 0 returns the start.
    batch:      windows in a step.
    rate:       first step of offsets, in codes, times iterations; steps fall linearly to 0.
    scale_rate: the same for clip factors, in ranges; 0 leaves scales and zero points alone.
    checks:     how often the state is judged on the windows held back.
    seed:       of the order of windows.
    """

    iterations: int = 100
    batch: int = 1
    rate: float = 1.0
    scale_rate: float = 0.1
    checks: int = 5
    seed: int = 0


class Problem(Protocol):
    """A block as learning sees it. Weights are name -> float32 [N, K]."""

    @property
    def windows(self) -> int:
        """How many windows there are to fit."""

    def gradients(self, weights: Mapping[str, Tensor], windows: Tensor) -> dict[str, Tensor]:
        """Of the mean loss over `windows` (int64 indices), for every weight."""

    def held_out(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Loss of each window that is held back, float [V]."""


@dataclass(frozen=True)
class Learned:
    """The best state: its weights, its losses on the windows held back, and the step it is from (0:
    the start)."""

    weights: dict[str, QuantizedWeight]
    losses: Tensor
    step: int


def learn(
    start: Mapping[str, QuantizedWeight],
    originals: Mapping[str, Tensor],
    problem: Problem,
    options: LearningOptions,
) -> Learned:
    """Learn the rounding of a block's weights from `start`.

    originals: name -> [N, K], what the weights were before rounding (they say which way a code
    leans). Raises RoundingError when a gradient is not finite.
    """
    variables = {name: WeightVariables(weight, originals[name]) for name, weight in start.items()}
    best = Learned(dict(start), problem.held_out(_dense(start)), 0)
    checked = _check_steps(options)
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, options.iterations + 1):
        if len(order) < min(options.batch, problem.windows):
            order = torch.randperm(problem.windows, generator=generator)
        batch, order = order[: options.batch], order[options.batch :]
        current = {name: each.quantized() for name, each in variables.items()}
        gradients = problem.gradients(_dense(current), batch)
        size = (1 - (step - 1) / options.iterations) / options.iterations
        for name, each in variables.items():
            if not bool(torch.isfinite(gradients[name]).all()):
                raise RoundingError(f"learning {name}: the gradient of the block is inf or nan")
            each.step(gradients[name], size * options.rate, size * options.scale_rate)
        if step in checked:
            current = {name: each.quantized() for name, each in variables.items()}
            losses = problem.held_out(_dense(current))
            if float(losses.mean()) < float(best.losses.mean()):
                best = Learned(current, losses, step)
    return best


def _check_steps(options: LearningOptions) -> set[int]:
    """The steps after which the state is judged: evenly spread, the last one among them."""
    checks = min(options.checks, options.iterations)
    return {round(options.iterations * (i + 1) / checks) for i in range(checks)}


def _dense(weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    return {name: dequantize(weight) for name, weight in weights.items()}


class WeightVariables:
    """Offsets and clip factors of one weight."""

    def __init__(self, start: QuantizedWeight, original: Tensor) -> None:
        self.shape = start.shape
        self.parts = [
            _SegmentVariables(part, original[:, part.segment.start :][:, : part.segment.length])
            for part in start.segments
        ]

    def quantized(self) -> QuantizedWeight:
        """The weight as it stands."""
        return QuantizedWeight(self.shape, tuple(part.quantized() for part in self.parts))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """One step against `gradient` [N, K] of the loss by the dequantized weight."""
        for part in self.parts:
            segment = part.start.segment
            part.step(gradient[:, segment.start : segment.start + segment.length], rate, scale_rate)


class _SegmentVariables:
    """Of one segment: `base` and `offset` [N, length] in codes; `high` and `low`, the ends of
    groups [N, G], with factors `alpha` and `beta` (alpha alone without zero points)."""

    def __init__(self, start: QuantizedSegment, original: Tensor) -> None:
        self.start = start
        format = start.segment.format
        self.levels = None if format.is_integer else _levels(format.element)
        self.top = (1 << format.bits) - 1 if self.levels is None else len(self.levels) - 1
        self._group_size = format.group_size
        self.scale = decode_scales(start.scale, start.row_scale, format)
        self.zero = None if start.zero is None else decode_zeros(start.zero, format)
        self.alpha = torch.ones_like(self.scale)
        self.beta = torch.ones_like(self.scale)
        self.base = self._base(original.to(torch.float32))
        self.offset = torch.zeros_like(self.base)

    def _base(self, original: Tensor) -> Tensor:
        """Where each weight lies on its grid, within half a step of the code it has."""
        start, format = self.start, self.start.segment.format
        units = original.clone()
        divisor = torch.where(self.scale > 0, self.scale, torch.inf)
        for block in group_blocks(start.segment.length, format.group_size):
            block.view(units).div_(divisor[:, block.groups, None])
        off = units - unit_values(start)
        if self.levels is None:
            return start.codes + LEAN * off.clamp_(-0.5, 0.5)
        rank = torch.searchsorted(self.levels, decode_float(start.codes, format.element))
        up = self.levels[(rank + 1).clamp(max=self.top)] - self.levels[rank]
        down = self.levels[rank] - self.levels[(rank - 1).clamp(min=0)]
        gap = torch.where(off > 0, up, down)
        off = torch.where(gap > 0, off / gap.clamp(min=1e-30), 0.0).clamp_(-0.5, 0.5)
        return rank + LEAN * off

    def _place(self, zero: Tensor | None) -> Tensor:
        """Where each weight lies by now, [N, length] in codes, its offset included. Weights move
        with the (stored) zero point of their group, so that they stay the numbers they are."""
        place = self.base + self.offset
        if zero is not None and self.zero is not None:
            moved = decode_zeros(zero, self.start.segment.format) - self.zero
            for block in group_blocks(self.start.segment.length, self._group_size):
                block.view(place).add_(moved[:, block.groups, None])
        return place

    def quantized(self) -> QuantizedSegment:
        """The segment as it stands, in stored form."""
        start, format = self.start, self.start.segment.format
        used, scale, zero = self.scale > 0, self.scale * self.alpha, None
        if self.zero is not None:
            low, high = self._ends()
            scale = (high - low) / self.top
            steps = -low / torch.where(used, scale, torch.inf)
            steps = torch.where(used, steps, self.zero) / format.zero_step
            largest = float((1 << format.zero_bits) - 1)
            zero = steps.round_().clamp_(0, largest).to(torch.uint8)
        stored = nearest_scale(torch.where(used, scale, 1.0), format, start.row_scale)
        ranks = self._place(zero).round_().clamp_(0, self.top)
        if self.levels is None:
            codes = ranks.to(torch.uint8)
        else:
            codes = _codes_of_ranks(format.element)[ranks.to(torch.int64)]
        scale = torch.where(used, stored, start.scale)
        return replace(start, codes=codes, scale=scale, zero=zero)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The range of each group, [N, G], of an asymmetric format."""
        assert self.zero is not None
        low, high = -self.zero * self.scale, (self.top - self.zero) * self.scale
        return low * self.beta, high * self.alpha

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move offsets and clip factors against the signs of their gradients."""
        if scale_rate:
            self._step_ends(gradient, scale_rate)
        # Scales are positive, so the sign by the code is the sign by the weight.
        self.offset.sub_(gradient.sign(), alpha=rate).clamp_(-0.5, 0.5)

    def _step_ends(self, gradient: Tensor, rate: float) -> None:
        """d/d scale is the sum of gradient * (code - zero) over a group; weights move with the zero
        point unless they saturate, so d/d zero is the sum of -gradient * scale over those that do.
        alpha and beta act through scale = (high - low) / top and zero = -low / scale."""
        now = self.quantized()
        format = now.segment.format
        by_scale = self._sums(gradient * unit_values(now))
        if self.zero is None:
            self.alpha.sub_((by_scale * self.scale).sign(), alpha=rate).clamp_(0.5, 1.5)
            return
        low, high = self._ends()
        span = torch.where(high > low, high - low, torch.inf)
        place = self._place(now.zero)
        saturated = (place < -0.5) | (place > self.top + 0.5)
        scale = decode_scales(now.scale, now.row_scale, format)
        by_zero = -self._sums(gradient * saturated) * scale
        by_high = by_scale / self.top + by_zero * (low * self.top / span.square())
        by_low = -by_scale / self.top - by_zero * (high * self.top / span.square())
        self.alpha.sub_((by_high * high).sign(), alpha=rate).clamp_(0.5, 1.5)
        self.beta.sub_((by_low * low).sign(), alpha=rate).clamp_(0.5, 1.5)

    def _sums(self, values: Tensor) -> Tensor:
        """Sums of [N, length] over each group: [N, G] ([1, 1] for TENSOR)."""
        format = self.start.segment.format
        blocks = group_blocks(self.start.segment.length, format.group_size)
        sums = torch.cat([block.view(values).sum(2) for block in blocks], dim=1)
        return sums.sum(0, keepdim=True) if format.group_size == TENSOR else sums


def _levels(element: str) -> Tensor:
    """The different finite values of a float element, ascending."""
    values = code_book(element)
    return torch.unique(values[torch.isfinite(values)])


def _codes_of_ranks(element: str) -> Tensor:
    """The code of each of `_levels`, uint8 (of the two zeros, the positive one)."""
    book = code_book(element)
    negative_zero = (book == 0) & torch.signbit(book)
    codes = torch.nonzero(torch.isfinite(book) & ~negative_zero)[:, 0]
    return codes[book[codes].argsort()].to(torch.uint8)
