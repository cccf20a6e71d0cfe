"""Bits to rows: what blocks of rows are worth below 3 bits, and the graph network as their judge.

    python -P -m quantlib.bench.graph_rows --work DIR                  everything
    python -P -m quantlib.bench.graph_rows --work DIR --budget 2.25    one budget
    python -P -m quantlib.bench.graph_rows --work DIR --every 3        every third block only
    python -P -m quantlib.bench.graph_rows --work DIR --seed 1         another calibration
    python -P -m quantlib.bench.graph_rows --work DIR --packed         one plan, run by the kernels

SmolLM2-135M-Instruct (the permuted copy of `bench.assets`), its 210 linears at true bits per
weight (codes, scales, zero points, blocks); embedding and norms stay as they are. Each allocation
is measured on held-out windows. All of them choose from one set of formats and round alike, by
plain GPTQ (`gptq`) or with coordinate descent behind it (`descent`):

    known     GPTQ as it is known: one format with float16 scales everywhere, then the next one,
              linear by linear
    uniform   the same with quantlib's formats, two-level scales
    layers    the exact knapsack over whole linears
    rows      the exact knapsack over blocks of rows of all linears, by what every row lost
    graph     blocks of rows by the graph network's prices: it was taught on the columns' errors of
              every fourth block, and nothing else was rounded for it
    *_tied    rows, layers or graph with the prices of a linear (and so `predicted`) times what its
              depth costs in truth over what was predicted, in the plan of `layers` at TIED bits on
              held-back calibration text (`bench/graph_depths.py`)

DIR is a work directory of `quantlib measure`: statistics and rounded weights that are there are
used, others made. Finished rows are kept in DIR/graph_rows.json, so a command that was stopped goes
on. A seed draws calibration windows, labels and the network's first weights; seeds above 0 have
folders of their own in DIR. `kl_ratio` is the KL over that of `uniform`, rounded alike, of the same
windows and seed; `kl_ratio_gptq` over that of `uniform` by plain GPTQ and `kl_ratio_known` over
`known`, where they were measured. `over_seeds` has their means.
`--packed` writes the plan of `rows` at PACKED bits as a checkpoint, whose linears have blocks of
rows, and evaluates it through the kernels beside the dense model with the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import assets, record
from quantlib.bench.graph import BUDGETS, SEQLEN, WINDOWS
from quantlib.bench.graph_checkpoint import OTHERS, write_keys
from quantlib.bench.graph_depths import block_of, depth_factors, put
from quantlib.bench.graph_model import dense_model
from quantlib.bench.graph_row_tables import KNOWN, SCHEMES, RowTable, tables
from quantlib.bench.graph_sensitivity import ratio_error
from quantlib.bench.seeds import with_values, work_of
from quantlib.calibration.data import load_windows
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.checkpoint.provenance import digest
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import reference_logprobs
from quantlib.formats.composite import ROWS, CompositeWeight, pack_stored
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import unpack
from quantlib.models.source import Source
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.dense import bank_weight
from quantlib.pipeline.measure import measure_plan
from quantlib.pipeline.opening import load_tokenizer, open_run
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe
from quantlib.rounding.stack import select_rows
from quantlib.runtime.load import load
from quantlib.search.baselines import uniform
from quantlib.search.columns import Candidates, chosen, column_problem
from quantlib.search.gnn import ColumnNetwork
from quantlib.search.gnn_bits import Training, train
from quantlib.search.row_widths import RowAssignment
from quantlib.search.solve import solve

WHOLE = ("uniform", "known")
"""Methods without a choice."""
TIED = 2.5
"""Bits of the plan in which depths are measured."""
METHODS = (
    *("uniform", "rows", "layers", "graph"),
    *("rows_tied", "layers_tied", "graph_tied", "known"),
)
ROUNDINGS = {"descent": 3, "gptq": 0}
"""Passes of coordinate descent."""
BASE = ("uniform", "gptq")
RATIOS = {"kl_ratio": ("uniform", ""), "kl_ratio_gptq": BASE, "kl_ratio_known": ("known", "gptq")}
"""Ratio -> method and rounding of what it is over; "": rounded alike."""
TAUGHT = 4
"""Of so many blocks the network is taught on one."""
TRAINING = Training(steps=100, batch=8)
PACKED = 2.5
"""Bits of the plan that kernels run."""
RESULT = "graph_rows"


def budget_bytes(found: Mapping[str, RowTable], bits: float) -> int:
    """Bytes of all linears at `bits` true bits per weight, or of the smallest choices."""
    parameters = sum(math.prod(table.shape) for table in found.values())
    smallest = sum(min(table.candidates("layers").bytes) for table in found.values())
    return max(int(bits * parameters / 8), smallest)


def allocation(
    found: Mapping[str, RowTable],
    method: str,
    budget: int,
    factors: Mapping[str, float],
    seed: int = 0,
) -> dict[str, RowAssignment]:
    """Linear -> its assignment. factors: of the prices of linears, for methods that are tied. seed:
    of the network's first weights."""
    prices: dict[str, Tensor] = {}
    method, _, tied = method.partition("_")
    if method == "graph":
        prices = network_prices(found, budget, seed)
    candidates = {n: table.candidates(method, prices.get(n)) for n, table in found.items()}
    if tied:
        candidates = {name: _times(factors[name], own) for name, own in candidates.items()}
    problem = column_problem(candidates)
    if method in WHOLE:
        smallest = sum(min(one.bytes) for one in candidates.values())
        return chosen(candidates, uniform(problem, max(budget, smallest)))
    return chosen(candidates, solve(problem, budget).picks)


def _times(factor: float, own: Candidates[RowAssignment]) -> Candidates[RowAssignment]:
    return Candidates([replace(one, loss=factor * one.loss) for one in own.assignments], own.bytes)


def factors_of_depth(run: Run, found: Mapping[str, RowTable], file: Path) -> dict[str, float]:
    """Linear -> the factor of its prices, kept in `file` once it was measured."""
    plan = allocation(found, "layers", budget_bytes(found, TIED), {})
    return depth_factors(run, plan, {name: one.loss for name, one in plan.items()}, file)


def network_prices(found: Mapping[str, RowTable], budget: int, seed: int) -> dict[str, Tensor]:
    """What a network says that was taught on the linears of every TAUGHT-th block."""
    blocks = list(dict.fromkeys(map(block_of, found)))
    known = set(blocks[:: min(TAUGHT, len(blocks))])
    lessons = {n: t.lesson() for n, t in found.items() if block_of(n) in known}
    least = sum(len(one.prices) * float(one.rates[0]) for one in lessons.values())
    share = sum(math.prod(found[n].shape) for n in lessons) / sum(
        math.prod(table.shape) for table in found.values()
    )
    network = ColumnNetwork(torch.Generator().manual_seed(seed))
    train(network, lessons, max(share * budget, 1.001 * least), TRAINING)
    return {name: table.judged(network) for name, table in found.items()}


class Judge:
    """The dense model, whose linears follow an allocation."""

    def __init__(self, source: Source, windows: Tensor) -> None:
        self._source, self.windows = source, windows

    @cached_property
    def model(self) -> Any:
        model = dense_model(self._source)
        self._reference = reference_logprobs(model, self.windows)
        return model

    @torch.no_grad()
    def measure(self, run: Run, plan: Mapping[str, RowAssignment]) -> LanguageResult:
        """Of weights as this run's bank has them."""
        parameters = dict(self.model.named_parameters())
        for name, one in plan.items():
            put(run, parameters[name], name, one)
        return self.evaluate(self.model)

    def evaluate(self, model: Any) -> LanguageResult:
        """Any model beside the source."""
        return evaluate_language(model, self.windows, self._reference)


def row_of(
    run: Run,
    judge: Judge,
    found: Mapping[str, RowTable],
    method: str,
    bits: float,
    factors: Mapping[str, float],
    seed: int = 0,
) -> dict[str, Any]:
    """One allocation: chosen and measured."""
    budget = budget_bytes(found, bits)
    started = time.process_time()
    plan = allocation(found, method, budget, factors, seed)
    searched = time.process_time() - started
    result = judge.measure(run, plan)
    assert result.kl is not None
    assert result.perplexity_ratio is not None
    size = sum(found[name].size(one) for name, one in plan.items())
    return {
        "linears": len(found),
        "true_bits": 8 * size / sum(math.prod(table.shape) for table in found.values()),
        "kl": result.kl.value,
        "kl_error": result.kl.standard_error,
        "perplexity_ratio": result.perplexity_ratio.value,
        "predicted": math.fsum(one.loss for one in plan.values()),
        "lost": math.fsum(found[name].lost(one) for name, one in plan.items()),
        "linears_in_blocks": sum(len(one.formats) > 1 for one in plan.values()),
        "search_seconds": round(searched, 1),
        "kl_by_window": result.per_window["kl"],
    }


def write_packed(run: Run, plan: Mapping[str, RowAssignment], out: Path) -> Path:
    """The checkpoint of a plan, from the bank."""
    keys = {}
    for name, one in plan.items():
        keys[name] = run.bank.key(name, one.scheme, run.rounding_hash)
        if len(one.formats) > 1:
            tensors = pack_stored(_composite(run, name, one))
            inputs = digest([run.rounding_hash, "rows", one.block.tolist()])
            keys[name] = run.bank.put(name, one.scheme, inputs, tensors)
    return write_keys(run, {name: one.scheme for name, one in plan.items()}, keys, out)


def _composite(run: Run, name: str, one: RowAssignment) -> CompositeWeight:
    weight = run.model_map.weight(name)
    shape, parts = (weight.out_features, weight.in_features), {}
    for index, scheme in enumerate(one.formats):
        tensors = run.bank.get(run.bank.key(name, scheme, run.rounding_hash))
        whole = unpack(tensors, shape, Scheme.parse(scheme).segments(shape[1]))
        parts[f"{ROWS}{index}"] = select_rows(whole, torch.nonzero(one.block == index)[:, 0])
    return CompositeWeight(Scheme.parse(one.scheme), shape, parts, one.block)


def packed_row(run: Run, judge: Judge, plan: Mapping[str, RowAssignment]) -> dict[str, Any]:
    """KL and logits of a plan's weights, dense and through packed modules."""
    measure_plan(run, {w.name: OTHERS for w in run.model_map.weights if w.name not in plan})
    judge.measure(run, plan)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        file = write_packed(run, plan, Path(scratch) / "packed")
        model = load(file).model
        parameters = dict(judge.model.named_parameters())
        for weight in run.model_map.weights:
            if weight.name not in plan:
                parameters[weight.name].copy_(bank_weight(run, weight.name, OTHERS))
        dense, packed = judge.evaluate(judge.model), judge.evaluate(model)
        window = judge.windows[0]
        expected, found = judge.model(window[None]).logits[0], model(window[None]).logits[0]
        size = sum(one.stat().st_size for one in file.glob("*.safetensors"))
    del judge.model  # its other weights are rounded now
    assert dense.kl is not None
    assert packed.kl is not None
    return {
        "bits": PACKED,
        "bytes": size,
        "linears_in_blocks": sum(len(one.formats) > 1 for one in plan.values()),
        "kl_dense": dense.kl.value,
        "kl_packed": packed.kl.value,
        "largest_logit_difference": float((found - expected).abs().max() / expected.std()),
    }


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their KL over that of others at the same bits and of the same seed, and the
    paired errors of these, as RATIOS has them."""
    by_window = {_beside(row): row["kl_by_window"] for row in rows}
    out = []
    for row in rows:
        ours, found = torch.tensor(row["kl_by_window"]), dict(row)
        for name, (method, rounding) in RATIOS.items():
            key = _beside({**row, "method": method, "rounding": rounding or row["rounding"]})
            if key in by_window:
                theirs = torch.tensor(by_window[key])
                found[name] = float(ours.sum() / theirs.sum())
                found[f"{name}_error"] = ratio_error(ours, theirs)
        out.append(found)
    return out


def _beside(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a row from those it is compared with."""
    names = ("method", "rounding", "bits", "windows")
    return (*(row[name] for name in names), row.get("seed", 0))


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of what more than one seed has: KL and its ratios, each seed's and their mean, with the half
    width of its 95 % interval over seeds (Student's t). rows: of `compared`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_beside({**row, "seed": 0}), []).append(row)
    found = []
    for (method, rounding, bits, windows, _), own in groups.items():
        if len(own) < 2:
            continue
        about = {"method": method, "rounding": rounding, "bits": bits, "windows": windows}
        entry: dict[str, Any] = about | {"seeds": [row.get("seed", 0) for row in own]}
        for name in ("kl", *RATIOS):
            if all(name in row for row in own):
                entry[name] = with_values([row[name] for row in own])
        found.append(entry)
    return found


class Kept:
    """Finished rows, by name, in a file of the work directory; the result file follows them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def keep(self, name: str, row: Mapping[str, Any]) -> None:
        self.rows[name] = {**record.when_and_where(), **row}
        atomic_write_text(self._file, json.dumps(self.rows, indent=1) + "\n")
        print(name, {k: v for k, v in row.items() if isinstance(v, float)}, flush=True)
        publish(list(self.rows.values()))


@dataclass(frozen=True)
class Wanted:
    """What is to be measured: linears of every so many blocks, on so many held-out windows.

    packed: one plan through the kernels, too.
    seed: of calibration and of the network.
    """

    methods: Sequence[str]
    roundings: Sequence[str]
    budgets: Sequence[float]
    every: int
    windows: int
    packed: bool
    seed: int = 0

    def recipe(self, rounding: str) -> Recipe:
        """Of the run that measures and rounds."""
        known = KNOWN if self.known(rounding) else ()
        return Recipe.create(
            data=str(assets.wikipedia_text("calibration")),
            seed=self.seed,
            passes=ROUNDINGS[rounding],
            schemes=(*SCHEMES, *known, *((OTHERS,) if self.packed else ())),
        )

    def known(self, rounding: str) -> bool:
        """Whether the formats of `known` are rounded, which is by plain GPTQ."""
        return rounding == BASE[1] and "known" in self.methods

    def methods_of(self, rounding: str) -> list[str]:
        """The methods that are wanted of a rounding, in the order of METHODS."""
        own = [method for method in METHODS if method in self.methods]
        return own if self.known(rounding) else [method for method in own if method != "known"]


def measure_all(work: Path, wanted: Wanted) -> None:
    """Measure what is not there yet. work: of all seeds."""
    work = work_of(work, wanted.seed)
    kept = Kept(work / "graph_rows.json")
    judge: Judge | None = None
    for rounding in wanted.roundings:
        with open_run(assets.fetch_smollm2(), work, wanted.recipe(rounding)) as run:
            calibrate(run)
            if judge is None:
                held_out = str(assets.wikipedia_text("held_out"))
                tokenizer = load_tokenizer(run.source.path)
                windows = load_windows(held_out, tokenizer, SEQLEN, wanted.windows, seed=0)
                judge = Judge(run.source, windows)
            measure_rounding(run, judge, kept, wanted, rounding)


def measure_rounding(run: Run, judge: Judge, kept: Kept, wanted: Wanted, rounding: str) -> None:
    """What is not there yet of one rounding."""
    every, windows, seed = wanted.every, wanted.windows, wanted.seed
    found = tables(run, rounding, every, wanted.known(rounding))
    methods = wanted.methods_of(rounding)
    factors: dict[str, float] = {}
    if any(method.endswith("_tied") for method in methods):
        file = run.work.path / f"depths_{rounding}_{every}.json"
        factors = factors_of_depth(run, found, file)
    for method in methods:
        for bits in wanted.budgets:
            about: dict[str, Any] = {"method": method, "rounding": rounding}
            about |= {"bits": bits, "windows": windows, "seed": seed}
            name = f"{method}@{bits:g}/{rounding}/{every}/{windows}"
            if name not in kept.rows:
                kept.keep(name, about | row_of(run, judge, found, method, bits, factors, seed))
    if wanted.packed and rounding != BASE[1]:
        plan = allocation(found, "rows", budget_bytes(found, PACKED), {})
        about = {"linears": len(found), "seed": seed}
        kept.keep("packed", about | packed_row(run, judge, plan))


def publish(rows: Sequence[dict[str, Any]]) -> Path:
    """Write the file that is committed: the rows in which most linears were rounded. Rows that
    stand in it of the same formats stay, where they were not measured again.

    Raises CheckpointError for a damaged file: its rows would be lost by writing over it.
    """
    about = {"seqlen": SEQLEN, "schemes": list(SCHEMES), "known": list(KNOWN)}
    path = record.path_of(RESULT)
    before = read_json(path) if path.exists() else {}
    older: list[dict[str, Any]] = []
    if {name: before.get(name) for name in about} == about:
        made = {name: before[name] for name in ("date", "machine")}
        older = [{**made, **row} for row in (*before["rows"], *before["packed"])]
    again = {place_of(row) for row in rows}
    rows = [*(row for row in older if place_of(row) not in again), *rows]
    most = max(row["linears"] for row in rows)
    best = [row for row in rows if row["linears"] == most and "method" in row]
    packed = [row for row in rows if "method" not in row]
    found = compared(best)
    document = {**about, "rows": found, "over_seeds": over_seeds(found), "packed": packed}
    return record.write(RESULT, document)


def place_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is of: no two of a file have the same."""
    names = ("method", "rounding", "bits", "windows", "linears")
    return (*(row.get(name) for name in names), row.get("seed", 0))


def main() -> None:
    """Run what was asked for; what is finished is written to `results/graph_rows.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budget", type=float, action="append")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--rounding", choices=ROUNDINGS, action="append")
    parser.add_argument(
        "--every", type=int, default=1, help="round the linears of every so many blocks only"
    )
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held-out windows")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and of the network")
    parser.add_argument("--packed", action="store_true", help="run a plan by the kernels, too")
    options = parser.parse_args()
    wanted = Wanted(
        options.method or METHODS,
        options.rounding or tuple(ROUNDINGS),
        options.budget or BUDGETS,
        options.every,
        options.windows,
        options.packed,
        options.seed,
    )
    measure_all(options.work, wanted)


if __name__ == "__main__":
    main()
