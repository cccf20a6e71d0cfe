"""What a plan really loses, on data that neither calibration nor search has seen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from quantlib.bench import assets
from quantlib.bench.beds.encoders import vision_bed
from quantlib.bench.beds.folders import TEST
from quantlib.calibration.data import load_windows
from quantlib.calibration.media import read_image
from quantlib.calibration.objectives import VectorObjective
from quantlib.calibration.paths.vectors import states
from quantlib.calibration.records import read_records
from quantlib.evaluation.language import evaluate_language
from quantlib.evaluation.reference import Reference, reference_logprobs
from quantlib.pipeline.compress import load_tokenizer
from quantlib.pipeline.dense import DensePlan, plan_keys
from quantlib.pipeline.run import Run

WINDOWS, SEQLEN = 8, 512
PICTURES = 128
KIND = "held-out loss"


class Judge:
    """Held-out losses of plans by sample: KL of WINDOWS windows, or half the squared relative error
    of the vectors of PICTURES pictures; each plan once per work directory."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def samples(self, schemes: Mapping[str, str]) -> list[float]:
        """The loss of every sample, in order."""
        work = self._run.work
        about = [WINDOWS, SEQLEN] if self._run.workload is None else [PICTURES]
        key = work.key(KIND, entries=plan_keys(self._run, schemes), about=about)
        if not work.has(key):
            losses = self._text(schemes) if self._run.workload is None else self._pictures(schemes)
            work.commit(key, KIND, {}, {"losses": losses})
        return [float(loss) for loss in work.unit(key).values["losses"]]

    @cached_property
    def _plan(self) -> DensePlan:
        return DensePlan(self._run)

    @cached_property
    def _windows(self) -> Tensor:
        tokenizer = load_tokenizer(self._run.source.path)
        held_out = str(assets.wikipedia_text("held_out"))
        return load_windows(held_out, tokenizer, SEQLEN, WINDOWS, seed=0)

    @cached_property
    def _reference(self) -> Reference:
        return reference_logprobs(self._plan.model, self._windows)

    def _text(self, schemes: Mapping[str, str]) -> list[float]:
        reference = self._reference  # of the full-precision model: before anything is loaded
        self._plan.load(schemes)
        found = evaluate_language(self._plan.model, self._windows, reference)
        return found.per_window["kl"]

    @cached_property
    def _said(self) -> list[tuple[Tensor, Tensor]]:
        """(pixels, vectors of the full-precision model) of every picture."""
        records = [r for r in read_records(vision_bed() / TEST) if not r.extra["known"]]
        tools = self._run.streams.tools
        pixels = [
            tools.pictures(images=[read_image(record.file)], return_tensors="pt")["pixel_values"]
            for record in records[:PICTURES]
        ]
        return [(one, self._vectors(one)) for one in pixels]

    @torch.no_grad()
    def _vectors(self, pixels: Tensor) -> Tensor:
        return _OBJECTIVE.said(self._plan.model(pixel_values=pixels))

    def _pictures(self, schemes: Mapping[str, str]) -> list[float]:
        said = self._said
        self._plan.load(schemes)
        found = []
        for pixels, reference in said:
            loss = _OBJECTIVE.divergence(reference, self._vectors(pixels))
            found.append(float(loss.value) / loss.terms)
        return found


_OBJECTIVE = VectorObjective(states)
