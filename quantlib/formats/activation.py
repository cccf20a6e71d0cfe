"""How the inputs of a linear are rounded: per token, while the model runs.

A weight's input features are consecutive `ActivationSegment`s, each with a format; a token has one
scale per segment, or per `group` columns of it (the last group may be shorter, and groups begin
anew with each segment). Scales follow from the numbers that arrive, nothing is stored but the
formats and their clip factors. With `amax`, `min` and `max` over the columns that share a scale,
everything in float32 and rounding to nearest, ties to even:

- symmetric integers: s = clip * amax / (2^(b-1) - 1), codes round(x / s) in +-(2^(b-1) - 1): the
  range is symmetric, as the scale is.
- asymmetric integers (b <= 7): lo = clip * min(x, 0), hi = clip * max(x, 0), s = (hi - lo) /
  (2^b - 1), z = round(-lo / s), codes clamp(round(x / s) + z, 0, 2^b - 1) - z. The zero point is
  taken off at once, so that a code is an int8 times a scale here too and kernels need no
  correction. At 8 bits it would not fit an int8, so there is no such format.
- floats: the element's code of x / s, saturating at its largest value, with the scales that the
  weight formats of the same name have: "fp8" and kin clip * amax / max_value; "mx..." groups of 32
  with the power of two 2^(floor(log2(clip * amax)) - emax), OCP Microscaling Formats 1.0, 6.3;
  "nvfp4" groups of 16 with an e4m3 multiple of the token's float32 (clip * amax / 6 / 448).

Columns that are all zeros have the scale 0 and codes 0. Where one is not finite the scale is nan
and the codes are 0, so that nothing computed from them looks like a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.elements import FLOAT_NAMES, FLOATS, MX_NAMES, decode_float, encode_float
from quantlib.formats.groups import group_blocks

UNROUNDED = 16
"""`ActivationFormat.bits` of inputs that are used as they are."""
INTEGER = "int"
_FP4 = "nvfp4"
FLOAT_ACTIVATIONS = (
    *FLOAT_NAMES,
    *(f"mx{name}" for name in MX_NAMES),
    _FP4,
)
"""Names of the floating formats: those of the weight formats (`scheme.py`)."""
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Elements whose codes tensor cores multiply as they are (compute capability 8.9 and later)."""
_MX_GROUP, _FP4_GROUP = 32, 16
_E8M0_SMALLEST = -127
_F32_NORMAL = 2.0**-126
_E4M3_SMALLEST = 2.0**-9
_PATTERN = re.compile(
    rf"(?P<bits>[2-8]|{UNROUNDED})(?P<zero>z)?(?:g(?P<group>[1-9]\d*))?"
    rf"|(?P<float>{'|'.join(sorted(FLOAT_ACTIVATIONS, key=len, reverse=True))})"
)


@dataclass(frozen=True, order=True)
class ActivationFormat:
    """How the numbers of one segment of a linear's inputs are rounded (see the module).

    bits:      2..8, or 16: used as they are. Floats have their element's, whatever is given.
    symmetric: False for integers whose range follows the columns' smallest and largest number.
    clip:      share of the range that is kept, in (0, 1]; numbers beyond it saturate.
    group:     columns that share a scale; 0: all of the segment. Floats have their own.
    element:   "int", or one of FLOAT_ACTIVATIONS.
    """

    bits: int = UNROUNDED
    symmetric: bool = True
    clip: float = 1.0
    group: int = 0
    element: str = INTEGER

    def __post_init__(self) -> None:
        if self.element != INTEGER:
            self._be_float()
        elif self.bits not in (*range(2, 9), UNROUNDED):
            raise FormatError(
                f"activations are rounded to 2..8 bits, or not at all (16), not to {self.bits}"
            )
        if not self.symmetric and (self.bits > 7 or self.element != INTEGER):
            raise FormatError(
                f"activations of {self.bits} bits cannot be asymmetric: a code less its zero point "
                "must fit 8 signed bits, so write a8, or at most a7z"
            )
        if self.group and (self.group < 0 or self.group % 16 or not self.rounds):
            raise FormatError(
                f"activation groups of {self.group}: give rounded activations groups of a multiple "
                "of 16 columns, for example a8g128"
            )
        if not 0 < self.clip <= 1:
            raise FormatError(f"a clip factor is above 0 and at most 1, not {self.clip}")

    def _be_float(self) -> None:
        if self.element not in FLOAT_ACTIVATIONS:
            known = ", ".join((INTEGER, *FLOAT_ACTIVATIONS))
            raise FormatError(f"unknown activation element {self.element!r}: use one of {known}")
        group = _MX_GROUP if self.is_mx else _FP4_GROUP if self.element == _FP4 else 0
        object.__setattr__(self, "bits", FLOATS[self.float_element].bits)
        object.__setattr__(self, "group", group)

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded at all."""
        return self.bits != UNROUNDED

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers times a scale: what an integer kernel multiplies."""
        return self.rounds and self.element == INTEGER

    @property
    def is_mx(self) -> bool:
        return self.element.startswith("mx")

    @property
    def float_element(self) -> str:
        """The key in `elements.FLOATS` of a floating format."""
        name = self.element.removeprefix("mx").removeprefix("nv")
        return FLOAT_NAMES[name]

    @staticmethod
    def parse(name: str) -> ActivationFormat:
        """Read what follows the `a` of a scheme: "8", "4z", "8g128", "mxfp4". `str` writes it.

        Raises FormatError when it is none.
        """
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise FormatError(
                f"{name!r} is not an activation format: write for example a8, a4z, a8g128 or amxfp4"
            )
        if match["float"]:
            return ActivationFormat(element=match["float"])
        return ActivationFormat(
            int(match["bits"]), not match["zero"], group=int(match["group"] or 0)
        )

    def __str__(self) -> str:
        """Its name, without the clip factor."""
        if self.element != INTEGER:
            return self.element
        return f"{self.bits}{'' if self.symmetric else 'z'}{f'g{self.group}' if self.group else ''}"


AS_THEY_ARE = ActivationFormat()
"""Not rounded."""


@dataclass(frozen=True, order=True)
class ActivationSegment:
    """`length` consecutive input features, from `start`, in one format."""

    start: int
    length: int
    format: ActivationFormat


def check_activations(length: int, segments: Sequence[ActivationSegment]) -> None:
    """Raise FormatError unless the segments cover 0..length in order exactly once."""
    position = 0
    for segment in segments:
        if segment.start != position or segment.length < 1:
            raise FormatError(
                f"activation segments must follow each other: one of {segment.length} columns "
                f"starts at {segment.start}, expected at {position}"
            )
        position += segment.length
    if position != length:
        raise FormatError(
            f"the activation segments cover {position} of {length} input features: give the layer "
            "its own scheme"
        )


def with_clips(
    segments: Sequence[ActivationSegment], clips: Sequence[float]
) -> tuple[ActivationSegment, ...]:
    """The segments with these clip factors, one each. Raises FormatError on another number."""
    if len(clips) != len(segments):
        raise FormatError(
            f"{len(clips)} clip factors for {len(segments)} activation segments: give one for each"
        )
    return tuple(
        replace(segment, format=replace(segment.format, clip=float(clip)))
        for segment, clip in zip(segments, clips, strict=True)
    )


def scale_columns(segments: Sequence[ActivationSegment]) -> list[slice]:
    """The columns of every scale of a token, in order; those of unrounded segments are left out."""
    return [
        slice(start, min(start + (part.format.group or part.length), part.start + part.length))
        for part in segments
        if part.format.rounds
        for start in range(part.start, part.start + part.length, part.format.group or part.length)
    ]


def fake_quantize(x: Tensor, segments: Sequence[ActivationSegment]) -> Tensor:
    """x [..., K], rounded and given back as numbers: float32 [..., K], what the kernels compute
    with.

    No segments: x as float32. A column that is not finite makes those that share its scale nan.
    Raises FormatError when the segments do not cover K.
    """
    if not segments:
        return x.to(torch.float32)
    flat = _tokens(x, segments)
    out = torch.empty_like(flat)
    for format, part, block in _blocks(flat, segments, out):
        values, scale = _round(part, format)
        torch.mul(values, scale, out=block)
    return out.view(x.shape)


def quantize(x: Tensor, segments: Sequence[ActivationSegment]) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and scales float32 [..., G], one per entry of `scale_columns`: what an
    integer kernel makes of x [..., K]. `fake_quantize` is their product.

    Raises FormatError when a segment is not rounded to integers, or the segments do not cover K.
    """
    for segment in segments:
        if not segment.format.is_integer:
            raise FormatError(
                f"activations in {segment.format} have no integer codes: use fake_quantize"
            )
    flat = _tokens(x, segments)
    codes = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
    scales = [torch.empty(len(flat), 0, device=flat.device)]
    for format, part, block in _blocks(flat, segments, codes):
        values, scale = _round(part, format)
        block.copy_(values)
        scales.append(scale.squeeze(2))
    return codes.view(x.shape), torch.cat(scales, dim=1).view(*x.shape[:-1], -1)


def float8(segments: Sequence[ActivationSegment]) -> torch.dtype | None:
    """The torch dtype that holds the codes of all segments, None unless they are floats of 8 bits
    of one kind."""
    kinds = {
        FLOAT8.get(part.format.float_element) if part.format.element != INTEGER else None
        for part in segments
    }
    return kinds.pop() if len(kinds) == 1 else None


def quantize_float8(x: Tensor, segments: Sequence[ActivationSegment]) -> tuple[Tensor, Tensor]:
    """Codes [..., K] in the dtype `float8(segments)` and scales float32 [..., G], one per entry of
    `scale_columns`, of x [..., K]. `fake_quantize` is their product.

    Raises FormatError where there is no such dtype, or the segments do not cover K.
    """
    dtype = float8(segments)
    if dtype is None:
        names = ", ".join(str(part.format) for part in segments)
        raise FormatError(
            f"activations in {names} have no codes of 8-bit floats: use fake_quantize"
        )
    flat = _tokens(x, segments)
    codes = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    scales = [torch.empty(len(flat), 0, device=flat.device)]
    for format, part, block in _blocks(flat, segments, codes):
        amax = part.abs().amax(dim=-1, keepdim=True)
        reach = torch.where(torch.isfinite(amax), amax * format.clip, torch.nan)
        scale = _float_scale(reach, format)
        largest = FLOATS[format.float_element].max_value
        block.copy_(_divide(part, scale).clamp_(-largest, largest))  # to nearest, ties to even
        scales.append(scale.squeeze(2))
    return codes.view(x.shape), torch.cat(scales, dim=1).view(*x.shape[:-1], -1)


def _tokens(x: Tensor, segments: Sequence[ActivationSegment]) -> Tensor:
    """x as float32 [T, K]. Raises FormatError when the segments do not cover K."""
    check_activations(x.shape[-1] if x.dim() else 0, segments)
    return x.to(torch.float32).reshape(-1, x.shape[-1])


def _blocks(
    x: Tensor, segments: Sequence[ActivationSegment], out: Tensor
) -> Iterator[tuple[ActivationFormat, Tensor, Tensor]]:
    """Format, and [T, groups, size] views of x and out [T, K], of columns in equal groups. NVFP4 is
    a segment at a time, [T, 1, length]: its groups share a float32."""
    for segment in segments:
        columns = slice(segment.start, segment.start + segment.length)
        group = 0 if segment.format.element == _FP4 else segment.format.group
        for block in group_blocks(segment.length, group):
            yield segment.format, block.view(x[:, columns]), block.view(out[:, columns])


def _round(x: Tensor, format: ActivationFormat) -> tuple[Tensor, Tensor]:
    """x [T, groups, size] -> values of the codes, float32 of the same shape, and scales
    [T, groups, 1] ([T, 1, length] for NVFP4, one for each column)."""
    if not format.rounds:
        return x, torch.ones_like(x[..., :1])
    if not format.symmetric:
        return _round_asymmetric(x, format)
    amax = x.abs().amax(dim=-1, keepdim=True)
    finite = torch.isfinite(amax)
    reach = torch.where(finite, amax * format.clip, torch.nan)
    if format.is_integer:
        limit = (1 << (format.bits - 1)) - 1
        scale = reach / limit
        return _divide(x, scale).round_().clamp_(-limit, limit), scale
    scale = (
        _nvfp4_scale(x, reach, format) if format.element == _FP4 else _float_scale(reach, format)
    )
    codes = encode_float(_divide(x, scale), format.float_element)
    return decode_float(codes, format.float_element), scale


def _round_asymmetric(x: Tensor, format: ActivationFormat) -> tuple[Tensor, Tensor]:
    largest = (1 << format.bits) - 1
    low = x.amin(dim=-1, keepdim=True).clamp_(max=0) * format.clip
    high = x.amax(dim=-1, keepdim=True).clamp_(min=0) * format.clip
    span = high - low
    scale = torch.where(torch.isfinite(span), span, torch.nan) / largest
    zero = _divide(-low, scale).round_()
    codes = _divide(x, scale).round_().add_(zero).clamp_(0, largest)
    return codes.sub_(zero), scale


def _float_scale(reach: Tensor, format: ActivationFormat) -> Tensor:
    element = FLOATS[format.float_element]
    if not format.is_mx:
        return reach / element.max_value
    exponent = torch.frexp(reach).exponent - 1 - element.max_exponent
    power = torch.exp2(exponent.clamp(min=_E8M0_SMALLEST).to(torch.float32))
    return torch.where(reach > 0, power, reach)  # zeros and nan stay what they are


def _nvfp4_scale(x: Tensor, reach: Tensor, format: ActivationFormat) -> Tensor:
    """The scale of every column, float32 [T, 1, length], of a segment x of that shape."""
    largest, e4m3 = FLOATS[format.float_element].max_value, FLOATS["e4m3"].max_value
    token = torch.where(reach > 0, (reach / largest / e4m3).clamp(min=_F32_NORMAL), reach)
    scale = torch.empty_like(x)
    for block in group_blocks(x.shape[-1], format.group):
        amax = block.view(x[:, 0]).abs().amax(dim=-1) * format.clip
        ratio = _divide(amax / largest, token[:, 0])
        # A group that is not all zeros has a scale, the smallest there is if need be.
        ratio = torch.where(amax > 0, ratio.clamp(min=_E4M3_SMALLEST), ratio)
        stored = decode_float(encode_float(ratio, "e4m3"), "e4m3") * token[:, 0]
        block.view(scale[:, 0]).copy_(stored[:, :, None].expand(-1, -1, block.size))
    return scale


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale; 0 where the scale is 0 or nan."""
    usable = scale > 0
    quotient = x / scale
    return quotient if bool(usable.all()) else torch.where(usable, quotient, 0.0)
