"""Every option of `quantlib compress` reaches the pipeline, under the pipeline's own name."""

from pathlib import Path
from typing import Any

import pytest

from quantlib.pipeline import compress as pipeline

from .conftest import Run

OPTIONS: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "data": (("--data", "other.txt"), {"data": "other.txt"}),
    "size": (("--size", "5MB"), {"size": "5MB"}),
    "latency": (
        ("--latency", "12ms", "--threads", 2, "--mode", "int8"),
        {"latency": ("12ms",), "threads": 2, "mode": "int8"},
    ),
    "activations": (("--scheme", "resq", "--activations", 4.5), {"activations": 4.5, "kv": "int4"}),
    "component": (("--component-size", "vision=2MB"), {"components": ("vision=2MB",)}),
    "files": (
        ("--work", "w", "--overwrite", "--download"),
        {"work": Path("w"), "overwrite": True, "download": True},
    ),
    "preset": (("--preset", "fast"), {"preset": "fast"}),
    "fast": (("--fast",), {"preset": "fast"}),
    "schemes": (("--schemes", "w4g64,w8g64"), {"schemes": ("w4g64", "w8g64")}),
    "kv": (("--kv", "8"), {"kv": "int8"}),
    "kinds": (
        ("--kv", "text=8,image_output=4"),
        {"kv": "f32", "kv_modalities": {"text": "int8", "image_output": "int4"}},
    ),
    "nonlinear": (("--nonlinear", "sqnr=30"), {"nonlinear": "sqnr=30"}),
    "rotation": (("--rotation", "pca"), {"rotation": "pca"}),
    "weighting": (("--weighting", "none"), {"weighting": "none"}),
    "keep": (("--keep", "vision", "--keep", "head"), {"keep": ("vision", "head")}),
    "windows": (
        ("--windows", 7, "--seqlen", 64, "--seed", 3),
        {"windows": 7, "seqlen": 64, "seed": 3},
    ),
    "rows": (("--rows",), {"rows": True}),
    "learning": (("--refine", "--learning", 20), {"learning": 20}),
    "refine": (("--no-refine",), {"refine": False}),
    "engine": (("--engine", "vllm"), {"engine": "vllm"}),
    "rules": (
        ("--floor", "a=4", "--ceiling", "b=5", "--pin", "c=w8g64"),
        {"floors": ("a=4",), "ceilings": ("b=5",), "pins": ("c=w8g64",)},
    ),
}


class Called(Exception):
    """Stops the command where the pipeline would begin."""


@pytest.fixture
def arguments(run: Run, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`arguments("--seed", 3)`: what the pipeline is called with."""

    def call(*options: object) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def instead(model: str, **given: Any) -> None:
            found.update(given, model=model)
            raise Called

        monkeypatch.setattr(pipeline, "compress", instead)
        run("compress", "MODEL", "-o", "OUT", *options)
        return found

    return call


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_reaches_the_pipeline(case: str, arguments: Any) -> None:
    options, expected = OPTIONS[case]
    budget = () if case == "size" else ("--bits", 4.25)
    text = () if case == "data" else ("--data", "text.txt")
    found = arguments(*budget, *text, *options)
    assert found["model"] == "MODEL"
    assert found["out"] == Path("OUT")
    assert found.get("bits") == (None if case == "size" else 4.25)
    assert {name: found[name] for name in expected} == expected


def test_balance_and_weights_of_tasks_are_the_objective(arguments: Any) -> None:
    found = arguments(
        "--bits", 4, "--data", "t.txt", "--balance", "minmax", "--task-weights", "text=1,image=2"
    )
    assert found["objective"].balance == "minmax"
    assert found["objective"].weights == {"text": 1.0, "image": 2.0}


def test_a_recipe_file_fills_what_no_option_says(arguments: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: file.txt\nseed: 5\nwindows: 9\n")
    found = arguments("--bits", 4, "--recipe", file, "--seed", 6)
    assert (found["data"], found["windows"], found["seed"]) == ("file.txt", 9, 6)
