"""The models that benchmarks build are whole: transformers and quantlib find what they expect."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlib.bench import artifacts, checkpoints
from quantlib.bench.checkpoints import LLAMA_1B, LLAMA_8B, LlamaShape, PlannedSchemes, Schemes
from quantlib.checkpoint.reader import read_layout

TINY = LlamaShape("tiny", 2, 64, 160, 4, 2, 16, 384, tied=True)
SCHEMES = Schemes("w4g32zs4", "w6g64zs6")


@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B, TINY], ids=lambda shape: shape.name)
def test_a_shape_names_every_parameter_of_transformers_model(shape: LlamaShape) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shape.weights() | dict.fromkeys(shape.norms(), (shape.hidden,)) == expected


def test_the_published_sizes() -> None:
    """1.24 and 8.03 billion parameters."""
    for shape, parameters in ((LLAMA_1B, 1_235_814_400), (LLAMA_8B, 8_030_261_248)):
        matrices = sum(n * k for n, k in shape.weights().values())
        assert matrices + len(shape.norms()) * shape.hidden == parameters


def test_a_random_source_is_a_folder_of_transformers(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = tiny_llama(tmp_path / "tokenizer")
    folder = checkpoints.write_source(TINY, tmp_path / "source", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert AutoTokenizer.from_pretrained(folder)("hello").input_ids
    weight = model.model.layers[1].mlp.down_proj.weight.float()
    assert float(weight.detach().std()) == pytest.approx(checkpoints._SPREAD, rel=0.05)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_checkpoint_is_consistent_and_finite(tmp_path: Path, tied: bool) -> None:
    path = checkpoints.pack_random(replace(TINY, tied=tied), tmp_path / "out", SCHEMES)
    layout = read_layout(path)
    assert str(layout.schemes[checkpoints.EMBEDDING]) == SCHEMES.embedding
    assert (checkpoints.HEAD in layout.schemes) is not tied
    for name in layout:
        layout.quantized(name)  # refuses damaged numbers


def test_a_rounded_checkpoint_computes_nearly_what_the_source_does(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    from quantlib.runtime.load import load

    source = tiny_llama(tmp_path / "source")
    path = checkpoints.pack_rounded(source, tmp_path / "out", Schemes("w8g32", "w8g32"))
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        found = load(path, "exact", engine="plain").model(ids).logits
    # Weights are off by half a percent, and logits by a few; one matrix in the wrong place makes
    # them different numbers.
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_plan_of_another_model_is_taken_layer_by_layer_at_the_same_depth() -> None:
    """Thirty layers for sixteen: the first and the last of each half stay what they are."""
    mixed = PlannedSchemes.load(artifacts.SMOLLM2_PLAN, LLAMA_1B.layers)
    chosen = {name: mixed.of(name) for name in LLAMA_1B.weights()}
    for ours, theirs in ((0, 0), (7, 14), (8, 15), (15, 29)):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert chosen[name.format(ours)] == mixed.planned[name.format(theirs)]
    assert chosen[checkpoints.EMBEDDING] == mixed.planned[checkpoints.EMBEDDING]
    assert len(set(chosen.values())) > 4, "a plan of mixed precision"
