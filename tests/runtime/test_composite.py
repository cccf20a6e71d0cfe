"""Weights of several matrices in whole models: written, loaded, run, saved, and tied."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.errors import CheckpointError, ModelError, UsageError
from quantlib.formats import (
    CompositeWeight,
    Scheme,
    dequantize_stored,
    pack_stored,
    parts_of,
    quantize_rtn,
)
from quantlib.formats.weight import ORDER
from quantlib.rounding.rows import assign_rows
from quantlib.runtime.assemble import Inputs, replace_modules
from quantlib.runtime.composite import (
    BlockedEmbedding,
    BlockedLinear,
    CanonicalConvolution,
    FactoredConvolution,
    FactoredLinear,
    ThinConvolution,
)
from quantlib.runtime.engine_changes import unsupported_changes
from quantlib.runtime.engine_spec import EngineSpec
from quantlib.runtime.load import load
from quantlib.runtime.modules import TiedHead, packed_modules
from tests.runtime.conftest import build, matrices

EMBEDDING = "w8g16@1/8+w6g16@3/8+w6g16d24"
LINEARS = ("w4g32+r4", "w5g16z+r3w4", "w6g32", "w8g16@1/4+w4g32z@1/4+w6")
TOLERANCE = 2e-4
"""Of logits: float32 sums of some dozens of products in another order, through two layers."""


def rounded(name: str, weight: torch.Tensor) -> Any:
    """A weight in a scheme, its matrices rounded to the nearest."""
    scheme, shape = Scheme.parse(name), (weight.shape[0], weight.shape[1])
    if not scheme.is_composite:
        return quantize_rtn(weight, scheme.segments(shape[1]))
    generator = torch.Generator().manual_seed(len(name))
    parts = {}
    for suffix, part in parts_of(scheme, shape).items():
        scale = float(weight.std()) * (0.3 if suffix else 1.0)
        drawn = weight if suffix == "" else scale * torch.randn(part.shape, generator=generator)
        parts[suffix] = quantize_rtn(drawn, part.segments)
    block = None
    if len(scheme.rows) > 1:
        block = assign_rows(scheme, torch.rand(shape[0], generator=generator))
    return CompositeWeight(scheme, shape, parts, block)


def written(family: str, folder: Path) -> tuple[Any, dict[str, str]]:
    """A tiny model with the values that its checkpoint stands for, and the schemes."""
    model = build(family)
    schemes = {}
    for index, (name, weight) in enumerate(matrices(model).items()):
        embedding = name.endswith("embed_tokens.weight")
        plain = weight.dim() == 3 or name == "lm_head.weight"
        scheme = EMBEDDING if embedding else "w6g32" if plain else LINEARS[index % len(LINEARS)]
        schemes[name] = scheme
    weights = {
        name: rounded(schemes[name], w.reshape(-1, w.shape[-1]))
        for name, w in matrices(model).items()
    }
    tensors = {name: p.detach() for name, p in model.named_parameters() if name not in weights}
    for name, weight in weights.items():
        tensors |= {name + suffix: tensor for suffix, tensor in pack_stored(weight).items()}
    shapes = {name: tuple(w.shape) for name, w in matrices(model).items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    write_checkpoint(folder, tensors, config, schemes, shapes)
    state = model.state_dict()
    for name, weight in weights.items():
        state[name].copy_(dequantize_stored(weight).view(state[name].shape))
    return model, schemes


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) * 5 % model.config.vocab_size
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma2", "qwen3-moe"])
def test_a_checkpoint_computes_what_its_matrices_stand_for(family: str, tmp_path: Path) -> None:
    dense, schemes = written(family, tmp_path / "out")
    loaded = load(tmp_path / "out", mode="exact", engine="plain").model
    expected, found = logits(dense), logits(loaded)
    assert not float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max())
    kinds = [type(module) for module in packed_modules(loaded).values()]
    assert {BlockedEmbedding, BlockedLinear, FactoredLinear} <= set(kinds)
    for name, weight in dense.state_dict().items():
        if schemes.get(name, "").startswith(("w4g32+", "w5g16z+", "w8g16@1/8", "w8g16@1/4")):
            module = loaded.get_submodule(name.rpartition(".")[0])
            torch.testing.assert_close(module.dequantize(), weight, rtol=1e-4, atol=1e-5)


def test_a_tied_head_reads_the_blocks(tmp_path: Path) -> None:
    dense, _ = written("llama", tmp_path / "out")
    loaded = load(tmp_path / "out", mode="exact", engine="plain").model
    assert isinstance(loaded.lm_head, TiedHead)
    hidden = torch.randn(3, dense.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = dense.lm_head(hidden), loaded.lm_head(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_layout_says_version_3_and_the_native_engine_says_why_not(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    checkpoint = read_layout(tmp_path / "out")
    assert checkpoint.config["quantization_config"]["version"] == 3
    assert str(checkpoint.schemes["model.embed_tokens.weight"]) == EMBEDDING
    assert isinstance(checkpoint.quantized("model.embed_tokens.weight"), CompositeWeight)
    loaded = load(tmp_path / "out")
    assert loaded.engine == "plain"
    assert "several matrices" in str(loaded.plain_reason)
    with pytest.raises(UsageError, match="several matrices"):
        load(tmp_path / "out", engine="native")


def test_the_native_engine_runs_blocks_of_rows_and_names_what_it_does_not(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    checkpoint = read_layout(tmp_path / "out")
    spec = EngineSpec.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    reasons = {}
    for name, scheme in checkpoint.schemes.items():
        alone = dataclasses.replace(checkpoint, schemes={name: scheme})
        reason = unsupported_changes(alone, spec)
        assert reason in (None, f"{name} is stored as several matrices ({scheme})")
        reasons[str(scheme)] = reason
    runs = {scheme: reason is None for scheme, reason in reasons.items()}
    factors = {LINEARS[0]: False, LINEARS[1]: False}
    assert runs == {EMBEDDING: False, **factors, LINEARS[2]: True, LINEARS[3]: True}


def test_what_is_loaded_can_be_saved_and_copied(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    loaded = load(tmp_path / "out", mode="exact", engine="plain").model
    before = logits(loaded)
    assert torch.equal(logits(copy.deepcopy(loaded)), before)
    loaded.save_pretrained(tmp_path / "again")
    first, second = read_layout(tmp_path / "out"), read_layout(tmp_path / "again")
    assert first.schemes == second.schemes
    assert first.headers.keys() == second.headers.keys()
    for name in first.schemes:
        for suffix, tensor in first.tensors(name).items():
            assert torch.equal(tensor, second.tensors(name)[suffix]), (name, suffix)
    assert torch.equal(logits(load(tmp_path / "again", mode="exact", engine="plain").model), before)


def test_casts_change_outputs_and_leave_the_bits(tmp_path: Path) -> None:
    written("llama", tmp_path / "out")
    loaded = load(tmp_path / "out", mode="exact", engine="plain").model
    exact = logits(loaded)
    half = logits(loaded.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits of fraction, and there are a dozen roundings on the way.
    assert not float((half.float() - exact).abs().max()) > 0.1 * float(exact.abs().max())
    embedding = loaded.get_input_embeddings()
    assert embedding.get_buffer("weight_block").dtype == torch.uint8


def test_a_missing_matrix_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    written("llama", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if name.endswith("_down_packed"))
    save_file({k: t for k, t in tensors.items() if k != gone}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=gone):
        read_layout(tmp_path / "out")


def test_factors_follow_the_order_of_their_inputs_and_round_with_the_rest() -> None:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 32, bias=True))
    name, scheme = "0.weight", Scheme.parse("w6g32a8+r4")
    stored = rounded(str(scheme), torch.randn(32, 64, generator=generator))
    order = torch.randperm(64, generator=generator).to(torch.int32)
    inputs = {name: Inputs(scheme.activations(64), order)}
    bias = model[0].bias
    replace_modules(model, {name: str(scheme)}, None, inputs)
    state = {name + suffix: tensor for suffix, tensor in pack_stored(stored).items()}
    model.load_state_dict({**state, name + ORDER: order, "0.bias": bias})
    x = torch.randn(5, 64, generator=generator)
    dense = torch.empty(32, 64)
    dense[:, order.long()] = dequantize_stored(stored)
    torch.testing.assert_close(model[0].dequantize(), dense, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        expected, found = nn.functional.linear(x, dense, bias), model(x)
    # Inputs have 8 bits: an error of up to 1/254 of the largest, over 64 terms.
    assert not float((found - expected).abs().max()) > 0.05 * float(expected.abs().max())
    model[0].mode = "exact"
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w4g16+r5", "r12w8", "r7w4", "c12k3x3w8"])
@pytest.mark.parametrize("size", [3, 16])
def test_a_convolution_with_factors_is_the_dense_one(size: int, scheme: str) -> None:
    """Of a small picture by the unfolded input, of a large one by dense filters."""
    dense = nn.Conv2d(6, 40, 3, padding=1)
    stored = rounded(scheme, dense.weight.detach().flatten(1))
    model = nn.Sequential(copy.deepcopy(dense))
    replace_modules(model, {"0.weight": scheme}, {"0.weight": (40, 54)})
    packed = model[0]
    kinds = {"r": ThinConvolution, "c": CanonicalConvolution, "w": FactoredConvolution}
    assert type(packed) is kinds[scheme[0]]
    packed.load_state_dict(
        {"weight" + k: t for k, t in pack_stored(stored).items()} | {"bias": dense.bias}
    )
    with torch.no_grad():
        dense.weight.copy_(dequantize_stored(stored).view(dense.weight.shape))
        x = torch.randn(1, 6, size, size, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(packed(x), dense(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed(x[0]), dense(x[0]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed.weight, dense.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_canonical_factors_read_strided_windows_of_one_axis(mode: str) -> None:
    dense = nn.Conv1d(8, 24, 5, stride=2, padding=3, dilation=2, padding_mode=mode)
    stored = rounded("c9k5w8", dense.weight.detach().flatten(1))
    model = nn.Sequential(copy.deepcopy(dense))
    replace_modules(model, {"0.weight": "c9k5w8"})
    tensors = {"weight" + k: t for k, t in pack_stored(stored).items()}
    model[0].load_state_dict(tensors | {"bias": dense.bias})
    with torch.no_grad():
        dense.weight.copy_(dequantize_stored(stored).view(dense.weight.shape))
        x = torch.randn(2, 8, 30, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model[0](x), dense(x), rtol=1e-4, atol=1e-4)


def test_schemes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="embeddings"):
        replace_modules(nn.Sequential(nn.Conv2d(4, 32, 3)), {"0.weight": "w4@1/2+w3"})
    with pytest.raises(ModelError, match="linears"):
        replace_modules(nn.Sequential(nn.Embedding(64, 32)), {"0.weight": "w4+r3"})
    with pytest.raises(ModelError, match="convolutions"):
        replace_modules(nn.Sequential(nn.Linear(64, 32)), {"0.weight": "r4w8"})
    with pytest.raises(ModelError, match="another window"):
        replace_modules(nn.Sequential(nn.Conv2d(6, 32, 3)), {"0.weight": "c4k9w8"})
    with pytest.raises(ModelError, match="directions"):
        replace_modules(nn.Sequential(nn.Linear(64, 32)), {"0.weight": "w4+r32"})
