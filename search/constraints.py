"""What the user insists on: floors, ceilings and pins, per component, kind or name pattern.

    --floor vision_tower=8            at least 8 bits in every weight of the component
    --ceiling 're:.*down_proj=6'      at most 6 bits where the regular expression matches
    --pin lm_head=w8g64               exactly this scheme

A pattern is the name of a component or of a kind (`embedding`, `experts`), or a glob for a dotted
name or the end of one (`down_proj`, `layers.0.*`, `*.self_attn.?_proj`), or a regular expression
after `re:`, matched in full against module and weight names. A tied head is an alias of its
embedding and matches by both names. Every rule that matches a weight applies to it; there is no
order of precedence to remember, so rules that cannot all hold are an error that names both, and a
rule that matches nothing is an error too: elsewhere those are silently ignored, and found out much
later.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from quantlib.errors import FormatError, UsageError
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.search.weights import WeightInfo

KINDS = ("floor", "ceiling", "pin")


@lru_cache(maxsize=1024)
def scheme_bits(scheme: str, most: bool = False) -> int:
    """Bits of one stored code of a scheme; 16 or 32 where the weight is kept as it is. Where blocks
    of rows differ, the fewest, or the most."""
    parsed = Scheme.parse(scheme)
    if parsed.rows:
        return (max if most else min)(block.format.bits for block in parsed.rows)
    return parsed.weight.bits if parsed.weight is not None else 8 * KEPT[str(parsed.kept)]


@dataclass(frozen=True)
class Rule:
    """One floor, ceiling (`value`: bits as text) or pin (`value`: a scheme's canonical name)."""

    kind: str
    pattern: str
    value: str

    @staticmethod
    def parse(kind: str, text: str) -> Rule:
        """Read `pattern=value` as it follows --floor, --ceiling or --pin. Raises UsageError."""
        if kind not in KINDS:
            raise UsageError(f"unknown kind of constraint {kind!r}: use one of {', '.join(KINDS)}")
        example = "lm_head=w8g64" if kind == "pin" else "vision_tower=8"
        pattern, separator, value = (part.strip() for part in text.rpartition("="))
        if not separator or not pattern or not value:
            raise UsageError(
                f"--{kind} {text}: write PATTERN=VALUE, for example --{kind} {example}"
            )
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(
                    f"--{kind} {text}: {pattern[3:]!r} is not a regular expression ({error})"
                ) from error
        return Rule(kind, pattern, _canonical(kind, text, value))

    def matches(self, weight: WeightInfo) -> bool:
        """Whether the rule is about `weight`, by component, kind, or any of its names."""
        if self.pattern.startswith("re:"):
            return any(re.fullmatch(self.pattern[3:], name) for name in _names(weight))
        if self.pattern in (weight.component, weight.kind, weight.group):
            return True
        return any(
            fnmatchcase(name, self.pattern) or fnmatchcase(name, f"*.{self.pattern}")
            for name in _names(weight)
        )

    def allows(self, scheme: str) -> bool:
        """Whether a weight under this rule may have `scheme`."""
        if self.kind == "pin":
            return scheme == self.value
        if self.kind == "floor":
            return scheme_bits(scheme) >= float(self.value)
        return scheme_bits(scheme, most=True) <= float(self.value)

    def __str__(self) -> str:
        return f"--{self.kind} {self.pattern}={self.value}"


def parse_rules(
    floors: Iterable[str] = (), ceilings: Iterable[str] = (), pins: Iterable[str] = ()
) -> tuple[Rule, ...]:
    """The rules of a command line: the texts after every --floor, --ceiling and --pin."""
    given = (("floor", floors), ("ceiling", ceilings), ("pin", pins))
    return tuple(Rule.parse(kind, text) for kind, texts in given for text in texts)


def _canonical(kind: str, text: str, value: str) -> str:
    if kind == "pin":
        try:
            return str(Scheme.parse(value))
        except FormatError as error:
            raise UsageError(f"--pin {text}: {error}") from error
    try:
        bits = float(value)
    except ValueError:
        bits = 0.0
    if not 1 <= bits <= 32:
        raise UsageError(f"--{kind} {text}: {value!r} is not a number of bits between 1 and 32")
    return f"{bits:g}"


def _names(weight: WeightInfo) -> list[str]:
    """Every dotted name the weight and its aliases go by, with and without `.weight`."""
    full = (weight.name, weight.module, *weight.aliases)
    return [*full, *(name.removesuffix(".weight") for name in full if name.endswith(".weight"))]


def check_matches(rules: Iterable[Rule], weights: Sequence[WeightInfo]) -> None:
    """Raise UsageError for a rule that is about no weight at all, with names it may have meant."""
    for rule in rules:
        if not any(rule.matches(weight) for weight in weights):
            near = near_matches(rule.pattern, weights)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            known = _components(weights)
            raise UsageError(f"{rule} matches no weight of this model; {hint}{known}")


def _components(weights: Sequence[WeightInfo]) -> str:
    return "its components are " + ", ".join(sorted({weight.component for weight in weights}))


def near_matches(pattern: str, weights: Sequence[WeightInfo], count: int = 4) -> list[str]:
    """Component, kind and module names most like `pattern`, best first; perhaps none."""
    wanted = pattern.removeprefix("re:").replace("*", "").replace("\\", "").strip(".")
    known: dict[str, None] = {}
    for weight in weights:
        tails = [
            name.rsplit(".", 1)[-1] for name in (weight.module, *_names(weight)) if "." in name
        ]
        known |= dict.fromkeys((weight.component, weight.kind, *tails, *_names(weight)))
    known.pop("weight", None)
    return difflib.get_close_matches(wanted, known, n=count, cutoff=0.6)


def allowed(item: str, schemes: Sequence[str], rules: Sequence[Rule]) -> list[str]:
    """The candidates of `item` that every one of `rules` allows, in order.

    Raises UsageError that names the rules when they leave nothing, alone or together.
    """
    for index, rule in enumerate(rules):
        if not any(rule.allows(scheme) for scheme in schemes):
            raise UsageError(
                f"{rule} leaves no scheme for {item}: its candidates are {', '.join(schemes)}"
            )
        for other in rules[:index]:
            if not any(rule.allows(scheme) and other.allows(scheme) for scheme in schemes):
                raise UsageError(
                    f"{other} and {rule} contradict each other at {item}, whose candidates are "
                    f"{', '.join(schemes)}: change or remove one of them"
                )
    kept = [scheme for scheme in schemes if all(rule.allows(scheme) for rule in rules)]
    if not kept:
        named = ", ".join(map(str, rules))
        raise UsageError(
            f"{named} together leave no scheme for {item}: its candidates are {', '.join(schemes)}"
        )
    return kept
