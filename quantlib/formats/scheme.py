"""What a number is: weight formats, schemes, and their short names.

Grammar of a scheme's name (`Scheme.parse` reads it, `str(scheme)` writes it; the two are inverse):

    w{2..8}         integer weights, symmetric, one float16 scale per output channel
    w4g64           ... one scale per group of 64 along the input axis (16, 32, 64, 128 or 256)
    w4t             ... one scale for the whole tensor
    w4g64z          asymmetric: an integer zero point of as many bits as the weight
    w4g64z6         ... a zero point of 6 bits, in steps of (2^4 - 1) / (2^6 - 1) codes (z2..z8)
    w4g64zs6        two-level scales: 6-bit scale codes and one float16 per output channel (s4..s8)
    fp8 fp8e5m2 fp6 fp6e2m3 fp4
                    floating point per output channel (e4m3, e5m2, e3m2, e2m3, e2m1); g, t, s as
                    above
    mxfp8 mxfp8e5m2 mxfp6 mxfp6e2m3 mxfp4
                    OCP microscaling: groups of 32 with an e8m0 scale
    nvfp4           e2m1 in groups of 16 with an e4m3 scale and one float32 per tensor
    bf16 f16 f32    kept as it is
    ...a8           after any of these: activations rounded to 8 bits per token

Group size is written in weights along K (input features). A row whose K is not a multiple of the
group has a shorter last group; shapes are never refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantlib.errors import FormatError

CHANNEL = 0
"""`group_size` of one scale per output channel."""
TENSOR = -1
"""`group_size` of one scale for the whole tensor."""

INTEGER_ELEMENTS = tuple(f"int{bits}" for bits in range(2, 9))
FLOAT_ELEMENTS = {"e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4}
GROUP_SIZES = (16, 32, 64, 128, 256)
TWO_LEVEL_SCALES = ("u4", "u5", "u6", "u7", "u8")
SCALES = ("f16", "e8m0", "e4m3", *TWO_LEVEL_SCALES)
KEPT = {"bf16": 2, "f16": 2, "f32": 4}
"""Names of the schemes that leave a weight unquantized, and their bytes per element."""

_FLOAT_NAMES = {"fp8": "e4m3", "fp8e5m2": "e5m2", "fp6": "e3m2", "fp6e2m3": "e2m3", "fp4": "e2m1"}
_ELEMENT_NAMES = {element: name for name, element in _FLOAT_NAMES.items()}
_PATTERN = re.compile(
    r"(?P<kept>bf16|f16|f32)"
    r"|nv(?P<nv>fp4)"
    r"|mx(?P<mx>fp8e5m2|fp8|fp6e2m3|fp6|fp4)"
    r"|(?:w(?P<bits>[2-8])|(?P<fp>fp8e5m2|fp8|fp6e2m3|fp6|fp4))"
    r"(?:g(?P<group>\d+)|(?P<tensor>t))?(?P<zero>z(?P<zero_bits>[2-8])?)?(?:s(?P<scale>[4-8]))?"
)


@dataclass(frozen=True, order=True)
class WeightFormat:
    """How the numbers of one segment of a weight are stored.

    element:    "int2".."int8", or a key of FLOAT_ELEMENTS.
    group_size: weights along K that share a scale; CHANNEL or TENSOR otherwise.
    symmetric:  integers only; False adds a zero point per group.
    scale:      "f16"; "u4".."u8": two-level, `row_scale[n] * code / (2^bits - 1)`; "e8m0"; "e4m3".
    zero_bits:  bits of a stored zero point; the element's own (an integer zero point) unless said
                otherwise. A stored code stands for `code * zero_step`, so that its range is always
                0 .. 2^bits - 1. 0 when symmetric.
    """

    element: str
    group_size: int
    symmetric: bool = True
    scale: str = "f16"
    zero_bits: int = 0

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
        if self.scale == "e8m0" and (self.is_integer or self.group_size != 32):
            raise FormatError(
                "e8m0 scales are for floats in groups of 32: write mxfp8, mxfp6 or mxfp4"
            )
        if self.scale == "e4m3" and (self.element != "e2m1" or self.group_size != 16):
            raise FormatError("e4m3 scales are for e2m1 in groups of 16: write nvfp4")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return int(self.element[3:]) if self.is_integer else FLOAT_ELEMENTS[self.element]

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

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
        if self.scale == "e8m0":
            return "mx" + _ELEMENT_NAMES[self.element]
        if self.scale == "e4m3":
            return "nvfp4"
        name = f"w{self.bits}" if self.is_integer else _ELEMENT_NAMES[self.element]
        group = {CHANNEL: "", TENSOR: "t"}.get(self.group_size, f"g{self.group_size}")
        zero = "" if self.symmetric else "z"
        if self.zero_bits not in (0, self.bits):
            zero += str(self.zero_bits)
        return name + group + zero + (f"s{self.scale_bits}" if self.two_level else "")


@dataclass(frozen=True, order=True)
class Segment:
    """`length` consecutive weights along K, from `start`, in one format."""

    start: int
    length: int
    format: WeightFormat


@dataclass(frozen=True)
class Scheme:
    """What is done to a weight: its format (None: kept as `kept`), and the bits of its inputs."""

    weight: WeightFormat | None
    kept: str | None = None
    activation_bits: int = 16

    @staticmethod
    def parse(name: str) -> Scheme:
        """Read a scheme's short name. Raises FormatError with examples when it is not one."""
        base, marker, activation = name.partition("a")
        match = _PATTERN.fullmatch(base)
        if match is None or (marker and activation not in ("8", "16")):
            raise FormatError(
                f"{name!r} is not a scheme: write for example w4g64, w3g32z, w4g64zs6, w8a8, fp8, "
                "mxfp4, nvfp4 or bf16"
            )
        activation_bits = int(activation) if activation else 16
        if match["kept"]:
            return Scheme(None, match["kept"], activation_bits)
        if match["nv"]:
            return Scheme(WeightFormat("e2m1", 16, scale="e4m3"), None, activation_bits)
        if match["mx"]:
            return Scheme(
                WeightFormat(_FLOAT_NAMES[match["mx"]], 32, scale="e8m0"), None, activation_bits
            )
        element = f"int{match['bits']}" if match["bits"] else _FLOAT_NAMES[match["fp"]]
        group = int(match["group"]) if match["group"] else TENSOR if match["tensor"] else CHANNEL
        scale = f"u{match['scale']}" if match["scale"] else "f16"
        zero_bits = int(match["zero_bits"] or 0)
        weight = WeightFormat(element, group, not match["zero"], scale, zero_bits)
        return Scheme(weight, None, activation_bits)

    def segments(self, length: int) -> tuple[Segment, ...]:
        """The K segments of a weight with `length` input features: one, for a uniform scheme."""
        if self.weight is None:
            raise FormatError(f"a weight kept as {self.kept} has no segments")
        return (Segment(0, length, self.weight),)

    def __str__(self) -> str:
        base = str(self.weight) if self.weight is not None else str(self.kept)
        return base + (f"a{self.activation_bits}" if self.activation_bits != 16 else "")
