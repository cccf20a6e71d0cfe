"""What the table is held against, row by row of its summary: the order of the published methods,
what leaving a projection out costs ResQ, and quantlib beside ResQ.

A claim is about mean KL over seeds. Nothing is claimed where a row is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Line = Mapping[str, Any]

FAR = 2.0
"""Times the KL that counts as far worse."""
SHARE = 0.6
"""Of ResQ's KL that quantlib may have at the same true bits."""
PROJECTIONS = {
    "resq_no_a": "the residual basis",
    "resq_no_b": "the value bases",
    "resq_no_c": "the key bases",
    "resq_no_d": "the Hadamard matrices before down projections",
}
FAR_ABOVE_QUAROT = ("rtn", "smoothquant")
STRICT = ("quantlib_strict", "quantlib_codes")


@dataclass(frozen=True)
class Claim:
    """text: what is claimed of a model. ratio: of the KLs it is about. holds: whether it is so."""

    model: str
    text: str
    ratio: float
    holds: bool

    def to_json(self) -> dict[str, Any]:
        """Every field, the ratio to three digits behind the point."""
        return {**asdict(self), "ratio": round(self.ratio, 3)}


def claims(summary: Sequence[Line]) -> list[Claim]:
    """Of every model that has ResQ's row."""
    models: dict[str, dict[str, Line]] = {}
    for line in summary:
        models.setdefault(line["model"], {})[line["method"]] = line
    return [
        claim
        for model, lines in models.items()
        if "resq" in lines
        for claim in (*_orders(model, lines), *_ablations(model, lines), *_ours(model, lines))
    ]


def _orders(model: str, lines: Mapping[str, Line]) -> Iterator[Claim]:
    """RTN and SmoothQuant << QuaRot < ResQ."""
    if "quarot" not in lines:
        return
    for name in (name for name in FAR_ABOVE_QUAROT if name in lines):
        ratio = _kl(lines, name) / _kl(lines, "quarot")
        yield Claim(
            model, f"{name} is at least {FAR:g} times as far off as quarot", ratio, ratio >= FAR
        )
    ratio = _kl(lines, "quarot") / _kl(lines, "resq")
    yield Claim(model, "quarot is farther off than resq", ratio, ratio > 1)


def _ablations(model: str, lines: Mapping[str, Line]) -> Iterator[Claim]:
    """One seed against the mean of several: they differ by factors, or are within the seeds'."""
    for name, what in PROJECTIONS.items():
        if name in lines:
            ratio = _kl(lines, name) / _kl(lines, "resq")
            yield Claim(model, f"resq is farther off without {what}", ratio, ratio > 1)


def _ours(model: str, lines: Mapping[str, Line]) -> Iterator[Claim]:
    if "quantlib" in lines:
        ratio = _kl(lines, "quantlib") / _kl(lines, "resq")
        text = f"quantlib has at most {SHARE:.0%} of resq's KL at its true bits"
        yield Claim(model, text, ratio, ratio <= SHARE)
        ours, theirs = lines["quantlib"]["kl"]["interval"], lines["resq"]["kl"]["interval"]
        if ours and theirs:
            ratio = ours[1] / theirs[0]
            seeds = f"{lines['quantlib']['seeds']} and {lines['resq']['seeds']} seeds"
            yield Claim(model, f"their 95 % intervals part ({seeds})", ratio, ratio < 1)
    for name in (name for name in STRICT if name in lines):
        ratio = _kl(lines, name) / _kl(lines, "resq")
        bits = lines[name]["bits"]
        text = (
            f"{name} ({bits['weights']:.2f} bits of weights, {bits['weight_codes']:.2f} of them "
            "codes) is nearer than resq"
        )
        yield Claim(model, text, ratio, ratio < 1)


def _kl(lines: Mapping[str, Line], name: str) -> float:
    return float(lines[name]["kl"]["mean"])


def told(found: Sequence[Claim]) -> str:
    """The claims in lines of text."""
    return "\n".join(
        f"{claim.model:8} {'holds' if claim.holds else 'FAILS':5} {claim.ratio:7.2f}  {claim.text}"
        for claim in found
    )
