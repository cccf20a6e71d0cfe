"""Latency budgets on the command line, with an invented clock: a product takes a nanosecond a byte
and a running model 1 ms more than its products."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.kernels import timing
from quantlib.kernels.cpu import stopwatch
from quantlib.kernels.timing import Machine, Op
from quantlib.pipeline import latency
from quantlib.pipeline.latency_models import RandomModels
from quantlib.runtime.stopwatch import Fit

from .conftest import QUICK, Run

Fails = Callable[..., str]
DECODE, PREFILL = "decode_ms@256", "prefill_ms@64"
MACHINE = Machine("an abacus", 1, "avx2", "libkernels", 1)


def invented_ms(op: Op) -> float:
    segments = Scheme.parse(op.scheme).segments(op.columns)
    return 1e-6 * op.tokens * payload_bytes((op.rows, op.columns), segments)


@pytest.fixture(autouse=True)
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Op]]:
    """What was timed. Every test has a cache of its own."""
    asked: list[Op] = []
    folder = tmp_path_factory.mktemp("timing")

    def seconds(op: Op, threads: int, passes: int) -> list[float]:
        asked.append(op)
        return [1e-3 * invented_ms(op)] * passes

    def fits(self, table, products, schemes, progress):
        return {cost: Fit(fixed=1.0, factor=1.0) for cost in products}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "table_folder", lambda: folder)
        patch.setattr(stopwatch, "seconds", seconds)
        patch.setattr(latency, "this_machine", lambda threads: MACHINE)
        patch.setattr(RandomModels, "fits", fits)
        yield asked


def least_and_most(run: Run, measured: Path) -> tuple[float, float]:
    """The latencies of the fastest and of the best plan, in milliseconds."""
    best = run("search", "--work", measured, "--latency", "10s", "--json").json
    message = run("search", "--work", measured, "--latency", "1ns").stderr
    assert "use ms, s or us" in message
    message = run("search", "--work", measured, "--latency", "0.1us").stderr
    least = message.split("the least possible is ")[1].split(",")[0]
    value, unit = least.split()
    return float(value) * {"us": 1e-3, "ms": 1.0}[unit], best["predicted"][DECODE]


def test_a_latency_alone_is_kept_and_used(run: Run, measured: Path) -> None:
    least, most = least_and_most(run, measured)
    limit = (least + most) / 2
    answer = run("search", "--work", measured, "--latency", f"{limit}ms", "--json")
    found = answer.json
    assert found["budget_bytes"] is None
    assert found["limits"] == {DECODE: pytest.approx(limit)}
    assert least <= found["predicted"][DECODE] <= limit * (1 + 1e-9)
    assert found["machine"].startswith("an abacus, 1 thread, avx2")
    plan = json.loads((measured / "plan.json").read_text())
    assert plan["limits"] == found["limits"]
    assert plan["predicted"][DECODE] == found["predicted"][DECODE]
    assert plan["provenance"]["timings"] == MACHINE.fingerprint


def test_size_and_two_latencies_hold_together(run: Run, measured: Path) -> None:
    size = run("search", "--work", measured, "--bits", 5, "--json").json
    free = run("search", "--work", measured, "--bits", 5, "--latency", "9s", "--json").json
    assert free["schemes"] == size["schemes"]
    limit = 0.999 * free["predicted"][DECODE]
    both = ("--latency", f"{limit}ms", "--latency", "prefill=3s@64")
    found = run("search", "--work", measured, "--bits", 5, *both, "--json").json
    assert found["bytes"] <= found["budget_bytes"]
    assert found["predicted"][DECODE] <= limit * (1 + 1e-9)
    assert set(found["limits"]) == {DECODE, PREFILL}
    assert found["loss"] > free["loss"]


def test_what_was_timed_is_not_timed_again(run: Run, measured: Path, clock: list[Op]) -> None:
    assert run("search", "--work", measured, "--latency", "9s", "--json").code == 0
    first = len(clock)
    # 6 shapes of the tiny Llama in 3 schemes, ROUNDS times each
    assert first == timing.ROUNDS * len(set(clock)) > 0
    assert all(op.tokens == 1 for op in clock)
    again = run("search", "--work", measured, "--latency", "8s", "--size", "30%", "--json")
    assert again.code == 0
    assert len(clock) == first
    assert run("search", "--work", measured, "--latency", "prefill=1s@64", "--json").code == 0
    new = clock[first:]
    assert {op.tokens for op in new} == {64}, "the head reads one token of a prompt"


def test_search_for_people(run: Run, measured: Path) -> None:
    answer = run("search", "--work", measured, "--latency", "90ms", "--size", "30%", "--pareto")
    assert answer.code == 0, answer
    assert "decoded token with 256 tokens of context" in answer.stdout
    assert "90.0 ms allowed" in answer.stdout
    assert "an abacus" in answer.stdout
    assert "sum of losses" in answer.stdout
    assert "time: done" in answer.stderr or "time" not in answer.stdout


def test_the_report_shows_both_pictures(run: Run, measured: Path) -> None:
    least, most = least_and_most(run, measured)
    limit = (least + most) / 2
    assert run("search", "--work", measured, "--latency", f"{limit}ms").code == 0
    page = Path(run("report", "--work", measured, "--json").json["report"]).read_text()
    assert "Loss against latency" in page
    assert "Size against latency" in page
    assert "ms for a decoded token with 256 tokens of context" in page
    assert "Predicted latency" in page
    (measured / "latency.json").unlink()
    page = Path(run("report", "--work", measured, "--json").json["report"]).read_text()
    assert "Predicted latency" in page
    assert "Loss against latency" not in page


def test_a_report_without_a_latency_says_nothing_of_time(run: Run, measured: Path) -> None:
    assert run("search", "--work", measured, "--latency", "9s").code == 0
    assert run("search", "--work", measured, "--bits", 5).code == 0
    page = Path(run("report", "--work", measured, "--json").json["report"]).read_text()
    assert "latency" not in page.lower()


def test_damaged_costs_are_told(run: Run, fails: Fails, measured: Path) -> None:
    assert run("search", "--work", measured, "--latency", "9s").code == 0
    (measured / "latency.json").write_text("{}")
    assert "latency.json is damaged" in fails(1, "report", "--work", measured)
    assert run("search", "--work", measured, "--latency", "9s").code == 0, "it is made anew"
    assert run("report", "--work", measured).code == 0


def test_compress_checks_measures_and_reports_a_latency(
    run: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantlib.pipeline import compress

    monkeypatch.setattr(compress, "measured_ms", lambda path, costs, *_: dict.fromkeys(costs, 7.5))
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--data", text, *QUICK)
    dry = run(*command, "--latency", "90ms", "--dry-run")
    assert "for a checkpoint of 90.0 ms for a decoded token" in dry.stdout, dry
    impossible = run(*command, "--latency", "1us")
    assert impossible.code == 1
    assert "1.00 us for a decoded token with 256 tokens of context is impossible" in (
        impossible.stderr
    )
    assert not out.exists()
    assert not (tmp_path / "out.work").exists()
    found = run(*command, "--latency", "90ms", "--json").json
    assert found["limits"] == {DECODE: 90.0}
    assert found["latency"] == {DECODE: 7.5}
    page = Path(found["report"]).read_text()
    assert "Measured latency" in page
    assert "this model, 7.50 ms measured" in page
    again = run(*command, "--latency", "90ms")
    assert again.code == 0, again
    assert "7.50 ms" in again.stdout
    other = run(*command, "--latency", "80ms")
    assert other.code == 1
    assert "--overwrite" in other.stderr


def test_a_recipe_file_can_hold_latencies(
    run: Run, fails: Fails, model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {text}\npreset: fast\nseqlen: 32\nwindows: 6\nlatency: [90ms]\n")
    command = ("compress", model, "-o", tmp_path / "out", "--recipe", recipe, "--dry-run")
    assert "90.0 ms for a decoded token" in run(*command).stdout
    assert "80.0 ms for a decoded token" in run(*command, "--latency", "80ms").stdout
    recipe.write_text(f"data: {text}\nlatency: [90 bananas]\n")
    assert "use ms, s or us" in fails(2, *command)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--latency", "12"), "no unit"),
        (("--latency", "prefill=1s"), "@512"),
        (("--latency", "12ms", "--latency", "decode=10ms"), "two latencies"),
        (("--latency", "12ms", "--threads", 0), "--threads 1 or more"),
        (("--latency", "12ms", "--mode", "guess"), "is not a mode to run in"),
        (("--bits", 5, "--threads", 2), "add --latency"),
        (("--bits", 5, "--mode", "int8"), "add --latency"),
        (("--latency", "12ms", "--engine", "vllm"), "leave out --latency or --engine"),
        (("--latency", "12ms", "--bits", 5, "--size", "30%"), "give one budget"),
    ],
)
def test_a_latency_that_is_wrong_is_exit_code_2(
    fails: Fails, measured_once: Path, clock: list[Op], options: tuple[object, ...], words: str
) -> None:
    assert words in fails(2, "search", "--work", measured_once, *options)
    assert not clock, "nothing is timed for a request that is wrong"


def test_a_model_that_the_engine_does_not_run(
    run: Run, fails: Fails, measured: Path, model: Path, tmp_path: Path
) -> None:
    known = json.loads((measured / "model.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (measured / "model.json").write_text(json.dumps({**known, "path": str(elsewhere)}))
    assert "config.json" in fails(2, "search", "--work", measured, "--latency", "9s")
    config = json.loads((model / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    assert "its model type is 'abacus'" in fails(2, "search", "--work", measured, "--latency", "9s")
