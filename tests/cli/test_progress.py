"""Progress: a bar with the time left for people, and few plain lines for logs."""

import io

import pytest
from rich.console import Console

from quantlib.cli import progress
from quantlib.cli.progress import Bars, by_stage


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=100, color_system=None), written


def test_a_terminal_gets_a_bar_with_the_stage_and_the_time() -> None:
    screen, written = console(terminal=True)
    bars = Bars(screen)
    bars.start("measure", 3)
    for group in ("q", "[k]", "v"):
        bars.tick(group)
    bars.say("a note [with brackets]")
    bars.finish()
    text = written.getvalue()
    assert "measure" in text
    assert "3/3" in text
    assert "0:00:0" in text
    assert "a note [with brackets]" in text


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    screen, written = console(terminal=False)
    bars = Bars(screen)
    bars.start("measure", 100)
    for step in range(100):
        clock[0] += 1.0
        bars.tick(f"group {step}")
    bars.finish()
    lines = written.getvalue().splitlines()
    assert lines[0] == "measure: 5 of 100, about 2 min left (group 4)"
    assert lines[-1] == "measure: done in 2 min"
    assert len(lines) == 20


def test_one_long_step_does_not_frighten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of 60 s before a hundred linears of 1 s."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    screen, written = console(terminal=False)
    bars = Bars(screen)
    bars.start("measure", 101)
    for seconds in (60.0, *[1.0] * 10):
        clock[0] += seconds
        bars.tick("group")
    lines = written.getvalue().splitlines()
    assert lines[0] == "measure: 1 of 101 (group)", "one step tells nothing of the others"
    assert lines[1:] == [
        "measure: 6 of 101, about 2 min left (group)",
        "measure: 11 of 101, about 2 min left (group)",
    ]


def test_a_stage_with_nothing_to_do_is_not_shown() -> None:
    for terminal in (False, True):
        screen, written = console(terminal)
        bars = Bars(screen)
        bars.start("measure", 0)
        bars.finish()
        assert written.getvalue() == ""


def test_a_stage_that_breaks_off_is_not_called_done() -> None:
    screen, written = console(terminal=False)
    bars = Bars(screen)
    bars.start("measure", 3)
    bars.tick()
    bars.finish()
    assert "done" not in written.getvalue()


def test_the_first_window_of_an_evaluation_takes_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a model and its first window 20 s, every other window 6 s."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    screen, written = console(terminal=False)
    report = by_stage(Bars(screen))
    for done, seconds in enumerate((20.0, 6.0, 6.0, 6.0), start=1):
        clock[0] += seconds
        report("reference", done, 4)
    assert written.getvalue().splitlines() == [
        "reference: 2 of 4, about 12 s left",
        "reference: 3 of 4, about 6 s left",
        "reference: done in 38 s",
    ]


def test_evaluation_reports_both_models() -> None:
    screen, written = console(terminal=False)
    report = by_stage(Bars(screen))
    for stage in ("reference", "model"):
        for done in (1, 2):
            report(stage, done, 2)
    assert [line.split(":")[0] for line in written.getvalue().splitlines()] == [
        "reference",
        "model",
    ]
