"""What a plan leaves as it is, and why: the user said so, or it is the best use of the bytes."""

from __future__ import annotations

from quantlib.formats.scheme import KEPT
from quantlib.models.modelmap import ModelMap
from quantlib.models.rows import Weight
from quantlib.search.constraints import Rule
from quantlib.search.plan import Plan

LEFT = "left by the plan: what rounding it would save wins less elsewhere than it costs here"
_WIDEST = "w8"
"""No scheme that rounds has more bits: what this is too narrow for cannot be rounded."""


def keeping_left(model_map: ModelMap, plan: Plan) -> ModelMap:
    """The map with the weights kept, each with its reason, that a plan leaves as they are.

    model_map: of the plan's model. Raises UsageError for a rule in the plan that says nothing.
    """
    rules = [Rule.parse(*rule.removeprefix("--").split(" ", 1)) for rule in plan.rules]
    names: dict[str, list[str]] = {}
    for weight in model_map.weights:
        if plan.schemes[weight.name] in KEPT:
            names.setdefault(_reason(weight, rules), []).append(weight.name)
    for reason, left in names.items():
        model_map = model_map.keeping_weights(left, reason)
    return model_map


def _reason(weight: Weight, rules: list[Rule]) -> str:
    """The rule that leaves nothing else to a weight, or that the search found nothing better."""
    for rule in rules:
        if rule.kind != "ceiling" and rule.matches(weight) and _only_kept(rule):
            return f"asked for by {rule}"
    return LEFT


def _only_kept(rule: Rule) -> bool:
    """Whether a floor or a pin allows no scheme that rounds."""
    return rule.value in KEPT if rule.kind == "pin" else not rule.allows(_WIDEST)
