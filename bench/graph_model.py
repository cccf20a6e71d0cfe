"""What the parts of `bench.graph` share: the run, the dense model, and the finished rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import graph_bits
from quantlib.bench.graph_bits import Table
from quantlib.checkpoint.disk import atomic_write_text
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.models import skeleton
from quantlib.models.rows import LinearGroup
from quantlib.models.source import Source
from quantlib.pipeline.run import Run
from quantlib.search.columns import Assignment


def dense_model(source: Source) -> Any:
    """A source's model in memory, all of it."""
    model = skeleton.build(source)
    skeleton.materialize(model, "", source)
    return model


@dataclass
class Bench:
    """A calibrated run, the dense model its linears are put into, and the finished rows.

    every:   of so many blocks one has its linears rounded; the others stay as they are.
    publish: given all rows whenever one is finished.
    """

    run: Run
    kept: Path
    windows: Tensor
    every: int = 1
    publish: Callable[[Mapping[str, Any]], object] = lambda rows: None

    @cached_property
    def rows(self) -> dict[str, Any]:
        return json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def keep(self, part: str, name: str, row: Mapping[str, Any]) -> None:
        """Remember a finished row."""
        self.rows.setdefault(part, {})[name] = dict(row)
        atomic_write_text(self.kept, json.dumps(self.rows, indent=1) + "\n")
        self.publish(self.rows)
        print(
            part, name, {k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True
        )

    @cached_property
    def groups(self) -> list[LinearGroup]:
        return graph_bits.groups_of(self.run, self.every)

    @cached_property
    def tables(self) -> dict[str, Table]:
        started = time.monotonic()
        found = graph_bits.tables(self.run, self.groups, self.kept.with_name("graph_tables"))
        print(f"tables of {len(found)} linears: {time.monotonic() - started:.0f} s", flush=True)
        return found

    @cached_property
    def model(self) -> Any:
        model = dense_model(self.run.source)
        self.reference = reference_logprobs(model, self.windows)
        return model

    @torch.no_grad()
    def measure(self, plan: Mapping[str, Assignment]) -> tuple[LanguageResult, float]:
        """Round the linears as a plan says and evaluate; also the sum of what they lost."""
        parameters = dict(self.model.named_parameters())
        lost = 0.0
        for name, one in graph_bits.rounded(self.run, self.groups, plan):
            parameters[name].copy_(one.value)
            lost += one.lost
        return evaluate_language(self.model, self.windows, self.reference), lost
