"""Tokens come out of the fused quantizer as rotation, rounding and packing one after the other
make them, to the last bit; the very source that GPUs get, on the emulator."""

from dataclasses import replace

import pytest
import torch

from quantlib.errors import FormatError
from quantlib.formats import Scheme
from quantlib.formats.activation import with_clips
from quantlib.kernels.cuda import quantizer, segmented
from quantlib.kernels.emulator import build
from quantlib.kernels.emulator.machine import Kernel, Writable
from quantlib.transforms.hadamard import rotate, signs, split

F16, BF16 = torch.float16, torch.bfloat16
NONE = quantizer.NO_TURN

pytestmark = pytest.mark.usefixtures("compiler")


def layout_of(scheme, columns, architecture=80, clip=1.0):
    own = Scheme.parse(scheme)
    activations = own.activations(columns)
    activations = with_clips(activations, [clip] * len(activations))
    return segmented.layout(own.segments(columns), activations, architecture), activations


def run(inputs, layout, turn=NONE, order=None, blocks=2, seed=0, flags=()):
    macros = quantizer.macros(layout, inputs.dtype, turn, order is not None)
    kernel = Kernel(build.compile_kernel(quantizer.SOURCE, macros, flags))
    output = quantizer.empty(layout, len(inputs))
    output.codes.fill_(0x5A)
    given = quantizer.arguments(inputs, layout, output, turn, order)
    arguments = [Writable(a) if i in (3, 4) else a for i, a in enumerate(given)]
    shared = quantizer.shared_bytes(layout)
    counters = kernel.launch(arguments, blocks, quantizer.THREADS, shared, seed)
    return output, counters


def inputs_of(tokens, columns, dtype=F16, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(found, wanted):
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.meta, wanted.meta)


@pytest.mark.parametrize(
    ("scheme", "columns", "architecture", "dtype", "order", "clip"),
    [
        ("w8a8", 70, 80, F16, 1, 1.0),
        ("w4a4zh8/8", 512, 80, BF16, 512, 0.9),
        ("w4a4zh8/8", 512, 90, F16, 64, 1.0),
        ("w4g64z5s5a4zg64h8/8", 500, 80, F16, 1, 1.0),
        ("w4g64za4zg128h8/16", 1536, 80, F16, 1024, 1.0),
        ("w4za3h8/8", 2048, 90, BF16, 2048, 0.95),
    ],
)
def test_codes_scales_and_sums_are_the_references(
    scheme, columns, architecture, dtype, order, clip
):
    layout, activations = layout_of(scheme, columns, architecture, clip)
    turn = quantizer.hadamard(None, order)
    inputs = inputs_of(5, columns, dtype)
    inputs[2] = 0
    for seed in (0, 1):
        found, counters = run(inputs, layout, turn, seed=seed)
        assert_same(found, quantizer.reference(inputs, layout, activations, turn))
        assert counters.bank_conflicts == 0


@pytest.mark.parametrize("distance", [1, 32, 1024])
def test_lanes_meet_in_no_bank(distance):
    """A warp's lanes take numbers `distance` apart, lane after lane the next group of them; where
    the source puts a column is `column ^ (column / 32 & 31)`."""
    assert "return (column ^ (column / 32 & 31)) * 4;" in quantizer.SOURCE.read_text()
    for warp in range(4):
        for number in range(32):
            units = [warp * 32 + lane for lane in range(32)]
            columns = [
                unit // distance * distance * 32 + unit % distance + number * distance
                for unit in units
            ]
            banks = {(column ^ (column // 32 & 31)) % 32 for column in columns}
            assert len(banks) == 32


def test_positive_and_negative_tokens():
    """Zero points at the ends of their range."""
    layout, activations = layout_of("w4a4zh8/8", 512)
    inputs = inputs_of(4, 512).abs()
    inputs[2:] *= -1
    found, _ = run(inputs, layout)
    assert_same(found, quantizer.reference(inputs, layout, activations))


def test_columns_are_put_in_order():
    layout, activations = layout_of("w4a4zh8/8", 256)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    turn, inputs = quantizer.hadamard(None, 256), inputs_of(3, 256)
    found, _ = run(inputs, layout, turn, order)
    assert_same(found, quantizer.reference(inputs, layout, activations, turn, order))


def test_a_token_that_is_not_a_number_stays_alone():
    layout, activations = layout_of("w4g64za4zh8/8", 320)
    inputs = inputs_of(3, 320)
    inputs[1, 5] = torch.inf
    found, _ = run(inputs, layout)
    wanted = quantizer.reference(inputs, layout, activations)
    assert torch.equal(found.codes, wanted.codes)
    assert found.meta[:, 0, 1].view(torch.float32).isnan().any()
    assert torch.equal(found.meta[..., [0, 2]], wanted.meta[..., [0, 2]])


@pytest.mark.parametrize("columns", [576, 24])
def test_dense_parts_are_the_models_hadamard_matrices(columns):
    """576 = 36 x 16. Sums in another order move a number's last bits, a code by one at most."""
    layout, activations = layout_of("w8a8", columns)
    rows, sylvester = split(columns)
    dense = signs(rows) if rows > 1 else None
    turn = quantizer.hadamard(dense, sylvester)
    inputs = inputs_of(3, columns)
    found, _ = run(inputs, layout, turn)
    wanted = quantizer.reference(inputs, layout, activations, turn)
    far = (found.codes.view(torch.int8).int() - wanted.codes.view(torch.int8).int()).abs()
    assert far.max() <= 1
    assert (far > 0).float().mean() < 0.01
    torch.testing.assert_close(
        quantizer.rotate(inputs, turn), rotate(inputs.float(), columns), rtol=1e-5, atol=1e-5
    )


def test_blocks_that_overlap_are_the_models():
    turn, inputs = quantizer.hadamard(None, 1024), inputs_of(3, 1536)
    torch.testing.assert_close(
        quantizer.rotate(inputs, turn), rotate(inputs.float(), 1024), rtol=1e-5, atol=1e-5
    )


def test_a_basis_of_its_own():
    basis = torch.linalg.qr(inputs_of(48, 48, torch.float32))[0].contiguous()
    turn = quantizer.Turn(1, basis, 1.0)
    layout, _ = layout_of("w8a8", 96)
    inputs = inputs_of(2, 96)
    found, _ = run(inputs, layout, turn)
    scale = found.meta[0, 0, :2].view(torch.float32)[:, None]
    numbers = found.codes.view(torch.int8)[:, :96].float() * scale
    exact = (inputs.float().reshape(2, 2, 48) @ basis).reshape(2, 96)
    # Rounding moves a number by half a step, and its last bits.
    assert ((numbers - exact).abs() <= scale * 0.51).all()


def test_no_undefined_behaviour(capfd):
    layout, activations = layout_of("w4g64z5s5a4zg64h8/8", 512)
    turn, inputs = quantizer.hadamard(None, 512), inputs_of(3, 512)
    found, _ = run(inputs, layout, turn, seed=1, flags=build.SANITIZE)
    assert_same(found, quantizer.reference(inputs, layout, activations, turn))
    assert "runtime error" not in capfd.readouterr().err


def test_what_the_quantizer_does_not_take_is_a_sentence():
    layout, _ = layout_of("w8a8", 96)
    with pytest.raises(FormatError, match="a matrix of at most 64 rows, not 1 times 96"):
        quantizer.macros(layout, F16, quantizer.Turn(1, torch.eye(96), 1.0))
    with pytest.raises(FormatError, match="blocks of 128 do not rotate 96 columns"):
        quantizer.macros(layout, F16, quantizer.hadamard(None, 128))
    small, _ = layout_of("w8a8", 96)
    part = small.segments[0]
    odd = replace(part, activation=replace(part.activation, group=48))
    with pytest.raises(FormatError, match="takes multiples of 32"):
        quantizer.macros(replace(small, segments=(odd,)), F16)
    with pytest.raises(FormatError, match=r"inputs are \[M, 96\] in rows"):
        quantizer.arguments(torch.zeros(2, 5), layout, quantizer.empty(layout, 2))
