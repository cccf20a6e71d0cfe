"""Compressing in another basis: the same command, the same stages, and a checkpoint that loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import quantlib
from quantlib.checkpoint.reader import read_layout
from quantlib.errors import SearchError, TransformError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.pipeline.compress import Result
from quantlib.pipeline.reporting import report_of
from quantlib.search.activations import ACTIVATION_BITS, mean_bits

RESQ: dict[str, Any] = {
    "rotation": "gradients",
    "schemes": ["w4a4z", "w4a4zh8/8", "w4a4zh8/4", "w8a8", "w6g32zs6", "w8g32zs8"],
    "refine": False,
    "bits": 12.0,
}
"""A budget that candidates of a model this small, most of it embedding and bases, can meet."""


@pytest.mark.parametrize("basis", ["pca", "weights", "gradients"])
def test_a_rotated_checkpoint_computes_what_was_measured(
    squeeze: Callable[..., Result], basis: str
) -> None:
    result = squeeze(**RESQ | {"rotation": basis})
    rounded = [s for s in result.plan.schemes.values() if Scheme.parse(s).activation.rounds]
    assert len(rounded) == 14, "every linear of two blocks rounds its inputs"
    model = quantlib.load(result.path).model
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("basis", "high"), [("pca", {}), ("weights", {0: 20, 1: 20})])
def test_channels_that_are_wide_with_every_scheme_stay_out_of_hadamard_matrices(
    squeeze: Callable[..., Result], basis: str, high: dict[int, int]
) -> None:
    """An eighth of 160, as schemes count it; ResQ itself rotates all of them."""
    rotation = read_layout(squeeze(**RESQ | {"rotation": basis}).path).rotation()
    assert rotation is not None
    assert rotation.hidden_high == {f"model.layers.{i}": count for i, count in high.items()}
    assert set(rotation.hidden.values()) == {128 if high else 160}
    assert not rotation.hidden_order, "it is in the weights"


def test_members_of_a_group_share_a_scheme_when_their_input_is_rounded(
    squeeze: Callable[..., Result],
) -> None:
    plan = squeeze(**RESQ).plan.schemes
    for block in range(2):
        attention = f"model.layers.{block}.self_attn"
        assert len({plan[f"{attention}.{p}_proj.weight"] for p in "qkv"}) == 1
        mlp = f"model.layers.{block}.mlp"
        assert plan[f"{mlp}.gate_proj.weight"] == plan[f"{mlp}.up_proj.weight"]


def test_embeddings_get_candidates_that_round_nothing(squeeze: Callable[..., Result]) -> None:
    scheme = squeeze(**RESQ).plan.schemes["model.embed_tokens.weight"]
    assert scheme in ("w6g32zs6", "w8g32zs8")


def test_a_limit_on_activation_bits_is_kept(squeeze: Callable[..., Result]) -> None:
    result = squeeze(**RESQ, activations=4.5)
    plan = result.plan
    assert plan.limits[ACTIVATION_BITS] == 4.5
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    shapes |= {"gate": (160, 64), "up": (160, 64), "down": (64, 160)}
    weighted, total = 0.0, 0
    for name, scheme in plan.schemes.items():
        kind = name.rpartition("_proj")[0].rpartition(".")[2]
        if kind in shapes:
            rows, columns = shapes[kind]
            weighted += rows * columns * mean_bits(Scheme.parse(scheme), columns)
            total += rows * columns
    assert weighted / total <= 4.5
    page = report_of(result.work).read_text()
    assert f"{weighted / total:.3f} in the mean, scales and zero points counted" in page
    assert "directions by what their rounding costs, priced by gradients" in page
    assert squeeze(**RESQ, activations=8.0, overwrite=True).plan.limits[ACTIVATION_BITS] == 8.0


def test_a_limit_below_every_candidate_says_what_is_possible(
    squeeze: Callable[..., Result], tmp_path: Path
) -> None:
    with pytest.raises(SearchError, match="activation bits"):
        squeeze(**RESQ, activations=3.0)
    assert not (tmp_path / "out").exists()


def test_a_second_budget_reuses_the_rotation_and_another_seed_does_not(
    squeeze: Callable[..., Result],
) -> None:
    first = squeeze(**RESQ)
    again = squeeze(**RESQ | {"bits": 13.0}, overwrite=True)
    other = squeeze(**RESQ | {"seed": 1}, overwrite=True)
    assert {"rotate", "calibrate"} <= first.seconds.keys()
    assert "rotate" not in again.seconds
    assert "rotate" in other.seconds


def test_a_model_whose_residual_stream_cannot_be_rotated_is_refused_in_a_sentence(
    squeeze: Callable[..., Result], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tiny_tokenizer.save_pretrained(tmp_path / "gemma")
    with pytest.raises(TransformError):
        squeeze(**RESQ, model=tmp_path / "gemma")
    assert not (tmp_path / "out.work").exists()


def test_a_scheme_that_no_integer_kernel_runs_is_refused_before_anything_is_written(
    squeeze: Callable[..., Result], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no activation groups of 48 columns"):
        squeeze(bits=13.0, schemes=("w4g32a4zg48", "w4g32"))
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("basis", ["pca", "weights", "gradients"])
def test_means_of_inputs_move_into_biases_where_a_model_has_them(
    squeeze: Callable[..., Result], biased_llama: Path, basis: str
) -> None:
    """Of values and hidden layers, whose online part a checkpoint keeps; ResQ itself does not."""
    schemes = ["w8g32a8", "w8g32zs8"]
    result = squeeze(**RESQ | {"rotation": basis, "schemes": schemes, "model": biased_llama})
    rotation = read_layout(result.path).rotation()
    assert rotation is not None
    shifted = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert set(rotation.means) == (set() if basis == "pca" else shifted)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        original = LlamaForCausalLM.from_pretrained(biased_llama).eval()
        expected, found = original(ids).logits, quantlib.load(result.path).model(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.fixture(scope="module")
def biased_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Path:
    """A Llama whose linears have biases, drawn like its weights."""
    path = tmp_path_factory.mktemp("biased") / "model"
    tiny_llama(path, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(path)
    return path
