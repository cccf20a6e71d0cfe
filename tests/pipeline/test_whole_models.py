"""Models of several parts, end to end: calibrated on records, compressed whole, reloaded, and run
on every path. What the checkpoint says is what the bank's weights say in the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantlib
from quantlib.calibration.paths.route import objective
from quantlib.checkpoint.contents import contents
from quantlib.pipeline.compress import Result, compress
from quantlib.pipeline.dense import DensePlan
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.task_trials import TaskTrials
from quantlib.pipeline.workfiles import load_model, load_table

from . import whole_models

TOLERANCE = 1e-3
"""Relative to the largest number: the same products added in another order, in float32, through
layers of random weights that amplify differences."""
SMALL: dict[str, Any] = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 0,
    "passes": 0,
    "size": "60%",
    "schemes": ["w2g32z4s4", "w3g32z4s4"],
    "report": False,
    "expert_tokens": 4,
}
STREAMS = {
    "janus": ("text", "answer", "image", "decoder", "codes"),
    "janus_mixture": ("text", "answer", "image", "decoder", "codes"),
    "emu3": ("text", "answer", "image", "decoder", "codes"),
    "chameleon": ("text", "answer", "codes"),
    "whisper": ("answer",),
    "qwen2_5_omni": ("text", "answer", "hearing", "codec", "spectrogram", "sound"),
    "bert": ("vectors",),
    "dinov2": ("vectors",),
    "clip": ("vectors",),
    "siglip": ("vectors",),
    "clip_vision": ("vectors",),
    "siglip_vision": ("vectors",),
}
CASES: list[Any] = [
    "janus",
    pytest.param("janus_mixture", marks=pytest.mark.slow),
    "llava_dinov2",
    "llava_siglip",
    "idefics3",
    "gemma3",
    "qwen2_5_vl",
    "qwen2_5_omni",
    "chameleon",
    pytest.param("emu3", marks=pytest.mark.slow),
    "whisper",
    "bert",
    "dinov2",
    "clip",
    "smolvlm",
    "siglip",
    "clip_vision",
    "siglip_vision",
]
Squeeze = Callable[..., Result]


@pytest.fixture(scope="session")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Squeeze:
    """squeezed("janus"): the tiny model compressed once per session."""
    made: dict[str, Result] = {}

    def build(case: str) -> Result:
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            model = whole_models.save(case, root / "model")
            data = whole_models.records(case, root)
            made[case] = compress(model, out=root / "out", data=data, **SMALL)
        return made[case]

    return build


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_says_on_every_path_what_was_measured(case: str, squeezed: Squeeze) -> None:
    result = squeezed(case)
    packed = quantlib.load(result.path, engine="plain").model
    with reopen_run(result.work, with_data=True) as run, torch.no_grad():
        plan = DensePlan(run)
        samples = {task: list(run.streams.judging(task, plan.model)) for task in run.tasks}
        exact = {task: _said(run, plan.model, task, samples[task]) for task in run.tasks}
        plan.load(result.plan.schemes)
        assert run.tasks == STREAMS.get(case, ("text", "answer"))
        for task in run.tasks:
            expected = _said(run, plan.model, task, samples[task])
            found = _said(run, packed, task, samples[task])
            assert _distance(found, expected) <= TOLERANCE, task
            moved = _distance(exact[task], expected)
            assert moved > 10 * TOLERANCE, f"{task} does not run on what was rounded"


def _said(run: Any, model: Any, task: str, samples: list[Any]) -> torch.Tensor:
    route = run.streams.route(task)
    said = [objective(sample).said(route.run(model, **sample.inputs)) for sample in samples]
    return torch.cat([one.flatten() for one in said])


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest number; Chameleon's forbidden words have logits
    of minus infinity, nearly."""
    allowed = expected > -1e30
    difference = (found - expected)[allowed].abs().max()
    return float(difference / expected[allowed].abs().max())


@pytest.mark.parametrize("case", CASES)
def test_nothing_stays_without_a_reason(case: str, squeezed: Squeeze) -> None:
    """Every matrix is packed, or is named with why not; and the component table of the checkpoint
    has all of its bytes."""
    result = squeezed(case)
    known = load_model(result.work).model_map
    assert set(result.plan.schemes) == {weight.name for weight in known.weights}
    assert all(row.reason for row in known.kept)
    checkpoint = quantlib.load(result.path, engine="plain").checkpoint
    reasons = {name: row.reason for row in known.kept for name in (row.name, *row.aliases)}
    assert set(checkpoint.kept_names) <= set(reasons)
    found = contents(checkpoint)
    left = [row for part in found.components for row in part.kept]
    assert sum(row.parameters for row in left) == sum(row.parameters for row in known.kept)
    assert all(row.name and row.reason for row in left)
    assert not found.beside, "tensors that are no parameter of the model"
    held = sum(part.bytes for part in found.components) + found.header_bytes
    assert held == sum(file.stat().st_size for file in result.path.glob("*.safetensors"))


def test_what_nothing_reads_is_kept_and_says_so(squeezed: Squeeze) -> None:
    kept = {
        row.name: row.reason for row in load_model(squeezed("llava_siglip").work).model_map.kept
    }
    pooling = [
        reason for name, reason in kept.items() if ".head.mlp." in name and "bias" not in name
    ]
    assert len(pooling) == 2
    assert all(reason.startswith("nothing reads it") for reason in pooling)


def test_the_table_has_a_column_and_a_full_precision_loss_for_every_stream(
    squeezed: Squeeze,
) -> None:
    result = squeezed("janus")
    known = load_model(result.work)
    table = load_table(result.work, known.model_map)
    assert table.tasks == STREAMS["janus"]
    assert set(table.baseline) == set(table.tasks)
    assert all(loss > 0 for loss in table.baseline.values())
    # what a task does not run costs it nothing, and what it runs costs something
    decoder = next(w.name for w in known.model_map.weights if w.component == "image_decoder")
    tower = next(w.name for w in known.model_map.weights if w.component == "vision_tower")
    head = next(w.name for w in known.model_map.weights if w.component == "generation_head")
    cheapest = "w3g32z4s4"
    felt = {
        name: {task for task, loss in table.entry(name, cheapest).loss.items() if loss > 0}
        for name in (decoder, tower, head)
    }
    assert felt == {decoder: {"decoder"}, tower: {"answer"}, head: {"image"}}


def test_predicted_losses_are_of_the_size_of_measured_ones(squeezed: Squeeze) -> None:
    """In every task, on held-back records: the units of statistics, terms and divergences agree.

    The prediction leaves out what errors do to each other, which at 2 and 3 bits is a factor of
    several, and measures nothing of two records but their order of magnitude.
    """
    result = squeezed("janus")
    table = load_table(result.work, load_model(result.work).model_map)
    with reopen_run(result.work, with_data=True) as run:
        measured = TaskTrials(run).measure(result.plan.schemes)
    for task, found in measured.items():
        rows = result.plan.schemes.items()
        predicted = sum(table.entry(name, scheme).loss[task] for name, scheme in rows)
        assert predicted / 12 < found.value < 12 * predicted, (task, predicted, found.value)


def test_janus_writes_and_decodes_pictures_after_a_reload(squeezed: Squeeze) -> None:
    result = squeezed("janus")
    model = quantlib.load(result.path, engine="plain").model
    ids = torch.tensor([[1, 5, 6, 94]])
    codes = model.generate(
        inputs=ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False
    )
    pixels = model.decode_image_tokens(codes)
    assert codes.shape == (1, 16)
    assert pixels.shape == (1, 8, 8, 3)
    assert torch.isfinite(pixels).all()


def test_whisper_writes_after_a_reload(squeezed: Squeeze) -> None:
    model = quantlib.load(squeezed("whisper").path, engine="plain").model
    features = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.generate(features, max_new_tokens=4, do_sample=False)
    assert found.shape[1] >= 1


def test_a_model_saved_again_is_the_same_checkpoint(squeezed: Squeeze, tmp_path: Path) -> None:
    """Convolutions too, whose dense filters are made while they run."""
    model = quantlib.load(squeezed("janus").path, engine="plain").model
    codes = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        before = model.model.vqmodel.decode(codes)
        model.save_pretrained(tmp_path)
        after = quantlib.load(tmp_path, engine="plain").model.model.vqmodel.decode(codes)
    assert torch.equal(before, after)
