"""Packed modules compute what those they replace compute, and hold nothing but packed tensors."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from quantlib.errors import UsageError
from quantlib.formats import (
    QuantizedWeight,
    Scheme,
    Segment,
    WeightFormat,
    dequantize,
    pack,
    packed_layout,
    quantize_rtn,
    unpack,
)
from quantlib.kernels import reference
from quantlib.runtime.modules import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    TiedHead,
    packed_weights,
    set_mode,
)
from quantlib.runtime.row_blocks import row_block

FLOAT32_SUMS = {"rtol": 1e-5, "atol": 1e-5}
"""Outputs of order 1 to 10, from fewer than 100 products summed in float32 in another order."""
TWO_FORMATS = (
    Segment(0, 48, WeightFormat("int3", 16, symmetric=False)),
    Segment(48, 24, WeightFormat("int8", 0)),
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_of(weight: QuantizedWeight, bias: Tensor | None = None) -> QuantizedLinear:
    segments = tuple(part.segment for part in weight.segments)
    rows, columns = weight.shape
    parameter = None if bias is None else nn.Parameter(bias)
    module = QuantizedLinear(columns, rows, segments, parameter, device="meta")
    module.exchange_packed("weight", segments, pack(weight))
    return module


@pytest.fixture
def weight() -> QuantizedWeight:
    return quantize_rtn(random(40, 72), TWO_FORMATS)


def embedding_of(weight: QuantizedWeight, **options: Any) -> QuantizedEmbedding:
    segments = tuple(part.segment for part in weight.segments)
    module = QuantizedEmbedding(*weight.shape, segments, device="meta", **options)
    module.exchange_packed("weight", segments, pack(weight))
    return module


def test_a_linear_multiplies_by_the_dequantized_weight(weight: QuantizedWeight) -> None:
    x, bias = random(2, 5, 72, seed=1), random(40, seed=2)
    expected = nn.functional.linear(x, dequantize(weight), bias)
    torch.testing.assert_close(linear_of(weight, bias)(x), expected, **FLOAT32_SUMS)


def test_a_linear_answers_in_the_dtype_it_was_asked_in(weight: QuantizedWeight) -> None:
    x = random(3, 72).to(torch.bfloat16)
    expected = nn.functional.linear(x.float(), dequantize(weight)).to(torch.bfloat16)
    assert linear_of(weight)(x).dtype == torch.bfloat16
    # Both round one float32 sum to bfloat16: one step of it apart at most.
    torch.testing.assert_close(linear_of(weight)(x), expected, rtol=2**-7, atol=1e-5)


def test_int8_mode_rounds_activations_per_token(weight: QuantizedWeight) -> None:
    module, x = linear_of(weight), random(3, 72)
    exact = module(x)
    set_mode(module, "int8")
    expected = reference.linear(x, weight, activation_bits=8)
    torch.testing.assert_close(module(x), expected, **FLOAT32_SUMS)
    assert not torch.equal(module(x), exact)


def test_an_unknown_mode_is_refused(weight: QuantizedWeight) -> None:
    with pytest.raises(UsageError, match=r"'fast'.*exact, int8"):
        set_mode(linear_of(weight), "fast")


def test_buffers_are_the_packed_tensors_and_nothing_else(weight: QuantizedWeight) -> None:
    module, tensors = linear_of(weight), pack(weight)
    assert {f"weight{suffix}" for suffix in tensors} == set(module.state_dict())
    assert "weight_packed_1" in module.state_dict()
    assert module.packed_bytes() == sum(tensor.nbytes for tensor in tensors.values())
    assert not list(module.parameters())
    assert torch.equal(module.dequantize(), dequantize(weight))


def test_a_module_says_what_it_is(weight: QuantizedWeight) -> None:
    module = linear_of(weight)
    for part in ("[40, 72]", "w3g16z+w8", "mode=scheme", f"bytes={module.packed_bytes()}"):
        assert part in repr(module)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_touch_the_bias_and_no_packed_tensor(
    weight: QuantizedWeight, cast: torch.dtype
) -> None:
    module = linear_of(weight, random(40)).to(cast)
    assert module.bias is not None
    assert module.bias.dtype == cast
    for suffix, tensor in pack(weight).items():
        assert torch.equal(module.get_buffer(f"weight{suffix}"), tensor), suffix


def test_a_module_can_be_emptied_and_filled(weight: QuantizedWeight) -> None:
    module, x = linear_of(weight), random(3, 72)
    expected, state = module(x), {k: v.clone() for k, v in module.state_dict().items()}
    module.to("meta").to_empty(device="cpu")
    module.load_state_dict(state)
    assert torch.equal(module(x), expected)


def test_replaced_buffers_are_the_ones_computed_with(weight: QuantizedWeight) -> None:
    module, x = linear_of(weight), random(3, 72)
    before = module(x)
    module.weight_scale = module.weight_scale * 2
    module.weight_scale_1 = module.weight_scale_1 * 2
    torch.testing.assert_close(module(x), before * 2, **FLOAT32_SUMS)


def test_a_copy_has_tensors_of_its_own(weight: QuantizedWeight) -> None:
    module, x = linear_of(weight), random(3, 72)
    expected = module(x)
    copied = copy.deepcopy(module)
    copied.weight_scale.zero_()
    assert torch.equal(module(x), expected)
    assert not torch.equal(copied(x), expected)


def test_another_format_can_take_the_place_of_one(weight: QuantizedWeight) -> None:
    module, x = linear_of(weight), random(3, 72)
    module(x)
    other = quantize_rtn(dequantize(weight), Scheme.parse("w8").segments(72))
    module.exchange_packed("weight", Scheme.parse("w8").segments(72), pack(other))
    assert set(module.state_dict()) == {"weight_packed", "weight_scale"}
    expected = nn.functional.linear(x, dequantize(other))
    torch.testing.assert_close(module(x), expected, **FLOAT32_SUMS)


def test_an_embedding_looks_rows_up_exactly(weight: QuantizedWeight) -> None:
    ids = torch.tensor([[3, 0, 39], [3, 7, 7]])
    assert torch.equal(embedding_of(weight)(ids), dequantize(weight)[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_embedding_equals_gemmas(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    scale, ids = 72**0.5, torch.arange(40)
    gemma = Gemma2TextScaledWordEmbedding(40, 72, 0, embed_scale=scale)
    gemma.weight.data = dequantize(weight)
    module = embedding_of(weight, embed_scale=scale)
    assert torch.equal(module.to(dtype)(ids), gemma.to(dtype)(ids))


def test_a_tied_head_has_no_tensor_of_its_own(weight: QuantizedWeight) -> None:
    embedding = embedding_of(weight)
    model = nn.ModuleDict({"embedding": embedding, "head": TiedHead(embedding)})
    assert set(model.state_dict()) == {f"embedding.weight{suffix}" for suffix in pack(weight)}
    x = random(3, 72)
    expected = nn.functional.linear(x, dequantize(weight))
    torch.testing.assert_close(model["head"](x), expected, **FLOAT32_SUMS)
    copied = copy.deepcopy(model)
    assert copied["head"].source is copied["embedding"]
    assert copied["head"].source is not embedding


@given(
    element=st.sampled_from(["int2", "int3", "int5", "int8", "e4m3", "e2m1"]),
    group=st.sampled_from([0, -1, 16]),
    scale=st.sampled_from(["f16", "u6"]),
    asymmetric=st.booleans(),
    rows=st.integers(1, 20),
    experts=st.integers(1, 4),
)
def test_row_blocks_of_a_stack_are_its_matrices(
    element: str, group: int, scale: str, asymmetric: bool, rows: int, experts: int
) -> None:
    two_level = scale if group > 0 else "f16"
    symmetric = not (asymmetric and element.startswith("int"))
    format = WeightFormat(element, group, symmetric, two_level)
    segments = (Segment(0, 20, format), Segment(20, 12, WeightFormat("int4", 16, False)))
    whole = quantize_rtn(random(experts * rows, 32), segments)
    for index in range(experts):
        block = row_block(pack(whole), segments, index * rows, rows)
        assert {name: tuple(t.shape) for name, t in block.items()} == {
            name: shape for name, (_, shape) in packed_layout((rows, 32), segments).items()
        }
        expected = dequantize(whole)[index * rows : (index + 1) * rows]
        assert torch.equal(dequantize(unpack(block, (rows, 32), segments)), expected)


def test_row_blocks_that_begin_at_words_are_views() -> None:
    segments = Scheme.parse("w4g16z").segments(32)
    tensors = pack(quantize_rtn(random(3 * 16, 32), segments))
    block = row_block(tensors, segments, 16, 16)
    for suffix, tensor in tensors.items():
        assert block[suffix].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def experts_and_dense(schemes: dict[str, str]) -> tuple[QuantizedExperts, Any]:
    """Experts with these schemes, and the transformers module with the same values, dense."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=3)
    config._experts_implementation = "eager"
    dense = MixtralExperts(config)
    packed, kept = {}, {}
    for index, name in enumerate(("gate_up_proj", "down_proj")):
        stack = random(*dense.get_parameter(name).shape, seed=index)
        if name in schemes:
            segments = Scheme.parse(schemes[name]).segments(stack.shape[-1])
            packed[name] = quantize_rtn(stack.reshape(-1, stack.shape[-1]), segments)
            stack = dequantize(packed[name]).view(stack.shape)
        else:
            kept[name] = nn.Parameter(stack)
        dense.get_parameter(name).data = stack
    segments = {n: tuple(part.segment for part in weight.segments) for n, weight in packed.items()}
    shapes = {name: tuple(dense.get_parameter(name).shape) for name in packed}
    module = QuantizedExperts(shapes, segments, kept, dense._apply_gate, device="meta")
    for name, weight in packed.items():
        module.exchange_packed(name, segments[name], pack(weight))
    return module, dense


@pytest.mark.parametrize(
    "schemes",
    [
        {"gate_up_proj": "w3g16z", "down_proj": "w5"},
        {"gate_up_proj": "nvfp4"},
        {"down_proj": "w4t"},
    ],
)
@torch.no_grad()
def test_experts_compute_what_transformers_experts_do(schemes: dict[str, str]) -> None:
    module, dense = experts_and_dense(schemes)
    x, weights = random(6, 32, seed=3), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 3], [3, 3], [0, 1]])  # 3: no expert
    expected = dense(x, chosen, weights)
    # Two products in a row with values of order 100 before the second: relative to those.
    torch.testing.assert_close(module(x, chosen, weights), expected, rtol=1e-4, atol=1e-3)
    assert not expected[4].any()


def test_packed_weights_are_named_as_in_the_dense_model() -> None:
    module, _ = experts_and_dense({"gate_up_proj": "w4", "down_proj": "w4"})
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": module})})
    assert {name: shape for name, (shape, _) in packed_weights(model).items()} == {
        "mlp.experts.gate_up_proj": (3, 48, 32),
        "mlp.experts.down_proj": (3, 32, 24),
    }
