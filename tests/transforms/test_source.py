"""A rotated source is a source: everything runs on it, and computes what the original does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from quantlib.calibration.observe import BlockObserver, observed
from quantlib.calibration.stream import BlockStream
from quantlib.errors import ModelError, TransformError
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.transforms import changes
from quantlib.transforms.apply import RotatedSource, rotate_module
from quantlib.transforms.binding import wire
from quantlib.transforms.hadamard import rotate
from quantlib.transforms.rotation import Rotation

from .families import IDS, logits, make, random_rotation

PARTS = ("norms", "residual", "value", "key", "hidden", "order")
ON_DISK = (
    "llama",
    "llama_tied",
    "llama_biased",
    "qwen2",
    "phi3",
    "gemma",
    "gemma2",
    "mixtral",
    "qwen3_moe_some_dense",
)
Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """saved("llama", dtype) -> the folder of that tiny model."""

    def save(case: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / case
        make(case, dtype).save_pretrained(folder)
        return folder

    return save


def rotated(folder: Path, case: str, *parts: str) -> RotatedSource:
    rotation = random_rotation(make(case), *(parts or PARTS))
    return RotatedSource.of(Source.open(folder), rotation)


def filled(source: Source) -> PreTrainedModel:
    model = skeleton.build(source)
    skeleton.materialize(model, "", source)
    return model


@pytest.mark.parametrize("case", ON_DISK)
def test_filled_from_it_a_module_is_what_rotating_in_memory_makes(case: str, saved: Saved) -> None:
    source = rotated(saved(case), case)
    model, expected = filled(source), make(case)
    before = logits(expected)
    rotate_module(expected, wire(expected), source.rotation)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert torch.equal(logits(model), logits(expected))
    error = (logits(model) - before).abs().max() / before.abs().max()
    assert float(error) <= 1e-4


@pytest.mark.parametrize("case", ON_DISK)
def test_its_map_is_the_original_s_but_for_the_fingerprint(case: str, saved: Saved) -> None:
    source = rotated(saved(case), case)
    original = ModelMap.from_source(source.original)
    found = ModelMap.from_source(source)
    assert found.fingerprint == source.fingerprint != original.fingerprint
    assert replace(found, fingerprint=original.fingerprint) == original


def test_its_fingerprint_names_the_rotation(saved: Saved) -> None:
    source = rotated(saved("llama"), "llama")
    again = RotatedSource.of(source.original, source.rotation)
    other = RotatedSource.of(source.original, replace(source.rotation, hidden={}))
    assert again.fingerprint == source.fingerprint
    assert len({source.fingerprint, source.original.fingerprint, other.fingerprint}) == 3


def test_changed_parameters_are_float32_and_others_as_stored(saved: Saved) -> None:
    source = rotated(saved("llama_tied", torch.bfloat16), "llama_tied")
    dtypes = {name: stored.dtype for name, stored in source.parameters.items()}
    for name in dtypes:
        tensor = source.read(name)
        stored = source.parameters[name]
        assert tensor.nbytes == stored.nbytes
        assert (tensor.dtype == torch.float32) == (stored.dtype == "F32")
    assert dtypes["model.embed_tokens.weight"] == "BF16"
    assert dtypes["model.layers.0.input_layernorm.weight"] == "BF16"  # 1.0 in any dtype
    assert dtypes["model.layers.0.mlp.down_proj.weight"] == "F32"
    assert source.file_bytes == source.original.file_bytes
    ModelMap.from_source(source)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe_some_dense"])
def test_one_expert_is_read_alone(case: str, saved: Saved) -> None:
    source = rotated(saved(case), case)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        stack = source.read(name)
        for expert in range(4):
            assert torch.equal(source.read(name, expert), stack[expert])


def test_wide_matrices_are_turned_in_slices(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of any size needs the float64 memory of a slice, and gives the same numbers."""
    source = rotated(saved("llama"), "llama")
    name = "model.embed_tokens.weight"
    whole = source.read(name)
    sizes: list[int] = []
    plain = changes.turn

    def turn(x: torch.Tensor, basis: changes.Basis) -> torch.Tensor:
        sizes.append(x.numel())
        return plain(x, basis)

    monkeypatch.setattr(changes, "turn", turn)
    monkeypatch.setattr(changes, "_CHUNK", 100)
    sliced = source.read(name)
    assert max(sizes) <= 100
    assert sum(sizes) == whole.numel()
    # float64 sums that a library may order by the number of rows, rounded to float32
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["llama", "llama_tied", "mixtral", "gemma"])
def test_streamed_block_by_block_it_gives_the_original_s_logits(case: str, saved: Saved) -> None:
    source = rotated(saved(case), case)
    expected = logits(make(case))
    stream = BlockStream(source, ModelMap.from_source(source))
    with torch.no_grad():
        hidden = stream.embed(IDS[0])
        for index in range(len(stream.block_names)):
            with stream.block(index) as block:
                hidden = stream.run(index, block, hidden)
        found = stream.logits(hidden, IDS[0])[0]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_calibration_sees_rotated_hidden_layers(case: str, saved: Saved) -> None:
    """What is observed at a down projection is what its rotated weight will be multiplied by."""
    folder = saved(case)
    block = "model.layers.0"
    seen = []
    for source in (Source.open(folder), rotated(folder, case, "hidden")):
        model_map, model = ModelMap.from_source(source), filled(source)
        observer = BlockObserver(model_map, block, weighted=False, seed=0)
        with observed(model, model_map, block, observer):
            logits(model)
        statistics = {entry.name: entry.matrices for entry in observer.statistics()}
        down = next(name for name in statistics if name.endswith("down_proj"))
        seen.append([matrix.hessian for matrix in statistics[down]])
    for plain, turned in zip(*seen, strict=True):
        if plain.numel():
            expected = rotate(rotate(plain.double(), 48).T, 48)
            torch.testing.assert_close(turned.double(), expected, rtol=1e-4, atol=1e-5)
            assert float((turned - plain).abs().max()) > 0.1 * float(plain.abs().max())


def test_values_that_are_not_finite_are_refused_by_name(saved: Saved) -> None:
    model = make("llama")
    folder = saved("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(folder)
    source = rotated(folder, "llama")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* 1 values"):
        source.read("model.layers.1.mlp.up_proj.weight")


def test_what_cannot_be_rotated_is_refused_before_anything_is_read(saved: Saved) -> None:
    source = Source.open(saved("llama"))
    with pytest.raises(TransformError, match="made for another model"):
        RotatedSource.of(source, random_rotation(make("qwen3"), "value"))
    once = RotatedSource.of(source, Rotation())
    with pytest.raises(ModelError, match="rotated already"):
        RotatedSource.of(once, Rotation())
    with pytest.raises(ModelError, match=r"has no tensor model\.nowhere"):
        once.read("model.nowhere")
