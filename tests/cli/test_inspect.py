"""`quantlib inspect` accounts for every byte, of a model and of a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import QUICK, Run


@pytest.fixture(scope="module")
def packed(run: Run, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    assert run("compress", model, "-o", out, "--bits", 6, "--data", text, *QUICK).code == 0
    return out


def test_what_is_kept_is_listed_by_name_with_its_reason(run: Run, model: Path) -> None:
    found = run("inspect", model, "--json").json
    kept = {
        row["name"]: row["bytes"] for row in found["coverage"] if row["role"].startswith("kept")
    }
    listed = [row for component in found["components"] for row in component["kept"]]
    assert kept
    assert sum(row["count"] for row in listed) == len(kept)
    assert sum(row["bytes"] for row in listed) == sum(kept.values())
    assert all(row["reason"] for row in listed)
    norms = next(r for r in listed if r["name"] == "model.layers.*.input_layernorm.weight")
    assert norms["count"] == found["blocks"]
    shown = run("inspect", model).stdout
    assert "layers.*.input_layernorm" in shown
    assert norms["reason"] in shown


def test_the_parts_of_a_checkpoint_add_up_to_its_files(run: Run, model: Path, packed: Path) -> None:
    before, after = (run("inspect", folder, "--json").json for folder in (model, packed))
    assert after["file_bytes"] == (packed / "model.safetensors").stat().st_size
    parts = [*after["components"], *after["beside"]]
    assert sum(part["bytes"] for part in parts) + after["header_bytes"] == after["file_bytes"]
    assert after["bits"] == pytest.approx(8 * after["file_bytes"] / before["parameters"])
    assert sum(part["share"] for part in after["components"]) == pytest.approx(1)
    for old, new in zip(before["components"], after["components"], strict=True):
        assert (new["name"], new["parameters"]) == (old["name"], old["parameters"])
        assert new["before"] == old["bytes"]
        assert new["bytes"] < old["bytes"]
        assert new["kept"] == old["kept"]
        assert sum(new["schemes"].values()) == new["quantized"]


def test_a_checkpoint_for_people(run: Run, packed: Path) -> None:
    shown = run("inspect", packed).stdout
    for word in ("embeddings", "language_model", "before", "after", "schemes", "w8g32", "why"):
        assert word in shown
    assert "model.layers.1.mlp.down_proj.weight" not in shown
    assert "model.layers.1.mlp.down_proj.weight" in run("inspect", packed, "--coverage").stdout


def test_parts_of_a_checkpoint_say_what_they_are_predicted_to_lose(
    run: Run, packed: Path, tmp_path: Path
) -> None:
    """As the plan and the table say; without the work directory that has them, why not."""
    plan = json.loads((packed / "quantlib_plan.json").read_text())
    found = run("inspect", packed, "--json").json["components"]
    losses = [row["predicted_losses"]["kl"] for row in found]
    assert all(loss > 0 for loss in losses)
    assert sum(losses) == pytest.approx(sum(row["loss"] for row in plan["weights"].values()))
    assert "predicted to lose" in run("inspect", packed).stdout
    moved = shutil.copytree(packed, tmp_path / "moved")
    assert all(
        not row["predicted_losses"] for row in run("inspect", moved, "--json").json["components"]
    )
    answer = run("inspect", moved)
    assert "predicted to lose" not in answer.stdout
    assert "is not known here" in answer.stderr


def test_what_lies_beside_a_rotated_model_is_listed(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--data", text, "--bits", 8, *QUICK)
    assert run(*command, "--rotation", "pca").code == 0
    found = run("inspect", out, "--json").json
    assert found["rotated"]
    assert "rotated" in run("inspect", out).stdout
    assert found["beside"]
    assert all("rotation" in row["reason"] for row in found["beside"])
    parts = [*found["components"], *found["beside"]]
    assert sum(part["bytes"] for part in parts) + found["header_bytes"] == found["file_bytes"]


def test_a_checkpoint_without_its_map_or_with_another_is_a_sentence(
    fails: Callable[..., str], packed: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(packed, tmp_path / "damaged"))
    file = damaged / "quantlib_map.json"
    known = json.loads(file.read_text())
    known["kept"].pop()
    known["weights"].pop()
    file.write_text(json.dumps(known))
    assert "do not belong together" in fails(1, "inspect", damaged)
    file.write_text("{}")
    assert "the model map is damaged" in fails(1, "inspect", damaged)
    file.unlink()
    assert "write it again with quantlib apply" in fails(1, "inspect", damaged)
