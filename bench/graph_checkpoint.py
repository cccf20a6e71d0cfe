"""The part `checkpoint` of `bench.graph`: columns of several widths, written, and run by kernels.

An allocation of the columns' part goes to a packed checkpoint whose linears have up to four
segments and an order of their own. It is then loaded and evaluated through the kernels, and one
window of it by the native engine, beside the dense model with the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantlib.bench import graph_bits
from quantlib.bench.graph_model import Bench
from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.writer import source_files, write_checkpoint
from quantlib.evaluation.language import evaluate_language
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import pack
from quantlib.models.rows import LinearGroup
from quantlib.pipeline.apply import checkpoint_tensors
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.run import Run
from quantlib.runtime.load import load
from quantlib.search.columns import Assignment

OTHERS = "w8g64zs6"
"""What weights have that no plan speaks of."""


def checkpoint_row(bench: Bench, name: str, plan: Mapping[str, Assignment]) -> None:
    """Write the plan `name`, run it, and keep what was found."""
    if name not in bench.rows.get("checkpoint", {}):
        with tempfile.TemporaryDirectory() as scratch:
            bench.keep("checkpoint", name, run_packed(bench, plan, Path(scratch) / "packed"))


def run_packed(bench: Bench, plan: Mapping[str, Assignment], out: Path) -> dict[str, Any]:
    """Sizes, and KL and logits of the same weights: dense, through packed modules, natively."""
    file = write_packed(bench.run, bench.groups, plan, out)
    model = load(file)
    dense, _ = bench.measure(plan)
    parameters = dict(bench.model.named_parameters())
    with torch.no_grad():
        for weight in bench.run.model_map.weights:
            if weight.name not in plan:
                parameters[weight.name].copy_(bank_weight(bench.run, weight.name, OTHERS))
        window = bench.windows[0]
        expected = bench.model(window[None]).logits[0]
        packed = model.model(window[None]).logits[0]
    both = evaluate_language(bench.model, bench.windows, bench.reference)
    through = evaluate_language(model.model, bench.windows, bench.reference)
    native = load(file, mode="exact", engine="native").make_engine().score(window.tolist())
    del bench.model  # its other weights are rounded now
    assert both.kl is not None
    assert through.kl is not None
    assert dense.kl is not None
    spread = float(expected.std())
    return {
        "kl_linears_alone": dense.kl.value,
        "kl_dense": both.kl.value,
        "kl_packed": through.kl.value,
        "largest_logit_difference": float((packed - expected).abs().max()) / spread,
        "largest_logit_difference_native": float((native - expected).abs().max()) / spread,
        "bytes": sum(one.stat().st_size for one in file.glob("*.safetensors")),
        "linears_with_an_order": sum(one.order is not None for one in plan.values()),
        "most_segments": max(1 + len(Scheme.parse(one.scheme).wide) for one in plan.values()),
    }


def write_packed(
    run: Run, groups: Sequence[LinearGroup], plan: Mapping[str, Assignment], out: Path
) -> Path:
    """The checkpoint of a plan: its linears rounded in the orders it gives, all other weights from
    the bank."""
    orders = {name: one.order for name, one in plan.items() if one.order is not None}
    keys = {}
    for name, one in graph_bits.rounded(run, groups, plan):
        inputs = digest([run.rounding_hash, "columns", plan[name].picks.tolist()])
        keys[name] = run.bank.put(name, plan[name].scheme, inputs, pack(one.packed))
    run.orders = {**run.orders, **orders}
    try:
        return write_keys(run, {name: one.scheme for name, one in plan.items()}, keys, out)
    finally:
        run.orders = {name: order for name, order in run.orders.items() if name not in orders}


def write_keys(run: Run, plan: Mapping[str, str], keys: Mapping[str, str], out: Path) -> Path:
    """The checkpoint of bank entries `keys`, weights in the schemes of `plan`; what it does not
    speak of is in OTHERS."""
    schemes = {weight.name: OTHERS for weight in run.model_map.weights} | dict(plan)
    others = {n: run.bank.key(n, s, run.rounding_hash) for n, s in schemes.items() if n not in plan}
    return write_checkpoint(
        out,
        checkpoint_tensors(run, others | dict(keys)),
        run.source.config,
        schemes,
        {weight.name: weight.shape for weight in run.model_map.weights},
        files=dict(source_files(run.source.path)),
    )
