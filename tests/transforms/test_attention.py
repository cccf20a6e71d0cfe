"""The attention function: sdpa without a state, the packed cache's numbers with one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

from quantlib.errors import FormatError, ModelError, UsageError
from quantlib.kernels import kv_reference
from quantlib.kernels.kv_format import BLOCK, KvFormat, SideFormat
from quantlib.transforms.attention import (
    AttentionState,
    attach_attention,
    detach_attention,
    round_kv,
    transform,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA2 = {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": GEMMA2,
    "gemma3_text": {"sliding_window": 6},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
# Four float32 sums in another order: a few units in the last place of logits of size about 10.
SAME = 1e-5


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def decoder(model_type: str, **own: Any) -> PreTrainedModel:
    settings = {**SHAPE, **DECODERS.get(model_type, {}), **own}
    config = CONFIG_MAPPING[model_type](**settings)
    return randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def whisper() -> Whisper:
    config = WhisperConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return randomised(Whisper(config))


def orthogonal(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator))[0].float()


def attention_names(model: PreTrainedModel) -> list[str]:
    return [n for n, m in model.named_modules() if n.endswith(("self_attn", "encoder_attn"))]


@torch.no_grad()
def logits(model: PreTrainedModel, padding: int = 0) -> Tensor:
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 20 - padding :] = 0
    if isinstance(model, Whisper):
        sound = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2))
        return model(input_features=sound, decoder_input_ids=ids).logits
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("model_type", [*DECODERS, "whisper"])
def test_without_a_state_nothing_changes(model_type: str, padding: int) -> None:
    model = whisper() if model_type == "whisper" else decoder(model_type)
    before = logits(model, padding)
    attach_attention(model, {name: AttentionState() for name in attention_names(model)})
    assert model.config._attn_implementation.startswith("quantlib")
    assert torch.equal(logits(model, padding), before)
    detach_attention(model)
    assert torch.equal(logits(model, padding), before)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("model_type", [*DECODERS, "whisper"])
def test_a_key_basis_alone_changes_nothing_but_the_last_bits(
    model_type: str, per_head: bool
) -> None:
    model = whisper() if model_type == "whisper" else decoder(model_type)
    before = logits(model)
    basis = orthogonal(2, 32, 32) if per_head else orthogonal(32, 32)
    seen: list[tuple[int, ...]] = []
    state = AttentionState(basis, observe=lambda q, k, v: seen.append(tuple(k.shape)))
    names = attention_names(model)
    attach_attention(model, dict.fromkeys(names, state))
    error = float((logits(model) - before).abs().max())
    assert len(seen) == len(names)  # every one was called
    assert error <= SAME * float(before.abs().max())


def test_a_wrong_basis_is_noticed() -> None:
    """The test above can fail: queries and keys in different bases are another model."""
    model = decoder("llama")
    before = logits(model)
    state = AttentionState(orthogonal(32, 32) * 1.1)
    attach_attention(model, {"model.layers.0.self_attn": state})
    assert float((logits(model) - before).abs().max()) > 100 * SAME


@pytest.mark.parametrize(
    "name", ["int8", "int4", "int4h16", "int4g16", "int4r", "int4h16r", "int8/int4r", "f32"]
)
@pytest.mark.parametrize("head_dim", [32, 48])
def test_keys_and_values_are_those_of_a_packed_cache(name: str, head_dim: int) -> None:
    """Stored in blocks by the reference cache, token by token, and read back: the same bits."""
    form = KvFormat.parse(name)
    x = torch.randn(7, 2, head_dim, generator=torch.Generator().manual_seed(4)) * 3
    for side, keys in ((form.key, True), (form.value, False)):
        stored = empty_blocks(side, head_dim)
        for position in range(len(x)):
            kv_reference.store(stored, side, keys, position, x[position : position + 1])
        expected = kv_reference.dequantize(stored, side, keys, head_dim)[: len(x)]
        assert torch.equal(round_kv(x, side), expected)


def empty_blocks(side: SideFormat, head_dim: int) -> Tensor:
    return torch.zeros(2, 1, BLOCK * side.bytes_per_position(head_dim), dtype=torch.uint8)


@pytest.mark.parametrize(("sinks", "per_head"), list(itertools.product([0, 2], [False, True])))
def test_a_model_attends_to_what_the_packed_cache_holds(sinks: int, per_head: bool) -> None:
    """One layer's attention against the reference cache and its own attention."""
    form = KvFormat.parse("int4h16/int4r")
    basis = orthogonal(2, 32, 32) if per_head else orthogonal(32, 32)
    model = decoder("llama", num_hidden_layers=1)
    module = model.get_submodule("model.layers.0.self_attn")
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    state = AttentionState(basis, form, sinks, observe=lambda *qkv: shown.append(qkv))
    attach_attention(model, {"model.layers.0.self_attn": state})
    module.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    logits(model)
    query, key, value = (x[0].transpose(0, 1) for x in shown[0])
    basis = basis.expand(2, 32, 32)
    query = torch.einsum("tkgd,kde->tkge", query.unflatten(1, (2, 2)), basis).flatten(1, 2)
    key = torch.einsum("tkd,kde->tke", key, basis)
    kept = []
    for x, side, keys in ((key, form.key, True), (value, form.value, False)):
        blocks = empty_blocks(side, 32)
        kv_reference.store(blocks, side, keys, 0, x)
        rounded = kv_reference.dequantize(blocks, side, keys, 32)[: len(x)]
        kept.append(torch.cat((x[:sinks], rounded[sinks:])))
    expected = kv_reference.attend(query, kept[0], kept[1], module.scaling).flatten(1)
    # A last bit of a rotated key may cross a rounding boundary: then it moves by one code of 15,
    # so a few of 20 * 128 outputs may differ, and nearly all agree.
    close = (outputs[0][0] - expected).abs() <= SAME * float(expected.abs().max())
    assert float(close.float().mean()) >= 0.99


@pytest.mark.parametrize(
    ("kv", "sinks"), [("int4", 2), ("int4k2", 0), ("int4k1", 2), ("int4k2", 1)]
)
def test_only_the_first_positions_stay_exact(kv: str, sinks: int) -> None:
    """Of the two ways to ask for them, the one that asks for more counts."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(1, 2, 6, 32, generator=generator) for _ in range(3))
    _, k, v = transform(query, key, value, AttentionState(kv=KvFormat.parse(kv), sinks=sinks))
    for rounded, exact in ((k, key), (v, value)):
        assert torch.equal(rounded[:, :, :2], exact[:, :, :2])
        assert bool((rounded[:, :, 2:] != exact[:, :, 2:]).any(-1).all())


def test_queries_are_rounded_to_their_grid() -> None:
    query = torch.randn(1, 2, 6, 32, generator=torch.Generator().manual_seed(5))
    query[0, 0, 0] = 0
    rounded, *_ = transform(query, query, query, AttentionState(query_bits=4))
    step = query.abs().amax(-1, keepdim=True) / 7
    assert float(((rounded - query).abs() - step * 0.5001).max()) <= 0
    assert len(torch.unique(rounded[0, 1, 0])) <= 15
    assert torch.equal(rounded[0, 0, 0], torch.zeros(32))


def test_with_a_cache_decoding_gives_the_numbers_of_one_pass() -> None:
    model = decoder("llama")
    form = KvFormat.parse("int4h16")
    states = dict.fromkeys(attention_names(model), AttentionState(kv=form, sinks=1))
    attach_attention(model, states)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0]
        cache, steps = None, []
        for token in ids[0]:
            out = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
    close = (torch.stack(steps) - whole).abs() <= SAME * float(whole.abs().max())
    assert float(close.float().mean()) >= 0.95  # see above: last bits may cross a boundary


def test_gradients_pass_through_rounding_as_if_it_were_not_there() -> None:
    key = torch.randn(1, 1, 4, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    _, rounded, _ = transform(
        key, key, key, AttentionState(kv=KvFormat.parse("int4"), query_bits=8)
    )
    rounded.sum().backward()
    assert key.grad is not None
    assert torch.equal(key.grad, torch.ones_like(key))


def test_infinities_become_nan_and_never_a_number() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    x[1, 4] = torch.inf
    rounded = round_kv(x, SideFormat.parse("int4"))
    assert bool(rounded[1].isnan().all())
    assert bool(rounded[[0, 2]].isfinite().all())


def test_bad_states_are_refused_with_a_sentence() -> None:
    model = decoder("llama")
    at = "model.layers.0.self_attn"
    with pytest.raises(ModelError, match=r"no module model\.layers\.9\.self_attn"):
        attach_attention(model, {"model.layers.9.self_attn": AttentionState()})
    with pytest.raises(UsageError, match="belongs to another model"):
        attach_attention(model, {at: AttentionState(torch.eye(16))})
    with pytest.raises(UsageError, match="first positions"):
        attach_attention(model, {at: AttentionState(sinks=-1)})
    with pytest.raises(UsageError, match="9 bits"):
        attach_attention(model, {at: AttentionState(query_bits=9)})
    with pytest.raises(FormatError, match="32"):
        attach_attention(model, {at: AttentionState(kv=KvFormat.parse("int4h32"))})
    assert model.config._attn_implementation == "sdpa"  # refused before anything was changed
    old = randomised(
        AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["bloom"](vocab_size=96, hidden_size=32, n_head=4, n_layer=1)
        )
    )
    with pytest.raises(ModelError, match="computes attention itself"):
        attach_attention(old, {"transformer.h.0.self_attention": AttentionState()})
