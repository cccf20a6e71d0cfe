"""Modules are exchanged by weight name; what cannot be computed on packed weights is refused."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib.errors import FormatError, ModelError
from quantlib.formats import Scheme, dequantize, fake_quantize, quantize_rtn, with_clips
from quantlib.runtime.assemble import Inputs, quantize_in_memory, replace_modules
from quantlib.runtime.modules import QuantizedEmbedding, QuantizedLinear, packed_modules
from quantlib.runtime.packed_module import Activations

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def rounded(matrix: Tensor, scheme: str) -> Any:
    flat = matrix.detach().reshape(-1, matrix.shape[-1])
    return quantize_rtn(flat, Scheme.parse(scheme).segments(flat.shape[-1]))


@pytest.fixture
def llama(build_tiny: Any) -> Any:
    return build_tiny("llama")


def test_modules_are_swapped_where_the_model_is(build_tiny: Any) -> None:
    with torch.device("meta"):
        model = build_tiny("llama")
    replace_modules(model, {Q_PROJ: "w4g32z", EMBEDDING: "bf16"}, {Q_PROJ: (64, 48)})
    projection = model.model.layers[0].self_attn.q_proj
    assert isinstance(projection, QuantizedLinear)
    assert all(buffer.is_meta for buffer in projection.buffers())
    assert type(model.model.embed_tokens) is nn.Embedding
    assert not model.training
    assert not projection.training


def test_inputs_are_rounded_as_schemes_say(llama: Any) -> None:
    replace_modules(llama, {Q_PROJ: "w4a4zh8/8", EMBEDDING: "w8"})
    assert activations(llama, Q_PROJ) == Scheme.parse("w4a4zh8/8").activations(48)
    assert activations(llama, EMBEDDING) == ()
    assert llama.model.layers[0].self_attn.q_proj.mode == llama.lm_head.mode == "scheme"


def activations(model: Any, name: str) -> Activations:
    module, _, parameter = name.rpartition(".")
    return packed_modules(model)[module].activations(parameter)


def test_orders_and_clip_factors_can_be_given(llama: Any, ids: Tensor) -> None:
    matrix = llama.get_parameter(Q_PROJ).detach().clone()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    clipped = with_clips(Scheme.parse("w4a4zh8/8").activations(48), [0.9, 1.0])
    inputs = Inputs(clipped, order)
    empty = copy.deepcopy(llama).to("meta")
    replace_modules(empty, {Q_PROJ: "w4a4zh8/8"}, inputs={Q_PROJ: inputs})
    expected = empty.model.layers[0].self_attn.q_proj.weight_order
    assert (expected.dtype, tuple(expected.shape), expected.is_meta) == (torch.int32, (48,), True)
    permuted = quantize_rtn(matrix[:, order], Scheme.parse("w4a4zh8/8").segments(48))
    quantize_in_memory(llama, {Q_PROJ: permuted}, inputs={Q_PROJ: inputs})
    assert activations(llama, Q_PROJ) == activations(empty, Q_PROJ) == clipped
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    found = llama.model.layers[0].self_attn.q_proj(x)
    expected = fake_quantize(x[:, order], clipped) @ dequantize(permuted).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "sentence"),
    [
        ("model.norm.weight", Inputs(), "model.norm.weight has inputs .* not a packed weight"),
        (EMBEDDING, Inputs((), torch.arange(48, dtype=torch.int32)), "embedding.*in their order"),
        (Q_PROJ, Inputs((), torch.arange(48)), r"is \[48\] torch.int64, expected int32 \[48\]"),
        (Q_PROJ, Inputs((), torch.arange(40, dtype=torch.int32)), r"is \[40\]"),
    ],
)
def test_inputs_that_a_weight_does_not_have_are_refused(
    llama: Any, name: str, inputs: Inputs, sentence: str
) -> None:
    packed = {n: rounded(llama.get_parameter(n), "w4") for n in (Q_PROJ, EMBEDDING)}
    with pytest.raises(ModelError, match=sentence):
        quantize_in_memory(llama, packed, inputs={name: inputs})


def test_activations_of_another_width_are_refused(llama: Any) -> None:
    inputs = Inputs(Scheme.parse("w4a4").activations(64))
    packed = {Q_PROJ: rounded(llama.get_parameter(Q_PROJ), "w4")}
    with pytest.raises(FormatError, match="cover 64 of 48"):
        quantize_in_memory(llama, packed, inputs={Q_PROJ: inputs})


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_the_dense_weights_are_let_go(family: str, build_tiny: Any) -> None:
    model = build_tiny(family)
    chosen = [n for n, p in model.named_parameters() if p.dim() > 1 and "mlp.gate." not in n]
    references = {name: weakref.ref(model.get_parameter(name)) for name in chosen}
    quantize_in_memory(model, {name: rounded(model.get_parameter(name), "w4") for name in chosen})
    assert [name for name, reference in references.items() if reference() is not None] == []


def test_candidates_can_be_tried_one_after_the_other(build_tiny: Any, ids: Tensor) -> None:
    tried, fresh = build_tiny("llama"), build_tiny("llama")
    matrix = fresh.get_parameter(EMBEDDING).detach()
    with torch.no_grad():
        for scheme in ("w2g16z", "w8", "mxfp4"):
            quantize_in_memory(tried, {EMBEDDING: rounded(matrix, scheme)})
            tried(ids)
        quantize_in_memory(fresh, {EMBEDDING: rounded(matrix, "mxfp4")})
        assert torch.equal(tried(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize(
    ("schemes", "shapes", "sentence"),
    [
        ({"model.layers.7.mlp.up_proj.weight": "w4"}, None, "has no weight model.layers.7"),
        ({"model.norm.bias": "w4"}, None, "has no weight model.norm.bias"),
        (
            {Q_PROJ: "w4"},
            {Q_PROJ: (64, 32)},
            r"\[64, 32\] as quantized and \[64, 48\] in the model",
        ),
        ({"model.norm.weight": "w4"}, None, "LlamaRMSNorm.*keep it in 16 bits"),
        ({HEAD: "w4"}, None, f"are one weight: give {EMBEDDING} the scheme"),
        ({HEAD: "w4", EMBEDDING: "w4"}, None, f"are one weight: give {EMBEDDING} the scheme"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    llama: Any, schemes: dict[str, str], shapes: Any, sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        replace_modules(llama, schemes, shapes)


def test_a_quantized_weight_of_another_shape_is_refused(llama: Any) -> None:
    with pytest.raises(ModelError, match=r"\[8, 48\] as quantized and \[64, 48\] in the model"):
        quantize_in_memory(llama, {Q_PROJ: rounded(torch.ones(8, 48), "w4")})


def test_replacing_twice_is_refused(llama: Any) -> None:
    replace_modules(llama, {Q_PROJ: "w4"})
    with pytest.raises(ModelError, match="quantized already"):
        replace_modules(llama, {Q_PROJ: "w4"})


class NormedEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(ids))


class CentredLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean())


@pytest.mark.parametrize("module", [NormedEmbedding(9, 16), CentredLinear(16, 9)])
def test_modules_that_do_more_are_refused_by_name(module: nn.Module) -> None:
    model = nn.ModuleDict({"odd": module})
    with pytest.raises(ModelError, match=f"odd is a {type(module).__name__}"):
        replace_modules(model, {"odd.weight": "w4"})


def test_transposed_experts_are_refused() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=16, intermediate_size=16, num_local_experts=2)
    model = nn.ModuleDict({"experts": GptOssExperts(config)})
    with pytest.raises(ModelError, match="experts is a GptOssExperts"):
        replace_modules(model, {"experts.gate_up_proj": "w4"})
    assert isinstance(model["experts"].gate_up_proj, nn.Parameter)


def test_an_embedding_can_be_packed_and_its_untied_head_kept(build_tiny: Any) -> None:
    model = build_tiny("llama-untied")
    replace_modules(model, {EMBEDDING: "w4"})
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert type(model.lm_head) is nn.Linear
    assert list(packed_modules(model)) == ["model.embed_tokens"]
