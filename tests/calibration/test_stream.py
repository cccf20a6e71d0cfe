"""A streamed model is the model: same hidden states between all blocks, same logits, for every way
a family calls its blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib.calibration import passes
from quantlib.calibration.stream import BlockStream
from quantlib.errors import ModelError
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

MakeTiny = Callable[[str], Any]

FAMILIES = [
    "llama", "llama_tied", "llama_one_block", "mistral_sliding", "qwen2", "qwen3", "phi3", "gemma2",
    "gemma3_text", "mixtral", "qwen3_moe", "bloom", "falcon", "mpt", "gptj", "gpt_bigcode", "opt",
]  # fmt: skip


def quiet(_: str) -> None:
    """A progress bar that shows nothing."""


def hidden_states(model, blocks, ids) -> list[torch.Tensor]:
    """What enters each block of the whole model, and what leaves the last, for one window."""
    seen: list[torch.Tensor] = []

    def enter(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leave(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    modules = [model.get_submodule(name) for name in blocks]
    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in modules]
    handles.append(modules[-1].register_forward_hook(leave))
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", FAMILIES)
def test_hidden_states_and_logits_are_the_models_own(
    tiny: MakeTiny, store: Any, windows: Tensor, case: str
) -> None:
    """The same operations on the same numbers: any difference is a wrong mask, position, norm or
    soft-cap. 1e-5 allows for products in another order on other processors."""
    it = tiny(case)
    stream = it.stream()
    passes.forward(stream, windows, store, quiet)
    for window, ids in enumerate(windows):
        expected = hidden_states(it.model, it.model_map.blocks, ids)
        assert len(expected) == len(it.model_map.blocks) + 1
        for index, hidden in enumerate(expected):
            found = store.load(f"hidden.{index}")[window]
            torch.testing.assert_close(found, hidden[0], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            logits = stream.logits(expected[-1], ids)
            whole = it.model(input_ids=ids[None], use_cache=False).logits
        torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["mistral_sliding", "gemma2", "gemma3_text"])
def test_the_sliding_window_is_shorter_than_the_test(
    tiny: MakeTiny, windows: Tensor, case: str
) -> None:
    """Otherwise the test above could not see a wrong mask."""
    it = tiny(case)
    with torch.no_grad():
        before = it.model(input_ids=windows[:1], use_cache=False).logits
        window, it.model.config.sliding_window = it.model.config.sliding_window, 64
        after = it.model(input_ids=windows[:1], use_cache=False).logits
        it.model.config.sliding_window = window
    assert float((before - after).abs().max()) > 1e-3


def test_only_one_block_is_ever_in_memory(tiny: MakeTiny, windows: Tensor) -> None:
    it = tiny("llama")
    stream = it.stream()

    def resident() -> list[str]:
        named = stream.model.named_parameters()
        inside = [n for n, p in named if not p.is_meta and n.startswith(it.model_map.blocks)]
        return sorted({".".join(n.split(".")[:3]) for n in inside})

    hidden = stream.embed(windows[0])
    assert resident() == []
    for index, name in enumerate(it.model_map.blocks):
        with stream.block(index) as block:
            assert resident() == [name]
            hidden = stream.run(index, block, hidden)
            loaded = weakref.ref(next(block.parameters()))
        assert resident() == []
        assert loaded() is None, "something still refers to a released parameter"
    assert stream.model.get_input_embeddings().weight.device.type == "cpu"


def test_a_block_is_put_back_when_running_it_fails(tiny: MakeTiny, windows: Tensor) -> None:
    stream = tiny("llama").stream()
    before = stream.embed(windows[0])
    with pytest.raises(ZeroDivisionError), stream.block(1):
        raise ZeroDivisionError
    assert torch.equal(stream.embed(windows[0]), before)


def test_running_a_block_before_any_window_is_a_sentence(tiny: MakeTiny) -> None:
    stream = tiny("llama").stream()
    with stream.block(0) as block, pytest.raises(ModelError, match="embed a window first"):
        stream.run(0, block, torch.zeros(1, 4, 32))


def test_windows_of_another_length_need_only_another_embed(tiny: MakeTiny, windows: Tensor) -> None:
    it = tiny("gemma2")
    stream = it.stream()
    for length in (20, 9):
        ids = windows[0, :length]
        expected = hidden_states(it.model, it.model_map.blocks, ids)
        with torch.no_grad():
            hidden = stream.embed(ids)
            for index in range(3):
                with stream.block(index) as block:
                    hidden = stream.run(index, block, hidden)
        torch.testing.assert_close(hidden, expected[-1], rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A block of no known family: hidden states by name, a position argument, a tuple back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, hidden_states, factor=None):
        return hidden_states + factor * self.mix(hidden_states), None


class Nested(nn.Module):
    """A decoder with its blocks two lists deep, each inside a wrapper that is no list."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        stages = [nn.ModuleList([nn.ModuleDict({"body": Block()})]) for _ in range(2)]
        self.stages = nn.ModuleList(stages)
        self.factor = factor

    @property
    def base_model(self) -> Nested:
        return self

    def forward(self, input_ids, use_cache=False):
        hidden = self.embed(input_ids)
        for stage in self.stages:
            for wrapper in stage:
                hidden, _ = wrapper["body"](hidden_states=hidden, factor=self.factor)
        return hidden


def test_blocks_may_lie_deep_and_take_hidden_states_by_name(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch, windows: Tensor
) -> None:
    """The machinery needs names of blocks, nothing else of a family."""
    model = Nested(0.5)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(windows[:1])

    def load(module, prefix, source, dtype, exclude=()):
        chosen = {n: v for n, v in state.items() if n.startswith(prefix)}
        module.load_state_dict(chosen, strict=False)

    monkeypatch.setattr("quantlib.models.skeleton.build", lambda source, dtype: model)
    monkeypatch.setattr("quantlib.models.skeleton.materialize", load)
    monkeypatch.setattr("quantlib.models.skeleton.release", lambda module, prefix: None)
    it = tiny("llama")
    names = ("stages.0.0.body", "stages.1.0.body")
    fields = {**vars(it.model_map), "blocks": names}
    known = {name: fields[name] for name in ModelMap.__dataclass_fields__}
    stream = BlockStream(it.source, ModelMap(**known))
    with torch.no_grad():
        hidden = stream.embed(windows[0])
        for index in range(2):
            with stream.block(index) as block:
                hidden = stream.run(index, block, hidden)
    torch.testing.assert_close(hidden, expected)


def test_a_truncated_model_is_a_sentence_and_the_block_is_put_back(
    tiny: MakeTiny, tmp_path: Path, windows: Tensor
) -> None:
    it = tiny("llama")
    copy = tmp_path / "model"
    copy.mkdir()
    for file in it.source.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    source = Source.open(copy)
    stream = BlockStream(source, it.model_map)
    before = stream.embed(windows[0])
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20_000])
    with pytest.raises(ModelError, match="shorter than when it was opened"), stream.block(2):
        pass
    assert torch.equal(stream.embed(windows[0]), before)
