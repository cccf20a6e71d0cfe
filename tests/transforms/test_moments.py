"""Moments are what a brute-force computation on the whole model gives, in one pass over blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quantlib.calibration.stream import BlockStream
from quantlib.errors import DataError
from quantlib.transforms.attention import ATTRIBUTE, AttentionState, attach_attention
from quantlib.transforms.moments import (
    PEAK_SHARES,
    Moments,
    Second,
    merge,
    moments_of,
    stream_moments,
)

from .small_models import HEAD_DIM, HEADS, KV_HEADS, Small, small_llama

# Products of a window are float32: 20 tokens, entries of any sign, a few units in the last place.
TOLERANCE = 1e-5
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def seen(small: Small, windows: Tensor) -> dict[str, Tensor]:
    """Inputs of all linears [tokens, K], and the outputs of q, k, v as `...q_proj:out`."""
    kept: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in small.model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(_: object, x: tuple[Tensor], y: Tensor, name: str = name) -> None:
                kept.setdefault(name, []).append(x[0][0])
                kept.setdefault(f"{name}:out", []).append(y[0])

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        for ids in windows:
            small.model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values).double() for name, values in kept.items()}


def token_weights(small: Small, windows: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {
        g.name: torch.rand(windows.numel(), generator=generator) for g in small.model_map.groups
    }


def streamed(small: Small, windows: Tensor, weighted: bool = True, skip: int = 0) -> Moments:
    stream = BlockStream(small.source, small.model_map)
    weights = token_weights(small, windows)
    give = (lambda group: [weights[group]]) if weighted else None
    return merge(stream_moments(stream, small.model_map, small.wiring, windows, give, skip))


def close(found: Tensor | None, expected: Tensor) -> bool:
    assert found is not None
    assert found.dtype == torch.float64
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def second(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """mean of x x^T over the rows of x."""
    weight = torch.ones(len(x)) if weight is None else weight
    return torch.einsum("ti,tj,t->ij", x, x, weight.double()) / weight.double().sum()


def rotated(small: Small, seen: dict[str, Tensor], block: str, projection: str) -> Tensor:
    """Queries or keys behind RoPE: [windows, heads, 20, d]."""
    x = seen[f"{block}.self_attn.{projection}:out"].float()
    heads = x.reshape(-1, 20, x.shape[1] // HEAD_DIM, HEAD_DIM).transpose(1, 2)
    rotary = small.model.get_submodule("model.rotary_emb")
    cos, sin = rotary(heads, torch.arange(20)[None])
    return apply_rotary_pos_emb(heads, heads, cos, sin)[0].double()


def test_inputs_are_those_of_brute_force(
    small: Small, windows: Tensor, seen: dict[str, Tensor]
) -> None:
    moments = streamed(small, windows)
    weights = token_weights(small, windows)
    for group in small.model_map.groups:
        if group.block is None:
            continue
        x = seen[small.model_map.weight(group.members[0]).module]
        found = moments.inputs[group.members[0]]
        assert all(moments.inputs[name] is found for name in group.members)
        plain, weighted = second(x), second(x, weights[group.name])
        if group.name.endswith("down_proj"):
            plain, weighted = plain.diagonal(), weighted.diagonal()
        assert close(found.second.plain, plain)
        assert close(found.second.weighted, weighted)
        assert close(found.mean, x.mean(0))
        assert torch.equal(found.amax, x.abs().amax(0).float())
        expected = torch.quantile(x.abs().amax(1).float(), torch.tensor(PEAK_SHARES))
        assert torch.equal(found.peaks, expected)
        assert found.tokens == windows.numel()


@pytest.mark.parametrize("skip", [0, 3])
def test_heads_are_those_of_brute_force(
    small: Small, windows: Tensor, seen: dict[str, Tensor], skip: int
) -> None:
    moments = streamed(small, windows, skip=skip)
    weights = token_weights(small, windows)
    for block in small.wiring.blocks:
        weight = weights[f"{block}.self_attn.qkv"].reshape(3, 20)[:, skip:].reshape(-1)
        found = moments.heads[block]
        query = rotated(small, seen, block, "q_proj")[:, :, skip:]
        key = rotated(small, seen, block, "k_proj")[:, :, skip:]
        value = seen[f"{block}.self_attn.v_proj:out"].reshape(3, 20, KV_HEADS, HEAD_DIM)[:, skip:]
        for head in range(KV_HEADS):
            first, group = head * (HEADS // KV_HEADS), HEADS // KV_HEADS
            queries = [query[:, first + i].reshape(-1, HEAD_DIM) for i in range(group)]
            for moment, rows, w in (
                (found.key, key[:, head].reshape(-1, HEAD_DIM), weight),
                (found.value, value[:, :, head].reshape(-1, HEAD_DIM), weight),
                (found.query, torch.cat(queries), weight.repeat(group)),
            ):
                assert close(moment.plain[head], second(rows))
                assert moment.weighted is not None
                assert close(moment.weighted[head], second(rows, w))


def test_a_module_in_memory_gives_what_a_stream_gives(small: Small, windows: Tensor) -> None:
    batches = [{"input_ids": windows[:2]}, {"input_ids": windows[2:]}]
    memory = moments_of(small.model, small.wiring, batches, skip=2)
    expected = streamed(small, windows, weighted=False, skip=2)
    assert memory.inputs.keys() == {*expected.inputs, "lm_head.weight"}
    assert memory.heads.keys() == expected.heads.keys()
    for name, inputs in expected.inputs.items():
        assert close(memory.inputs[name].second.plain, inputs.second.plain)
        assert memory.inputs[name].second.weighted is None
    for name, heads in memory.heads.items():
        for side in ("query", "key", "value"):
            assert close(getattr(heads, side).plain, getattr(expected.heads[name], side).plain)


def test_watching_leaves_nothing_behind(small: Small, windows: Tensor) -> None:
    at = "model.layers.0.self_attn"
    state = AttentionState(sinks=1)
    attach_attention(small.model, {at: state})
    moments_of(small.model, small.wiring, [{"input_ids": windows}])
    assert getattr(small.model.get_submodule(at), ATTRIBUTE) is state
    assert not hasattr(small.model.get_submodule("model.layers.1.self_attn"), ATTRIBUTE)
    delattr(small.model.get_submodule(at), ATTRIBUTE)


@pytest.mark.parametrize("change", [lambda w: w[:-1], lambda w: torch.cat((w, w[:1]))])
def test_token_weights_of_other_windows_are_refused(
    small: Small, windows: Tensor, change: Callable[[Tensor], Tensor]
) -> None:
    stream = BlockStream(small.source, small.model_map)
    weights = change(torch.ones(windows.numel()))
    passes = stream_moments(stream, small.model_map, small.wiring, windows, lambda _: [weights])
    with pytest.raises(DataError, match="windows of calibration"):
        list(passes)


def test_weighted_moments_are_blended_with_plain_ones_and_must_be_there() -> None:
    both = Second(torch.eye(2), 3 * torch.eye(2))
    for share, expected in ((0.0, 1.0), (0.25, 1.5), (1.0, 3.0)):
        assert torch.equal(both.of(share), expected * torch.eye(2))
    with pytest.raises(DataError, match="calibrate with gradients"):
        Second(torch.eye(2)).of(0.5)


def test_equal_weights_change_nothing(small: Small, windows: Tensor) -> None:
    stream = BlockStream(small.source, small.model_map)
    ones = torch.full((windows.numel(),), 0.25)
    for part in stream_moments(stream, small.model_map, small.wiring, windows, lambda _: [ones]):
        for found in part.inputs.values():
            assert close(found.second.weighted, found.second.plain)


def test_experts_are_seen_row_by_row(tmp_path: Path) -> None:
    """Each routed row counts once, for its expert's input; weights go with the rows."""
    from .small_models import small_mixtral

    small = small_mixtral(tmp_path)
    windows = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(7))
    stream = BlockStream(small.source, small.model_map)
    moments = merge(stream_moments(stream, small.model_map, small.wiring, windows))
    found = moments.inputs["model.layers.0.mlp.experts.gate_up_proj"]
    assert found.tokens == 2 * windows.numel()  # two experts per token
    assert found.second.plain.shape == (32, 32)
    down = moments.inputs["model.layers.0.mlp.experts.down_proj"]
    assert down.second.plain.shape == (24,)
    assert bool(down.second.plain.isfinite().all())
