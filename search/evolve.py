"""EMQ: formulas that predict which plan loses less, found by genetic programming (ICCV 2023).

A formula is a tree of functions over columns of statistics (`proxies.py`), and its fitness how well
the sums it gives to measured plans rank them. What the paper adds to plain genetic programming:

    compatibility screening       A formula is computed for a table of random statistics first. One
                                  that is not finite and positive there, is constant, does not
                                  fall when a scheme's noise falls, or gives the same numbers as one
                                  already known, never reaches the plans.
    operation sampling            Functions whose formulas pass the screening more often are drawn
    prioritisation                more often.
    diversity-prompting selection A parent is the fittest of a few drawn; its partner is, of a few
                                  others, the one whose numbers are least like the parent's. The
                                  population holds nobody twice.

Trees, crossover and mutation are DEAP's (extra `evolve`). A formula is computed by `expressions`,
so what was evolved can be used where DEAP is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from quantlib.errors import SearchError, UsageError
from quantlib.search.expressions import BINARY, UNARY, Expression
from quantlib.search.proxies import KNOWN, LAYER, SCHEME
from quantlib.search.rank import MeasuredPlans, qualities, rank_correlation

CONSTANTS = (0.5, 1.0, 2.0)
PROBE_WEIGHTS, PROBE_SCHEMES = 48, 5
NODE_PRICE = 3e-4
"""Fitness that every node costs: of two formulas that rank alike the shorter is kept."""
ATTEMPTS = 400
"""Draws without a formula that passes the screening and is new, after which a generation ends."""


@dataclass(frozen=True)
class Settings:
    """How long, how many, how deep.

    tournament: formulas drawn for a parent. crossover: share of children of two parents.
    fresh: share of a generation's children that are new formulas and have no parents.
    """

    population: int = 100
    generations: int = 40
    children: int = 100
    tournament: int = 7
    crossover: float = 0.5
    fresh: float = 0.1
    depth: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.population, self.generations, self.children, self.tournament, self.depth)
        if min(counts) < 1 or not (0 <= self.crossover <= 1 and 0 <= self.fresh <= 1):
            raise UsageError(
                "an evolution needs a population, generations, children, a tournament and a depth "
                "of 1 or more, and shares between 0 and 1"
            )


@dataclass(frozen=True)
class Screened:
    """A formula that passed: its numbers for the probe, float64, and what tells it from others."""

    expression: Expression
    values: np.ndarray
    signature: str


@dataclass(frozen=True)
class Member:
    """A formula of the population."""

    tree: Any
    screened: Screened
    fitness: float

    @property
    def expression(self) -> Expression:
        return self.screened.expression


@dataclass(frozen=True)
class Evolved:
    """The best formulas, fittest first, their fitness, and how it went.

    history: best fitness after each generation. tried, passed: formulas drawn, and those that
    passed the screening.
    """

    members: tuple[Member, ...]
    history: tuple[float, ...]
    tried: int
    passed: int
    settings: dict[str, Any] = field(default_factory=dict)


def fitness_of(values: Sequence[np.ndarray], sets: Sequence[MeasuredPlans]) -> float:
    """Mean rank correlation over the sets and, within each, over what `rank.qualities` says; -1
    where one of them is undefined. values: a formula's, in the rows of every set."""
    found = [
        quality
        for value, one in zip(values, sets, strict=True)
        for quality in qualities(one.scores(value), one).values()
    ]
    mean = float(np.mean(found))
    return mean if np.isfinite(mean) else -1.0


class Screening:
    """The compatibility screening, over a fixed table of random statistics."""

    def __init__(self, columns: Sequence[str], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        per_weight = np.repeat(
            generator.lognormal(0.0, 1.0, (PROBE_WEIGHTS, len(columns))), PROBE_SCHEMES, 0
        )
        self.columns = {name: per_weight[:, i].copy() for i, name in enumerate(columns)}
        bits = np.tile(np.linspace(8.0, 2.0, PROBE_SCHEMES), PROBE_WEIGHTS)
        self.columns["bits"], self.columns["noise"] = bits, 1.2 * 4.0**-bits
        if "loss" in columns:
            self.columns["loss"] = self.columns["loss"] * self.columns["noise"]
        self._weights = np.repeat(np.arange(PROBE_WEIGHTS), PROBE_SCHEMES)

    def passes(self, expression: Expression) -> Screened | None:
        """None for a formula that is no score."""
        values = expression.evaluate(self.columns)
        if not is_score(values, self.columns["noise"], self._weights):
            return None
        scaled = np.round(values / values.mean(), 6)
        return Screened(expression, values, hashlib.sha256(scaled.tobytes()).hexdigest())


def is_score(values: np.ndarray, noise: np.ndarray, weights: np.ndarray) -> bool:
    """Whether numbers [R] can be losses: finite, positive, falling with every weight's noise, and
    different between weights in the noisiest scheme. A weight that loses nothing, or the same in
    all schemes, would get the smallest one, whatever that does to the model."""
    if not (np.isfinite(values).all() and (values > 0).all()):
        return False
    order = np.lexsort((noise, weights))
    rising, same = np.diff(values[order]), np.diff(weights[order]) == 0
    finer = np.diff(noise[order]) > 0  # schemes that round weights alike may lose the same
    if not (rising[same & finer] > 0).all():
        return False
    last = np.append(~same, True)
    return bool(np.ptp(values[order][last]) > 0)


class _Grammar:
    """DEAP's primitives, drawn by how often their formulas pass."""

    def __init__(self, columns: Sequence[str]) -> None:
        from deap import gp

        self.set = gp.PrimitiveSet("proxy", 0)
        for table, arity in ((UNARY, 1), (BINARY, 2)):
            for name, function in table.items():
                self.set.addPrimitive(function, arity, name=name)
        for column in columns:
            self.set.addTerminal(0.0, name=column)
        for constant in CONSTANTS:
            self.set.addTerminal(constant)
        self._all = list(self.set.primitives[self.set.ret])
        self._tried = dict.fromkeys((one.name for one in self._all), 1)
        self._passed = dict(self._tried)

    def learn(self, tree: Any, passed: bool) -> None:
        """Count the functions of a formula that was screened."""
        for name in {node.name for node in tree if node.arity}:
            self._tried[name] += 1
            self._passed[name] += passed

    def prioritise(self) -> None:
        """Let functions be drawn in proportion to how often they pass; none dies out."""
        rates = {name: self._passed[name] / tried for name, tried in self._tried.items()}
        most = max(rates.values())
        self.set.primitives[self.set.ret] = [
            one for one in self._all for _ in range(1 + round(9 * rates[one.name] / most))
        ]


class _Evolution:
    """One run: the population, and what was counted."""

    def __init__(
        self, sets: Sequence[MeasuredPlans], columns: Sequence[str], settings: Settings
    ) -> None:
        from deap import gp

        self.gp, self.sets, self.settings, self.names = gp, sets, settings, frozenset(columns)
        self.grammar, self.screening = _Grammar(columns), Screening(columns)
        self.known: set[str] = set()
        self.tried = self.passed = 0

    def run(self, progress: Callable[[int, float], None]) -> Evolved:
        settings, history = self.settings, []
        members = [*self._seeds(), *self._children(settings.population, lambda: self._fresh())]
        members = self._survivors(members)
        for generation in range(settings.generations):
            self.grammar.prioritise()
            fresh = max(1, round(settings.fresh * settings.children))
            bred = settings.children - fresh
            parents = list(members)
            children = self._children(bred, lambda: self._bred(parents))  # noqa: B023 (used at once)
            members = self._survivors([*members, *children, *self._children(fresh, self._fresh)])
            history.append(members[0].fitness)
            progress(generation + 1, members[0].fitness)
        return Evolved(
            tuple(members), tuple(history), self.tried, self.passed, asdict(self.settings)
        )

    def _seeds(self) -> Iterator[Member]:
        """The scores that people use, as far as the columns allow."""
        for text in KNOWN.values():
            if Expression.parse(text, {*LAYER, *SCHEME}).names() <= self.names:
                member = self._member(self.gp.PrimitiveTree.from_string(text, self.grammar.set))
                if member is not None:
                    yield member

    def _children(self, count: int, draw: Callable[[], Any]) -> list[Member]:
        found: list[Member] = []
        misses = 0
        while len(found) < count and misses < ATTEMPTS:
            member = self._member(draw())
            misses = 0 if member else misses + 1
            found += [member] if member else []
        return found

    def _member(self, tree: Any) -> Member | None:
        """The formula with its fitness; None where the screening stops it."""
        self.tried += 1
        screened = None
        if tree.height <= self.settings.depth:
            screened = self.screening.passes(Expression.parse(str(tree), self.names))
        self.grammar.learn(tree, screened is not None)
        if screened is None or screened.signature in self.known:
            return None
        self.known.add(screened.signature)
        values = [screened.expression.evaluate(one.columns) for one in self.sets]
        if not all(
            is_score(value, one.columns["noise"], one.weights)
            for value, one in zip(values, self.sets, strict=True)
        ):
            return None
        self.passed += 1
        price = NODE_PRICE * screened.expression.nodes()
        return Member(tree, screened, fitness_of(values, self.sets) - price)

    def _fresh(self) -> Any:
        depth = min(3, self.settings.depth)
        return self.gp.PrimitiveTree(self.gp.genHalfAndHalf(self.grammar.set, 1, depth))

    def _bred(self, members: Sequence[Member]) -> Any:
        parent = self._tournament(members)
        tree = self.gp.PrimitiveTree(list(parent.tree))
        if random.random() < self.settings.crossover and len(members) > 1:
            partner = self._unlike(parent, members)
            return self.gp.cxOnePoint(tree, self.gp.PrimitiveTree(list(partner.tree)))[0]
        kind = random.randrange(4)
        if kind == 0:
            return self.gp.mutShrink(tree)[0]
        if kind == 1:
            return self.gp.mutNodeReplacement(tree, self.grammar.set)[0]
        if kind == 2:
            return self.gp.mutInsert(tree, self.grammar.set)[0]
        grow = lambda pset, type_: self.gp.genGrow(pset, 0, 2, type_)  # noqa: E731 (DEAP's signature)
        return self.gp.mutUniform(tree, grow, self.grammar.set)[0]

    def _tournament(self, members: Sequence[Member]) -> Member:
        drawn = random.sample(members, min(self.settings.tournament, len(members)))
        return max(drawn, key=lambda member: member.fitness)

    def _unlike(self, parent: Member, members: Sequence[Member]) -> Member:
        """The one of a few drawn whose numbers are ranked least as the parent's are."""
        others = [member for member in members if member is not parent]
        drawn = random.sample(others, min(self.settings.tournament, len(others)))
        mine = parent.screened.values
        return min(drawn, key=lambda one: abs(rank_correlation(one.screened.values, mine)))

    def _survivors(self, members: Sequence[Member]) -> list[Member]:
        if not members:
            raise SearchError(
                "no formula passed the screening: give more columns, or a larger population"
            )
        fittest = sorted(members, key=lambda member: -member.fitness)
        return fittest[: self.settings.population]


def evolve(
    sets: Sequence[MeasuredPlans],
    columns: Sequence[str],
    settings: Settings | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Evolved:
    """Formulas over `columns` that rank the measured plans of all `sets`.

    Deterministic given the settings' seed. Raises UsageError without DEAP, and SearchError where
    the plans cannot be ranked.
    """
    if importlib.util.find_spec("deap") is None:
        raise UsageError("evolving a score needs DEAP: pip install 'quantlib-torch[evolve]'")
    if not sets:
        raise SearchError("evolving a score needs measured plans")
    names = [one.name for one in sets]
    if len(set(names)) != len(names):
        raise SearchError(f"sets of measured plans need names of their own, not {', '.join(names)}")
    missing = {"noise", "bits"} - set(columns)
    if missing:
        raise SearchError(f"a score has to know schemes apart: add the columns {sorted(missing)}")
    with _seeded((settings or Settings()).seed):
        run = _Evolution(sets, columns, settings or Settings())
        return run.run(progress or (lambda generation, fitness: None))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """DEAP draws from Python's one generator: it is lent for the evolution, and put back."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
