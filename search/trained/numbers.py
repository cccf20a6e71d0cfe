"""What a layer may be trained in: candidates, and the spaces that a search chooses from.

A candidate rounds a layer's weight and its inputs. It is a scheme of quantlib's where there is one,
so that what is found can be stored and run; and any small float besides, since a search over number
formats asks which of them are worth building (FLIQS, arXiv 2308.03290). A float `eXmY` has a sign,
X exponent bits with bias 2^(X-1) - 1, Y mantissa bits, subnormals, and neither inf nor nan, but for
the two of 8 bits that OCP defines otherwise. Weights have one scale per output channel, inputs one
per token, which takes the largest magnitude to the largest number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantlib.errors import SearchError
from quantlib.formats.activation import UNROUNDED
from quantlib.formats.elements import FLOAT_NAMES, FLOATS, FloatElement
from quantlib.formats.scheme import Scheme

_FLOAT = re.compile(r"e([2-5])m([1-5])")
_SCHEME_NAMES = {element: name for name, element in FLOAT_NAMES.items()}
FEWEST_BITS, MOST_BITS = 4, 8


@dataclass(frozen=True)
class Candidate:
    """How a layer's weight and inputs are rounded.

    name:    the scheme's, or the element's where no scheme has it.
    scheme:  None for a float that quantlib trains with and does not store.
    element: that float.
    """

    name: str
    scheme: Scheme | None = None
    element: FloatElement | None = None

    @staticmethod
    def parse(name: str) -> Candidate:
        """A scheme ("w4a4", "w4g64a8", "fp4afp4") or a float for both ("e3m2").

        Raises SearchError for a float that is none of 4..8 bits, for a kept weight and for one of
        several matrices, FormatError for what is no scheme.
        """
        match = _FLOAT.fullmatch(name)
        if match is None:
            scheme = Scheme.parse(name)
            if scheme.weight is None:
                raise SearchError(
                    f"{name} rounds no weight, so there is nothing to train: leave it out, the "
                    "full-precision model is trained beside"
                )
            if scheme.low_rank is not None or scheme.rows:
                raise SearchError(
                    f"{name} is several matrices, and training rounds one: leave out the factors "
                    "and the blocks of rows"
                )
            return Candidate(str(scheme), scheme)
        if name in _SCHEME_NAMES:
            known = _SCHEME_NAMES[name]
            return Candidate.parse(f"{known}a{known}")
        element = float_of(int(match[1]), int(match[2]))
        if not FEWEST_BITS <= element.bits <= MOST_BITS:
            raise SearchError(
                f"{name} has {element.bits} bits: floats of {FEWEST_BITS} to {MOST_BITS} are "
                "trained, such as e2m1, e3m2 or e4m3"
            )
        return Candidate(name, None, element)

    def bit_products(self, columns: int) -> float:
        """Weight bits times input bits of a multiplication, the mean over the K columns."""
        if self.element is not None:
            return float(self.element.bits**2)
        assert self.scheme is not None  # one of the two is there
        inputs = [part.format.bits for part in self.scheme.activations(columns)]
        weights = self.scheme.segments(columns)
        pairs = zip(weights, inputs or [UNROUNDED] * len(weights), strict=True)
        return sum(part.format.bits * bits * part.length for part, bits in pairs) / columns

    def stored(self) -> Scheme:
        """The scheme that a checkpoint has it in. Raises SearchError when there is none."""
        if self.scheme is None:
            raise SearchError(
                f"{self.name} can be trained but neither stored nor run: no format or kernel of "
                f"quantlib has it; search among {', '.join(SPACES['float'])} instead (the space "
                "'float')"
            )
        return self.scheme


def float_of(exponent_bits: int, mantissa_bits: int) -> FloatElement:
    """The float of so many bits: OCP's where there is one."""
    name = f"e{exponent_bits}m{mantissa_bits}"
    if name in FLOATS:
        return FLOATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    largest = (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
    codes = 1 << (exponent_bits + mantissa_bits)
    return FloatElement(name, exponent_bits, mantissa_bits, bias, largest, specials=codes)


def _integers(*bits: int) -> tuple[str, ...]:
    return tuple(f"w{b}a{b}" for b in bits)


def _floats(fewest: int, most: int) -> tuple[str, ...]:
    """All of so many bits, with two exponent bits or more and a mantissa: with one exponent bit
    they are integers."""
    pairs = [(e, bits - 1 - e) for bits in range(fewest, most + 1) for e in range(2, 6)]
    return tuple(f"e{e}m{m}" for e, m in pairs if m >= 1)


SPACES: dict[str, tuple[str, ...]] = {
    "int-s": _integers(4, 8),
    "int-l": _integers(4, 5, 6, 7, 8),
    "int-xl": _integers(3, 4, 5, 6, 8),
    "float-s": ("e2m1", "e4m3"),
    "float-l": _floats(4, 8),
    "float": ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2"),
    "mixed-l": (*_integers(4, 5, 6, 7, 8), *_floats(4, 8)),
    "mixed-xl": (*_integers(3, 4, 5, 6, 8), "e2m1", "e2m3", "e3m2", "e4m3"),
    "columns": ("w4a4", "w4a4h8/8", "w4a4h8/4", "w4a4h8/2", "w8a8"),
    "weights": ("w2g64z", "w3g64z", "w4g64", "w5g64", "w6g64", "w8g64"),
}
"""Named lists of candidates. The S and L of FLIQS are "int-s", "int-l", "float-s", "float-l".

At the cost of uniform 4-bit numbers a space that begins at 4 bits leaves nothing to choose; those
called xl go down to 3. "float" are the floats that quantlib stores and runs; "columns" choose how
many of a layer's input channels are wider; "weights" leave inputs as they are.
"""


def space_of(names: str) -> tuple[Candidate, ...]:
    """A named space, or candidates apart by commas, each once.

    Raises SearchError when fewer than two are left to choose among.
    """
    listed = SPACES.get(names) or tuple(filter(None, (n.strip() for n in names.split(","))))
    found = {candidate.name: candidate for candidate in map(Candidate.parse, listed)}
    if len(found) < 2:
        known = ", ".join(SPACES)
        raise SearchError(
            f"{names!r} leaves nothing to choose: give two candidates or more, such as w4a4,w8a8, "
            f"or one of {known}"
        )
    return tuple(found.values())
