"""Element types: what the stored code of one weight stands for, before its scale.

Integers need no table: a code `c` of an integer element is the number `c - zero`. The small floats
do: OCP FP8 (e4m3 and e5m2), OCP MX (e3m2, e2m3, e2m1), and all others of 4 to 8 bits with two to
five exponent bits and a mantissa. They are one formula with two parameters, exponent and mantissa
bits, so there is one encoder instead of a branch per type; `torch.float8_*` casts, which exist for
only two of them, are what the tests compare it with.

Codes are `sign | exponent | mantissa`, the sign in the highest of the element's bits, one code per
uint8.

Sources: OCP 8-bit Floating Point Specification 1.0 (2023); OCP Microscaling Formats Specification
1.0 (2023), 5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantlib.errors import FormatError

_F32_MANTISSA_BITS = 23
_F32_BIAS = 127
_CHUNK = 1 << 18
"""Values encoded at a time: the intermediate tensors then stay in cache, and small."""


@dataclass(frozen=True)
class FloatElement:
    """A small float: `(-1)^s * 2^(e - bias) * (1 + m / 2^mantissa_bits)`, subnormal where `e == 0`.

    max_value: the largest finite value; encoding saturates there.
    specials:  codes without sign from this one on are inf or nan (2^(bits-1): every code is a
               number).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_value: float
    specials: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Power of two of the smallest normal value."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Power of two of the largest normal value: `emax` of the OCP MX specification."""
        return math.frexp(self.max_value)[1] - 1


def _plain(exponent_bits: int, mantissa_bits: int) -> FloatElement:
    """A float that no standard defines: every code is a number. With five exponent bits the highest
    of them stays free, as in e5m2 and in a half, which all floats then fit into."""
    bias = (1 << (exponent_bits - 1)) - 1
    specials = 1 << (exponent_bits + mantissa_bits)
    highest = (1 << exponent_bits) - 1 - bias
    if exponent_bits == 5:
        specials, highest = specials - (1 << mantissa_bits), highest - 1
    largest = (2 - 2.0**-mantissa_bits) * 2.0**highest
    name = f"e{exponent_bits}m{mantissa_bits}"
    return FloatElement(name, exponent_bits, mantissa_bits, bias, largest, specials)


OCP_FLOATS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
"""The elements that OCP's specifications define."""
FLOATS: dict[str, FloatElement] = {
    element.name: element
    for element in (
        FloatElement("e4m3", 4, 3, bias=7, max_value=448.0, specials=0x7F),
        FloatElement("e5m2", 5, 2, bias=15, max_value=57344.0, specials=0x7C),
        FloatElement("e3m2", 3, 2, bias=3, max_value=28.0, specials=0x20),
        FloatElement("e2m3", 2, 3, bias=1, max_value=7.5, specials=0x20),
        FloatElement("e2m1", 2, 1, bias=1, max_value=6.0, specials=0x08),
        *(_plain(*bits) for bits in ((2, 2), (3, 1))),
        *(_plain(*bits) for bits in ((4, 1), (2, 4), (3, 3), (4, 2), (5, 1))),
        *(_plain(*bits) for bits in ((2, 5), (3, 4))),
    )
}
"""Element name -> its parameters."""


FLOAT_NAMES = {
    **{"fp8": "e4m3", "fp8e5m2": "e5m2", "fp6": "e3m2", "fp6e2m3": "e2m3", "fp4": "e2m1"},
    **{f"fp{e.bits}{e.name}": e.name for e in FLOATS.values() if e.name not in OCP_FLOATS},
}
"""What schemes call a float element -> the element. Only OCP's have names without exponent and
mantissa."""
MX_NAMES = tuple(name for name, element in FLOAT_NAMES.items() if element in OCP_FLOATS)
"""Those that exist as microscaling formats."""


def float_element(name: str) -> FloatElement:
    """The parameters of a float element. Raises FormatError for any other name."""
    if name not in FLOATS:
        raise FormatError(f"{name!r} is not a float element: use one of {', '.join(FLOATS)}")
    return FLOATS[name]


@cache
def code_book(name: str) -> Tensor:
    """The value of every code, float32 [2^bits]; inf and nan where the code is one.

    The tensor is shared: do not write into it.
    """
    element = float_element(name)
    half = 1 << (element.bits - 1)
    positive = [_value_of(code, element) for code in range(half)]
    values = positive + [-value for value in positive]
    # The device is named: a first call under a default device such as meta would cache it there.
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _value_of(code: int, element: FloatElement) -> float:
    if code >= element.specials:
        is_infinite = element.exponent_bits == 5 and code == element.specials
        return math.inf if is_infinite else math.nan
    exponent, mantissa = divmod(code, 1 << element.mantissa_bits)
    if exponent == 0:
        return math.ldexp(mantissa, element.min_exponent - element.mantissa_bits)
    significand = mantissa + (1 << element.mantissa_bits)
    return math.ldexp(significand, exponent - element.bias - element.mantissa_bits)


def encode_float(values: Tensor, name: str) -> Tensor:
    """Codes (uint8, same shape) of float32 `values`: round to nearest, ties to even.

    Values beyond max_value saturate, inf included; nan has no code and raises FormatError.
    """
    element = float_element(name)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    chunks = values.reshape(-1).split(_CHUNK)
    for chunk, out in zip(chunks, codes.view(-1).split(_CHUNK), strict=True):
        out.copy_(_encode_chunk(chunk.to(torch.float32), element))
    return codes


def _encode_chunk(values: Tensor, element: FloatElement) -> Tensor:
    if bool(torch.isnan(values).any()):
        raise FormatError(f"nan cannot be written as {element.name}: look for it in the weight")
    magnitude = values.abs().clamp_(max=element.max_value)
    # The exponent field of the float32 itself; float32 subnormals read as -127 and land in the
    # clamp.
    exponent = (magnitude.view(torch.int32) >> _F32_MANTISSA_BITS).sub_(_F32_BIAS)
    exponent.clamp_(min=element.min_exponent)
    # 2^(mantissa_bits - exponent) built from its bits: multiplying by it is exact, so the only
    # rounding is round_().
    inverse_step = (element.mantissa_bits - exponent + _F32_BIAS) << _F32_MANTISSA_BITS
    significand = magnitude.mul_(inverse_step.view(torch.float32)).round_().to(torch.int32)
    # A significand that rounds up to 2^(mantissa_bits + 1) carries into the exponent field by
    # itself.
    code = ((exponent - element.min_exponent) << element.mantissa_bits).add_(significand)
    sign = torch.signbit(values).to(torch.uint8) << (element.bits - 1)
    return code.to(torch.uint8) | sign


def decode_float(codes: Tensor, name: str) -> Tensor:
    """Values (float32, same shape) of uint8 `codes`. Codes of inf and nan decode to themselves."""
    book = code_book(name).to(codes.device)
    return book.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
