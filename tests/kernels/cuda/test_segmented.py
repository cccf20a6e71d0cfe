"""Kernel (b), the very source that GPUs get, on the emulator: the same bits as integer arithmetic,
for every kind of product, any shape, and whatever the order in which threads run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import FormatError
from quantlib.formats import Scheme, dequantize
from quantlib.formats.weight import effective_scale
from quantlib.kernels import reference
from quantlib.kernels.cuda import segmented
from quantlib.kernels.cuda.segmented import PROMPT_TILES
from quantlib.kernels.emulator import build

from .emulated_segmented import Linear, expected, linear, multiply

F16, BF16 = torch.float16, torch.bfloat16
# Scheme, tokens, rows, columns, architecture, stages, dtype. One, two and three segments; every
# kind; scales for a chunk, a step, several steps and whole segments; K and N that nothing divides.
CASES = [
    ("w8a8", 3, 40, 70, 80, 3, F16),
    ("w4a4", 12, 130, 200, 86, 5, BF16),
    ("w4za4zh8/8", 20, 150, 333, 80, 4, F16),
    ("w4za4zh8/8", 20, 150, 333, 90, 3, F16),
    ("w4g64z5s5a4zg64h8/8", 33, 40, 500, 89, 3, BF16),
    ("w4g64z5s5a4zg128h8/16", 7, 129, 500, 120, 6, F16),
    ("w4g128s5a4h8/8", 5, 60, 700, 80, 4, F16),
    ("w3g256za3zh8/4", 9, 30, 900, 80, 3, F16),
    ("w3g32za3h8/8", 3, 30, 300, 80, 3, F16),
    ("w4a8h8/8", 5, 40, 260, 80, 3, F16),
    ("w5g64zs5a5zh8/8", 5, 40, 260, 80, 3, BF16),
    ("w2a4zh4/4h8/8", 5, 40, 700, 80, 3, F16),
]
PROMPTS = [
    ("w4g64z5s5a4zh8/8", 130, 150, 300, 80, 3, F16),
    ("w4za4zh8/8", 70, 129, 400, 90, 3, BF16),
]

pytestmark = pytest.mark.usefixtures("compiler")


def inputs_of(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def assert_exact(draw, case, seed=0):
    scheme, tokens, rows, columns, architecture, stages, dtype = case
    own = linear(draw, scheme, rows, columns, seed)
    inputs, bias = inputs_of(tokens, columns, seed), inputs_of(1, rows, seed + 1)[0].to(dtype)
    for run, given_bias in ((seed, None), (seed + 1, bias)):
        # One block has every tile to itself: sums are in the order of the reference.
        output, counters = multiply(own, inputs, given_bias, architecture, 1, run, stages, dtype)
        wanted = expected(own, inputs, given_bias, architecture).to(dtype)
        assert wanted.isfinite().all()
        assert torch.equal(output, wanted)
        assert counters.bank_conflicts == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-sm{case[4]}")
def test_every_kind_has_the_bits_of_integer_arithmetic(draw, case):
    assert_exact(draw, case)


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case[0])
def test_tiles_for_prompts_have_the_same_bits(draw, case):
    assert_exact(draw, case)


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("tokens", [1, 16, 30, 60, 129])
@pytest.mark.parametrize("activation", ["a8", "a8g64", "a4", "a4z", "a3zg128"])
@pytest.mark.parametrize("weight", ["w2", "w3z", "w4g64", "w4g32zs5", "w5g128z", "w8g256z6"])
def test_every_weight_input_number_of_tokens(draw, weight, activation, tokens, architecture):
    high = "" if weight.startswith("w8") else "h8/8"
    case = f"{weight}{activation}{high}", tokens, 150, 391, architecture, 4, F16
    assert_exact(draw, case, seed=tokens)


@pytest.mark.parametrize("scheme", ["w4g64z5s5a4zg64h8/8", "w4za4zh8/8", "w3a4h8/16"])
def test_results_are_those_of_the_formats(draw, scheme):
    """Against float64 with the formats' own numbers. A sum passes through at most four float32
    operations for each span and a few at the end; each is off by at most 2^-24 of what it adds up,
    which is at most `mass`: codes and zero points are less than 2^bits apart from 0. Rounding the
    inputs can grow them by no more than a tenth here."""
    own = linear(draw, scheme, 60, 500)
    inputs = inputs_of(9, 500)
    output, _ = multiply(own, inputs, blocks=3)
    exact = reference.linear(inputs.double(), own.weight, activations=own.activations)
    mass = torch.zeros_like(exact)
    for part in own.weight.segments:
        segment = part.segment
        columns = slice(segment.start, segment.start + segment.length)
        largest = effective_scale(part).double().amax(1) * (2 << segment.format.bits)
        mass += inputs[:, columns].double().abs().sum(1, keepdim=True) * 1.1 * largest
    steps = 4 * own.layout(80).spans + 8
    bound = steps * 2.0**-24 * mass + exact.abs() * 2.0**-10
    assert ((output.double() - exact).abs() <= bound).all()


def whole_numbers(draw, scheme: str, tokens: int, rows: int, columns: int, seed: int):
    """A linear whose scales are all 1, and inputs that are their own codes."""
    own = linear(draw, scheme, rows, columns, seed, unit_scales=True)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.zeros(tokens, columns)
    for part in own.activations:
        top = 127 if part.format.bits == 8 else 7
        low = -top - (not part.format.symmetric)
        size = part.format.group or part.length
        codes = torch.randint(low, top + 1, (tokens, part.length), generator=generator)
        codes[:, 0::size], codes[:, 1::size] = top, low
        inputs[:, part.start : part.start + part.length] = codes.float()
    return own, inputs


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(9, 16),
    rows=st.integers(1, 300),
    columns=st.sampled_from([130, 391, 600]),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_any_shape_any_number_of_blocks_any_schedule(draw, tokens, rows, columns, blocks, seed):
    """Whole numbers stay exact in float32, whoever adds them up; only the output is rounded."""
    own, inputs = whole_numbers(draw, "w4a4h8/8", tokens, rows, columns, seed)
    output, counters = multiply(own, inputs, blocks=blocks, seed=seed, dtype=BF16, stages=4)
    exact = inputs.double() @ dequantize(own.weight).double().T
    assert torch.equal(output, exact.to(torch.float32).to(BF16))
    assert counters.bank_conflicts == 0


@pytest.mark.parametrize("scheme", ["w4g64z5s5a4zg64h8/8", "w4za4zh8/8"])
def test_architectures_agree_to_the_last_bit(draw, scheme):
    """Nibbles times nibbles, or bytes made of nibbles: the same spans, the same sums."""
    own, inputs = linear(draw, scheme, 60, 512), inputs_of(9, 512)
    first, _ = multiply(own, inputs, architecture=80, blocks=1)
    for architecture in (89, 90, 120):
        again, _ = multiply(own, inputs, architecture=architecture, blocks=1)
        assert torch.equal(again, first)


def test_prompts_and_few_tokens_agree_to_the_last_bit(draw):
    own, inputs = linear(draw, "w4g64z5s5a4zh8/8", 140, 300), inputs_of(3, 300)
    few, _ = multiply(own, inputs, blocks=1)
    prompt, counters = multiply(own, inputs, blocks=1, token_tiles=PROMPT_TILES, stages=3)
    assert torch.equal(few, prompt)
    assert counters.bank_conflicts == 0


def test_the_schedule_does_not_change_a_bit(draw):
    """Sums of a tile that several blocks share are added in one order."""
    own, inputs = linear(draw, "w4g64z5s5a4zg64h8/8", 96, 2100), inputs_of(9, 2100)
    first, _ = multiply(own, inputs, blocks=4)
    for seed in range(1, 4):
        again, _ = multiply(own, inputs, blocks=4, seed=seed, launches=2)
        assert torch.equal(again, first)


def test_a_token_that_is_not_a_number_stays_alone(draw):
    own, inputs = linear(draw, "w4g64z5s5a4zh8/8", 64, 200), inputs_of(9, 200)
    inputs[4, 7] = torch.nan
    output, _ = multiply(own, inputs)
    assert output[4].isnan().all()
    assert output[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("case", CASES[2::5], ids=lambda case: case[0])
def test_no_undefined_behaviour(draw, case, capfd):
    scheme, tokens, rows, columns, architecture, stages, dtype = case
    own, inputs = linear(draw, scheme, rows, columns), inputs_of(tokens, columns)
    output, _ = multiply(own, inputs, None, architecture, 1, 1, stages, dtype, flags=build.SANITIZE)
    assert torch.equal(output, expected(own, inputs, None, architecture).to(dtype))
    assert "runtime error" not in capfd.readouterr().err


def layout_of(scheme: str, columns: int, architecture: int = 80) -> segmented.Layout:
    own = Scheme.parse(scheme)
    return segmented.layout(own.segments(columns), own.activations(columns), architecture)


def test_nibbles_are_multiplied_where_tensor_cores_have_them():
    for architecture in segmented.SHARED_KB:
        kinds = [case.kind for case in layout_of("w4a4zh8/8", 512, architecture).cases]
        few = segmented.UNSIGNED if architecture in (80, 86, 89) else segmented.MIXED
        assert kinds == [segmented.BYTES, few]
    assert layout_of("w4g32a4", 512).cases[0].kind is segmented.MIXED


def test_what_the_kernel_does_not_take_is_a_sentence(draw):
    with pytest.raises(FormatError, match="scales for 16 columns are too many"):
        layout_of("w4g16a4", 64)
    with pytest.raises(FormatError, match="not mxfp4 by mxfp4"):
        layout_of("mxfp4amxfp4", 64)
    with pytest.raises(FormatError, match="scales in float16, not w4g64e by 4"):
        layout_of("w4g64ea4", 64)
    with pytest.raises(FormatError, match="neither divides the other"):
        layout_of("w4g64a4g96", 192)
    with pytest.raises(FormatError, match="may not fit 32 bits"):
        layout_of("w8a8", 200000)
    with pytest.raises(FormatError, match="nothing is known of 1 tokens on sm_70"):
        segmented.case(layout_of("w8a8", 64), 1, F16, 70)
    with pytest.raises(FormatError, match=r"not torch\.float32"):
        segmented.case(layout_of("w8a8", 64), 1, torch.float32, 80)
    own = Scheme.parse("w4h8/8").segments(64), Scheme.parse("w8a8g16").activations(64)
    with pytest.raises(FormatError, match="not rounded in one segment of the inputs"):
        segmented.layout(*own, 80)


@pytest.mark.parametrize("architecture", segmented.SHARED_KB)
@pytest.mark.parametrize("scheme", ["w8a8", "w4g64z5s5a4zg64h8/8", "w2za4zh4/4h8/8"])
def test_every_case_fits_every_architecture(architecture, scheme):
    own = layout_of(scheme, 4096, architecture)
    for tokens in (1, 9, 17, 64, 65, 4096):
        case = segmented.case(own, tokens, F16, architecture)
        # A block alone may have all but the kilobyte that is taken from each.
        assert case.shared_bytes <= (segmented.SHARED_KB[architecture] - 1) * 1024
        assert case.tokens >= min(tokens, 128)


def test_a_linear_of_the_tests_is_what_its_scheme_says(draw):
    own = linear(draw, "w4g64z5s5a4zg64h8/8", 8, 256)
    assert isinstance(own, Linear)
    assert Scheme.of([part.segment for part in own.weight.segments], own.activations) == (
        Scheme.parse("w4g64z5s5a4zg64h8/8")
    )
