"""Plans measured on every task: what each loses on the records that were held back.

The full-precision model makes the samples (the codes of a picture are its own) and says what it
says of them; then its weights follow a plan, and what it says now is compared: the divergence that
the sensitivity table predicts. Every plan is measured once per work directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quantlib.calibration.objectives import Objective
from quantlib.calibration.paths.route import objective
from quantlib.calibration.streams import Run as RunSample
from quantlib.calibration.streams import Sample
from quantlib.evaluation.estimate import Estimate
from quantlib.pipeline.dense import DensePlan, plan_keys
from quantlib.pipeline.inputs import round_cache
from quantlib.pipeline.run import Run

KIND = "task trial"
REFERENCE_NUMBERS = 1 << 21
"""Of what the full-precision model says of one sample, so many numbers are compared: 8 MB. Of a
long text with a large vocabulary these are some of its tokens, drawn once."""

CLOSE_NUMBERS = 1 << 23
"""The same where two plans of one size are compared, which differ by a tenth: of Whisper's words,
160 a sample and not 40."""


@dataclass(frozen=True)
class _Judged:
    """A held-back sample, the terms [rows] that are compared, and what was said of them."""

    run: RunSample
    sample: Sample
    asked: Objective
    rows: Tensor
    reference: Tensor


class TaskTrials:
    """Plans measured on the held-back records; the model is only loaded when one has to be.

    numbers: the most that are compared of one sample.
    """

    def __init__(self, run: Run, numbers: int = REFERENCE_NUMBERS) -> None:
        self.run, self.numbers = run, numbers
        self._inputs = {task: run.stream_hash(task, held_back=True) for task in run.tasks}

    def has(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None) -> bool:
        """Whether this plan was measured before."""
        return self.run.work.has(self._key(schemes, keys))

    def measure(
        self, schemes: Mapping[str, str], keys: Mapping[str, str] | None = None
    ) -> dict[str, Estimate]:
        """Task -> divergence per term of a plan (weight -> scheme), a mean over samples; `keys`
        name other bank entries for some weights."""
        key = self._key(schemes, keys)
        if not self.run.work.has(key):
            self.run.work.commit(key, KIND, {}, self._measured(schemes, keys))
        values = self.run.work.unit(key).values
        return {task: Estimate.mean(values[task]) for task in self.run.tasks}

    @cached_property
    def _model(self) -> DensePlan:
        return DensePlan(self.run)

    @cached_property
    def _judged(self) -> dict[str, list[_Judged]]:
        """Made while the model has its own weights, keys and values: before the first plan is
        loaded, and caches are rounded."""
        model, found = self._model.model, {}
        generator = torch.Generator().manual_seed(self.run.recipe.seed)
        for task in self.run.tasks:
            route = self.run.streams.route(task)
            found[task] = [
                _judged(route.run, model, sample, generator, self.numbers)
                for sample in self.run.streams.judging(task, model)
            ]
        round_cache(model, self.run)
        return found

    @torch.no_grad()
    def _measured(
        self, schemes: Mapping[str, str], keys: Mapping[str, str] | None
    ) -> dict[str, list[float]]:
        """Task -> divergence per term of every sample."""
        judged = self._judged
        self._model.load(schemes, keys)
        found: dict[str, list[float]] = {}
        for task, samples in judged.items():
            found[task] = []
            for one in samples:
                output = one.run(self._model.model, **one.sample.inputs)
                loss = one.asked.divergence(one.reference, one.asked.said(output)[one.rows])
                found[task].append(float(loss.value) / loss.terms)
        return found

    def _key(self, schemes: Mapping[str, str], keys: Mapping[str, str] | None) -> str:
        entries = plan_keys(self.run, schemes, keys)
        kept = {} if self.run.recipe.kv == "f32" else {"kv": self.run.recipe.kv}
        more = {} if self.numbers == REFERENCE_NUMBERS else {"numbers": self.numbers}
        return self.run.work.key(KIND, entries=entries, records=self._inputs, **kept, **more)


def _judged(
    run: RunSample, model: object, sample: Sample, generator: torch.Generator, numbers: int
) -> _Judged:
    asked = objective(sample)
    with torch.no_grad():
        said = asked.said(run(model, **sample.inputs))
    count = max(1, min(len(said), numbers // said.shape[1]))
    rows = torch.randperm(len(said), generator=generator)[:count].sort().values
    return _Judged(run, sample, asked, rows, said[rows].clone())
