"""How `quantlib search` judges plans: by which score, and by trials on true KL."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlib.search.expressions import Expression
from quantlib.search.plan import Plan
from quantlib.search.proxies import COLUMNS, KNOWN, Proxy

from .conftest import Run

Fails = Callable[..., str]
BUDGET = ("--bits", 6)


def test_every_known_score_and_an_evolved_one_find_a_plan_within_the_budget(
    run: Run, measured: Path, tmp_path: Path
) -> None:
    proxy = tmp_path / "proxy.json"
    Proxy(Expression.parse("mul(noise, sqrt(fisher_energy))", COLUMNS)).save(proxy)
    allowed = run("search", "--work", measured, *BUDGET, "--json").json["budget_bytes"]
    for score in ("measured", *KNOWN, f"evolved:{proxy}"):
        answer = run("search", "--work", measured, *BUDGET, "--score", score, "--json")
        assert answer.code == 0, answer
        assert answer.json["bytes"] <= allowed
        assert ("score" in Plan.load(measured / "plan.json").provenance) == (score != "measured")
    layers = json.loads((measured / "layers.json").read_text())
    assert set(layers["tasks"]) == {"kl"}


def test_a_plan_of_another_score_is_applied_as_any_other(
    run: Run, measured: Path, tmp_path: Path
) -> None:
    assert run("search", "--work", measured, *BUDGET, "--score", "fisher").code == 0
    out = tmp_path / "out"
    answer = run("apply", measured / "plan.json", "-o", out, "--json")
    assert answer.code == 0, answer
    assert (
        Plan.load(measured / "plan.json").schemes == Plan.load(out / "quantlib_plan.json").schemes
    )


def test_scores_that_are_not_there_end_with_a_sentence(
    fails: Fails, measured: Path, tmp_path: Path
) -> None:
    search = ("search", "--work", measured, *BUDGET)
    assert "use measured" in fails(2, *search, "--score", "best")
    assert "there is no evolved proxy" in fails(1, *search, "--score", "evolved:nowhere.json")
    other = tmp_path / "other.json"
    Proxy(Expression.parse("noise", COLUMNS)).save(other)
    data = json.loads(other.read_text()) | {"version": 7}
    other.write_text(json.dumps(data))
    assert "version 7" in fails(1, *search, "--score", f"evolved:{other}")
    assert "add --validate" in fails(2, *search, "--workers", 2)
    assert "add --validate" in fails(2, *search, "--ray", "auto")
    assert "add --size or --bits" in fails(
        2, "search", "--work", measured, "--pareto", "--validate", 3
    )


@pytest.mark.usefixtures("needs_optuna")
def test_one_process_or_two_find_the_same_plan_and_remember_its_trials(
    run: Run, measured: Path, tmp_path: Path
) -> None:
    asked = ("--validate", 3, "--json", "-o")
    alone = run("search", "--work", measured, *BUDGET, *asked, tmp_path / "one.json")
    assert alone.code == 0, alone
    again = run("search", "--work", measured, *BUDGET, *asked, tmp_path / "two.json")
    (measured / "trials.log").unlink()
    both = run(
        "search", "--work", measured, *BUDGET, "--workers", 2, *asked, tmp_path / "three.json"
    )
    assert both.code == 0, both
    found = alone.json["validation"]
    assert 1 <= len(found["trials"]) <= 3
    assert found == again.json["validation"] == both.json["validation"]
    plans = [(tmp_path / f"{name}.json").read_text() for name in ("one", "two", "three")]
    assert plans[0] == plans[1] == plans[2]
    assert found["kl_after"] <= found["kl_before"]


@pytest.mark.usefixtures("needs_optuna")
def test_a_cluster_finds_the_plan_that_one_process_finds(
    run: Run, measured: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is the extra `ray`, 200 MB")
    asked = ("--validate", 3, "--json", "-o")
    alone = run("search", "--work", measured, *BUDGET, *asked, tmp_path / "one.json")
    (measured / "trials.log").unlink()
    cluster = ("--ray", "local", "--workers", 2)
    both = run("search", "--work", measured, *BUDGET, *cluster, *asked, tmp_path / "two.json")
    assert both.code == 0, both
    assert alone.json["validation"] == both.json["validation"]
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


@pytest.mark.usefixtures("needs_optuna")
def test_trials_of_other_settings_are_refused(run: Run, fails: Fails, measured: Path) -> None:
    assert run("search", "--work", measured, *BUDGET, "--validate", 1).code == 0
    log = measured / "trials.log"
    log.write_text(log.read_text().replace('\\"threads\\\\\\": 1', '\\"threads\\\\\\": 9'))
    log.write_text(log.read_text().replace('"threads\\": 1', '"threads\\": 9'))
    assert "other settings" in fails(1, "search", "--work", measured, *BUDGET, "--validate", 1)


@pytest.fixture
def needs_optuna() -> None:
    pytest.importorskip("optuna", reason="Optuna is the extra `trials`")
