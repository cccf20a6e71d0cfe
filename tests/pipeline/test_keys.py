"""What results depend on is in their keys; what they do not depend on is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline.compress import open_run
from quantlib.pipeline.reround import reround_inputs
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe

FIELDS: dict[str, Any] = {"seqlen": 32, "windows": 4, "probe_windows": 2}
Opened = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path, llama: Path, text: str) -> Opened:
    """`opened(**changes)`: a context with the run of a recipe (or another `model`)."""

    @contextmanager
    def run(**changes: Any) -> Iterator[Run]:
        model = changes.pop("model", llama)
        recipe = Recipe.create(**{"data": text, **FIELDS, **changes})
        with open_run(model, tmp_path / "work", recipe) as one:
            yield one

    return run


def keys(run: Run) -> tuple[str, str]:
    return run.statistics_hash, run.rounding_hash


@pytest.fixture
def before(opened: Opened) -> tuple[str, str]:
    with opened() as run:
        return keys(run)


def test_the_same_request_has_the_same_keys(opened: Opened, before: tuple[str, str]) -> None:
    with opened() as run:
        assert keys(run) == before


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"windows": 5}, {"seqlen": 33}, {"gradients": False}], ids=str
)
def test_changes_of_the_calibration(
    opened: Opened, before: tuple[str, str], change: dict[str, Any]
) -> None:
    with opened(**change) as run:
        assert keys(run)[0] != before[0]
        assert keys(run)[1] != before[1]


def test_other_text_under_the_same_name(
    opened: Opened, before: tuple[str, str], tmp_path: Path, text: str
) -> None:
    copy = tmp_path / "copy.txt"
    words = Path(text).read_text()
    copy.write_text(words)
    with opened(data=str(copy)) as run:
        assert keys(run) == before, "the text decides, not where it lies"
    copy.write_text(words.replace("lighthouse", "windmill"))
    with opened(data=str(copy)) as run:
        assert keys(run)[0] != before[0]


@pytest.mark.parametrize("change", [{"damping": 0.02}, {"passes": 4}], ids=str)
def test_changes_of_the_rounding(
    opened: Opened, before: tuple[str, str], change: dict[str, Any]
) -> None:
    with opened(**change) as run:
        assert keys(run)[0] == before[0]
        assert keys(run)[1] != before[1]


@pytest.mark.parametrize(
    "change",
    [
        {"schemes": ["w4g64"]},
        {"probes": 0},
        {"swaps": 9},
        {"refine": True},
        {"strength": 0.25},
        {"preset": "fast", "passes": 3},
    ],
    ids=str,
)
def test_changes_that_come_later(
    opened: Opened, before: tuple[str, str], change: dict[str, Any]
) -> None:
    with opened(**{"windows": 4, "probe_windows": 2, **change}) as run:
        assert keys(run) == before


def test_strength_is_in_the_key_of_re_rounded_entries(opened: Opened) -> None:
    found = []
    for strength in (0.5, 0.25):
        with opened(strength=strength) as run:
            found.append(reround_inputs(run, {"model.embed_tokens.weight": "w4g64"}))
    assert found[0] != found[1]


def test_other_weights_of_the_same_shapes(
    opened: Opened, before: tuple[str, str], tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """Headers are equal, and so is the fingerprint that is made of them: the bytes differ."""
    same = tiny_llama(tmp_path / "same")
    other = tiny_llama(tmp_path / "other", seed=1)
    assert Source.open(other).fingerprint == Source.open(same).fingerprint
    with opened(model=same) as run:
        assert keys(run) == before
    with opened(model=other) as run:
        assert keys(run)[0] != before[0]


def test_probe_windows_are_never_calibrated_on(opened: Opened) -> None:
    with opened() as run:
        assert (len(run.windows), len(run.probe_windows)) == (4, 2)
        calibrated = {tuple(window) for window in run.windows.tolist()}
        probed = {tuple(window) for window in run.probe_windows.tolist()}
    assert len(calibrated | probed) == 6


def test_the_map_of_the_work_directory_is_that_of_the_model(opened: Opened, llama: Path) -> None:
    with opened() as run:
        assert run.model_map == ModelMap.from_source(Source.open(llama))
