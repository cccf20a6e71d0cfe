"""Inputs that are rotated, put in order and rounded in one pass: the operator, and the linears of
rotated models that ask for it."""

import copy

import pytest
import torch

from quantlib.errors import FormatError
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.kernels import accelerated, dispatch, ops, turned
from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import quantizer
from quantlib.kernels.packed import PackedWeight, activations_of
from quantlib.runtime.fused_turn import InputTurn, take_turn
from quantlib.runtime.modules import QuantizedLinear
from quantlib.transforms import online
from quantlib.transforms.changes import Blocks, Heads
from quantlib.transforms.hadamard import signs, split

F16 = torch.float16
SCHEME = "w4a4zh8/8"

pytestmark = pytest.mark.usefixtures("compiler")


def made(columns, rows=40, scheme=SCHEME):
    parsed = Scheme.parse(scheme)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator)
    weight = quantize_rtn(dense, parsed.segments(columns))
    packed = PackedWeight.from_tensors(pack(weight), weight.shape, parsed.segments(columns))
    return packed, parsed.activations(columns)


def turn_of(order):
    dense, sylvester = split(order)
    return quantizer.hadamard(None if dense == 1 else signs(dense), sylvester)


def inputs_of(tokens, columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(F16)


@pytest.mark.parametrize(("columns", "order", "permuted"), [(512, 512, False), (384, 384, True)])
def test_one_pass_rotates_and_rounds(emulated, columns, order, permuted):
    packed, activations = made(columns)
    x, text, turn = inputs_of(5, columns), activations_of(activations), turn_of(order)
    generator = torch.Generator().manual_seed(2)
    columns_of = torch.randperm(columns, generator=generator).int() if permuted else None
    found = turned.linear(x, packed, text, turn, columns_of)
    assert [one.name for one in emulated] == [quantizer.NAME, "segmented_gemm"]
    assert emulated[0].macros["QL_SYLVESTER"] * emulated[0].macros["QL_DENSE"] == order
    exact = quantizer.rotate(x, turn)
    exact = exact if columns_of is None else exact[:, columns_of.long()]
    expected = ops.linear(exact.float(), packed, activations=activations)
    # The same codes but where a sum of the dense part in another order tips one over.
    close = (found.float() - expected).abs() <= 2e-3 * expected.abs().amax()
    assert close.float().mean() >= (0.99 if permuted else 1.0)
    again = torch.ops.quantlib.turned_linear(
        x, list(packed.tensors.values()), packed.layout, None, text,
        turn.sylvester, turn.dense, turn.factor, columns_of,
    )  # fmt: skip
    assert torch.equal(again, found)


def test_without_the_kernel_it_is_a_rotation_and_a_product():
    packed, activations = made(384)
    x, turn, text = inputs_of(5, 384), turn_of(384), activations_of(activations)
    bias = torch.randn(40)
    found = turned.linear(x, packed, text, turn, None, bias)
    rotated = quantizer.rotate(x, turn).to(F16)
    assert torch.equal(found, ops.linear(rotated, packed, bias, activations=activations))


def test_a_kernel_that_cannot_be_had_is_passed_over(monkeypatch):
    def refuse(*_):
        raise BuildError("no NVRTC")

    packed, activations = made(512)
    x, turn = inputs_of(3, 512), turn_of(512)
    monkeypatch.setattr(accelerated, "_segmented", refuse)
    monkeypatch.setattr(accelerated, "_instead", lambda *_: dispatch.REFERENCE)
    tensors = list(packed.tensors.values())
    given = (x, tensors, packed.layout, None, tuple(activations), turn)
    order = torch.arange(511, -1, -1).int()
    found = accelerated.multiply_turned(*given, order)
    rotated = quantizer.rotate(x, turn).to(F16)[:, order.long()]
    wanted = accelerated.multiply_rounded(
        dispatch.REFERENCE, rotated, tensors, packed.layout, None, tuple(activations)
    )
    assert torch.equal(found, wanted)


def test_torch_accepts_the_operator():
    packed, activations = made(384)
    x, turn = inputs_of(3, 384), turn_of(384)
    text = activations_of(activations)
    given = (x, list(packed.tensors.values()), packed.layout, None, text)
    given += (turn.sylvester, turn.dense, turn.factor, None)
    torch.library.opcheck(torch.ops.quantlib.turned_linear, given)
    compiled = torch.compile(
        lambda x: turned.linear(x, packed, text, turn).relu(), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), turned.linear(x, packed, text, turn).relu())


def test_a_rotation_that_the_quantizer_does_not_do_is_refused_or_left_alone():
    packed, activations = made(384)
    text, turn = activations_of(activations), turn_of(256)  # 256 does not divide 384: overlaps
    assert not turned.fuses(inputs_of(2, 384), 384, text, turn)  # on a processor
    with pytest.raises(FormatError, match="do not rotate 384 columns"):
        turned.linear(inputs_of(2, 384), packed, text, turn_of(768))


def linear_of(columns, hook=None):
    own = Scheme.parse(SCHEME)
    module = QuantizedLinear(columns, 40, tuple(own.segments(columns)))
    packed, activations = made(columns)
    module.exchange_packed("weight", module.packed_weights()["weight"][1], packed.tensors)
    module.set_inputs("weight", tuple(activations))
    if hook is not None:
        module.register_forward_pre_hook(hook)
    return module


def test_a_linear_takes_its_rotation_over_from_the_hook(emulated):
    hooked = linear_of(512, online.Turn(Blocks(512)).first_argument)
    fused = copy.deepcopy(hooked)
    fused.turn = take_turn(fused)
    assert isinstance(fused.turn, InputTurn)
    assert not fused._forward_pre_hooks
    x = inputs_of(4, 512)
    found, expected = fused(x), hooked(x)
    names = [one.macros.get("QL_SYLVESTER") for one in emulated if one.name == quantizer.NAME]
    assert names == [512, 1]
    # The hook rounds rotated inputs to 16 bits before they are rounded to 4: of a thousand codes a
    # few are others. Without the rotation all of them would be.
    assert (found - expected).abs().mean() <= 0.1 * expected.abs().mean()
    assert torch.equal(copy.deepcopy(fused)(x), found)


def test_on_a_processor_it_rotates_as_the_hook_did():
    hooked = linear_of(384, online.Turn(Blocks(384)).first_argument)
    fused = copy.deepcopy(hooked)
    fused.turn = take_turn(fused)
    x = inputs_of(4, 384).float()
    assert torch.equal(fused(x), hooked(x))


@pytest.mark.parametrize(
    "basis", [Blocks(256, 256), torch.eye(384), Heads(torch.eye(64).expand(6, 64, 64))]
)
def test_other_hooks_stay_where_they_are(basis):
    module = linear_of(384, online.Turn(basis).first_argument)
    assert take_turn(module) is None
    assert len(module._forward_pre_hooks) == 1
    several = linear_of(384, online.Turn(Blocks(384)).first_argument)
    several.register_forward_pre_hook(lambda *_: None)
    assert take_turn(several) is None
    assert len(several._forward_pre_hooks) == 2
