"""Formats of KV caches, layer by layer, within mean bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantlib
from quantlib.checkpoint.reader import read_layout
from quantlib.errors import FormatError, ModelError, UsageError
from quantlib.kernels.kv_format import KvFormat, SideFormat
from quantlib.pipeline.caches import allocate
from quantlib.pipeline.compress import Result
from quantlib.transforms.wiring import Attention, Matrix

KEYS_MATTER = {
    "key": {"int4": 4.0, "int4g32": 3.0, "int8": 0.1},
    "value": {"int4": 0.2, "int4g32": 0.1, "int8": 0.0},
}


def attention(module: str, kv_heads: int = 2, head_dim: int = 64) -> Attention:
    matrix = Matrix(f"{module}.w")
    return Attention(module, module, "block", matrix, matrix, 4, kv_heads, head_dim)


def mean_bits(found: dict[str, KvFormat], head_dim: int) -> float:
    sizes = [kv.bytes_per_position(head_dim) for kv in found.values()]
    return 8 * sum(sizes) / (2 * head_dim * len(sizes))


@pytest.mark.parametrize("bits", [4.5, 5.2, 6.5, 8.5])
def test_the_mean_is_within_the_budget_and_bits_go_where_they_save_most(bits: float) -> None:
    attentions = {name: attention(name) for name in ("first", "second")}
    losses = {"first": KEYS_MATTER, "second": KEYS_MATTER}
    found = allocate(losses, attentions, bits)
    assert mean_bits(found, 64) <= bits
    if bits == 6.5:
        assert all(kv.key == SideFormat(8) and kv.value == SideFormat(4) for kv in found.values())


def test_so_few_bits_that_no_format_has_them_are_refused_with_the_least_there_is() -> None:
    with pytest.raises(UsageError, match=r"the least is 4\.500 bits"):
        allocate({"only": KEYS_MATTER}, {"only": attention("only")}, 4.2)


def test_too_few_bits_are_refused_before_anything_is_written(
    squeeze: Callable[..., Result], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a KV cache of 4 bits cannot be had"):
        squeeze(kv="4", bits=16.0)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("kv", "why"),
    [
        ("int4h16", "int4h16 keeps 16 columns at 8 bits, and a head has 16: use int8"),
        ("int8/int4h32", "int4h32 keeps 32 columns at 8 bits, and a head has 16"),
    ],
)
@pytest.mark.parametrize("rotation", ["none", "gradients"])
def test_more_wide_columns_than_heads_have_are_refused_before_anything_is_written(
    squeeze: Callable[..., Result], tmp_path: Path, kv: str, why: str, rotation: str
) -> None:
    with pytest.raises(FormatError, match=why):
        squeeze(kv=kv, bits=16.0, rotation=rotation)
    assert not (tmp_path / "out.work").exists()


def test_a_cache_of_attentions_that_nobody_knows_is_refused_before_anything_is_written(
    squeeze: Callable[..., Result], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """Weights of such a decoder can be rounded: its map is derived, its wiring is not."""
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    StableLmForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    for kv in ("int8", "5.5"):
        with pytest.raises(ModelError, match=r"does not know the attentions of .* type stablelm"):
            squeeze(model=tmp_path / "model", kv=kv, bits=16.0)
    assert not (tmp_path / "out.work").exists()


def test_a_checkpoint_holds_the_formats_that_were_chosen(
    squeeze: Callable[..., Result],
) -> None:
    request: dict[str, Any] = {"kv": "7", "bits": 16.0, "refine": False}
    path = squeeze(**request).path
    caches = read_layout(path).around.caches
    kept = {name: settings.kv for name, settings in caches.items()}
    model = quantlib.load(path)
    config = model.model.config
    head_dim = config.hidden_size // config.num_attention_heads
    assert len(kept) == config.num_hidden_layers
    assert mean_bits(kept, head_dim) <= 7
    with torch.no_grad():
        logits = model.model(torch.arange(3, 30)[None]).logits
    assert torch.isfinite(logits).all()
