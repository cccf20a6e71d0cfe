"""Refine a plan on the true KL: exchange bytes between weights, keep what really helps.

The solver's optimum is an optimum of *predicted* losses, added up. Two things are missing from the
sum: how wrong each prediction is, and how weights interact. Both show only when a whole plan is
evaluated, which a bank of finished layers makes cheap (substitute, do not requantize). So bytes are
moved between weights, one exchange at a time, and each is judged on the same windows as the plan
before it.

Which exchange to try is decided by Thompson sampling (Biometrika 25, 1933). The belief is that a
weight's true losses are its predicted ones times a factor of its own, known to be 1 within
`relative_error` (and the table's standard errors), and that the factors of weights of one kind and
of one block err together. Each trial draws all factors, takes the exchange that would be best if
the draw were true, and updates the belief with the measured outcome (a Kalman update). Rejected
trials are therefore not wasted: they say which weights were misjudged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from quantlib.errors import SearchError
from quantlib.search.plan import Plan
from quantlib.search.problem import Picks, Problem
from quantlib.search.swaps import NONE, best_swap

PerWindow = Sequence[float] | np.ndarray | torch.Tensor
Evaluate = Callable[[Plan], PerWindow]
"""Mean KL per token in nats of each window [W], W >= 2: the same windows every time, in order."""
EvaluateAll = Callable[[Sequence[Plan]], Sequence[PerWindow]]
"""The same of several plans, in their order; they may be measured at the same time."""

SIGNIFICANCE = 2.0
"""An exchange is kept when the KL falls by more than this many paired standard errors."""
RELATIVE_ERROR = 0.3
"""Prior standard deviation of a weight's factor: how far single-layer predictions are trusted
before any trial."""
SHARED = (0.4, 0.2)
"""Shares of that variance that weights of one kind (the same name in another block), and weights of
one block, have in common: predictions go wrong by kind and by depth, not only one by one."""
NUMBER = re.compile(r"\d+")
"""What tells weights of one kind apart: the number of their block, of their expert."""
REDRAWS = 64
"""Draws without a new exchange after which nothing is left to try."""


@dataclass(frozen=True)
class Trial:
    """One exchange that was evaluated.

    moves: (item, scheme before, scheme after) of the one or two items that changed.
    predicted, measured, error: change of KL believed beforehand, found, and its paired standard
                                error (nats per token).
    bytes, kl: of the plan with the exchange, whether it was accepted or not.
    """

    index: int
    moves: tuple[tuple[str, str, str], ...]
    predicted: float
    measured: float
    error: float
    accepted: bool
    bytes: int
    kl: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Refined:
    """The refined plan, its KL before and after on the windows it was refined on, and the journal
    of trials.

    The windows chose the exchanges, so `kl_after` flatters the plan a little; quote a held-out
    evaluation.
    """

    plan: Plan
    kl_before: float
    kl_after: float
    trials: tuple[Trial, ...]


def refine(
    plan: Plan,
    problem: Problem,
    evaluate: Evaluate,
    trials: int,
    generator: torch.Generator,
    *,
    significance: float = SIGNIFICANCE,
    relative_error: float = RELATIVE_ERROR,
) -> Refined:
    """Try up to `trials` exchanges on `plan`; deterministic given `generator` and `evaluate`.

    Every plan tried fits the budget and limits of `plan` (its own size when it has no budget).
    Raises SearchError when `plan` itself does not, or when `evaluate` returns fewer than two
    windows, another number of them, or NaN.
    """
    return refine_in_rounds(
        plan,
        problem,
        lambda plans: [evaluate(one) for one in plans],
        trials,
        generator,
        width=1,
        significance=significance,
        relative_error=relative_error,
    )


def refine_in_rounds(
    plan: Plan,
    problem: Problem,
    evaluate: EvaluateAll,
    trials: int,
    generator: torch.Generator,
    *,
    width: int,
    significance: float = SIGNIFICANCE,
    relative_error: float = RELATIVE_ERROR,
) -> Refined:
    """As `refine`, `width` exchanges at a time, which `evaluate` may measure all at once.

    All exchanges of a round are drawn before any of it is measured, and what was found is learned
    in the order of drawing: the result depends on the width, and not on who measured what when. Of
    the exchanges of a round that help, the one that helps most is kept.
    """
    budget = plan.bytes if plan.budget is None else plan.budget
    picks = problem.picks(plan.schemes)
    if not problem.fits(picks, budget, plan.limits):
        raise SearchError(
            f"the plan has {problem.bytes(picks):,} bytes, more than its budget of {budget:,} or "
            "its limits allow: search again before refining"
        )
    kl = _checked(evaluate([plan])[0])
    start = float(kl.mean())
    beliefs = _Beliefs(problem, picks, start, relative_error)
    journal: list[Trial] = []
    tried: set[Picks] = set()
    while len(journal) < trials:
        proposals: list[Picks] = []
        while len(proposals) < min(width, trials - len(journal)):
            proposal = _propose(problem, beliefs, picks, budget, plan, tried, generator)
            if proposal is None:
                break
            tried.add(proposal)
            proposals.append(proposal)
        if not proposals:
            break
        candidates = [_candidate(problem, plan, proposal) for proposal in proposals]
        found = [_checked(windows, len(kl)) for windows in evaluate(candidates)]
        changes = [_paired(windows - kl) for windows in found]
        helps = [change + significance * error < 0 for change, error in changes]
        best = min(range(len(changes)), key=lambda i: (not helps[i], changes[i][0]))
        for index, (proposal, candidate) in enumerate(zip(proposals, candidates, strict=True)):
            measured, error = changes[index]
            predicted = beliefs.learn(picks, proposal, measured, error)
            moves, size = _moves(problem, picks, proposal), candidate.bytes
            kept, value = helps[best] and index == best, float(found[index].mean())
            journal.append(
                Trial(len(journal), moves, predicted, measured, error, kept, size, value)
            )
        if helps[best]:
            plan, picks, kl = candidates[best], proposals[best], found[best]
    return Refined(plan, start, float(kl.mean()), tuple(journal))


def _candidate(problem: Problem, plan: Plan, picks: Picks) -> Plan:
    return Plan.of(
        problem, picks, budget=plan.budget, limits=plan.limits, provenance=plan.provenance
    )


def _paired(change: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) of differences between the same windows."""
    return float(change.mean()), float(change.std(ddof=1)) / math.sqrt(len(change))


class _Beliefs:
    """What is believed of every item's factor: `mean` [items] and `covariance` [items, items], and
    all choices as arrays [rows].

    Losses are scaled so that the sum of the plan's equals its measured KL: near it, changes scale
    alike.
    """

    def __init__(self, problem: Problem, picks: Picks, kl: float, relative_error: float) -> None:
        choices = [choice for item in problem.items for choice in item.choices]
        sizes = [len(item.choices) for item in problem.items]
        predicted = problem.loss(picks)
        self.scale = kl / predicted if predicted > 0 and kl > 0 else 1.0
        self.item = np.repeat(np.arange(len(sizes)), sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.choice = np.arange(len(choices)) - self.starts[self.item]
        self.bytes = np.array([choice.bytes for choice in choices], dtype=np.float64)
        self.loss = self.scale * np.array([choice.loss for choice in choices])
        self._root: np.ndarray | None = None
        now = problem.chosen(picks)
        noise = [choice.error / choice.loss if choice.loss > 0 else 0.0 for choice in now]
        self.mean = np.ones(len(sizes))
        kin = SHARED[0] * _same([NUMBER.sub("#", item.name) for item in problem.items])
        kin += SHARED[1] * _same([item.block or item.name for item in problem.items])
        own = (1 - sum(SHARED)) * np.eye(len(sizes))
        self.covariance = relative_error**2 * (kin + own) + np.diag(noise) ** 2

    def draw(self, generator: torch.Generator) -> np.ndarray:
        """One possible truth: a factor >= 0 for every item."""
        normal = torch.randn(len(self.mean), generator=generator, dtype=torch.float64).numpy()
        if self._root is None:
            values, vectors = np.linalg.eigh(self.covariance)
            self._root = vectors * np.sqrt(np.maximum(0.0, values))
        return np.maximum(0.0, self.mean + self._root @ normal)

    def rows(self, picks: Picks) -> np.ndarray:
        return self.starts + np.array(picks)

    def learn(self, before: Picks, after: Picks, measured: float, error: float) -> float:
        """Update the factors of the items that changed; returns the change of KL believed until
        now."""
        slope = self.loss[self.rows(after)] - self.loss[self.rows(before)]
        predicted = float(slope @ self.mean)
        shared = self.covariance @ slope
        spread = float(slope @ shared) + error**2
        if spread > 0:
            self.mean = self.mean + shared * ((measured - predicted) / spread)
            self.covariance = self.covariance - np.outer(shared, shared) / spread
            self._root = None
        return predicted


def _same(labels: Sequence[str]) -> np.ndarray:
    """[n, n] with 1 where two labels are equal."""
    _, index = np.unique(labels, return_inverse=True)
    return (index[:, None] == index[None, :]).astype(np.float64)


def _propose(
    problem: Problem,
    beliefs: _Beliefs,
    picks: Picks,
    budget: int,
    plan: Plan,
    tried: set[Picks],
    generator: torch.Generator,
) -> Picks | None:
    """The best exchange under a draw of the beliefs that has not been tried, or None when no draw
    finds one."""
    current = beliefs.rows(picks)[beliefs.item]
    size = beliefs.bytes - beliefs.bytes[current]
    slack = float(budget - problem.bytes(picks))
    for _ in range(REDRAWS):
        factor = beliefs.draw(generator)
        loss = factor[beliefs.item] * (beliefs.loss - beliefs.loss[current])
        swap = best_swap(beliefs.item, loss, size, slack)
        if swap is None:
            continue
        changed = list(picks)
        for row in (swap.first, swap.second):
            if row != NONE:
                changed[beliefs.item[row]] = int(beliefs.choice[row])
        proposal = tuple(changed)
        if proposal not in tried and problem.fits(proposal, budget, plan.limits):
            return proposal
    return None


def _moves(problem: Problem, before: Picks, after: Picks) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (item.name, item.choices[old].scheme, item.choices[new].scheme)
        for item, old, new in zip(problem.items, before, after, strict=True)
        if old != new
    )


def _checked(result: PerWindow, windows: int | None = None) -> np.ndarray:
    """The KL of every window [W] as float64, checked."""
    tensor = result.detach().cpu() if isinstance(result, torch.Tensor) else result
    kl = np.asarray(tensor, dtype=np.float64)
    if kl.ndim != 1 or len(kl) < 2 or (windows is not None and len(kl) != windows):
        raise SearchError(
            "refining needs the KL of the same two or more windows every time, and the evaluation "
            f"returned shape {kl.shape}"
        )
    if not np.isfinite(kl).all():
        raise SearchError(
            "the evaluation returned a KL that is not finite: the model is broken by some scheme"
        )
    return kl
