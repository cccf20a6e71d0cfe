"""More choices for the solver, at equal bytes: shared exponents, factors, embeddings in blocks.

    python -P -m quantlib.bench.choices --work DIR
    python -P -m quantlib.bench.choices --work DIR --family factors --bits 2.5
    python -P -m quantlib.bench.choices --work DIR --family factors --layer 3 --layer 15
    python -P -m quantlib.bench.choices --work DIR --family linears --bits 3.0 --bits 3.5
    python -P -m quantlib.bench.choices --work DIR --joint --seed 1

SmolLM2-135M-Instruct (the permuted copy of `bench.assets`), calibrated and rounded as `quantlib
compress` does by default. Every family of candidates joins the default ones in one sensitivity
table; `linears` are mixtures of the others by rows (`pipeline.row_blocks`), for which nothing more
is rounded. The exact solver then chooses with and without the family, under the same bytes, and
both plans are measured on held-out windows. `gain` is the mean difference of KL over windows
(positive: the family helps), with its standard error. What is done stays in DIR, rounded weights
and measured plans: the command goes on where it was stopped. A seed draws calibration windows and
labels; each has its own folder in DIR, but for 0, which has DIR itself. `--joint` measures the
default candidates and all families together, and no family alone. The result file is written after
every row; rows of other budgets, families and seeds that stand in it stay, as long as they were
measured on the same windows. `over_seeds` has the relative gains of families that several seeds
have.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quantlib.bench import assets, record
from quantlib.bench.seeds import with_values, work_of
from quantlib.calibration.data import load_windows
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.checkpoint.provenance import digest
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import evaluate_language
from quantlib.evaluation.reference import Reference, reference_logprobs
from quantlib.formats.scheme import Scheme
from quantlib.pipeline import bytecount
from quantlib.pipeline.calibrate import calibrate
from quantlib.pipeline.dense import DensePlan
from quantlib.pipeline.measure import entry_key, measure, measure_groups
from quantlib.pipeline.opening import load_tokenizer, open_run
from quantlib.pipeline.plan import Budget, allocation_problem
from quantlib.pipeline.row_blocks import is_mixture, with_row_blocks
from quantlib.pipeline.run import Run
from quantlib.recipe import NATIVE_SCHEMES, Recipe
from quantlib.search.plan import Plan
from quantlib.search.sensitivity import Sensitivity
from quantlib.search.solve import solve

FAMILIES: dict[str, tuple[str, ...]] = {
    "exponents": ("w3g64z4e",),
    "factors": ("w2g64z4s4+r32w4",),
    "rows": ("w4g32zs4@1/8+w3g32z4s4", "w5g32zs5@1/16+w4g32zs4@3/16+w3g32z4s4"),
    "rows2": (
        "w3g32z4s4@1/8+w2g32z4s4",
        "w4g32zs4@1/8+w2g32z4s4",
        "w4g32zs4@1/16+w3g32z4s4@3/16+w2g32z4s4",
    ),
    "dimensions": ("w4g32zs4@1/4+w3g32z4s4d448", "w4g32zs4@1/8+w3g32z4s4@3/8+w3g32z4s4d384"),
}
"""What joins the default candidates: shared exponents where two-level scales are beside them,
factors where rounding alone is worst, rare tokens in 3 bits, in 2, or in fewer dimensions."""
MIXED = "linears"
"""A family without schemes of its own."""
NONE, JOINT = "none", "all"
RESULT = "choices"
BITS = (2.5, 2.75, 3.0, 3.25, 3.5)
"""True bits per parameter of the whole file."""
WINDOWS, SEQLEN = 8, 512


class Bench:
    """A work directory with rounded weights, and the plans that were measured before."""

    def __init__(
        self,
        work: Path,
        families: Sequence[str],
        windows: int = WINDOWS,
        seqlen: int = SEQLEN,
        seed: int = 0,
    ) -> None:
        self.work, self.windows, self.seqlen, self.seed = work_of(work, seed), windows, seqlen, seed
        self.families = tuple(families)
        extra = [name for family in families for name in FAMILIES.get(family, ())]
        self.model = assets.fetch_smollm2()
        self.recipe = Recipe.create(
            data=str(assets.wikipedia_text("calibration")),
            schemes=(*NATIVE_SCHEMES, *extra),
            seed=seed,
        )
        self._file = self.work / "choices.json"
        self.known: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            self.known = json.loads(self._file.read_text(encoding="utf-8"))

    def rows(
        self, bits: Sequence[float], measured: bool, joint: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Every family at every budget, and all together; joint: only these. measured: also on
        held-out windows."""
        together = (JOINT,) if len(self.families) > 1 else ()
        asked = (NONE, *(() if joint else self.families), *together)
        with open_run(self.model, self.work, self.recipe) as run:
            calibrate(run)
            table = measure(run)
            trial = _Trial(run, self.windows, self.seqlen)
            for size in bits:
                for family in asked:
                    row = self._row(trial, table, size, family, measured)
                    if family == NONE:
                        base = row
                    elif measured:
                        row["gain"] = _gain(base, row)
                    if family == JOINT:
                        row["joined"] = list(self.families)
                    yield row

    def matrices(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """The linears of some layers in the families' candidates: predicted losses beside what the
        default candidates lose at as many bytes (`ratio`: below 1, the solver may want it)."""
        rows: list[dict[str, Any]] = []
        with open_run(self.model, self.work, self.recipe) as run:
            calibrate(run)
            blocks = {run.model_map.blocks[layer] for layer in layers}
            groups = [group for group in run.model_map.groups if group.block in blocks]
            measure_groups(run, groups)
            for name in (name for group in groups for name in group.members):
                points = {
                    str(scheme): (
                        bytecount.weight_bytes(run.model_map.weight(name), scheme),
                        run.bank.entry(entry_key(run, name, str(scheme))).extra["loss"],
                    )
                    for scheme in run.candidates[name]
                }
                plain = [points.pop(known) for known in NATIVE_SCHEMES]
                for scheme, (size, loss) in points.items():
                    row = {"weight": name, "scheme": scheme, "bytes": size, "predicted": loss}
                    rows.append(row | {"ratio": loss / _interpolated(plain, size)})
        for scheme in sorted({row["scheme"] for row in rows}):
            ratios = [row["ratio"] for row in rows if row["scheme"] == scheme]
            print(f"{scheme}: {min(ratios):.3f} to {max(ratios):.3f} of {len(ratios)} weights")
        return rows

    def _row(
        self, trial: _Trial, table: Sensitivity, bits: float, family: str, measured: bool
    ) -> dict[str, Any]:
        offered = _restricted(table, self._allowed(family))
        if MIXED in self.families and family in (MIXED, JOINT):
            offered = with_row_blocks(trial.run, offered)
        plan = _plan(trial.run, offered, bits)
        row: dict[str, Any] = {"bits": bits, "family": family, "seed": self.seed}
        row |= {"bytes": plan.bytes}
        row |= {"predicted_sum": plan.loss, "chosen": _chosen(plan, self._allowed(family))}
        row["mixed"] = sum(is_mixture(trial.run, *one) for one in plan.schemes.items())
        if measured:
            key = digest([self.windows, self.seqlen, sorted(plan.schemes.items())])
            if key not in self.known:
                started = time.monotonic()
                found = trial.measure(plan)
                self.known[key] = {"kl": found, "seconds": round(time.monotonic() - started, 1)}
                atomic_write_text(self._file, json.dumps(self.known) + "\n")
            windows = self.known[key]["kl"]
            estimate = Estimate.mean(windows)
            row |= {"kl": estimate.value, "kl_error": estimate.standard_error, "windows": windows}
        return row

    def _allowed(self, family: str) -> tuple[str, ...]:
        """Candidates that join the default ones."""
        names = self.families if family == JOINT else () if family == NONE else (family,)
        return tuple(str(Scheme.parse(n)) for name in names for n in FAMILIES.get(name, ()))


class _Trial:
    """The model in memory, once a plan has to be measured."""

    def __init__(self, run: Run, windows: int, seqlen: int) -> None:
        self.run, self.count, self.seqlen = run, windows, seqlen

    @cached_property
    def _windows(self) -> Tensor:
        tokenizer = load_tokenizer(self.run.source.path)
        held_out = str(assets.wikipedia_text("held_out"))
        return load_windows(held_out, tokenizer, self.seqlen, self.count, seed=0)

    @cached_property
    def _dense(self) -> tuple[DensePlan, Reference]:
        dense = DensePlan(self.run)
        return dense, reference_logprobs(dense.model, self._windows)

    def measure(self, plan: Plan) -> list[float]:
        """KL of every window."""
        dense, reference = self._dense
        dense.load(plan.schemes)
        return evaluate_language(dense.model, self._windows, reference).per_window["kl"]


def _restricted(table: Sensitivity, allowed: Sequence[str]) -> Sensitivity:
    """The table with the default candidates and `allowed` alone."""
    kept = {*map(str, map(Scheme.parse, NATIVE_SCHEMES)), *allowed}
    rows = {
        weight: {scheme: entry for scheme, entry in row.items() if scheme in kept}
        for weight, row in table.rows.items()
    }
    return replace(table, rows=rows)


def _plan(run: Run, table: Sensitivity, bits: float) -> Plan:
    """The exact solver's plan under so many true bits per parameter."""
    budget = Budget(bits=bits)
    problem = allocation_problem(run.model_map, table, budget)
    return Plan.from_solution(problem, solve(problem, budget.in_bytes(run.model_map) or 0))


def _chosen(plan: Plan, allowed: Sequence[str]) -> dict[str, int]:
    """How many weights got each of `allowed`."""
    return dict(Counter(scheme for scheme in plan.schemes.values() if scheme in allowed))


def _interpolated(points: Sequence[tuple[int, float]], size: int) -> float:
    """The loss at `size` bytes on the front of (bytes, loss) `points`, geometrically between."""
    sizes: list[int] = []
    losses: list[float] = []
    for nbytes, loss in sorted(points):
        if not losses or loss < losses[-1]:
            sizes.append(nbytes)
            losses.append(loss)
    return float(np.exp(np.interp(size, sizes, np.log(losses))))


def kept(rows: Sequence[dict[str, Any]], windows: int, seqlen: int) -> dict[str, Any]:
    """The result file's content: these rows, and those of the file that stands there which have
    another budget, family or seed, if they were measured on the same windows.

    Raises CheckpointError for a damaged file: its rows would be lost by writing over it.
    """
    path = record.path_of(RESULT)
    before: dict[str, Any] = read_json(path) if path.exists() else {}
    mine = {_place(row) for row in rows}
    others = []
    if (before.get("windows"), before.get("seqlen")) == (windows, seqlen):
        made = {name: before[name] for name in ("date", "machine")}
        older = (row for row in before["rows"] if _place(row) not in mine)
        others = [{**made, **row} for row in older]
    told = [{**record.when_and_where(), **row} for row in rows]
    families = {**before.get("families", {}), **FAMILIES} if others else FAMILIES
    listed = {row["family"] for row in (*told, *others)}
    named = {family: list(names) for family, names in families.items() if family in listed}
    rows = sorted([*told, *others], key=lambda row: float(row["bits"]))
    about = {"windows": windows, "seqlen": seqlen, "families": named}
    return {**about, "over_seeds": over_seeds(rows), "rows": rows}


def _place(row: dict[str, Any]) -> tuple[float, str, int]:
    """What a row is of: no two of a file have the same."""
    return row["bits"], row["family"], row.get("seed", 0)


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every family and budget that more than one seed has, the share of KL that is saved: each
    seed's, and the mean with the half width of its 95 % interval over seeds (Student's t). Families
    together are those of a seed only where the same ones joined."""
    groups: dict[tuple[float, str, tuple[str, ...]], dict[int, float]] = {}
    for row in rows:
        if "gain" in row:
            bits, family, seed = _place(row)
            what = bits, family, tuple(sorted(row.get("joined", ())))
            groups.setdefault(what, {})[seed] = row["gain"]["relative"]
    return [
        {
            "bits": bits,
            "family": family,
            "seeds": list(gains),
            "relative": with_values([*gains.values()]),
        }
        for (bits, family, _), gains in groups.items()
        if len(gains) > 1
    ]


def _sentence(row: dict[str, Any]) -> str:
    text = f"{row['bits']} bits, {row['family']}: predicted {row['predicted_sum']:.4f}"
    if "kl" in row:
        text += f", KL {row['kl']:.4f} +- {row['kl_error']:.4f}"
    if "gain" in row:
        text += f", gain {row['gain']['value']:.5f} +- {row['gain']['error']:.5f}"
    return f"{text}; {row['chosen']}, {row['mixed']} linears mixed"


def _gain(base: dict[str, Any], row: dict[str, Any]) -> dict[str, float | None]:
    """How much KL the family saves, over windows, and relative to what there was."""
    differences = [a - b for a, b in zip(base["windows"], row["windows"], strict=True)]
    estimate = Estimate.mean(differences)
    return {
        "value": estimate.value,
        "error": estimate.standard_error,
        "relative": estimate.value / base["kl"],
    }


def main() -> None:
    """Measure what was asked for, and what the work directory lacks for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="work directory to use and keep")
    parser.add_argument("--family", choices=(*FAMILIES, MIXED), action="append")
    parser.add_argument("--bits", type=float, action="append")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held-out windows")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="their length in tokens")
    parser.add_argument(
        "--layer", type=int, action="append", help="compare the matrices of these layers instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="of calibration")
    parser.add_argument("--joint", action="store_true", help="all families together, none alone")
    parser.add_argument("--predict", action="store_true", help="round and solve, measure no KL")
    options = parser.parse_args()
    families = options.family or (*FAMILIES, MIXED)
    if options.joint and len(families) < 2:
        parser.error("--joint needs two families or more: leave out --family, or name another one")
    bench = Bench(options.work, families, options.windows, options.seqlen, options.seed)
    if options.layer:
        rows = bench.matrices(options.layer)
        print(record.write("choices_matrices", {"layers": options.layer, "rows": rows}))
        return
    rows = []
    for row in bench.rows(options.bits or BITS, not options.predict, options.joint):
        rows.append(row)
        print(_sentence(row), flush=True)
        if not options.predict:
            path = record.write(RESULT, kept(rows, options.windows, options.seqlen))
    if not options.predict:
        print(path)


if __name__ == "__main__":
    main()
