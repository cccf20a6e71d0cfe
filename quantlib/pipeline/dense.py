"""The dense model with weights swapped in from the layer bank: how a plan is measured without being written.

A trial is a list of references into the bank. `DenseTrial` keeps the source model in memory once, puts the
dequantized weights of a plan into it (only those that differ from the plan before), and measures true KL on windows
that calibration never saw.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize, unpack
from quantlib.models import skeleton
from quantlib.pipeline.measure import entry_key
from quantlib.pipeline.run import Run


class DenseTrial:
    """The source model in memory, whose weights follow a plan."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.windows = run.probe_windows
        self.model: nn.Module = skeleton.build(run.source)
        skeleton.materialize(self.model, "", run.source)
        self.reference = reference_logprobs(self.model, self.windows)
        self.loaded: dict[str, str] = {}

    @torch.no_grad()
    def load(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None) -> None:
        """Put every weight of `schemes` (weight -> scheme) into the model; `keys` name other bank entries for some."""
        parameters = dict(self.model.named_parameters())
        for name, scheme in schemes.items():
            key = (keys or {}).get(name) or entry_key(self.run, name, scheme)
            if self.loaded.get(name) != key:
                parameters[name].copy_(bank_weight(self.run, name, scheme, key))
                self.loaded[name] = key

    def measure(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None) -> LanguageResult:
        """True KL (and perplexity) of a plan on the probe windows."""
        self.load(schemes, keys)
        return evaluate_language(self.model, self.windows, self.reference)


def bank_weight(run: Run, name: str, scheme: str, key: str | None = None) -> Tensor:
    """A weight as the bank holds it, dequantized to float32 in its original shape."""
    weight = run.model_map.weight(name)
    segments = Scheme.parse(scheme).segments(weight.in_features)
    shape = (weight.parameters // weight.in_features, weight.in_features)
    packed = unpack(run.bank.get(key or entry_key(run, name, scheme)), shape, segments)
    return dequantize(packed).reshape(weight.shape)
