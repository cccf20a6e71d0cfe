"""Packed keys and values in place of transformers' cache: what a model makes of them is what it
makes of rounded ones, and one new token is attended by CUDA's kernel (here in the emulator)."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantlib.errors import UsageError
from quantlib.kernels.cpu.build import BuildError, find_compiler
from quantlib.kernels.kv_format import KvFormat
from quantlib.runtime.generate import TransformersTexts
from quantlib.runtime.packed_cache import PackedCache, packed_cache
from quantlib.transforms.attention import AttentionState, attach_attention
from quantlib.transforms.hadamard import hadamard

PROMPT = [5, 20, 17, 31, 44, 9, 2]


@pytest.fixture(autouse=True)
def _compiler() -> None:
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def tiny(states, dtype=torch.float16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=len(states),
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    attach_attention(model, {f"model.layers.{i}.self_attn": s for i, s in enumerate(states)})
    return model


def logits_of(model, steps, cache=None):
    """Of the prompt and then of token after token, the likeliest ones of the first run."""
    found = []
    with torch.no_grad():
        for tokens in steps:
            output = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0, -1].float())
    return torch.stack(found)


STATES = [
    AttentionState(hadamard(16).float(), KvFormat.parse("int8")),
    AttentionState(None, KvFormat.parse("int8/int4r"), sinks=0, query_bits=8),
]
STEPS = [PROMPT, [11], [50], [3]]


def test_logits_are_those_of_rounded_keys_and_values(emulated):
    model = tiny(STATES)
    cache = packed_cache(model)
    assert isinstance(cache, PackedCache)
    found, expected = logits_of(model, STEPS, cache), logits_of(model, STEPS)
    # Three tokens in each of two layers; the prompt is attended by the processor's kernels.
    assert [one.name for one in emulated] == ["kv_attention"] * 6
    # Attention rounds its output, and a rotated query, to 16 bits; logits are below 1 here.
    assert ((found - expected).abs() <= 0.02 * expected.abs().amax()).all()
    assert cache.get_seq_length() == len(PROMPT) + 3
    unrounded = logits_of(tiny([AttentionState()] * 2), STEPS)
    assert (found - expected).abs().max() < (unrounded - expected).abs().max()


def test_generation_uses_it_where_cudas_kernels_are(emulated):
    texts = TransformersTexts(tiny(STATES))
    first = texts.extend({0: PROMPT, 1: PROMPT[:3]})
    assert all(isinstance(cache, PackedCache) for cache in texts._caches.values())
    again = texts.extend({1: PROMPT[3:6], 0: [11]})
    assert first.shape == again.shape == (2, 64)
    assert {one.name for one in emulated} == {"kv_attention"}


def test_it_grows_and_can_be_reordered_and_emptied(emulated):
    model, cache = tiny(STATES[:1]), PackedCache([STATES[0].kv])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (2, 300), generator=generator)
    with torch.no_grad():
        model(tokens[:, :250], past_key_values=cache)
        model(tokens[:, 250:], past_key_values=cache)
        whole = model(tokens, use_cache=False).logits[:, -1]
    assert cache.packed[0].cache.capacity >= 300
    assert cache.nbytes == cache.packed[0].cache.nbytes
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        last = model(tokens[[1, 0], :1], past_key_values=cache).logits[:, -1]
        longer = torch.cat([tokens, tokens[:, :1]], 1)
        wanted = model(longer, use_cache=False).logits[:, -1]
    assert ((last - wanted[[1, 0]]).abs() <= 0.02 * whole.abs().amax()).all()
    cache.reset()
    assert cache.get_seq_length() == 0


def test_models_that_keep_floats_keep_transformers_cache(emulated):
    assert packed_cache(tiny([AttentionState(kv=None)] * 2)) is None
    half = tiny(STATES)
    del half.model.layers[1].self_attn.quantlib_attention
    assert packed_cache(half) is None


def test_on_a_processor_transformers_cache_stays():
    assert packed_cache(tiny(STATES)) is None


def test_keys_that_nobody_attends_to_are_a_sentence(emulated):
    cache = PackedCache([KvFormat.parse("int8")])
    keys = torch.zeros(1, 2, 3, 16)
    cache.update(keys, keys, 0)
    with pytest.raises(UsageError, match="computes attention itself"):
        cache.update(keys, keys, 0)
