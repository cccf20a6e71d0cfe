"""Kernel (a), the very source that GPUs get, on the emulator: right for every width, any shape, and
whatever the order in which threads run."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.kernels.cuda import decode, layout
from quantlib.kernels.emulator import build
from quantlib.kernels.emulator.machine import Kernel, Writable

from .emulated import assert_right, expected, multiply

F16, BF16 = torch.float16, torch.bfloat16
OPERANDS = Path(__file__).with_name("operands.cu")
# Scheme, tokens, rows, columns, blocks, stages, dtype. Each width in both types, every way in which
# scales and zero points come in, tiles of 128 and 256 rows, K and N that nothing divides.
CASES = [
    ("w2g16z8", 1, 40, 72, 3, 3, F16),
    ("w2g64z4s4", 5, 33, 331, 2, 5, BF16),
    ("w3g32s4", 9, 100, 200, 3, 4, BF16),
    ("w3z", 20, 97, 130, 2, 3, F16),
    ("w4", 20, 130, 331, 3, 5, F16),
    ("w4g64z5s5", 3, 300, 193, 2, 4, BF16),
    ("w5g128z7", 40, 128, 272, 3, 3, BF16),
    ("w5", 8, 31, 64, 1, 4, F16),
    ("w6t", 1, 64, 200, 3, 4, F16),
    ("w6g32z", 17, 40, 100, 2, 3, BF16),
    ("w7g256", 9, 50, 700, 3, 5, BF16),
    ("w7g16z", 26, 30, 90, 2, 3, F16),
    ("w8g16zs8", 20, 130, 72, 3, 3, F16),
    ("w8z", 64, 257, 80, 3, 3, BF16),
]

pytestmark = pytest.mark.usefixtures("compiler")


def sample(draw, scheme, tokens, rows, columns, dtype, seed=0):
    weight, _ = draw(rows, [(scheme, columns)], seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(tokens, columns, generator=generator).to(dtype)
    return weight, inputs, torch.randn(rows, generator=generator).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_width_and_ragged_shapes(draw, case):
    scheme, tokens, rows, columns, blocks, stages, dtype = case
    weight, inputs, bias = sample(draw, scheme, tokens, rows, columns, dtype)
    for seed, own in ((0, None), (1, bias), (2, None)):
        output, counters = multiply(weight, inputs, own, blocks, seed, stages)
        assert_right(output, weight, inputs, own)
        assert counters.bank_conflicts == 0


@pytest.mark.kernels
@pytest.mark.parametrize("tokens", [1, 12, 30, 64])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("form", ["", "z", "g16z", "g32s4", "g64z5", "g256zs6"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_form_type_and_number_of_tokens(draw, bits, form, dtype, tokens):
    for seed, (rows, columns, blocks) in enumerate([(31, 65, 2), (130, 391, 3), (257, 130, 4)]):
        case = f"w{bits}{form}", tokens, rows, columns, dtype, seed
        weight, inputs, bias = sample(draw, *case)
        inputs = inputs[: decode.pack(weight).most_tokens]
        output, counters = multiply(weight, inputs, bias, blocks, seed, stages=4)
        assert_right(output, weight, inputs, bias)
        assert counters.bank_conflicts == 0


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(9, 16),
    rows=st.integers(1, 300),
    columns=st.integers(1, 600),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_any_shape_any_number_of_blocks_any_schedule(draw, tokens, rows, columns, blocks, seed):
    weight, inputs, bias = sample(draw, "w4g64z", tokens, rows, columns, F16, seed)
    output, _ = multiply(weight, inputs, bias, blocks, seed)
    assert_right(output, weight, inputs, bias)


def test_the_schedule_does_not_change_a_bit(draw):
    """Sums of a tile that several blocks share are added in one order."""
    weight, inputs, _ = sample(draw, "w4g64z", 9, 96, 2100, F16)
    first, _ = multiply(weight, inputs, blocks=4, seed=0)
    for seed in range(1, 6):
        again, _ = multiply(weight, inputs, blocks=4, seed=seed)
        assert torch.equal(again.view(torch.int16), first.view(torch.int16))


def test_a_launch_leaves_its_workspace_as_it_found_it(draw):
    weight, inputs, _ = sample(draw, "w4g64z", 9, 96, 2100, F16)
    once, _ = multiply(weight, inputs, blocks=4)
    thrice, _ = multiply(weight, inputs, blocks=4, seed=3, launches=3)
    assert torch.equal(once, thrice)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_operands_are_exact_integers(bits, dtype):
    """What goes into the tensor cores is the code less half the range, whatever the words are."""
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(1 << 31), 1 << 31, (32, bits), generator=generator).to(torch.int32)
    output = torch.full((32, 16, 2), torch.nan)
    library = build.compile_kernel(OPERANDS, extra_flags=(f"-I{decode.SOURCE.parent}",))
    arguments = [words, Writable(output), bits, int(dtype == BF16)]
    Kernel(library).launch(arguments, blocks=1, threads=32, shared_bytes=0)
    # The same words as a unit in memory, in planes, read by the layout.
    parts = [words[:, plane.start : plane.stop].contiguous() for plane in layout.planes(bits)]
    memory = torch.cat([part.view(torch.uint8).flatten() for part in parts]).expand(1, 1, 2, -1)
    codes = layout.unpack_codes(memory, bits, (32, 32))
    rows, columns = layout.unit_places()
    assert torch.equal(output, codes[rows, columns].float() - (1 << bits - 1))


def test_large_inputs_do_not_overflow_before_the_end(draw):
    """fp16 ends at 65504; partial sums of a thousand times that are float32 all the way."""
    weight, inputs, _ = sample(draw, "w4g64z", 9, 64, 640, F16)
    inputs = (inputs.sign() * 60000).to(F16)
    output, _ = multiply(weight, inputs)
    exact, bound = expected(weight, inputs)
    fits = exact.abs() + bound < 65504
    assert fits.any()
    assert (~fits).any()
    assert ((output.double() - exact).abs()[fits] <= bound[fits]).all()
    assert output[exact.abs() - bound > 65520].isinf().all()


def test_a_token_of_nan_stays_alone(draw):
    weight, inputs, _ = sample(draw, "w4g64z", 9, 64, 200, F16)
    inputs[4, 7] = torch.nan
    output, _ = multiply(weight, inputs)
    assert output[4].isnan().all()
    assert output[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("case", CASES[::4])
def test_no_undefined_behaviour(draw, case, capfd):
    """Shifts, indices and sums that g++ and nvcc may take differently."""
    scheme, tokens, rows, columns, blocks, stages, dtype = case
    weight, inputs, bias = sample(draw, scheme, tokens, rows, columns, dtype)
    output, _ = multiply(weight, inputs, bias, blocks, 1, stages, flags=build.SANITIZE)
    assert_right(output, weight, inputs, bias)
    assert "runtime error" not in capfd.readouterr().err


def test_what_the_kernel_does_not_take_is_a_sentence(draw):
    two, _ = draw(32, [("w4", 64), ("w8", 64)])
    with pytest.raises(FormatError, match=r"integers in one format, .* not \['w4', 'w8'\]"):
        decode.pack(two)
    for scheme in ("mxfp4", "w4g32e"):
        other, _ = draw(32, [(scheme, 64)])
        assert not decode.can_pack(other)
    packed = decode.pack(draw(32, [("w4", 64)])[0])
    with pytest.raises(FormatError, match="1 to 64 tokens at a time, not 65"):
        packed.case(65, F16)
    short = decode.pack(draw(32, [("w4g16z", 64)])[0])
    with pytest.raises(FormatError, match="1 to 32 tokens at a time, not 33"):
        short.case(33, F16)
    with pytest.raises(FormatError, match=r"float16 or bfloat16 here, not torch\.float32"):
        packed.case(1, torch.float32)
    with pytest.raises(FormatError, match="nothing is known of the shared memory of sm_70"):
        packed.case(1, F16, architecture=70)
    empty = torch.empty(0)
    with pytest.raises(FormatError, match="whose stride is a multiple of 8"):
        decode.arguments(packed, torch.zeros(3, 65)[:, :64], None, empty, empty, empty)


@pytest.mark.parametrize("architecture", decode.SHARED_KB)
@pytest.mark.parametrize("tiles", decode.TOKEN_TILES)
@pytest.mark.parametrize("bits", [2, 8])
def test_every_case_fits_every_architecture(architecture, tiles, bits):
    for period in (0, 1, 2, 4):
        for zeros in (False, True) if period else (False,):
            case = decode.DecodeCase(bits, F16, tiles, period, zeros)
            planned = decode.plan(case, architecture)
            # A block alone may have all but the kilobyte that is taken from each.
            assert planned.shared_bytes <= (decode.SHARED_KB[architecture] - 1) * 1024
            assert planned.stages >= decode.LEAST_STAGES
