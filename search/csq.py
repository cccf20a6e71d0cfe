"""CSQ: bits of weights as gates, which grow hard while the model trains (bi-level continuous
sparsification, DAC 2023).

A weight of n magnitude planes is

    W = s sum_k 2^k / (2^n - 1) [g(p_k) - g(q_k)] h(m_k)

with gates p, q of W's shape for the positive and the negative bit of every plane, one gate m_k of a
plane for all of the layer, and a scale s per output channel. g and h are sigmoids of a temperature
beta that rises exponentially: soft at first, steps at the end, so that what is trained becomes a
quantized model by itself, without a straight-through estimator. They are divided by what an
untouched gate gives, so that the model begins as its own 8-bit rounding at every temperature.

    first round     beta rises for bits and planes; a penalty holds the mean bits at their target
    second round    planes are fixed, within the target; beta rises once more for the bits, from
                    gates that are put back to where they began, on their sides
    last steps      bits are fixed; scales, and all that is not quantized, train on

The penalty is lambda (bits - target) times the soft bits: its sign changes, so bits grow where
there are too few. Layers weigh by their multiplications: mean bits times the bits of inputs are
BOPs.
The paper counts planes; here a layer's bits are those that a two's complement integer needs: the
sign, and every plane between the highest and the lowest that is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import SearchError
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import QuantizedSegment, QuantizedWeight
from quantlib.search.trained.layers import Choice, Layers
from quantlib.search.trained.quantizers import through

PLANES = 7
"""Magnitude planes: with the sign they make the 8 bits of the widest integer format."""
LARGEST = (1 << PLANES) - 1
UNTOUCHED = 0.3
"""Where a bit's gate begins, positive for a set bit: near enough to 0 for training to flip it."""
UNTOUCHED_PLANE = 0.1
HOTTEST = 200.0
"""The last temperature."""
_F16_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Settings:
    """Of the search.

    target: mean bits of a weight, over multiplications. first, second: steps of the two rounds.
    penalty: lambda.
    """

    target: float
    first: int
    second: int
    penalty: float = 0.05

    def check(self, steps: int) -> None:
        """Raise SearchError for a target out of reach, or rounds that a run of so many steps has no
        room for."""
        if not 2 <= self.target <= PLANES + 1:
            raise SearchError(
                f"{self.target} bits are out of reach of CSQ: it has 2 to {PLANES + 1} a weight"
            )
        if self.first < 1 or self.second < 0 or self.first + self.second > steps:
            raise SearchError(
                f"rounds of {self.first} and {self.second} steps do not fit into {steps}: train "
                "longer, or shorten them"
            )


class BitGates(nn.Module):
    """The gates of one weight [N, K].

    beta:  temperature of its bits; 0: they are hard. plane_beta: of its planes.
    used:  bool [PLANES], the planes that are fixed; None while they are soft.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        reach = weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        magnitude = (weight.detach().abs() / reach * LARGEST).round().to(torch.int32)
        planes = torch.arange(PLANES).view(-1, 1, 1)
        is_set = ((magnitude >> planes) & 1).bool()
        plus, minus = is_set & (weight > 0), is_set & (weight < 0)
        self.positive = nn.Parameter(torch.where(plus, UNTOUCHED, -UNTOUCHED))
        self.negative = nn.Parameter(torch.where(minus, UNTOUCHED, -UNTOUCHED))
        self.planes = nn.Parameter(torch.full((PLANES,), UNTOUCHED_PLANE))
        self.base: Tensor
        self.register_buffer("base", reach / LARGEST)
        self.gain = nn.Parameter(torch.ones_like(reach))
        self.beta, self.plane_beta = 1.0, 1.0
        self.used: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """What a unit of the lowest plane is worth [N, 1]: a factor near 1 is what is trained, as
        steps of an optimizer know nothing of how small a scale is."""
        return self.base * self.gain

    def forward(self) -> Tensor:
        """The weight [N, K], float32."""
        values = self._values()
        if self.beta:
            return self.scale * values
        return through(self.scale, stored_scale(self.scale)) * values

    def _values(self) -> Tensor:
        """In units of the lowest plane [N, K]."""
        powers = torch.exp2(torch.arange(PLANES)).view(-1, 1, 1)
        planes = self._plane_gates().view(-1, 1, 1) * powers
        if not self.beta:
            bits = (self.positive > 0).float() - (self.negative > 0).float()
            return (bits * planes).sum(0).detach()
        both = torch.sigmoid(self.beta * self.positive) - torch.sigmoid(self.beta * self.negative)
        return (both * planes).sum(0) / math.tanh(self.beta * UNTOUCHED / 2)

    def _plane_gates(self) -> Tensor:
        if self.used is not None:
            return self.used.float()
        untouched = 1 / (1 + math.exp(-self.plane_beta * UNTOUCHED_PLANE))
        return torch.sigmoid(self.plane_beta * self.planes) / untouched

    @torch.no_grad()
    def settle(self) -> None:
        """Put every bit's gate back to where one begins, on its side: a second rise of the
        temperature then starts from the hard weight, and can still change it."""
        for gates in (self.positive, self.negative):
            gates.copy_(torch.where(gates > 0, UNTOUCHED, -UNTOUCHED))

    def soft_bits(self) -> Tensor:
        """Sign and planes, as far as they are used."""
        return 1 + torch.sigmoid(self.plane_beta * self.planes).sum()

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, int]:
        """The hard weight: integers int32 [N, K] in units of the lowest plane that is used, and
        that plane."""
        if self.used is None or self.beta:
            raise SearchError("the bits are still soft: train to the end before they are stored")
        lowest = int(torch.nonzero(self.used)[0])
        return (self._values() / (1 << lowest)).to(torch.int32), lowest


def stored_scale(scale: Tensor) -> Tensor:
    """A scale as a checkpoint stores it, half precision, in float32: never zero, and such that
    every plane's multiple of it is half precision too."""
    largest = 65504.0 / LARGEST
    return scale.clamp(_F16_SMALLEST, largest).to(torch.float16).to(torch.float32)


def bits_of(used: Tensor) -> int:
    """Bits of the two's complement integer that holds these planes (bool [PLANES])."""
    found = torch.nonzero(used).flatten()
    return 2 if not len(found) else max(2, int(found[-1] - found[0]) + 2)


def within_target(
    planes: Mapping[str, Tensor], shares: Mapping[str, float], target: float
) -> dict[str, Tensor]:
    """The planes to use, bool [PLANES] by layer: those whose gates are positive (the highest where
    none is), less the least certain lowest ones while the mean bits exceed the target.

    shares: layer -> its share of all multiplications. Raises SearchError when not even two bits
    everywhere are few enough.
    """
    used = {name: gates.detach() > 0 for name, gates in planes.items()}
    for name, row in used.items():
        if not bool(row.any()):
            used[name] = torch.arange(PLANES) == PLANES - 1
    while sum(shares[n] * bits_of(row) for n, row in used.items()) > target + 1e-9:
        narrower = [n for n, row in used.items() if bits_of(row) > 2]
        if not narrower:
            raise SearchError(f"a mean of {target} bits is below the two that every layer needs")
        chosen = min(narrower, key=lambda n: _certainty(planes[n], used[n]))
        used[chosen] = used[chosen].clone()
        used[chosen][torch.nonzero(used[chosen])[0]] = False
    return used


def _certainty(gates: Tensor, used: Tensor) -> float:
    """The gate of the lowest plane that is used."""
    return float(gates.detach()[torch.nonzero(used)[0]])


class Csq:
    """The method, as the training loop takes it (`loop.Method`)."""

    def __init__(
        self, layers: Layers, products: Mapping[str, float], inputs: Choice, search: Settings
    ) -> None:
        """Puts gates into the layers; their weights are no longer trained, but made.

        products: weight -> multiplications. inputs: the choice by whose candidates inputs are
        rounded. Steps are checked by `Settings.check`.
        """
        self._layers, self._inputs, self._search = layers, inputs, search
        total = math.fsum(products[name] for name in layers.of)
        self.shares = {name: products[name] / total for name in layers.of}
        self.gates: dict[str, BitGates] = {}
        for name, layer in layers.of.items():
            self.gates[name] = BitGates(layer.weight.flatten(1))
            layer.gates = self.gates[name]
            layer.weight.requires_grad_(False)
        self._used: dict[str, Tensor] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values on which the result depends."""
        candidates = self._layers.space.candidates(self._inputs)
        own = {f"search_{name}": value for name, value in asdict(self._search).items()}
        inputs = {name: candidate.name for name, candidate in candidates.items()}
        return {"method": "csq", "inputs": inputs, **own}

    def before(self, step: int) -> None:
        """Set the temperatures; fix the planes after the first round, the bits after the second."""
        self._layers.choose(self._inputs)
        first, second = self._search.first, self._search.second
        if step >= first and self._used is None:
            planes = {name: gates.planes for name, gates in self.gates.items()}
            self._used = within_target(planes, self.shares, self._search.target)
            for gates in self.gates.values():
                gates.settle()
        beta = HOTTEST ** (step / first)
        if step >= first:
            beta = HOTTEST ** ((step - first) / second) if step < first + second else 0.0
        for name, gates in self.gates.items():
            gates.beta, gates.plane_beta = beta, beta
            gates.used = None if self._used is None else self._used[name]

    def penalty(self) -> Tensor | None:
        """While planes are soft: what holds their bits at the target."""
        if self._used is not None:
            return None
        bits = torch.stack([self.shares[n] * g.soft_bits() for n, g in self.gates.items()]).sum()
        return self._search.penalty * (bits.detach() - self._search.target) * bits

    def after(self, step: int, quality: float) -> None:
        """Nothing more: gates are parameters of the model."""

    def figures(self) -> dict[str, float]:
        """Mean bits."""
        if self._used is not None:
            return {"bits": self.mean_bits}
        with torch.no_grad():
            return {
                "bits": sum(self.shares[n] * float(g.soft_bits()) for n, g in self.gates.items())
            }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The planes that are fixed."""
        used = self._used
        return {}, {"used": None if used is None else {n: row.tolist() for n, row in used.items()}}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        used = numbers["used"]
        self._used = None if used is None else {n: torch.tensor(row) for n, row in used.items()}

    def harden(self) -> None:
        """Fix everything, as the last steps do: for a run that has come to its end.

        Raises SearchError before the first round is over.
        """
        if self._used is None:
            raise SearchError("the planes are still soft: train to the end before they are fixed")
        for name, gates in self.gates.items():
            gates.beta, gates.used = 0.0, self._used[name]

    @property
    def mean_bits(self) -> float:
        """Of a weight, over multiplications, when planes are fixed."""
        assert self._used is not None
        return sum(self.shares[name] * bits_of(row) for name, row in self._used.items())

    def quantized(self) -> dict[str, QuantizedWeight]:
        """weight -> what the hard model computes with, to the bit."""
        self.harden()
        return {name: _quantized(gates) for name, gates in self.gates.items()}


@torch.no_grad()
def _quantized(gates: BitGates) -> QuantizedWeight:
    assert gates.used is not None
    values, lowest = gates.codes()
    bits = bits_of(gates.used)
    (segment,) = Scheme.parse(f"w{bits}").segments(values.shape[1])
    codes = (values + (1 << (bits - 1))).to(torch.uint8)
    scale = (stored_scale(gates.scale) * (1 << lowest)).to(torch.float16)
    part = QuantizedSegment(segment, codes, scale, None, None)
    return QuantizedWeight((values.shape[0], values.shape[1]), (part,))
