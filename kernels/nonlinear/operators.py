"""One operator as a layer uses it: a method, its grids, and how they are fitted.

A method's name ends in the bits of the grid its inputs are on, one symmetric scale per layer:

    ibert8  ibert16    I-BERT
    ivit8   ivit16     I-ViT
    fqvit8             FQ-ViT: softmax in 4-bit logarithms, LayerNorm of channels on grids of powers
                       of two; it has no GELU

Weights that a softmax of I-BERT or I-ViT gives have as many bits. Around an operator are floats, so
that it can stand in a model of floats; inside there are integers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.kernels.nonlinear import fqvit, ibert, ivit
from quantlib.kernels.nonlinear.integers import grid_scale, to_integers

Kind = Literal["softmax", "gelu", "layer_norm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
METHODS: dict[str, tuple[str, int]] = {
    "ibert8": ("ibert", 8),
    "ibert16": ("ibert", 16),
    "ivit8": ("ivit", 8),
    "ivit16": ("ivit", 16),
    "fqvit8": ("fqvit", 8),
}
"""Name -> method, and bits of the grid of its inputs."""
CANDIDATES: dict[Kind, tuple[str, ...]] = {
    "softmax": tuple(METHODS),
    "gelu": tuple(name for name, (method, _) in METHODS.items() if method != "fqvit"),
    "layer_norm": tuple(METHODS),
}
RANGES = (1.0, 0.8, 0.6, 0.4, 0.25)
"""Shares of the largest input that a grid may reach: what is clipped can be worth finer steps."""


@dataclass(frozen=True)
class Operator:
    """kind, method: what is computed, and how (see above).

    scale:  of the grid of inputs.
    shifts: of every channel, for FQ-ViT's LayerNorm: its grid is scale * 2^shift.
    output: scale of the grid of outputs, for FQ-ViT's LayerNorm.
    """

    kind: Kind
    method: str
    scale: float
    shifts: tuple[int, ...] = ()
    output: float = 0.0

    @property
    def bits(self) -> int:
        """Of the grid of inputs."""
        return METHODS[self.method][1]

    def softmax(self, scores: Tensor, seen: Tensor | None = None) -> Tensor:
        """Weights float32 [..., L] of scores [..., L]. seen: bool, broadcast: scores that count."""
        at = to_integers(scores, self.scale, self.bits)
        method = METHODS[self.method][0]
        if method == "fqvit":
            return fqvit.from_logs(fqvit.softmax(at, seen).values)
        softmax = ibert.softmax if method == "ibert" else ivit.softmax
        return softmax(at, self.bits, seen).floats()

    def gelu(self, x: Tensor) -> Tensor:
        """float32 of x's shape."""
        at = to_integers(x, self.scale, self.bits)
        is_ibert = METHODS[self.method][0] == "ibert"
        return (ibert.gelu(at) if is_ibert else ivit.gelu(at, self.bits)).floats()

    def layer_norm(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """float32 of x's shape, normalized over the last axis; gain, bias [channels]."""
        if METHODS[self.method][0] == "fqvit":
            shifts = torch.tensor(self.shifts, device=x.device)
            at = fqvit.to_channel_grids(x, self.scale, shifts, self.bits)
            gain = torch.ones(x.shape[-1:], device=x.device) if gain is None else gain
            bias = torch.zeros(x.shape[-1:], device=x.device) if bias is None else bias
            return fqvit.layer_norm(at, gain, bias, self.output, self.bits).floats()
        layer_norm = ibert.layer_norm if METHODS[self.method][0] == "ibert" else ivit.layer_norm
        normal = layer_norm(to_integers(x, self.scale, self.bits)).floats()
        normal = normal if gain is None else normal * gain.float()
        return normal if bias is None else normal + bias.float()

    def to_json(self) -> dict[str, Any]:
        """JSON values; shifts as one string of digits."""
        found: dict[str, Any] = {"kind": self.kind, "method": self.method, "scale": self.scale}
        if self.shifts:
            found |= {"shifts": "".join(map(str, self.shifts)), "output": self.output}
        return found

    @staticmethod
    def parse(given: Any) -> Operator:
        """The inverse of `to_json`. Raises FormatError when it is none."""
        try:
            shifts = tuple(int(digit) for digit in given.get("shifts", ""))
            operator = Operator(
                given["kind"],
                given["method"],
                float(given["scale"]),
                shifts,
                float(given.get("output", 0.0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{given!r} describes no integer operator: {error}") from error
        operator.check()
        return operator

    def check(self) -> None:
        """Raise FormatError when there is no such operator, or its grids are none."""
        if self.kind not in KINDS or self.method not in CANDIDATES[self.kind]:
            known = ", ".join(CANDIDATES.get(self.kind, ()))
            raise FormatError(
                f"there is no {self.kind} of {self.method!r}: use one of {known}"
                if known
                else f"there is no integer {self.kind!r}: there are {', '.join(KINDS)}"
            )
        in_channels = (self.kind, METHODS[self.method][0]) == ("layer_norm", "fqvit")
        scales = (self.scale, self.output) if in_channels else (self.scale,)
        fits = all(math.isfinite(scale) and scale > 0 for scale in scales)
        allowed = range(fqvit.LARGEST_SHIFT + 1)
        if not fits or in_channels != bool(self.shifts) or set(self.shifts) - set(allowed):
            raise FormatError(f"the grids of {self.kind} by {self.method} are none: {self}")


def fit(
    kind: Kind,
    method: str,
    rows: Tensor,
    exact: Tensor,
    *,
    seen: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Operator, float]:
    """The operator whose grids suit inputs `rows` [rows, n] best, and its SQNR in dB.

    exact: what the layer makes of the rows. seen: of a softmax; gain, bias: of a LayerNorm.
    Raises FormatError when there is no such operator, or no finite row.
    """
    counted = rows if seen is None else rows[seen.expand_as(rows)]
    largest = float(counted.abs().max()) if counted.numel() else math.nan
    if not math.isfinite(largest):
        raise FormatError(f"the inputs of a {kind} are not finite: no grid can hold them")
    found = []
    for share in RANGES:
        operator = _with_range(kind, method, share * largest, rows, exact)
        computed = _apply(operator, rows, seen, gain, bias)
        found.append((operator, sqnr(exact, computed)))
    return max(found, key=lambda one: one[1])


def sqnr(exact: Tensor, computed: Tensor) -> float:
    """Signal over quantization noise in dB; -inf where something is not finite."""
    signal = float(exact.double().square().sum())
    noise = float((exact.double() - computed.double()).square().sum())
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise) if noise else math.inf


def _with_range(kind: Kind, method: str, largest: float, rows: Tensor, exact: Tensor) -> Operator:
    """The operator whose grid of inputs reaches `largest`."""
    family, bits = METHODS.get(method, ("", 8))
    operator = Operator(kind, method, grid_scale(largest, bits))
    if (kind, family) != ("layer_norm", "fqvit"):
        operator.check()
        return operator
    # The widest channels reach it with the largest shift.
    scale = grid_scale(largest / 2**fqvit.LARGEST_SHIFT, bits)
    shifts = fqvit.channel_shifts(rows, scale, bits)
    chosen = tuple(int(power) for power in shifts)
    return replace(operator, scale=scale, shifts=chosen, output=fqvit.output_scale(exact, bits))


def _apply(
    operator: Operator,
    rows: Tensor,
    seen: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if operator.kind == "softmax":
        return operator.softmax(rows, seen)
    if operator.kind == "gelu":
        return operator.gelu(rows)
    return operator.layer_norm(rows, gain, bias)


def describe(operators: Mapping[str, Operator]) -> dict[str, int]:
    """How many layers use each operator, such as {"gelu ivit8": 12}."""
    found: dict[str, int] = {}
    for operator in operators.values():
        name = f"{operator.kind} {operator.method}"
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))
