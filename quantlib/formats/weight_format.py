"""How the numbers of a weight are stored: element, groups, scales, zero points.

What the names say is in the grammar of schemes (`scheme.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from quantlib.errors import FormatError
from quantlib.formats.elements import FLOAT_NAMES, FLOATS, MX_NAMES, OCP_FLOATS

CHANNEL = 0
"""`group_size` of one scale per output channel."""
TENSOR = -1
"""`group_size` of one scale for the whole tensor."""

INTEGER_ELEMENTS = tuple(f"int{bits}" for bits in range(2, 9))
FLOAT_ELEMENTS = {name: element.bits for name, element in FLOATS.items()}
GROUP_SIZES = (16, 32, 64, 128, 256)
TWO_LEVEL_SCALES = ("u4", "u5", "u6", "u7", "u8")
SCALES = ("f16", "e8m0", "e4m3", *TWO_LEVEL_SCALES)

FLOAT_OF_BITS = {8: "e4m3", 6: "e3m2", 4: "e2m1"}
"""The element that stands for a width where only the width is given."""
FLOAT_NAME, MX_NAME = ("|".join(sorted(n, reverse=True)) for n in (FLOAT_NAMES, MX_NAMES))
"""Patterns of their names, longer ones before those that they begin with."""
FORMAT_NAME = (
    r"nv(?P<nv>fp4)"
    rf"|mx(?P<mx>{MX_NAME})"
    rf"|(?:w(?P<bits>[2-8])|(?P<fp>{FLOAT_NAME}))"
    r"(?:g(?P<group>\d+)|(?P<tensor>t))?(?P<zero>z(?P<zero_bits>[2-8])?)?"
    r"(?:s(?P<scale>[4-8])|(?P<exponent>e))?"
    r"(?P<sparse>:2of4)?"
)
"""Pattern of a format's name; `named_format` takes its match."""

_ELEMENT_NAMES = {element: name for name, element in FLOAT_NAMES.items()}


@dataclass(frozen=True, order=True)
class WeightFormat:
    """How the numbers of one segment of a weight are stored.

    element:    "int2".."int8", or a key of FLOAT_ELEMENTS.
    group_size: weights along K that share a scale; CHANNEL or TENSOR otherwise.
    symmetric:  integers only; False adds a zero point per group.
    scale:      "f16"; "u4".."u8": two-level, `row_scale[n] * code / (2^bits - 1)`; "e8m0", a power
                of two; "e4m3".
    zero_bits:  bits of a stored zero point; the element's own (an integer zero point) unless said
                otherwise. A stored code stands for `code * zero_step`, so that its range is always
                0 .. 2^bits - 1. 0 when symmetric.
    sparse:     two of every four neighbouring weights of a row are zero, and are not stored.
    """

    element: str
    group_size: int
    symmetric: bool = True
    scale: str = "f16"
    zero_bits: int = 0
    sparse: bool = False

    def __post_init__(self) -> None:
        if self.element not in INTEGER_ELEMENTS and self.element not in FLOAT_ELEMENTS:
            known = ", ".join((*INTEGER_ELEMENTS, *FLOAT_ELEMENTS))
            raise FormatError(f"unknown element type {self.element!r}: use one of {known}")
        if self.group_size not in (CHANNEL, TENSOR, *GROUP_SIZES):
            raise FormatError(
                f"group size {self.group_size} is not supported: use one of {GROUP_SIZES}, "
                "channel or tensor"
            )
        if self.scale not in SCALES:
            raise FormatError(f"unknown scale type {self.scale!r}: use one of {', '.join(SCALES)}")
        if not self.symmetric and not self.is_integer:
            raise FormatError(
                f"{self.element} has a sign of its own: zero points are for integer weights"
            )
        if self.symmetric and self.zero_bits:
            raise FormatError("a symmetric format has no zero point: write for example w4g64z4")
        if not self.symmetric and not self.zero_bits:
            object.__setattr__(self, "zero_bits", self.bits)
        if self.two_level and self.group_size in (CHANNEL, TENSOR):
            raise FormatError("two-level scales need groups: write for example w4g64s6")
        if self.scale == "e8m0" and not self.is_integer:
            if self.group_size != 32:
                raise FormatError(
                    "floats have e8m0 scales in groups of 32 only: write mxfp8, mxfp6 or mxfp4"
                )
            if self.element not in OCP_FLOATS:
                raise FormatError(f"{self.element} is no microscaling format: write mxfp6")
        if self.scale == "e4m3" and (self.element != "e2m1" or self.group_size != 16):
            raise FormatError("e4m3 scales are for e2m1 in groups of 16: write nvfp4")
        if self.sparse and not (self.is_integer and self.symmetric):
            raise FormatError(
                "what 2:4 sparsity leaves out is zero, which symmetric integers have exactly: "
                "write for example w4g128:2of4"
            )

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return int(self.element[3:]) if self.is_integer else FLOAT_ELEMENTS[self.element]

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

    @property
    def is_mx(self) -> bool:
        """Whether this is one of the OCP microscaling formats."""
        return self.scale == "e8m0" and not self.is_integer

    @property
    def shares_exponent(self) -> bool:
        """Whether this is dynamic fixed point: integers whose scale is a power of two."""
        return self.scale == "e8m0" and self.is_integer

    @property
    def two_level(self) -> bool:
        return self.scale in TWO_LEVEL_SCALES

    @property
    def scale_bits(self) -> int:
        """Bits of one stored group scale."""
        return {"f16": 16, "e8m0": 8, "e4m3": 8}.get(self.scale) or int(self.scale[1:])

    @property
    def zero_step(self) -> float:
        """What one unit of a stored zero point is worth, in codes: 1.0 for integer zero points."""
        return ((1 << self.bits) - 1) / ((1 << self.zero_bits) - 1) if self.zero_bits else 1.0

    def groups(self, length: int) -> int:
        """Number of scale groups along `length` weights (the last one may be shorter)."""
        return -(-length // self.group_size) if self.group_size > 0 else 1

    def __str__(self) -> str:
        if self.is_mx:
            return "mx" + _ELEMENT_NAMES[self.element]
        if self.scale == "e4m3":
            return "nvfp4"
        name = f"w{self.bits}" if self.is_integer else _ELEMENT_NAMES[self.element]
        group = {CHANNEL: "", TENSOR: "t"}.get(self.group_size, f"g{self.group_size}")
        zero = "" if self.symmetric else "z"
        if self.zero_bits not in (0, self.bits):
            zero += str(self.zero_bits)
        scale = f"s{self.scale_bits}" if self.two_level else "e" if self.shares_exponent else ""
        return name + group + zero + scale + (":2of4" if self.sparse else "")


@dataclass(frozen=True, order=True)
class Segment:
    """`length` consecutive weights along K, from `start`, in one format."""

    start: int
    length: int
    format: WeightFormat


def named_format(match: re.Match[str]) -> WeightFormat:
    """The format whose name matched FORMAT_NAME. Raises FormatError for what cannot be."""
    if match["nv"]:
        return WeightFormat("e2m1", 16, scale="e4m3")
    if match["mx"]:
        return WeightFormat(FLOAT_NAMES[match["mx"]], 32, scale="e8m0")
    element = f"int{match['bits']}" if match["bits"] else FLOAT_NAMES[match["fp"]]
    group = int(match["group"]) if match["group"] else TENSOR if match["tensor"] else CHANNEL
    scale = f"u{match['scale']}" if match["scale"] else "e8m0" if match["exponent"] else "f16"
    zero_bits = int(match["zero_bits"] or 0)
    return WeightFormat(element, group, not match["zero"], scale, zero_bits, bool(match["sparse"]))


def restyled(format: WeightFormat, bits: int) -> WeightFormat:
    """The format with codes of `bits` bits: groups and scales are kept, and zero points have as
    many bits as codes, whatever they had; columns that matter more are not pruned. NVFP4 has no
    wider kin: fp8 and fp6 take its place."""
    if format.is_integer:
        return replace(format, element=f"int{bits}", zero_bits=0, sparse=False)
    if bits not in FLOAT_OF_BITS:
        raise FormatError(f"no float stands for {bits} bits alone: give {format} columns of 8 or 6")
    if bits == format.bits:
        return format
    if format.scale == "e4m3":
        return WeightFormat(FLOAT_OF_BITS[bits], CHANNEL)
    return replace(format, element=FLOAT_OF_BITS[bits])
