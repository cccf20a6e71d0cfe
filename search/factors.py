"""How far the predicted losses of whole components are off, found from plans that were measured.

A predicted loss is a second-order expansion under gradients that were sampled at some tokens. For a
head it is nearly exact; for an encoder, whose errors pass through everything behind it, it can be
several times too small. One line through sums of all components (`calibrate.py`) cannot say so: it
scales every component alike, and the search goes on spending its bytes on the wrong one.

Within a component a table of words has candidates of several kinds. Where its rows are in blocks of
several widths, the calibration data says which rows are to lose what, and the prediction trusts the
same data once more. What that costs depends on the narrowest block, which words that were never
heard are in: in 3 bits one such word can make a sentence lose tens of times what others lose, in 4
it is hardly noticed. So what a factor is of is a part (`part_of`): a component, or what of it is in
blocks of rows down to a number of bits. A few plans round one part and leave all else at its best,
and

    log measured = a + b log sum_p f_p S_p

is fitted to them: S_p are the predicted losses that the weights of a part sum to, a and b are the
line's, and f_p is what the part's losses are multiplied with. A prior keeps all factors near one,
so that a part of which little was measured gets the common one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from quantlib.formats.scheme import Scheme
from quantlib.formats.several import names_rows
from quantlib.search.calibrate import HUBER
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import Solver

SHARES = (0.2, 0.35, 0.5)
"""Budgets of a part's plans, as fractions of the way from its smallest size to its best one: 3.5 to
5.5 bits, where its loss is above the noise and not yet beyond what anyone wants."""
BLOCK_SHARES = (0.0, 0.5, 1.0)
"""The same of blocks of rows, whose few candidates of one narrowest width lie close together."""
FACTOR_SPREAD = 1.0
"""Prior standard deviation of log f: a factor of e is nothing unusual."""
SLOPE_SPREAD = 0.25
"""Prior standard deviation of b around 1."""
SCATTER = 0.2
"""Standard deviation of a measured loss around a prediction that has the right factors, relative:
some 20 % on Whisper."""


class Trial(NamedTuple):
    """A measured plan: part -> sum of predicted losses; the loss that was measured, and its
    standard error."""

    sums: Mapping[str, float]
    measured: float
    error: float


def part_of(component: str, scheme: str) -> str:
    """What the factor of a weight of this component in this scheme is of."""
    if not names_rows(scheme):
        return component
    narrowest = min(block.format.bits for block in Scheme.parse(scheme).rows)
    return f"{component}, rows in blocks down to {narrowest} bits"


def plans_alone(problem: Problem, component_of: Mapping[str, str]) -> list[dict[str, str]]:
    """Plans (weight -> scheme) in which one part has less than its best, at SHARES (or
    BLOCK_SHARES) of its own range, and every other weight has its best candidate.

    component_of: weight -> component, of those that are to be tried; weights that are left out
    always have their best. That may be to stay as it is, and what is tried is always rounded.
    """
    best = problem.schemes(problem.best())
    rounded = replace(problem, weights=(), fixed_bytes=0).rounding()
    plans: list[dict[str, str]] = []
    for items in _parts(rounded, component_of).values():
        part = replace(rounded, items=tuple(items), weights=())
        low, high = part.bytes(part.smallest()), part.bytes(part.best())
        solver = Solver(part)
        in_blocks = any(names_rows(choice.scheme) for item in items for choice in item.choices)
        for share in BLOCK_SHARES if in_blocks else SHARES:
            picks = solver.solve(int(low + share * (high - low))).picks
            plan = best | part.schemes(picks)
            if plan != best and plan not in plans:
                plans.append(plan)
    return plans


def _parts(problem: Problem, component_of: Mapping[str, str]) -> dict[str, list[Item]]:
    """Part -> the items of its component that have choices of it, with these and no others."""
    found: dict[str, list[Item]] = {}
    for item in problem.items:
        component = component_of.get(item.members[0])
        if component is None:
            continue
        choices: dict[str, list[Choice]] = {}
        for choice in item.choices:
            choices.setdefault(part_of(component, choice.scheme), []).append(choice)
        for part, mine in choices.items():
            found.setdefault(part, []).append(replace(item, choices=tuple(mine)))
    return found


def fit_factors(trials: Sequence[Trial]) -> dict[str, float]:
    """Part -> the factor on its predicted losses, their geometric mean near 1; empty where fewer
    than two parts, or than four plans, lose anything.

    Plans that lose nothing that could be measured are left out: they have no logarithm.
    """
    used = [t for t in trials if t.measured > 0 and sum(t.sums.values()) > 0]
    named = dict.fromkeys(name for trial in used for name, value in trial.sums.items() if value > 0)
    names = list(named)
    if len(names) < 2 or len(used) < 4:
        return {}
    sums = np.array([[max(0.0, t.sums.get(name, 0.0)) for name in names] for t in used])
    measured = np.array([t.measured for t in used])
    spread = np.hypot(np.array([t.error for t in used]) / measured, SCATTER)
    center = float(np.log(sums.sum(axis=1)).mean())

    def residuals(values: np.ndarray) -> np.ndarray:
        a, b, factors = values[0], values[1], values[2:]
        total = np.log(sums @ np.exp(factors))
        misses = (a + b * (total - center) - np.log(measured)) / spread
        return np.concatenate([misses, [(b - 1) / SLOPE_SPREAD], factors / FACTOR_SPREAD])

    start = np.concatenate([[float(np.log(measured).mean()), 1.0], np.zeros(len(names))])
    found = least_squares(residuals, start, loss="huber", f_scale=HUBER).x[2:]
    return dict(zip(names, np.exp(found).tolist(), strict=True))
