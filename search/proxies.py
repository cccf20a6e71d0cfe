"""Proxies: losses of roundings predicted by a formula over statistics of the layers (EMQ, ICCV
2023).

The sensitivity table rounds every weight in every scheme and looks at the error. A proxy does not:
it is a formula over numbers that calibration leaves behind anyway (LAYER), over what is known of a
scheme without any weight (SCHEME), and, if it wants, over the table's own prediction (MEASURED).
A plan's score is the sum of the formula over its weights, so the exact solver can minimise it.

EMQ's formulas are made of tensors (weights, activations, gradients, Hessians) that end in one
number per layer. Here those ends are the columns: sums that occur in the second-order expansion of
the loss, and ratios that say how unevenly they are spread. What would be lost is formulas between
tensors before they are summed; what is won is that a formula runs on any model in a millisecond,
needs no weights, and cannot mismatch dimensions.

Columns that have a unit are relative to the model's median weight, so that formulas mean the same
on models of other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlib.errors import SearchError, UsageError
from quantlib.formats.rtn import quantize_rtn
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.search import jsonfile
from quantlib.search.expressions import Expression
from quantlib.search.sensitivity import Entry, Sensitivity

FORMAT, LAYERS_FORMAT = "quantlib-proxy", "quantlib-layers"
VERSIONS = (1,)
"""Of both files. Raise it when a column changes its meaning: old formulas would be others then."""

UNITS = {
    "parameters": "elements of the weight",
    "rows": "N, outputs",
    "columns": "K, inputs",
    "weight_energy": "sum of squares of the weight",
    "input_energy": "trace of the inputs' second moment H",
    "gradient_energy": "sum over outputs of the squared gradient F",
    "weighted_rows": "sum of F_n ||w_n||^2: rows by what their outputs matter",
    "weighted_columns": "sum of H_kk ||w_k||^2: columns by how strong their inputs are",
    "output_energy": "sum of w_n H w_n^T: the outputs' energy",
    "fisher_energy": "sum of F_n H_kk w_nk^2: the diagonal Fisher information times squares",
}
"""Columns of a weight that have a unit."""
RATIOS = {
    "weight_peak": "largest element over the root mean square",
    "input_peak": "largest diagonal element of H over the mean one",
    "input_floor": "geometric over arithmetic mean of H's eigenvalues: what error feedback leaves",
    "gradient_peak": "largest F over the mean one",
    "depth": "place in the model, 0 for the first weight and 1 for the last",
}
"""Columns of a weight that are the same in any unit."""
LAYER = (*UNITS, *RATIOS)
SCHEME = ("noise", "bits")
"""noise: squared error of rounding normal numbers in the scheme, over their squares. bits: bytes of
the packed weight, 8 bits each, over its elements."""
MEASURED = ("loss",)
"""The sensitivity table's prediction, of a weight that was really rounded."""
COLUMNS = (*LAYER, *SCHEME, *MEASURED)
TRAINING_FREE = (*LAYER, *SCHEME)

KNOWN = {
    "weights": "mul(noise, weight_energy)",
    "inputs": "mul(noise, div(mul(weight_energy, input_energy), columns))",
    "hawq": "mul(noise, mul(weight_energy, div(mul(gradient_energy, input_energy), parameters)))",
    "fisher": "mul(noise, div(mul(weighted_rows, input_energy), columns))",
}
"""Scores that people use, as formulas. weights: squared error. inputs: with inputs of equal
strength in all columns. hawq: squared error times the mean trace of the weight's Hessian (HAWQ-V2),
as a Kronecker product. fisher: the same, output by output."""

NORMAL_SHAPE = (64, 1024)
_SMALL = 1e-30


@dataclass(frozen=True)
class Layers:
    """Statistics of every weight, for every task.

    rows: task -> weight -> column of LAYER -> number, with its unit. provenance: name -> hash.
    """

    model: str
    rows: Mapping[str, Mapping[str, Mapping[str, float]]]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON with one line per task and weight."""
        head = {"format": LAYERS_FORMAT, "version": VERSIONS[-1], "model": self.model}
        head["provenance"] = dict(self.provenance)
        lines = [f"  {jsonfile.dump(key)}: {jsonfile.dump(value)}," for key, value in head.items()]
        tasks = []
        for task, weights in self.rows.items():
            rows = ",\n".join(
                f"      {jsonfile.dump(name)}: {jsonfile.dump({c: row[c] for c in LAYER})}"
                for name, row in weights.items()
            )
            tasks.append(f"    {jsonfile.dump(task)}: {{\n{rows}\n    }}")
        return "{\n" + "\n".join(lines) + '\n  "tasks": {\n' + ",\n".join(tasks) + "\n  }\n}\n"

    @staticmethod
    def from_json(text: str, source: str) -> Layers:
        """Read what `to_json` wrote. Raises SearchError that names `source`."""
        data = jsonfile.parse_object(text, source)
        jsonfile.check_header(data, LAYERS_FORMAT, VERSIONS, source)
        required = {"format", "version", "model", "provenance", "tasks"}
        jsonfile.check_keys(data, required, set(), source)
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for task, weights in jsonfile.field(data, "tasks", dict, source).items():
            where = f"{source}, {task}"
            found = jsonfile.field(data["tasks"], task, dict, source)
            rows[task] = {name: jsonfile.numbers(found, name, where) for name in weights}
            for name, row in rows[task].items():
                jsonfile.check_keys(row, set(LAYER), set(), f"{where}, {name}")
        model = jsonfile.field(data, "model", str, source)
        return Layers(model, rows, jsonfile.texts(data, "provenance", source))


@dataclass(frozen=True)
class Use:
    """What one use of a matrix knows: a linear has one, a tied embedding two.

    hessian: [K, K], second moment of the inputs. fisher: [N], mean squared gradient of the outputs;
    ones where there are no gradients.
    """

    hessian: Tensor
    fisher: Tensor


def layer_row(matrices: Sequence[tuple[Tensor, Sequence[Use]]], depth: float) -> dict[str, float]:
    """The columns of LAYER of one weight.

    matrices: (weight [N, K], its uses) of every matrix: one, or those of a stack of experts. Sums
    are over all matrices and uses; ratios are means over them, by what they add to fisher_energy.
    """
    parts = [(matrix.float(), use) for matrix, uses in matrices for use in uses]
    found = [_columns_of(matrix, use) for matrix, use in parts]
    share = np.array([row["fisher_energy"] for row in found]) + _SMALL
    share /= share.sum()
    out = {name: float(sum(row[name] for row in found)) for name in UNITS}
    uses = sum(len(uses) for _, uses in matrices)
    for name in ("parameters", "rows", "weight_energy"):  # of the weight, however often it is used
        out[name] *= len(matrices) / uses
    out["columns"] = float(parts[0][0].shape[1])
    for name in RATIOS:
        values = [depth if name == "depth" else row[name] for row in found]
        out[name] = float(np.dot(share, values))
    return out


def _columns_of(weight: Tensor, use: Use) -> dict[str, float]:
    squares = weight.double().square()
    diagonal, fisher = use.hessian.double().diagonal(), use.fisher.double()
    by_row, by_column = squares.sum(1), squares.sum(0)
    mean = float(diagonal.mean().clamp(min=_SMALL))
    size = len(diagonal)
    damped = use.hessian.double() + 0.01 * mean * torch.eye(size, dtype=torch.float64)
    factor, _ = torch.linalg.cholesky_ex(damped)
    logarithms = 2 * factor.diagonal().clamp(min=_SMALL).log()
    return {
        "parameters": float(weight.numel()),
        "rows": float(weight.shape[0]),
        "columns": float(size),
        "weight_energy": float(by_row.sum()),
        "input_energy": float(diagonal.sum()),
        "gradient_energy": float(fisher.sum()),
        "weighted_rows": float(fisher @ by_row),
        "weighted_columns": float(diagonal @ by_column),
        "output_energy": float(((weight @ use.hessian) * weight).sum(dtype=torch.float64)),
        "fisher_energy": float(fisher @ (squares @ diagonal)),
        "weight_peak": float(weight.abs().max() / squares.mean().sqrt().clamp(min=_SMALL)),
        "input_peak": float(diagonal.max()) / mean,
        "input_floor": float(logarithms.mean().exp()) / mean,
        "gradient_peak": float(fisher.max() / fisher.mean().clamp(min=_SMALL)),
    }


@lru_cache(maxsize=256)
def scheme_noise(scheme: str) -> float:
    """Squared error of rounding standard normal numbers in a scheme, over their squares."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(NORMAL_SHAPE, generator=generator)
    error = (
        dequantize(quantize_rtn(values, Scheme.parse(scheme).segments(NORMAL_SHAPE[1]))) - values
    )
    return float(error.square().sum() / values.square().sum())


@dataclass(frozen=True)
class Columns:
    """All columns of a model in one task: row i is weight `keys[i][0]` in scheme `keys[i][1]`."""

    keys: tuple[tuple[str, str], ...]
    values: Mapping[str, np.ndarray]

    @staticmethod
    def of(table: Sensitivity, layers: Layers, task: str) -> Columns:
        """Raises SearchError when the statistics are of another model, or lack a weight."""
        if layers.model != table.model:
            raise SearchError(
                f"the layers' statistics are of model {layers.model[:12]}, the sensitivity table "
                f"of {table.model[:12]}: delete the statistics, and they are made anew"
            )
        rows = layers.rows.get(task, {})
        missing = [name for name in table.rows if name not in rows]
        if missing:
            raise SearchError(
                f"the layers' statistics have no {missing[0]} in task {task}: delete them, and "
                "they are made anew"
            )
        keys = [(name, scheme) for name, row in table.rows.items() for scheme in row]
        values = {column: np.array([rows[n][column] for n, _ in keys]) for column in LAYER}
        for column in UNITS:
            median = float(np.median([rows[name][column] for name in table.rows]))
            values[column] = values[column] / max(median, _SMALL)
        values["noise"] = np.array([scheme_noise(scheme) for _, scheme in keys])
        sizes = [8 * table.rows[n][s].bytes / rows[n]["parameters"] for n, s in keys]
        values["bits"] = np.array(sizes)
        values["loss"] = np.array([table.rows[n][s].loss[task] for n, s in keys])
        return Columns(tuple(keys), values)


@dataclass(frozen=True)
class Proxy:
    """A formula with its history.

    evolved_on: models its plans were of. quality: what was found of it (rank correlations by name).
    settings:   how it was looked for.
    """

    expression: Expression
    evolved_on: tuple[str, ...] = ()
    quality: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """JSON of its file."""
        data = {
            "format": FORMAT,
            "version": VERSIONS[-1],
            "expression": self.expression.text,
            "evolved_on": list(self.evolved_on),
            "quality": dict(self.quality),
            "settings": dict(self.settings),
        }
        lines = [f"  {jsonfile.dump(key)}: {jsonfile.dump(value)}" for key, value in data.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | Path) -> None:
        jsonfile.write_text(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> Proxy:
        """Read a proxy's file. Raises SearchError for one of another schema, and for a formula that
        reads or calls what is not there."""
        source = str(path)
        data = jsonfile.parse_object(jsonfile.read_text(path, "evolved proxy"), source)
        jsonfile.check_header(data, FORMAT, VERSIONS, source)
        required = {"format", "version", "expression", "evolved_on", "quality", "settings"}
        jsonfile.check_keys(data, required, set(), source)
        text = jsonfile.field(data, "expression", str, source)
        try:
            expression = Expression.parse(text, COLUMNS)
        except SearchError as error:
            raise SearchError(f"{source}: {error}") from error
        models = jsonfile.field(data, "evolved_on", list, source)
        quality = jsonfile.numbers(data, "quality", source)
        settings = jsonfile.field(data, "settings", dict, source)
        return Proxy(expression, tuple(map(str, models)), quality, settings)


EVOLVED = "evolved:"
"""What --score says before the name of a proxy's file."""


def read_score(text: str) -> Expression | None:
    """The formula that --score names: one of KNOWN or `evolved:FILE`; None for "measured", the
    sensitivity table as it is. Raises UsageError for anything else, SearchError for a bad file."""
    if text == "measured":
        return None
    if text.startswith(EVOLVED) and text != EVOLVED:
        return Proxy.load(text.removeprefix(EVOLVED)).expression
    if text in KNOWN:
        return Expression.parse(KNOWN[text], COLUMNS)
    raise UsageError(
        f"--score {text}: use measured, {', '.join(KNOWN)}, or {EVOLVED}FILE for a formula that "
        "was evolved"
    )


def rescored(table: Sensitivity, layers: Layers, expression: Expression) -> Sensitivity:
    """The table with the formula's values as losses, of every task.

    They are scaled to the sum of the losses they replace, rank plans, and are no prediction:
    standard errors are 0 and calibrations are dropped. Raises SearchError where the formula gives a
    weight no loss: a number that is negative or not finite.
    """
    losses = {}
    for task in table.tasks:
        columns = Columns.of(table, layers, task)
        values = expression.evaluate(columns.values)
        wrong = ~(np.isfinite(values) & (values >= 0))
        if wrong.any():
            (name, scheme), value = columns.keys[int(wrong.argmax())], values[int(wrong.argmax())]
            raise SearchError(
                f"{expression.text} is {value:g} for {name} in {scheme}, which is no loss: this "
                "formula does not suit this model; use another --score"
            )
        scale = float(columns.values["loss"].sum()) / max(float(values.sum()), _SMALL)
        losses[task] = dict(zip(columns.keys, values * scale, strict=True))
    rows = {
        name: {
            scheme: Entry(
                entry.bytes,
                {task: float(losses[task][name, scheme]) for task in table.tasks},
                dict.fromkeys(table.tasks, 0.0),
            )
            for scheme, entry in row.items()
        }
        for name, row in table.rows.items()
    }
    provenance = {**table.provenance, "score": expression.text}
    return replace(table, rows=rows, provenance=provenance, calibrations={})
