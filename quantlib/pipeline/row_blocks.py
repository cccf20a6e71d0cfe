"""Blocks of rows in linears as further candidates: `quantlib compress --rows`.

Rows of a linear are rounded independently of each other, so what was measured of whole linears
says what any mixture of their rows loses, exactly: row by row, half the Fisher information of its
output times e H e^T (`search.scores.fisher_score`), summed over the block each row is in. Nothing
more is rounded to know it. For every linear the mixtures that are worth their bytes
(`search.row_widths`) join the sensitivity table, with all that they add to a file: the packed
blocks, their headers, and two bits a row that say which block it is in. The one knapsack then
chooses among whole linears and mixtures.

A mixture is not in the bank until a plan has it: its rows are rows of entries that are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.tensorfile import read_tensors, tensor_content
from quantlib.formats.composite import (
    ROWS,
    CompositeWeight,
    StoredWeight,
    dequantize_stored,
    pack_stored,
    rows_of_blocks,
    unpack_stored,
)
from quantlib.formats.scheme import Scheme
from quantlib.formats.size import payload_bytes
from quantlib.formats.weight import QuantizedWeight
from quantlib.formats.weight_format import TENSOR
from quantlib.models.rows import LinearGroup, Weight
from quantlib.pipeline import bytecount
from quantlib.pipeline.measure import entry_key, ordered_statistics, ordered_weight
from quantlib.pipeline.plan import TASK
from quantlib.pipeline.run import Run
from quantlib.rounding.rows import assign_rows
from quantlib.rounding.stack import select_rows
from quantlib.search.columns import Candidates
from quantlib.search.row_widths import RowAssignment, row_assignments
from quantlib.search.scores import row_scores
from quantlib.search.sensitivity import Entry, Sensitivity

KIND = "rows"


def with_row_blocks(run: Run, table: Sensitivity) -> Sensitivity:
    """A table of one task with mixtures of its candidates by rows, of dense linears."""
    groups = [group for group in run.model_map.groups if row_formats(run, group)]
    with run.stage("rows", len(groups)) as progress:
        found = dict(table.rows)
        for group in groups:
            prices, formats = row_prices(run, group), row_formats(run, group)
            for name in group.members:
                weight, measured = run.model_map.weight(name), table.rows[name]
                offered = [index for index, scheme in enumerate(formats) if scheme in measured]
                own, names = prices[name][:, offered], [formats[index] for index in offered]
                found[name] = {**measured, **_mixtures(weight, names, own, measured)}
            progress.tick(group.name)
    return replace(table, rows=found)


def row_formats(run: Run, group: LinearGroup) -> list[str]:
    """The candidates of a group of linears that its rows may be in: plain formats whose rows share
    no scale, inputs as they are. Empty where rows cannot be in blocks, or have nothing to choose
    among."""
    if group.kind != "linear" or any(name in run.orders for name in group.members):
        return []
    schemes = run.candidates[group.members[0]]
    plain = [str(scheme) for scheme in schemes if _mixes(scheme)]
    return plain if len(plain) > 1 else []


def _mixes(scheme: Scheme) -> bool:
    form = scheme.weight
    if form is None or scheme.is_composite or scheme.activation.rounds or scheme.high:
        return False
    return form.group_size != TENSOR and form.scale != "e4m3"


def row_prices(run: Run, group: LinearGroup) -> dict[str, Tensor]:
    """Member -> float32 [N, S]: nats that each of its rows loses in each of `row_formats`. Kept in
    the work directory."""
    formats = row_formats(run, group)
    key = run.work.key(KIND, group=group.name, formats=formats, inputs=run.rounding_hash)
    if not run.work.has(key):
        (statistics,) = ordered_statistics(run, group).matrices
        prices = {}
        for name in group.members:
            original = ordered_weight(run, name)
            errors = (_dense(run, name, scheme) - original for scheme in formats)
            scores = [row_scores(original, error, statistics, name) for error in errors]
            prices[name] = torch.stack(scores, dim=1)
        file = f"{KIND}/{digest([key])[:12]}-{group.name}.safetensors"
        run.work.commit(key, KIND, {file: tensor_content(prices)})
    return read_tensors(run.work.file(key))


def _mixtures(
    weight: Weight, formats: Sequence[str], prices: Tensor, measured: Mapping[str, Entry]
) -> dict[str, Entry]:
    """Scheme -> entry of the mixtures of `formats` that no other one matches in bytes and loss.

    prices: [N, len(formats)]. Standard errors are relative to losses as those of the formats are,
    each for its rows' share.
    """
    shape = (weight.out_features, weight.in_features)
    layouts = [Scheme.parse(scheme).segments(shape[1]) for scheme in formats]
    rates = [payload_bytes(shape, layout) / shape[0] for layout in layouts]
    assignments = row_assignments(prices.double(), [one[0].format for one in layouts], rates)
    kept = Candidates.of(assignments, lambda one: _size(weight, one))
    spreads = torch.tensor(
        [
            one.error[TASK] / one.loss[TASK] if one.loss[TASK] > 0 else 0.0
            for one in (measured[scheme] for scheme in formats)
        ],
        dtype=torch.float64,
    )
    found = {}
    for one, size in zip(kept.assignments, kept.bytes, strict=True):
        if len(one.formats) > 1:
            picks = torch.tensor([formats.index(scheme) for scheme in one.formats])
            index = picks[one.block.long()]
            lost = prices.double().gather(1, index[:, None])[:, 0]
            error = float((lost * spreads[index]).sum())
            found[one.scheme] = Entry(size, {TASK: one.loss}, {TASK: error})
    return found


def _size(weight: Weight, one: RowAssignment) -> int:
    return bytecount.weight_bytes(weight, Scheme.parse(one.scheme))


def is_mixture(run: Run, name: str, scheme: str) -> bool:
    """Whether a scheme is one of blocks of rows of a linear."""
    return run.model_map.weight(name).kind == "linear" and bool(Scheme.parse(scheme).rows)


def stored_weight(run: Run, name: str, scheme: str, key: str | None = None) -> StoredWeight:
    """A weight as the bank has it, or, of a mixture that is not there, as its rows are.

    Raises CheckpointError when the bank lacks what it is made of.
    """
    weight, parsed = run.model_map.weight(name), Scheme.parse(scheme)
    key = key or entry_key(run, name, scheme)
    if is_mixture(run, name, scheme) and not run.bank.has(key):
        return _mixture(run, weight, parsed, _prices_of(run, weight.group))
    shape = (weight.parameters // weight.in_features, weight.in_features)
    return unpack_stored(run.bank.get(key), shape, parsed)


def keep_mixtures(run: Run, schemes: Mapping[str, str]) -> None:
    """Put the mixtures of a plan (weight -> scheme) that the bank lacks into it."""
    lacking: dict[str, list[Weight]] = {}
    for name, scheme in schemes.items():
        if is_mixture(run, name, scheme) and not run.bank.has(entry_key(run, name, scheme)):
            weight = run.model_map.weight(name)
            lacking.setdefault(weight.group, []).append(weight)
    if not lacking:
        return
    with run.bank.batch() as batch:
        for group, weights in lacking.items():
            prices = _prices_of(run, group)
            for weight in weights:
                scheme = schemes[weight.name]
                tensors = pack_stored(_mixture(run, weight, Scheme.parse(scheme), prices))
                batch.put(weight.name, scheme, run.rounding_hash, tensors)


def _prices_of(run: Run, group: str) -> dict[tuple[str, str], Tensor]:
    """(member of a group, format) -> float32 [N]: what each of its rows loses there."""
    found = run.model_map.group(group)
    formats = row_formats(run, found)
    return {
        (name, scheme): prices[:, index]
        for name, prices in row_prices(run, found).items()
        for index, scheme in enumerate(formats)
    }


def _mixture(
    run: Run, weight: Weight, scheme: Scheme, prices: Mapping[tuple[str, str], Tensor]
) -> CompositeWeight:
    """Blocks of rows of the bank's entries: the dearest rows, by what they lose in the narrowest
    block's format, are in the first block, as `search.row_widths` ranks them. prices: those of its
    group (`_prices_of`)."""
    names = [str(block.format) for block in scheme.rows]
    block = assign_rows(scheme, prices[weight.name, names[-1]].double())
    parts: dict[str, QuantizedWeight] = {}
    for index, rows in enumerate(rows_of_blocks(block, weight.out_features)):
        whole = stored_weight(run, weight.name, names[index])
        assert isinstance(whole, QuantizedWeight)
        parts[f"{ROWS}{index}"] = select_rows(whole, rows)
    return CompositeWeight(scheme, (weight.out_features, weight.in_features), parts, block)


def _dense(run: Run, name: str, scheme: str) -> Tensor:
    return dequantize_stored(stored_weight(run, name, scheme))
