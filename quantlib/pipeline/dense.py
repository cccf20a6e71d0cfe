"""The dense model with weights swapped in from the layer bank: how a plan is measured without being
written.

A plan is a list of references into the bank. `DenseTrial` keeps the source model in memory once,
puts the dequantized weights of a plan into it (only those that differ from the plan before), and
measures true KL on windows that calibration never saw. `Trials` remembers every result in the work
directory, so that no plan is measured twice, whoever asks: probes, swaps, or the comparison of a
re-rounded plan with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from quantlib.calibration.data import windows_sha256
from quantlib.errors import CheckpointError
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.formats.composite import dequantize_stored
from quantlib.formats.scheme import KEPT
from quantlib.models import skeleton
from quantlib.pipeline.inputs import RoundedInputs, bank_clips, round_cache
from quantlib.pipeline.measure import entry_key
from quantlib.pipeline.row_blocks import stored_weight
from quantlib.pipeline.run import Run

KIND = "trial"


class DensePlan:
    """The source model in memory, whose weights follow a plan."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = skeleton.build(run.source)
        skeleton.materialize(self.model, "", run.source)
        self.loaded: dict[str, str] = {}
        self.inputs = RoundedInputs(self.model, run)

    @torch.no_grad()
    def load(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None) -> None:
        """Put every weight of `schemes` (weight -> scheme) into the model; `keys` name other bank
        entries for some."""
        parameters = dict(self.model.named_parameters())
        for name, key in plan_keys(self.run, schemes, keys).items():
            if self.loaded.get(name) != key:
                parameters[name].copy_(bank_weight(self.run, name, schemes[name], key))
                self.loaded[name] = key
                clips = bank_clips(self.run, key) if self.run.bank.has(key) else ()  # a mixture
                self.inputs.set(name, schemes[name], clips)


class DenseTrial(DensePlan):
    """A language model whose weights follow a plan, and its KL on the probe windows."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.windows = run.probe_windows
        self.reference = reference_logprobs(self.model, self.windows)
        round_cache(self.model, run)

    def measure(
        self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None
    ) -> LanguageResult:
        """True KL (and perplexity) of a plan on the windows."""
        self.load(schemes, keys)
        return evaluate_language(self.model, self.windows, self.reference)


class Trials:
    """Plans measured on the probe windows, each once per work directory.

    The model is only loaded when something has to be measured.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._windows = windows_sha256(run.probe_windows)

    @cached_property
    def _dense(self) -> DenseTrial:
        return DenseTrial(self.run)

    def has(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None) -> bool:
        """Whether this plan was measured before."""
        return self.run.work.has(self._key(schemes, keys))

    def measure(
        self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None
    ) -> LanguageResult:
        """True KL of a plan (weight -> scheme); `keys` name other bank entries for some weights."""
        key = self._key(schemes, keys)
        if not self.run.work.has(key):
            measured = self._dense.measure(schemes, keys).to_json()
            self.run.work.commit(key, KIND, {}, measured)
        return LanguageResult.from_json(self.run.work.unit(key).values)

    def _key(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None) -> str:
        entries = plan_keys(self.run, schemes, keys)
        return self.run.work.key(
            KIND, entries=entries, windows=self._windows, kv=self.run.recipe.kv
        )


def measured_kl(result: LanguageResult) -> Estimate:
    """The KL of a result that was measured against the source model."""
    if result.kl is None:
        raise CheckpointError(
            "a plan's measurement in the work directory has no KL: delete the work directory"
        )
    return result.kl


def plan_keys(
    run: Run, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Weight -> bank key of a plan (weight -> scheme), except where `keys` name another."""
    plain = {name: entry_key(run, name, scheme) for name, scheme in schemes.items()}
    return {name: (keys or {}).get(name, key) for name, key in plain.items()}


def bank_weight(run: Run, name: str, scheme: str, key: str | None = None) -> Tensor:
    """A weight as the bank holds it, dequantized to float32 in the shape of its parameter, its
    columns in the order of its inputs; one that stays as it is, as the source has it."""
    if scheme in KEPT:
        return run.source.read(name).float()
    value, order = dequantize_stored(stored_weight(run, name, scheme, key)), run.orders.get(name)
    if order is not None:
        value = value[:, torch.argsort(order)]
    return run.model_map.weight(name).tensor(value)
