"""The pictures of time: what is in them, and that they are left out when nothing is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantlib.report.collect import LatencyParts
from quantlib.report.data import LatencyPoint, LatencyRow, ReportData, TradeOff
from quantlib.report.latencies import latency_pictures
from quantlib.report.render import render
from quantlib.search.latency import LatencyCosts
from quantlib.search.plan import Plan
from quantlib.search.problem import Choice, Item, Problem
from quantlib.search.solve import solve

DECODE, PREFILL = "decode_ms@256", "prefill_ms@512"
WHAT = "a decoded token with 256 tokens of context"


@pytest.fixture
def timed(data: ReportData) -> ReportData:
    """The made-up report with a latency: limited, predicted and measured."""
    front = [
        LatencyPoint(
            DECODE, 2.0 + 0.4 * step, int(6e7 + 4e6 * step), *(0.5**step * f for f in (1, 0.9, 1.1))
        )
        for step in range(8)
    ]
    lines = [
        TradeOff(DECODE, level, int(6e7 / level**0.3 + 1e5 * step), 3.0 / level**0.2 - 0.02 * step)
        for level in (0.05, 0.1, 0.2)
        for step in range(4)
    ]
    return replace(
        data,
        latencies=(LatencyRow(DECODE, WHAT, 4.0, 3.9, 4.05),),
        latency_front=tuple(front),
        trade_offs=tuple(lines),
        machine="an abacus, 2 threads",
    )


def test_loss_against_latency_marks_the_budget_the_plan_and_the_measurement(
    timed: ReportData,
) -> None:
    picture = latency_pictures(timed)[0]
    assert picture.title == "Loss against latency"
    labels = [label for _, label, _ in picture.key]
    assert labels == [
        "predicted front, 95 % band",
        "budget 4.00 ms",
        "this plan, 3.90 ms predicted",
        "this model, 4.05 ms measured",
    ]
    assert f"ms for {WHAT}" in picture.svg
    assert "an abacus, 2 threads" in picture.caption


def test_size_against_latency_has_a_line_for_every_loss(timed: ReportData) -> None:
    picture = latency_pictures(timed)[1]
    assert picture.title == "Size against latency"
    labels = [label for _, label, _ in picture.key]
    assert labels[:3] == ["loss 0.0500", "loss 0.100", "loss 0.200"]
    assert "this model" in labels
    assert any("budgets 4.00 ms and" in label for label in labels)


def test_the_page_has_both_and_a_card(timed: ReportData) -> None:
    page = render(timed)
    assert "What a millisecond buys" in page
    assert "Measured latency" in page
    assert f"4.00 ms allowed for {WHAT}; 3.90 ms predicted" in page
    assert page == render(ReportData.from_json(timed.to_json()))


def test_a_plan_that_was_not_timed_is_shown_as_predicted(timed: ReportData) -> None:
    planned = replace(timed, latencies=(LatencyRow(DECODE, WHAT, 4.0, 3.9),))
    labels = [label for picture in latency_pictures(planned) for _, label, _ in picture.key]
    assert "this plan" in labels
    assert not any("measured" in label for label in labels)
    assert "Predicted latency" in render(planned)


def test_a_measurement_far_over_the_budget_is_marked(timed: ReportData) -> None:
    slow = replace(timed, latencies=(LatencyRow(DECODE, WHAT, 4.0, 3.9, 5.0),))
    assert 'class="note bad"' in render(slow)
    assert 'class="note bad"' not in render(timed)


def test_without_prices_there_is_a_card_and_no_picture(timed: ReportData) -> None:
    bare = replace(timed, latency_front=(), trade_offs=())
    assert latency_pictures(bare) == []
    page = render(bare)
    assert "Measured latency" in page
    assert "What a millisecond buys" not in page


def test_without_a_latency_nothing_is_said_of_time(data: ReportData) -> None:
    assert latency_pictures(data) == []
    assert "latency" not in render(data).lower()


# -- from a plan ---------------------------------------------------------------------------------


def problem_with(costs: LatencyCosts) -> Problem:
    sizes = {"w2": (10, 1.0), "w4": (20, 0.25), "w8": (40, 0.01)}
    items = tuple(
        Item(
            name,
            (name,),
            tuple(
                Choice(s, size, loss, {DECODE: costs.costs[DECODE][name, s]})
                for s, (size, loss) in sizes.items()
            ),
        )
        for name in ("a", "b", "c")
    )
    return Problem(items, fixed_costs=costs.fixed, model="m")


@pytest.fixture
def costs() -> LatencyCosts:
    prices = {(name, f"w{bits}"): 0.1 * bits for name in "abc" for bits in (2, 4, 8)}
    return LatencyCosts({DECODE: prices}, {DECODE: 1.0}, "an abacus", "f")


def test_parts_come_from_the_plan_its_problem_and_its_prices(costs: LatencyCosts) -> None:
    problem = problem_with(costs)
    limits = {DECODE: 2.5}
    plan = Plan.from_solution(problem, solve(problem, None, limits), limits=limits)
    parts = LatencyParts.of(plan, problem, costs, {DECODE: 2.45})
    (row,) = parts.rows
    assert row == LatencyRow(DECODE, WHAT, 2.5, plan.predicted[DECODE], 2.45)
    assert [point.ms for point in parts.front] == sorted(point.ms for point in parts.front)
    assert parts.front[0].ms == pytest.approx(1.6)
    assert {place.level for place in parts.trade_offs} <= {m * plan.loss for m in (0.5, 1, 2, 4)}
    assert any(place.level == plan.loss for place in parts.trade_offs)


def test_an_edited_plan_is_predicted_anew(costs: LatencyCosts) -> None:
    problem = problem_with(costs)
    plan = Plan.of(problem, (2, 2, 2), limits={DECODE: 2.5})
    (row,) = LatencyParts.of(plan, problem, costs, {}).rows
    assert row.predicted == pytest.approx(1.0 + 3 * 0.8)
    assert row.measured is None


def test_a_plan_without_prices_keeps_the_search_s_promise(costs: LatencyCosts) -> None:
    problem = problem_with(costs)
    plan = Plan.of(problem, (0, 0, 0), limits={DECODE: 2.5}, predicted={DECODE: 1.6})
    parts = LatencyParts.of(plan, problem, None, {})
    assert parts.rows[0].predicted == 1.6
    assert parts.front == parts.trade_offs == ()
