"""Latency budgets as people write them, and the costs they limit.

    12ms                 12 milliseconds for each token that is decoded
    decode=12ms@2048     the same with 2048 tokens of context, which attention reads every time
    prefill=0.5s@512     half a second for a prompt of 512 tokens

A budget names a cost of the allocation problem (`Problem.fixed_costs`, `Choice.costs`), always in
milliseconds: `decode_ms@256`, `prefill_ms@512`. What the costs are is measured on the machine that
will run the model (`kernels.timing`); nothing here knows how.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantlib.errors import SearchError, UsageError
from quantlib.kernels.cpu.engine_library import MODES

DECODE_CONTEXT = 256
"""Tokens of context a decode budget is for unless it says: about the middle of a short answer."""
LONGEST = 1 << 20
"""Most tokens of a prompt or a context. Beyond, a typing mistake is more likely than a wish."""
PHASES = ("decode", "prefill")
_UNITS = {"us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_LATENCY = re.compile(
    rf"(?:(?P<phase>[a-z]+)\s*=\s*)?(?P<number>{_NUMBER})\s*(?P<unit>[a-zµμ]*)"
    r"(?:\s*@\s*(?P<tokens>\d+))?",
    re.IGNORECASE,
)
_NAME = re.compile(r"(?P<phase>decode|prefill)_ms@(?P<tokens>\d+)")


@dataclass(frozen=True)
class Latency:
    """One latency budget.

    phase:  "decode": each token of one sequence with `tokens` of context before it; "prefill": a
            prompt of `tokens`.
    ms:     the most it may take.
    """

    phase: str
    tokens: int
    ms: float

    @property
    def cost(self) -> str:
        """Name of the cost that this limits."""
        return f"{self.phase}_ms@{self.tokens}"

    @staticmethod
    def parse(text: str) -> Latency:
        """Read what follows --latency. Raises UsageError that says how to write it."""
        match = _LATENCY.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{text!r} is not a latency: write for example 12ms (for each decoded token), "
                "decode=12ms@2048 (with 2048 tokens of context) or prefill=0.5s@512 (a prompt of "
                "512 tokens)"
            )
        unit, phase = match["unit"].lower(), (match["phase"] or "decode").lower()
        if unit not in _UNITS:
            what = f"the unit {match['unit']!r}" if unit else "no unit"
            raise UsageError(f"the latency {text!r} has {what}: use ms, s or us, such as 12ms")
        if phase not in PHASES:
            raise UsageError(
                f"the latency {text!r} is for {match['phase']!r}: use decode= or prefill="
            )
        if phase == "prefill" and match["tokens"] is None:
            raise UsageError(
                f"the latency {text!r} does not say for how many tokens: write {text.strip()}@512 "
                "for a prompt of 512"
            )
        tokens, ms = int(match["tokens"] or DECODE_CONTEXT), float(match["number"]) * _UNITS[unit]
        if not 1 <= tokens <= LONGEST:
            raise UsageError(f"the latency {text!r} is for {tokens} tokens: use 1 to {LONGEST:,}")
        if not ms > 0:
            raise UsageError(f"the latency {text!r} leaves no time at all: it must be positive")
        return Latency(phase, tokens, ms)


def parse_latencies(texts: Iterable[str]) -> tuple[Latency, ...]:
    """All latency budgets of a request. Raises UsageError for one that is malformed, and for two of
    the same kind."""
    found = tuple(Latency.parse(text) for text in texts)
    for index, latency in enumerate(found):
        if latency.cost in {other.cost for other in found[:index]}:
            raise UsageError(f"two latencies are for {phase_text(latency.cost)}: give one of them")
    return found


@dataclass(frozen=True)
class LatencyBudget:
    """What the user asks of the speed.

    texts:   as after --latency. threads: of the engine; None: torch's number.
    mode:    of its activations, as `quantlib generate --mode`; None: each scheme decides.
    """

    texts: tuple[str, ...] = ()
    threads: int | None = None
    mode: str | None = None

    def __bool__(self) -> bool:
        return bool(self.texts)

    def parsed(self) -> tuple[Latency, ...]:
        """Raises UsageError for one that is malformed."""
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"{self.threads} threads compute nothing: use --threads 1 or more")
        if self.mode not in (None, *MODES):
            raise UsageError(
                f"{self.mode!r} is not a mode to run in: use one of {', '.join(MODES)}"
            )
        return parse_latencies(self.texts)

    def limits(self) -> dict[str, float]:
        """Cost name -> milliseconds."""
        return {latency.cost: latency.ms for latency in self.parsed()}


@dataclass(frozen=True)
class LatencyCosts:
    """What everything costs on one machine, in milliseconds.

    costs:   cost name -> (weight, scheme) -> ms.
    fixed:   cost name -> ms that no scheme changes.
    machine: which machine, in words; `fingerprint`: the same as a hash.
    threads: that the engine uses. mode: of its activations, None where each scheme decides.
    """

    costs: Mapping[str, Mapping[tuple[str, str], float]]
    fixed: Mapping[str, float]
    machine: str
    fingerprint: str
    threads: int = 1
    mode: str | None = None

    def predict(self, cost: str, schemes: Mapping[str, str]) -> float | None:
        """Milliseconds of a plan, weight -> scheme; None if some of it has no price."""
        prices = self.costs.get(cost, {})
        if cost not in self.fixed or not all(pair in prices for pair in schemes.items()):
            return None
        return self.fixed[cost] + math.fsum(prices[pair] for pair in schemes.items())

    def merged(self, other: LatencyCosts) -> LatencyCosts:
        """With what `other` knows and this does not, if it is of the same machine."""
        if (other.fingerprint, other.mode) != (self.fingerprint, self.mode):
            return self
        return replace(
            self, costs={**other.costs, **self.costs}, fixed={**other.fixed, **self.fixed}
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; `from_json` is the inverse."""
        costs: dict[str, dict[str, dict[str, float]]] = {}
        for cost, prices in self.costs.items():
            rows = costs.setdefault(cost, {})
            for (weight, scheme), ms in prices.items():
                rows.setdefault(weight, {})[scheme] = ms
        return {
            "machine": self.machine,
            "fingerprint": self.fingerprint,
            "threads": self.threads,
            "mode": self.mode,
            "unit": "ms",
            "fixed": dict(self.fixed),
            "costs": costs,
        }

    @staticmethod
    def from_json(data: Any) -> LatencyCosts:
        """Raises SearchError when `data` is not what `to_json` gives."""
        try:
            costs = {
                str(cost): {
                    (str(weight), str(scheme)): float(ms)
                    for weight, row in rows.items()
                    for scheme, ms in row.items()
                }
                for cost, rows in data["costs"].items()
            }
            fixed = {str(cost): float(ms) for cost, ms in data["fixed"].items()}
            mode = None if data["mode"] is None else str(data["mode"])
            made_on = str(data["machine"]), str(data["fingerprint"]), int(data["threads"])
            return LatencyCosts(costs, fixed, *made_on, mode)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SearchError(f"these latency costs are damaged ({error})") from error


def is_latency(cost: str) -> bool:
    """Whether a cost is one of these."""
    return _NAME.fullmatch(cost) is not None


def phase_of(cost: str) -> tuple[str, int]:
    """(phase, tokens) of the name of a latency cost."""
    match = _NAME.fullmatch(cost)
    if match is None:
        raise UsageError(f"{cost!r} is not the name of a latency such as decode_ms@256")
    return match["phase"], int(match["tokens"])


def phase_text(cost: str) -> str:
    """`a decoded token with 256 tokens of context`, `a prompt of 512 tokens`."""
    phase, tokens = phase_of(cost)
    if phase == "decode":
        return f"a decoded token with {tokens:,} tokens of context"
    return f"a prompt of {tokens:,} tokens"


def cost_text(cost: str, limit: float) -> str:
    """A limit in words: `11.8 ms for a decoded token ...`, or the plain name of another cost."""
    if is_latency(cost):
        return f"{format_ms(limit)} for {phase_text(cost)}"
    return f"a limit of {limit:g} on {cost.replace('_', ' ')}"


def format_ms(ms: float) -> str:
    """`850 us`, `11.8 ms`, `1.25 s`: three digits in the unit that suits."""
    for unit, scale in (("s", 1e3), ("ms", 1.0), ("us", 1e-3)):
        if ms >= scale or unit == "us":
            value = ms / scale
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{value:.{digits}f} {unit}"
    return f"{ms:g} ms"
