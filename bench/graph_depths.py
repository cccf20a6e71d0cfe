"""Prices of linears tied to what their depth costs in truth.

A predicted loss says what an error costs while everything else is exact. Where all linears have 2
bits that is off by a factor, which need not be the same at every depth: what the first blocks lose,
all others have to live with. So one plan is really run on windows that were held back from
calibration, once as it is and once more for every span of blocks, which is then left in full
precision. What that saves, over what was predicted to be saved, is the factor of the span's prices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench.graph_model import dense_model
from quantlib.checkpoint.disk import atomic_write_json, read_json
from quantlib.checkpoint.provenance import digest
from quantlib.errors import SearchError
from quantlib.evaluation.language import evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.run import Run
from quantlib.search.row_widths import RowAssignment

SPANS = 10
PROBE_WINDOWS = 4
LEAST = 0.1
"""The smallest factor, of their mean: one window's noise may show a block that costs nothing."""


def spans(names: Sequence[str], count: int = SPANS) -> list[list[str]]:
    """The linears, in the model's order, by spans of equally many neighbouring blocks (fewer where
    there are fewer blocks)."""
    blocks = list(dict.fromkeys(map(block_of, names)))
    pieces = min(count, len(blocks))
    span = {block: index * pieces // len(blocks) for index, block in enumerate(blocks)}
    found: list[list[str]] = [[] for _ in range(pieces)]
    for name in names:
        found[span[block_of(name)]].append(name)
    return found


def block_of(name: str) -> str:
    """The block of a linear, by its name."""
    return name.split(".")[2]


def depth_factors(
    run: Run, plan: Mapping[str, RowAssignment], lost: Mapping[str, float], file: Path
) -> dict[str, float]:
    """Linear -> the factor of its prices; 1 on average, weighted by what is lost. What was measured
    of this plan is kept in `file`.

    plan: linear -> its assignment. lost: linear -> its predicted loss in that plan, in nats.
    """
    rows = {name: (one.scheme, one.block.tolist()) for name, one in plan.items()}
    about = digest([rows, run.rounding_hash, PROBE_WINDOWS, SPANS])
    known: dict[str, Any] = read_json(file) if file.exists() else {}
    if known.get("plan") != about:
        parts = spans(list(plan))
        kl, without = measured_spans(run, plan, parts)
        known = {"plan": about, "spans": parts, "kl": kl, "without": without}
        atomic_write_json(file, known)
    return factors_of(known["spans"], known["kl"], known["without"], lost)


def factors_of(
    parts: Sequence[Sequence[str]], kl: float, without: Sequence[float], lost: Mapping[str, float]
) -> dict[str, float]:
    """Linear -> factor, from the KL of a plan and that without the loss of each span.

    Raises SearchError where leaving spans in full precision saves nothing.
    """
    predicted = [sum(lost[name] for name in part) for part in parts]
    saved = [kl - rest for rest in without]
    mean = sum(saved) / sum(predicted)
    if not mean > 0:
        raise SearchError(
            f"spans of blocks in full precision change the KL of {kl:.4g} by {sum(saved):.4g} in "
            "all: there is nothing to tie prices to; measure on more windows, or at fewer bits"
        )
    factors = [max(LEAST, s / p / mean) for s, p in zip(saved, predicted, strict=True)]
    return {name: f for part, f in zip(parts, factors, strict=True) for name in part}


@torch.no_grad()
def measured_spans(
    run: Run, plan: Mapping[str, RowAssignment], parts: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """KL of a plan on PROBE_WINDOWS held-back windows, and with each span in full precision."""
    windows = run.probe_windows[:PROBE_WINDOWS]
    model = dense_model(run.source)
    reference = reference_logprobs(model, windows)
    parameters = dict(model.named_parameters())

    def kl() -> float:
        found = evaluate_language(model, windows, reference).kl
        assert found is not None  # there is a reference
        return found.value

    for name, one in plan.items():
        put(run, parameters[name], name, one)
    whole, without = kl(), []
    for part in parts:
        for name in part:
            parameters[name].copy_(run.source.read(name))
        without.append(kl())
        for name in part:
            put(run, parameters[name], name, plan[name])
        print(f"span {len(without)} of {len(parts)}: {whole - without[-1]:.4f}", flush=True)
    return whole, without


def put(run: Run, parameter: Tensor, name: str, one: RowAssignment) -> None:
    """Write what the run's bank has for an assignment into the dense model's parameter."""
    for index, scheme in enumerate(one.formats):
        rows = torch.nonzero(one.block == index)[:, 0]
        parameter[rows] = bank_weight(run, name, scheme)[rows]
