"""Canonical factors of convolutions: candidates of a whole model, and run from its checkpoint."""

from __future__ import annotations

import pytest
import torch

import quantlib
from quantlib.formats.composite import has_room
from quantlib.formats.scheme import Scheme
from quantlib.pipeline.compress import Result, compress
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.workfiles import load_model, load_table
from quantlib.runtime.composite import CanonicalConvolution
from tests.pipeline import whole_models

CANONICAL, OTHER = "c6k3w8", "c6k3x3w8"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A tiny Whisper, whose two convolutions have windows of 3."""
    root = tmp_path_factory.mktemp("whisper")
    model, data = (
        whole_models.save("whisper", root / "model"),
        whole_models.records("whisper", root),
    )
    return compress(
        model,
        out=root / "out",
        data=data,
        size="60%",
        schemes=["w3g32z4s4", "w6g64zs6", CANONICAL, OTHER],
        pins=(f"*conv*={CANONICAL}",),
        windows=4,
        probe_windows=2,
        probes=0,
        passes=0,
        report=False,
    )


def test_convolutions_of_that_window_alone_have_them(result: Result) -> None:
    known = load_model(result.work)
    table = load_table(result.work, known.model_map)
    for weight in known.model_map.weights:
        found = set(table.rows[weight.name])
        assert OTHER not in found
        assert (CANONICAL in found) == (weight.kind == "conv")
        if weight.kind == "conv":
            assert has_room(Scheme.parse(CANONICAL), weight.shape, weight.tensor_shape[2:])


def test_the_checkpoint_computes_what_the_bank_holds(result: Result) -> None:
    loaded = quantlib.load(result.path, engine="plain").model
    with reopen_run(result.work) as run, torch.no_grad():
        convolutions = [w.name for w in run.model_map.weights if w.kind == "conv"]
        for name in convolutions:
            module = loaded.get_submodule(name.removesuffix(".weight"))
            assert type(module) is CanonicalConvolution
            dense = bank_weight(run, name, CANONICAL)
            torch.testing.assert_close(module.weight, dense, rtol=1e-5, atol=1e-7)
            x = torch.randn(2, module.in_channels, 20, generator=torch.Generator().manual_seed(0))
            expected = module.window.dense(x, dense, module.bias)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert len(convolutions) == 2
