"""Losses of whole models are corrected by part from plans that are measured once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from quantlib.checkpoint.workdir import WorkDir
from quantlib.models.modelmap import ModelMap
from quantlib.pipeline.compress import measured_table, open_run, recipe_for
from quantlib.pipeline.measure import sensitivity
from quantlib.pipeline.plan import Budget
from quantlib.pipeline.probe import FACTORS_FILE, large_components
from quantlib.pipeline.task_trials import KIND, TaskTrials
from quantlib.search.factors import part_of
from quantlib.search.sensitivity import Sensitivity

from . import whole_models

BLOCKS = "w4g32zs4@1/8+w3g32z4s4"
FEW: dict[str, Any] = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 3,
    "passes": 0,
    "schemes": ["w2g32z4s4", "w3g32z4s4", "w4g32zs4", "w8g64zs6", BLOCKS],
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a tiny Whisper and of the work on it, and its records."""
    root = tmp_path_factory.mktemp("whisper")
    model, data = (
        whole_models.save("whisper", root / "model"),
        whole_models.records("whisper", root),
    )
    _table(model, root / "work", data)
    return model, root / "work", data


def _table(model: Path, work: Path, data: Path) -> tuple[Sensitivity, Sensitivity]:
    """The table of a run, and what the bank alone says."""
    settings = recipe_for(Budget(), data=str(data), **FEW)
    with open_run(model, work, settings) as run:
        return measured_table(run), sensitivity(run)


def test_losses_are_the_banks_times_the_factor_of_their_part(
    probed: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work, data = probed

    def again(*_: object) -> None:
        raise AssertionError("a plan was measured twice")

    monkeypatch.setattr(TaskTrials, "_measured", again)
    table, bank = _table(model, work, data)
    factors = json.loads((work / FACTORS_FILE).read_text())["answer"]
    alike = {"audio_tower", "language_model", "embeddings"}
    assert set(factors) == alike | {part_of(name, BLOCKS) for name in ("audio_tower", "embeddings")}
    assert max(factors.values()) > 1.05 * min(factors.values())
    settings = recipe_for(Budget(), data=str(data), **FEW)
    with open_run(model, work, settings) as run:
        for weight in run.model_map.weights:
            for scheme, entry in bank.rows[weight.name].items():
                expected = entry.loss["answer"] * factors[part_of(weight.component, scheme)]
                assert table.entry(weight.name, scheme).loss["answer"] == expected
    assert "factors" in table.provenance
    assert len(table.calibrations["answer"].probes) == 3


def test_every_part_is_tried_alone(probed: tuple[Path, Path, Path]) -> None:
    _, work, _ = probed
    with WorkDir.open(work) as there:
        tried = list(there.units(KIND))
    # three plans of each of three components (fewer where candidates coincide), the only one of
    # rows in blocks of each table (words, and the encoder's positions), and three probes
    assert 3 * 2 + 2 + 3 <= len(tried) <= 3 * 3 + 2 + 3


def test_small_components_are_not_tried() -> None:
    sizes = {"tower.a": 50, "tower.b": 31, "projector.a": 1, "decoder.a": 18}
    weights = [
        SimpleNamespace(name=name, component=name.split(".")[0], parameters=size)
        for name, size in sizes.items()
    ]
    tried = large_components(cast(ModelMap, SimpleNamespace(weights=weights)))
    assert tried == {"tower.a": "tower", "tower.b": "tower", "decoder.a": "decoder"}
