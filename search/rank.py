"""Measured plans, and how well a score ranks them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, spearmanr

from quantlib.errors import SearchError

SHARES = {"all": 1.0, "half": 0.5, "fifth": 0.2}
"""EMQ ranks the best share of the plans, too: it is there that a search has to choose."""
FEW = 10
"""Of fewer plans, or where more than half of them tie, Spearman's coefficient takes few values, and
Kendall's tau-b is used."""


@dataclass(frozen=True)
class MeasuredPlans:
    """Plans of one model whose losses were measured.

    columns: of every (weight, scheme), float64 [R] each (`proxies.Columns`). weights: int64 [R],
             which weight a row belongs to; its rows stand together.
    plans:   int64 [P, W], the row of every weight. losses, errors: float64 [P], measured, and their
             standard errors. budgets: int64 [P], bytes that a plan was made for.
    """

    name: str
    columns: Mapping[str, np.ndarray]
    weights: np.ndarray
    plans: np.ndarray
    losses: np.ndarray
    errors: np.ndarray
    budgets: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.plans)
        if not (len(self.losses) == len(self.errors) == len(self.budgets) == count >= 3):
            raise SearchError(
                f"{self.name}: give three or more plans, each with a loss, an error and a budget"
            )
        if not np.isfinite(self.losses).all():
            raise SearchError(f"{self.name}: a measured loss is not finite; measure it again")

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Of every plan, from the value of every row."""
        found: np.ndarray = values[self.plans].sum(1)
        return found

    def part(self, chosen: Sequence[int] | np.ndarray, name: str) -> MeasuredPlans:
        """Some of the plans."""
        return MeasuredPlans(
            name,
            self.columns,
            self.weights,
            self.plans[chosen],
            self.losses[chosen],
            self.errors[chosen],
            self.budgets[chosen],
        )

    def halves(self, seed: int) -> tuple[MeasuredPlans, MeasuredPlans]:
        """The plans by lot: those a formula is made on, and those that are held out."""
        order = np.random.default_rng(seed).permutation(len(self.plans))
        middle = (len(order) + 1) // 2
        return (
            self.part(order[:middle], f"{self.name}, first half"),
            self.part(order[middle:], f"{self.name}, held out"),
        )


def rank_correlation(scores: np.ndarray, losses: np.ndarray) -> float:
    """Spearman's coefficient, Kendall's tau-b of few plans or many ties; nan where either is
    constant or a score is not finite."""
    if not np.isfinite(scores).all() or np.ptp(scores) == 0 or np.ptp(losses) == 0:
        return math.nan
    few = len(scores) < FEW or len(np.unique(scores)) < len(scores) / 2
    return float((kendalltau if few else spearmanr)(scores, losses).statistic)


def qualities(scores: np.ndarray, measured: MeasuredPlans) -> dict[str, float]:
    """Rank correlation over each of SHARES, those that lose least, and `equal_bytes`: the mean over
    groups of plans of one budget, which no score can rank by their bytes."""
    order = np.argsort(measured.losses, kind="stable")
    found = {}
    for name, share in SHARES.items():
        best = order[: max(3, round(share * len(order)))]
        found[name] = rank_correlation(scores[best], measured.losses[best])
    groups = [np.flatnonzero(measured.budgets == budget) for budget in np.unique(measured.budgets)]
    each = [rank_correlation(scores[g], measured.losses[g]) for g in groups if len(g) >= FEW]
    if each:
        found["equal_bytes"] = float(np.mean(each))
    return found
