"""Latency budgets: their text, their costs, and what is said when they are impossible."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import SearchError, UsageError
from quantlib.search.latency import (
    DECODE_CONTEXT,
    Latency,
    LatencyCosts,
    cost_text,
    format_ms,
    is_latency,
    parse_latencies,
    phase_of,
    phase_text,
)
from quantlib.search.pareto import cost_front, equal_loss
from quantlib.search.plan import Plan
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import Solver, solve

DECODE, PREFILL = "decode_ms@256", "prefill_ms@512"


# -- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "phase", "tokens", "ms"),
    [
        ("12ms", "decode", DECODE_CONTEXT, 12.0),
        ("0.012 s", "decode", DECODE_CONTEXT, 12.0),
        ("900us", "decode", DECODE_CONTEXT, 0.9),
        ("850µs", "decode", DECODE_CONTEXT, 0.85),
        ("decode=12ms@2048", "decode", 2048, 12.0),
        ("prefill=0.5s@512", "prefill", 512, 500.0),
        (" PREFILL = .5S @ 512 ", "prefill", 512, 500.0),
    ],
)
def test_latencies_as_people_write_them(text: str, phase: str, tokens: int, ms: float) -> None:
    found = Latency.parse(text)
    assert (found.phase, found.tokens) == (phase, tokens)
    assert math.isclose(found.ms, ms, rel_tol=1e-12)
    assert phase_of(found.cost) == (phase, tokens)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("12", "no unit"),
        ("12min", "use ms, s or us"),
        ("fast", "is not a latency"),
        ("-3ms", "is not a latency"),
        ("0ms", "no time at all"),
        ("prefill=1s", "prefill=1s@512"),
        ("encode=1s@5", "use decode= or prefill="),
        ("12ms@0", "for 0 tokens"),
        ("12ms@99999999", "use 1 to"),
        ("1e3ms", "is not a latency"),
    ],
)
def test_a_latency_that_is_wrong_is_told_how_to_be_right(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        Latency.parse(text)
    assert hint in str(error.value)
    assert text.split("=")[0] in str(error.value)


def test_several_latencies_may_be_given_but_not_two_of_a_kind() -> None:
    both = parse_latencies(["12ms", "prefill=0.5s@512", "decode=20ms@4096"])
    assert [latency.cost for latency in both] == [DECODE, PREFILL, "decode_ms@4096"]
    with pytest.raises(UsageError, match="two latencies are for a decoded token"):
        parse_latencies(["12ms", "decode=10ms@256"])


@given(ms=st.floats(1e-3, 1e6))
def test_milliseconds_read_back_to_three_digits(ms: float) -> None:
    assert math.isclose(Latency.parse(format_ms(ms).replace(" ", "")).ms, ms, rel_tol=6e-3)


def test_costs_in_words() -> None:
    assert phase_text(PREFILL) == "a prompt of 512 tokens"
    assert cost_text(DECODE, 11.84) == "11.8 ms for a decoded token with 256 tokens of context"
    assert cost_text("joules", 3.0) == "a limit of 3 on joules"
    assert is_latency(DECODE)
    assert not is_latency("ms")


# -- costs ---------------------------------------------------------------------------------------


def test_costs_survive_json_and_merge_with_those_of_their_machine() -> None:
    costs = LatencyCosts({DECODE: {("a", "w4g64"): 0.5}}, {DECODE: 1.0}, "cpu", "f1", 2, "int8")
    other = LatencyCosts({PREFILL: {("a", "w4g64"): 9.0}}, {PREFILL: 2.0}, "cpu", "f1", 2, "int8")
    assert LatencyCosts.from_json(costs.to_json()) == costs
    assert costs.predict(DECODE, {"a": "w4g64"}) == 1.5
    assert costs.predict(DECODE, {"a": "w8g64"}) is None
    assert costs.predict(PREFILL, {"a": "w4g64"}) is None
    assert set(costs.merged(other).fixed) == {DECODE, PREFILL}
    elsewhere = LatencyCosts(other.costs, other.fixed, "cpu", "f2", 2, "int8")
    assert costs.merged(elsewhere) == costs
    with pytest.raises(SearchError, match="damaged"):
        LatencyCosts.from_json({**costs.to_json(), "fixed": None})


def timed(sizes: tuple[tuple[int, float, float], ...], name: str = "a", block: str = "") -> Item:
    """An item of choices (bytes, loss, ms)."""
    choices = tuple(
        Choice(f"w{index}", size, loss, {DECODE: ms})
        for index, (size, loss, ms) in enumerate(sizes)
    )
    return Item(name, (name,), choices, block)


FAST_OR_SMALL = ((1, 1.0, 9.0), (8, 0.1, 2.0))


def test_fixed_time_counts_against_the_limit() -> None:
    problem = Problem((timed(FAST_OR_SMALL),), fixed_costs={DECODE: 5.0})
    solution = solve(problem, None, {DECODE: 8.0})
    assert solution.costs == {DECODE: 7.0}
    assert solution.budget is None
    assert problem.cost(DECODE, (0,)) == 14.0
    with pytest.raises(SearchError, match="finite"):
        Problem((timed(FAST_OR_SMALL),), fixed_costs={DECODE: -1.0})


def test_an_impossible_latency_says_the_least_possible_and_what_it_is_made_of() -> None:
    items = (
        timed(((4, 1.0, 3.0), (8, 0.5, 6.0)), "model.embed_tokens.weight"),
        *(timed(((1, 1.0, 0.5), (2, 0.5, 1.0)), f"w{index}", "layer") for index in range(4)),
    )
    problem = Problem(items, fixed_costs={DECODE: 1.5}, rules=("--floor w0=4",))
    with pytest.raises(SearchError) as error:
        solve(problem, 100, {DECODE: 6.0})
    text = str(error.value)
    for part in (
        "6.00 ms for a decoded token with 256 tokens of context is impossible",
        "the least possible is 6.50 ms",
        "1.50 ms no scheme changes",
        "3.00 ms model.embed_tokens",
        "2.00 ms the weights in blocks",
        "--floor w0=4",
    ):
        assert part in text
    assert solve(problem, 100, {DECODE: 6.5}).costs[DECODE] == 6.5


def test_two_budgets_that_are_possible_alone_say_what_each_leaves_the_other() -> None:
    problem = Problem((timed(FAST_OR_SMALL, "a"), timed(FAST_OR_SMALL, "b")))
    with pytest.raises(SearchError) as error:
        solve(problem, 8, {DECODE: 11.0})
    text = str(error.value)
    assert "a budget of 8 bytes (8 bytes) is impossible" in text
    assert "has 9 bytes" in text
    assert "11.0 ms for a decoded token with 256 tokens of context is asked for" in text
    assert "8 bytes are possible with 18.0 ms" in text


def test_two_latencies_that_are_possible_alone_are_named_together() -> None:
    choices = (
        Choice("w2", 1, 1.0, {DECODE: 1.0, PREFILL: 9.0}),
        Choice("w4", 1, 1.0, {DECODE: 9.0, PREFILL: 1.0}),
    )
    problem = Problem((Item("a", ("a",), choices),))
    with pytest.raises(SearchError, match="though within each alone"):
        solve(problem, None, {DECODE: 5.0, PREFILL: 5.0})


# -- solving -------------------------------------------------------------------------------------

rows = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


def by_brute_force(problem: Problem, budget: int | None, limits: dict[str, float]) -> float | None:
    losses = [
        problem.loss(picks)
        for picks in itertools.product(*(range(len(item.choices)) for item in problem.items))
        if (budget is None or problem.bytes(picks) <= budget)
        and all(problem.cost(name, picks) <= limit for name, limit in limits.items())
    ]
    return min(losses) if losses else None


@settings(max_examples=200)
@given(
    drawn=st.lists(rows, min_size=1, max_size=4),
    budget=st.one_of(st.none(), st.integers(0, 40)),
    limits=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    fixed=st.integers(0, 5),
)
def test_size_and_two_latencies_hold_at_once_and_the_optimum_is_found(
    drawn: list[list[tuple[int, int, int, int]]],
    budget: int | None,
    limits: tuple[int, int],
    fixed: int,
) -> None:
    items = tuple(
        Item(
            f"i{index}",
            (f"i{index}",),
            tuple(
                Choice(f"w{n}", size, float(loss), {DECODE: float(ms), PREFILL: float(other)})
                for n, (size, loss, ms, other) in enumerate(found)
            ),
        )
        for index, found in enumerate(drawn)
    )
    problem = Problem(items, fixed_costs={DECODE: float(fixed)})
    wanted = {DECODE: float(limits[0]), PREFILL: float(limits[1])}
    expected = by_brute_force(problem, budget, wanted)
    if expected is None:
        with pytest.raises(SearchError):
            solve(problem, budget, wanted)
        return
    solution = solve(problem, budget, wanted, relative_gap=1e-6)
    assert math.isclose(solution.loss, expected, rel_tol=1e-5, abs_tol=1e-9)
    assert budget is None or solution.bytes <= budget
    assert all(solution.costs[name] <= limit for name, limit in wanted.items())


def language_model(seed: int = 0, weights: int = 60) -> Problem:
    """Items of 10 schemes: an embedding of a fifth of all, and times near to bytes / bandwidth
    that vary by scheme, as those of real kernels do."""
    generator = np.random.default_rng(seed)
    slower = {2: 1.25, 3: 1.12, 4: 1.0, 5: 1.08, 6: 1.06}
    items = []
    for index in range(weights):
        numel = 28_311_552 if index == 0 else int(generator.choice([110_592, 331_776, 884_736]))
        importance = 10 ** generator.uniform(-6, -3)
        offered = []
        for bits, group in itertools.product(range(2, 7), (32, 64)):
            size = numel * bits // 8 + numel // group * 2
            loss = importance * 4.0 ** (4 - bits) * (1 + group / 200)
            ms = size / 22e6 * slower[bits] * generator.uniform(0.97, 1.03)
            costs = {DECODE: ms * (1 + 2 / group)}
            offered.append(
                Choice(f"w{bits}g{group}", size, loss * math.exp(0.05 * generator.normal()), costs)
            )
        items.append(Item(f"w{index}", (f"w{index}",), tuple(offered), f"l{index // 7}"))
    return Problem(tuple(items), fixed_costs={DECODE: 1.0})


def test_a_language_model_with_two_binding_budgets_takes_less_than_two_seconds() -> None:
    problem = language_model(weights=211)
    low, high = problem.bytes(problem.smallest()), problem.bytes(problem.best())
    seconds = []
    for share in (0.2, 0.5):
        budget = int(low + share * (high - low))
        alone = solve(problem, budget)
        usual = problem.cost(DECODE, alone.picks)
        solver = Solver(problem, {DECODE: usual})
        for tighter in (0.99, 0.97):
            start = time.process_time()  # of this process: neighbours on the machine do not count
            solution = solver.solve(budget, limits={DECODE: tighter * usual})
            seconds.append(time.process_time() - start)
            assert solution.optimal
            assert solution.proven_gap <= 1e-4
            assert solution.bytes <= budget
            assert solution.costs[DECODE] <= tighter * usual
            # where the size binds, it is used; where the time does, that is
            assert solution.bytes >= 0.995 * budget or solution.costs[DECODE] >= 0.995 * tighter * (
                usual
            )
            assert solution.loss > alone.loss
    assert max(seconds) < 2.0


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    problem = language_model(1)
    budget = int(1.4 * problem.bytes(problem.smallest()))
    alone = solve(problem, budget)
    loose = solve(problem, budget, {DECODE: 2 * problem.cost(DECODE, alone.picks)})
    assert math.isclose(loose.loss, alone.loss, rel_tol=1.1e-4)  # the gap it may stop at


# -- plans and fronts ----------------------------------------------------------------------------


def test_a_plan_records_its_limits_and_what_was_promised() -> None:
    problem = Problem((timed(FAST_OR_SMALL),), fixed_costs={DECODE: 5.0}, model="m")
    solution = solve(problem, None, {DECODE: 8.0})
    plan = Plan.from_solution(problem, solution, limits={DECODE: 8.0})
    assert plan.budget is None
    assert plan.limits == {DECODE: 8.0}
    assert plan.predicted[DECODE] == 7.0


def test_the_front_over_latency_falls_and_spans_what_is_possible() -> None:
    problem = language_model(2)
    front = cost_front(problem, DECODE, 6)
    times = [point.costs[DECODE] for point in front]
    assert times == sorted(times)
    losses = [point.loss for point in front]
    assert losses == sorted(set(losses), reverse=True)
    assert math.isclose(front[-1].loss, problem.loss(problem.best()), rel_tol=1e-4)
    least = 1.0 + sum(min(c.costs[DECODE] for c in item.choices) for item in problem.items)
    assert math.isclose(times[0], least, rel_tol=1e-6)
    for point in front:
        assert point.bytes == problem.bytes(point.picks)
        assert math.isclose(point.costs[DECODE], problem.cost(DECODE, point.picks))


def test_lines_of_equal_loss_pass_through_the_best_of_both_budgets() -> None:
    problem = language_model(3)
    budget = int(1.5 * problem.bytes(problem.smallest()))
    loss = solve(problem, budget).loss
    line = equal_loss(problem, DECODE, loss)
    assert [place.bytes for place in line] == sorted(place.bytes for place in line)
    assert [place.cost for place in line] == sorted((p.cost for p in line), reverse=True)
    # the smallest of them is what a size alone buys, within the gap of each
    assert math.isclose(line[0].bytes, budget, rel_tol=5e-3)
    for place in line:
        assert solve(problem, place.bytes, {DECODE: place.cost}).loss <= loss * (1 + 2e-4)
    assert equal_loss(problem, DECODE, 0.5 * problem.loss(problem.best())) == []
    anything = equal_loss(problem, DECODE, 2 * problem.loss(problem.smallest()))
    assert anything[0].bytes == problem.bytes(problem.smallest())
