"""What a choice costs: bit operations, or milliseconds of this machine's kernels.

Bit operations (BOPs) of a product are its multiplications times the bits of a weight times those of
an input; unrounded ones have 16. They are the unit of FLIQS: ResNet-18's 1.83 G multiplications are
29.2 GBOPs in 4-bit numbers and 467.7 in bfloat16. Attention's products of inputs with inputs are
the same in every choice and not counted. Hidden channels that are left out take their share off the
weights that write them and those that read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from quantlib.errors import SearchError
from quantlib.formats.activation import AS_THEY_ARE, UNROUNDED
from quantlib.formats.scheme import Scheme
from quantlib.kernels.timing import Clock, Op, TimingTable, this_machine
from quantlib.search.problem import Choice as Priced
from quantlib.search.problem import Item, Problem
from quantlib.search.solve import solve
from quantlib.search.trained.layers import Choice, Space

BOPS, MS = "bops", "ms"
_UNSPENT = "unspent"
SHORTFALLS = (0.01, 0.03, 0.1)
"""Shares of a target that a final choice may leave unspent, the first that can be had."""
FULL_BITS = float(UNROUNDED**2)
"""Bit operations of one multiplication in bfloat16."""


@dataclass(frozen=True)
class Costs:
    """Prices of a space.

    unit:   BOPS or MS.
    prices: weight -> price of each option of its decision, at full width.
    whole:  the price of everything in 16 bits; None where that was not measured.
    """

    unit: str
    space: Space
    prices: Mapping[str, tuple[float, ...]]
    whole: float | None = None

    def of(self, choice: Choice) -> float:
        """The cost of a choice."""
        shares = self.space.shares(choice)
        return math.fsum(
            self.prices[name][index] * math.prod(shares.get(name, (1.0, 1.0)))
            for decision, index in zip(self.space.numbers, choice)
            for name in decision.members
        )

    @property
    def least(self) -> float:
        return self.of(self._extreme(min))

    @property
    def most(self) -> float:
        return self.of(self._extreme(max))

    @property
    def by_decision(self) -> list[list[float]]:
        """The price of every decision's options, at full width."""
        return [
            [math.fsum(row) for row in zip(*(self.prices[name] for name in decision.members))]
            for decision in self.space.numbers
        ]

    def _extreme(self, pick: Callable[..., int]) -> Choice:
        """The cheapest or the dearest choice: prices are sums and widths are factors, so each
        decision can be taken alone."""
        numbers = [pick(range(len(row)), key=row.__getitem__) for row in self.by_decision]
        widths = [pick(range(len(w.options)), key=w.options.__getitem__) for w in self.space.widths]
        return (*numbers, *widths)

    def check_target(self, target: float) -> None:
        """Raise SearchError for a target that no choice meets, or that all do; says the range.

        Where all choices cost the same there is still a best one among them: any target they meet
        will do."""
        least, most = self.least, self.most
        if not (math.isfinite(target) and least * (1 - 1e-9) <= target):
            raise SearchError(
                f"a cost of {self.text(target)} cannot be reached: these candidates cost "
                f"{self.text(least)} to {self.text(most)}; ask for one in between, or add "
                "narrower formats"
            )
        if target >= most and not math.isclose(least, most):
            raise SearchError(
                f"a cost of {self.text(target)} leaves nothing to search: the dearest choice costs "
                f"{self.text(most)} and the cheapest {self.text(least)}; ask for one in between"
            )

    def text(self, cost: float) -> str:
        """A cost with its unit, as people read it."""
        if self.unit == MS:
            return f"{cost:.4g} ms"
        for size, unit in ((1e12, "TBOPs"), (1e9, "GBOPs"), (1e6, "MBOPs")):
            if cost >= size:
                return f"{cost / size:.4g} {unit}"
        return f"{cost:.4g} BOPs"

    def likeliest(
        self, scores: Sequence[Sequence[float]], target: float, spend: bool = True
    ) -> Choice:
        """The choice of the highest sum of `scores` (log-probabilities: one for each option of each
        decision) that costs at most `target`: exact, a multiple-choice knapsack.

        spend: also at least so much that little is left, as near to the target as SHORTFALLS go:
        a search that was told what it may cost should not leave it lying.
        Widths are those of the highest score, or the narrowest where those are too dear.
        """
        count = len(self.space.numbers)
        widths = tuple(max(range(len(row)), key=row.__getitem__) for row in scores[count:])
        for tried in (widths, self._extreme(min)[count:]):
            problem = self._problem(scores[:count], tried)
            costs = [[choice.costs[self.unit] for choice in item.choices] for item in problem.items]
            if math.fsum(map(min, costs)) > target * (1 + 1e-12):
                continue
            dearest = math.fsum(map(max, costs))
            for shortfall in SHORTFALLS if spend else ():
                least = min(dearest, (1 - shortfall) * target)
                limits = {self.unit: target, _UNSPENT: dearest - least}
                with suppress(SearchError):
                    return (*solve(problem, None, limits).picks, *tried)
            return (*solve(problem, None, {self.unit: target}).picks, *tried)
        self.check_target(target)
        raise SearchError(f"no choice costs at most {self.text(target)}")

    def _problem(self, scores: Sequence[Sequence[float]], widths: Choice) -> Problem:
        """Unlikeliness to minimise, under a cost, and under what is left of the dearest options."""
        items = []
        shares = self.space.shares((*(0 for _ in self.space.numbers), *widths))
        for decision, row in zip(self.space.numbers, scores, strict=True):
            prices = [
                math.fsum(
                    self.prices[name][index] * math.prod(shares.get(name, (1.0, 1.0)))
                    for name in decision.members
                )
                for index in range(len(decision.options))
            ]
            choices = [
                Priced(
                    option.name,
                    0,
                    max(row) - score,
                    {self.unit: price, _UNSPENT: max(prices) - price},
                )
                for option, score, price in zip(decision.options, row, prices, strict=True)
            ]
            items.append(Item(decision.name, (decision.name,), tuple(choices)))
        return Problem(tuple(items))


def bops(space: Space, products: Mapping[str, float]) -> Costs:
    """Costs in bit operations. products: weight -> multiplications of a sample
    (`Layers.count_products`)."""
    prices = {
        name: tuple(products[name] * option.bit_products(columns) for option in decision.options)
        for decision in space.numbers
        for name, columns in zip(decision.members, decision.columns, strict=True)
    }
    whole = FULL_BITS * math.fsum(products[name] for name in prices)
    return Costs(BOPS, space, prices, whole)


def milliseconds(
    space: Space,
    shapes: Mapping[str, tuple[int, int]],
    tokens: Mapping[str, int] | int = 1,
    threads: int = 1,
    folder: Path | None = None,
    clock: Clock | None = None,
) -> Costs:
    """Costs in milliseconds of this machine's kernels, from its timing table; what is missing is
    measured and kept.

    shapes: weight -> [N, K]. tokens: rows of inputs that each product has. folder, clock: as
    `TimingTable.load` and `measure` take them. What the runtime adds between products is left out:
    it is the same for all choices.
    Raises UsageError without compiled kernels.
    """
    table = TimingTable.load(this_machine(threads), folder)
    rows: dict[str, list[Op]] = {}
    for decision in space.numbers:
        for name in decision.members:
            count = tokens if isinstance(tokens, int) else tokens[name]
            schemes = [option.scheme for option in decision.options]
            rows[name] = [_operation(shapes[name], scheme, count) for scheme in schemes]
    table.measure([op for ops in rows.values() for op in ops], clock)
    prices = {name: tuple(table.ms[op.key] for op in ops) for name, ops in rows.items()}
    return Costs(MS, space, prices)


def _operation(shape: tuple[int, int], scheme: Scheme, tokens: int) -> Op:
    """The product as the kernels compute it: rounded integers in integers, all else exactly."""
    mode = "exact"
    if scheme.activation.is_integer:
        groups = [part.format.group for part in scheme.activations(shape[1])]
        group = math.gcd(*groups)
        mode = f"int8g{group}" if group else "int8"
    stored = replace(scheme, activation=AS_THEY_ARE)
    return Op(shape[0], shape[1], str(stored), tokens, mode)
