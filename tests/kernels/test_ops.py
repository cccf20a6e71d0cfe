"""The operators: dtypes, shapes, errors, torch's own checks, and the reference behind them."""

import gc
import os
import subprocess
import sys
import warnings

import pytest
import torch

from quantlib.errors import DataError, FormatError, UsageError
from quantlib.formats import dequantize
from quantlib.kernels import layouts, ops, reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight

MIXED = [("w4g64z6", 448), ("w8", 64)]


@pytest.fixture(autouse=True)
def _seeded():
    """The same random activations on every run; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def arguments(packed):
    """Tensors and layout, as the operators take a weight."""
    return list(packed.tensors.values()), packed.layout


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_exact_mode_is_a_linear_with_the_dequantized_weight(draw, tokens):
    weight, packed = draw(70, MIXED)
    x, bias = torch.randn(tokens, 512), torch.randn(70)
    expected = torch.nn.functional.linear(x.double(), dequantize(weight).double(), bias.double())
    torch.testing.assert_close(ops.linear(x, packed, bias), expected.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations_are_computed_in_float32_and_rounded_once(draw, mode, dtype):
    _, packed = draw(37, MIXED)
    for tokens in (1, 9):
        x = torch.randn(tokens, 512).mul(0.01).to(dtype)
        expected = ops.linear(x.float(), packed, None, mode).to(dtype)
        found = ops.linear(x, packed, None, mode)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ops.MODES)
def test_leading_dimensions_are_kept_even_when_empty(draw, mode):
    _, packed = draw(37, MIXED)
    x = torch.randn(2, 3, 512)
    flat = ops.linear(x.reshape(6, 512), packed, None, mode)
    assert torch.equal(ops.linear(x, packed, None, mode), flat.view(2, 3, 37))
    assert ops.linear(x[0, 0], packed, None, mode).shape == (37,)
    assert ops.linear(x[:0], packed, None, mode).shape == (0, 3, 37)
    transposed = torch.randn(512, 6).t()
    assert torch.equal(
        ops.linear(transposed, packed, None, mode),
        ops.linear(transposed.contiguous(), packed, None, mode),
    )


def test_float_weights_in_int8_mode_multiply_rounded_activations(draw):
    weight, packed = draw(37, [("mxfp4", 64), ("w4g64", 64)])
    for tokens in (2, 9):
        x = torch.randn(tokens, 128)
        expected = reference.linear(x, weight, activation_bits=8)
        found = ops.linear(x, packed, None, "int8")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ops.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_linear_as_an_operator(draw, mode, dtype):
    _, packed = draw(37, MIXED)
    x, bias = torch.randn(2, 3, 512).to(dtype), torch.randn(37).to(dtype)
    torch.library.opcheck(torch.ops.quantlib.linear, (x, *arguments(packed), bias, mode))
    if ops.backend() != "reference":
        tiled = layouts.tile(packed)
        given = (x, [tiled.memory], tiled.layout, bias, mode)
        torch.library.opcheck(torch.ops.quantlib.linear, given)


def test_torch_accepts_embedding_as_an_operator(draw):
    _, packed = draw(37, MIXED)
    ids = torch.tensor([[0, 36], [5, 5]])
    torch.library.opcheck(torch.ops.quantlib.embedding, (ids, *arguments(packed), torch.bfloat16))


@pytest.mark.parametrize("tiled", [False, True])
def test_torch_compile_sees_one_node_and_the_same_numbers(draw, library, tiled):
    _, packed = draw(37, MIXED)
    weight = layouts.tile(packed) if tiled else packed
    x = torch.randn(3, 512)

    def layer(x):
        return ops.linear(x, weight, mode="int8").relu()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_a_call_past_the_dispatcher_gives_the_same_bits(draw, library):
    """Eager calls skip the operator unless somebody looks on."""
    _, packed = draw(37, MIXED)
    x, bias = torch.randn(3, 512), torch.randn(37)
    found = ops.linear(x, packed, bias, "int8", 128)
    by_operator = torch.ops.quantlib.linear(x, *arguments(packed), bias, "int8", 128)
    assert torch.equal(found, by_operator)
    assert ops.linear(x.requires_grad_(), packed, bias).requires_grad


def test_a_packed_weight_is_tiled_once_and_forgotten_with_its_tensors(draw, library, monkeypatch):
    made = []
    used = cpu.load()  # which is another object once a test has done without the library
    pack = used.pack
    monkeypatch.setattr(used, "pack", lambda *given: made.append(1) or pack(*given))
    _, packed = draw(37, MIXED)
    x = torch.randn(3, 512)
    expected = ops.linear(x, packed)
    assert torch.equal(ops.linear(x, packed), expected)
    assert made == [1]
    packed.tensors["_scale"].mul_(2)
    packed.tensors["_scale_1"].mul_(2)
    assert torch.equal(ops.linear(x, packed), 2 * expected)  # written to: tiled again
    assert made == [1, 1]
    count = len(ops._TILES._known)
    del packed
    gc.collect()
    assert len(ops._TILES._known) == count - 1


@pytest.mark.parametrize("mode", ops.MODES)
def test_tiled_and_packed_weights_give_the_same_bits(draw, library, mode):
    _, packed = draw(37, MIXED)
    tiled, x = layouts.tile(packed), torch.randn(5, 512)
    assert torch.equal(ops.linear(x, tiled, None, mode), ops.linear(x, packed, None, mode))
    assert torch.equal(ops.dequantize(tiled), ops.dequantize(packed))


def test_tiles_are_refused_away_from_the_cpu(draw, library):
    tiled = layouts.tile(draw(37, MIXED)[1])
    x = torch.zeros(3, 512, device="meta")
    assert torch.ops.quantlib.linear(
        x, [tiled.memory.to("meta")], tiled.layout, None, "exact"
    ).shape == (3, 37)
    with pytest.raises(UsageError, match="tiles are for the CPU"):
        ops.linear(x, tiled)


@pytest.mark.parametrize("scheme", ["w4g64zs6", "nvfp4", "fp8"])
def test_torchs_default_dtype_and_device_do_not_matter(draw, scheme, library):
    """Transformers sets both while it loads a model."""
    _, packed = draw(37, [(scheme, 128)])
    x, ids = torch.randn(9, 128), torch.tensor([3, 36])
    rows, expected = ops.embedding(ids, packed), ops.linear(x, packed)
    cpu._integer_values.cache_clear()
    cpu._describe_tiles.cache_clear()
    again = PackedWeight.from_tensors(
        {suffix: tensor.clone() for suffix, tensor in packed.tensors.items()},
        packed.shape,
        packed.segments,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(ops.embedding(ids, again), rows)
            assert torch.equal(ops.linear(x, again), expected)
            found = layouts.tile(again).to_packed().tensors
            assert all(torch.equal(found[key], packed.tensors[key]) for key in found)
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_input_is_a_sentence(draw):
    _, packed = draw(37, MIXED)
    with pytest.raises(FormatError, match=r"shape \[3, 500\].*37 x 512 takes 512 features"):
        ops.linear(torch.zeros(3, 500), packed)
    with pytest.raises(FormatError, match="float64: give float32, bfloat16 or float16"):
        ops.linear(torch.zeros(3, 512, dtype=torch.float64), packed)
    with pytest.raises(FormatError, match=r"bias has shape \[36\], expected \[37\]"):
        ops.linear(torch.zeros(3, 512), packed, torch.zeros(36))
    with pytest.raises(UsageError, match=r"unknown mode 'fast'.*exact, int8"):
        ops.linear(torch.zeros(3, 512), packed, mode="fast")
    with pytest.raises(UsageError, match=r"groups of 100 in mode 'int8'.*multiple of 128"):
        ops.linear(torch.zeros(3, 512), packed, mode="int8", act_group=100)
    with pytest.raises(UsageError, match=r"groups of 128 in mode 'exact'.*for mode int8"):
        ops.linear(torch.zeros(3, 512), packed, mode="exact", act_group=128)


def test_tensors_of_another_weight_are_refused_by_the_operator(draw, library):
    _, packed = draw(37, MIXED)
    _, other = draw(36, MIXED)
    with pytest.raises(FormatError, match="not the tensors of a weight"):
        torch.ops.quantlib.linear(
            torch.zeros(1, 512), list(other.tensors.values()), packed.layout, None, "exact"
        )
    tensors, layout = arguments(packed)
    tensors[0] = tensors[0].t().contiguous().t()
    with pytest.raises(FormatError, match="not contiguous"):
        torch.ops.quantlib.linear(torch.zeros(1, 512), tensors, layout, None, "exact")


@pytest.mark.parametrize("mode", ops.MODES)
def test_without_a_compiler_the_reference_computes_and_says_so_once(draw, without_library, mode):
    weight, packed = draw(37, MIXED)
    x, bias = torch.randn(3, 512), torch.randn(37)
    bits = 8 if mode == "int8" else 16
    with pytest.warns(RuntimeWarning, match="torch reference.*no C\\+\\+ compiler"):
        found = ops.linear(x, packed, bias, mode)
    assert torch.equal(found, reference.linear(x, weight, bias, bits))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.linear(x, packed, bias, mode), found)
        assert torch.equal(ops.dequantize(packed), dequantize(weight))
        ids = torch.tensor([[36, 0, 36]])
        assert torch.equal(ops.embedding(ids, packed), dequantize(weight)[ids])
        with pytest.raises(DataError, match=r"outside 0\.\.36"):
            ops.embedding(torch.tensor([37]), packed)
    assert ops.backend() == "reference"


def test_the_backend_has_a_name(library):
    assert ops.backend() == library.isa
    assert library.isa in cpu.ISAS[1:]


def test_an_instruction_set_that_is_not_there_is_a_sentence(draw, library, monkeypatch):
    tiled = layouts.tile(draw(4, [("w4", 8)])[1])
    monkeypatch.setattr(cpu, "ISAS", (*cpu.ISAS, "avx9"))
    with pytest.raises(UsageError, match=r"no instruction set 'avx9'.*portable"):
        library.linear(tiled.description, torch.zeros(1, 8), None, "exact", isa="avx9")


def test_the_environment_forces_an_instruction_set(library, isa):
    assert cpu.ISAS[chosen_isa(library, isa)] == isa


@pytest.mark.parametrize("name", ["avx9", "AVX2", "best"])
def test_the_environment_cannot_force_what_is_not_there(library, name):
    assert chosen_isa(library, name) == 0


def chosen_isa(library: cpu.Library, name: str) -> int:
    """What "best" stands for in a process that is told to use an instruction set."""
    script = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ql_chosen_isa())"
    return int(run(script, library.functions._name, QUANTLIB_ISA=name))


def test_forcing_an_instruction_set_that_is_not_there_is_a_sentence(library):
    script = (
        "from quantlib.errors import UsageError\n"
        "from quantlib.kernels import ops\n"
        "try:\n    print(ops.backend())\nexcept UsageError as error:\n    print(error)\n"
    )
    said = run(script, QUANTLIB_ISA="avx9")
    assert "this processor has no instruction set 'avx9': unset QUANTLIB_ISA" in said
    assert "portable" in said


def run(script: str, *arguments: str, **environment: str) -> str:
    """What another process prints."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
