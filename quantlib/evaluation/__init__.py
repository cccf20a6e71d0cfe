"""What a model is worth, before and after, each figure with its standard error."""

from quantlib.evaluation.compare import Comparison, compare
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import Reference, reference_logprobs

__all__ = [
    "Comparison",
    "Estimate",
    "LanguageResult",
    "Reference",
    "compare",
    "evaluate_language",
    "reference_logprobs",
]
