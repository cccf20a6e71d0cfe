"""Rotated parameters from original ones, so that the model computes what it did before.

Vectors are rows and a linear is `y = x W^T + b`. With the basis U of the residual stream:

    what writes the stream    W <- U^T W,  b <- b U        embedding rows  E <- E U
    what reads it             W <- W diag(g) U,  b <- b + W s    (g, s: the norm's gain and bias)

Orthogonal U leaves the norm's root mean square as it was, so with its gain in the readers a norm
commutes with U. A LayerNorm subtracts the mean first; as every reader of the stream sees it through
one, the mean is not used by anybody, and everything written can be centred instead (`C U` in place
of U, C = I - 1/D), which turns the norm into the kind without mean. (The same on an RMSNorm model
would change its function.)

Per key/value head with basis B: values W <- B^T W, output projection W <- W B for the columns of
every query head that uses it. Down projection with Hadamard matrix H before it: W <- W H, where H
may leave the last columns alone. The channels of a hidden layer can be put in any order: rows of
gate and up, columns of down. Means of inputs can be moved into biases (`means.py`).

All sums are in float64, results in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlib.models.memory import empty
from quantlib.transforms import hadamard
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import RMS_PLUS_ONE, Attention, Hidden, Norm, Stream, Wiring

_CHUNK = 4 << 20
"""Elements of a matrix that are in float64 at a time, where rows do not depend on each other."""

Read = Callable[[str, int | None], Tensor]
"""read(name, expert): an original parameter, or one matrix [N, K] of a stack [E, N, K]."""


@dataclass(frozen=True)
class Heads:
    """Bases [H, d, d] of the last H * d of the columns, head by head; the ones before stay."""

    bases: Tensor


@dataclass(frozen=True)
class Blocks:
    """Hadamard matrices of order `size` along the first `columns`; None: along all."""

    size: int
    columns: int | None = None


Basis = Tensor | Heads | Blocks
"""What x [..., K] can be multiplied by from the right; a Tensor is [K, K]."""


@dataclass(frozen=True)
class Change:
    """How one parameter is computed from the original ones. Axes are those of a weight [N, K]; a
    bias has N only, and a table of vectors [rows, K] has only inputs.

    constant: it becomes this, the rest does not matter (parameters of folded norms): a number, or
              a vector float64 [N].
    gain:     the norm whose gain multiplies the columns; of a bias, the mean in `added`.
    shift:    of a bias: (the weight, the norm bias) whose product is added.
    added:    of a bias: (the weight, a mean of its input, float64 [K]) whose product is added.
    taken:    of a bias: float64, taken from its last numbers.
    columns:  int64 [K], the order they are put in before a basis.
    inputs:   basis along K. outputs: basis along N.
    rows:     int64 [N], the order they are put in; not together with `outputs`.
    """

    constant: float | Tensor | None = None
    gain: Norm | None = None
    shift: tuple[str, str] | None = None
    added: tuple[str, Tensor] | None = None
    taken: Tensor | None = None
    columns: Tensor | None = None
    inputs: Basis | None = None
    outputs: Basis | None = None
    rows: Tensor | None = None


def turn(x: Tensor, basis: Basis) -> Tensor:
    """x [..., K] times the basis, in the dtype of x."""
    if isinstance(basis, Blocks):
        if basis.columns is None:
            return hadamard.rotate(x, basis.size)
        turned = hadamard.rotate(x[..., : basis.columns], basis.size)
        return torch.cat([turned, x[..., basis.columns :]], dim=-1)
    if isinstance(basis, Tensor):
        return x @ basis.to(x)
    bases = basis.bases.to(x)
    heads, d, _ = bases.shape
    before, own = x.split([x.shape[-1] - heads * d, heads * d], dim=-1)
    turned = torch.einsum("...hd,hde->...he", own.unflatten(-1, (heads, d)), bases)
    return torch.cat([before, turned.flatten(-2)], dim=-1)


def written(stream: Stream, basis: Tensor) -> Tensor:
    """What multiplies vectors on their way into the stream: U, or C U where its norms subtract the
    mean. float64 [D, D]."""
    basis = basis.double()
    return basis - basis.mean(0, keepdim=True) if stream.centred else basis


def changes(wiring: Wiring, rotation: Rotation) -> dict[str, Change]:
    """Every parameter that a rotation changes, by name. Raises TransformError when it does not
    belong to the model (`Rotation.check`)."""
    rotation.check(wiring)
    found: dict[str, Change] = {}

    def note(name: str | None, **values: object) -> None:
        if name is not None:
            found[name] = replace(found.get(name, Change()), **values)  # type: ignore[arg-type]

    for stream in wiring.streams:
        basis = rotation.basis(stream.name)
        if rotation.folds(stream.name):
            for norm in stream.norms:
                mean = rotation.means.get(norm.name)
                note(norm.weight, constant=0.0 if norm.kind == RMS_PLUS_ONE else 1.0)
                note(norm.bias, constant=0.0 if mean is None else -_turned_mean(mean, basis))
                for reader in norm.readers:
                    note(reader.weight, gain=norm, inputs=basis)
                    if norm.bias is not None:
                        note(reader.bias, shift=(reader.weight, norm.bias))
                    if mean is not None:
                        note(reader.bias, gain=norm, added=(reader.weight, mean))
        if basis is not None:
            into = written(stream, basis)
            for writer in stream.writers:
                note(writer.weight, outputs=into)
                note(writer.bias, outputs=into)
            for table in stream.tables:
                note(table, inputs=into)
    for attention in wiring.attentions:
        if attention.name in rotation.value:
            bases = rotation.value[attention.name].double()
            note(attention.values.weight, outputs=Heads(bases))
            note(attention.values.bias, outputs=Heads(bases))
            note(attention.output.weight, inputs=Heads(_per_query_head(attention, bases)))
        mean = rotation.means.get(attention.output.weight)
        if mean is not None:
            output = attention.output
            note(attention.values.bias, taken=mean.flatten())
            read = _per_query_head(attention, mean).flatten()
            note(output.bias, added=(output.weight, read))
    for site in wiring.hiddens:
        order, blocks = rotation.hidden_order.get(site.name), hidden_blocks(site, rotation)
        if order is not None:
            note(site.down.weight, columns=order)
            rows = torch.cat([order + part * site.width for part in range(site.stacked)])
            for writer in site.writers:
                note(writer.weight, rows=rows)
                note(writer.bias, rows=rows)
        if blocks is not None:
            note(site.down.weight, inputs=blocks)
        if site.down.weight in rotation.means:
            note(site.down.bias, added=(site.down.weight, rotation.means[site.down.weight]))
    return found


def _turned_mean(mean: Tensor, basis: Tensor | None) -> Tensor:
    return mean.double() if basis is None else turn(mean.double(), basis)


def hidden_blocks(site: Hidden, rotation: Rotation) -> Blocks | None:
    """The Hadamard matrices before a down projection, None without."""
    size, high = rotation.hidden.get(site.name, 1), rotation.hidden_high.get(site.name, 0)
    return Blocks(size, site.width - high if high else None) if size > 1 else None


def _per_query_head(attention: Attention, bases: Tensor) -> Tensor:
    """What belongs to the query heads' outputs [H, ...], each its key/value head's."""
    return bases.repeat_interleave(attention.heads // attention.kv_heads, 0)


def changed(name: str, change: Change, read: Read, expert: int | None = None) -> Tensor:
    """The parameter `name` after its change, float32 (a folded norm's in its own dtype).

    read:   gives original parameters, of any floating dtype.
    expert: of a stack [E, N, K], this matrix alone.

    Memory beside the result: the original of this parameter (of one expert, for a stack; for a bias
    that takes over a norm's, the weight as well), and in float64 one matrix where its rows are
    mixed, else a slice of it.
    """
    if isinstance(change.constant, Tensor):
        return change.constant.float()
    if change.constant is not None:
        return torch.full_like(read(name, None), change.constant)
    original = read(name, expert)
    if original.ndim == 3:
        raise ValueError(f"{name}: a stack is changed one expert at a time")
    if original.ndim == 1:
        return _changed_bias(original, change, read)
    return _changed_matrix(original, change, read)


def changed_stack(name: str, change: Change, read: Read, shape: tuple[int, ...]) -> Tensor:
    """As `changed`, for all experts of a stack of this shape [E, N, K]."""
    result = empty(shape, torch.float32)
    for expert, matrix in enumerate(result):
        matrix.copy_(changed(name, change, read, expert))
    return result


def folded_gain(norm: Norm, read: Read) -> Tensor:
    """The factor per channel that a norm multiplies by, float64 [D]."""
    weight = read(norm.weight, None).double()
    return weight + 1.0 if norm.kind == RMS_PLUS_ONE else weight


def _changed_bias(original: Tensor, change: Change, read: Read) -> Tensor:
    bias = original.double()
    if change.shift is not None:
        weight, norm_bias = change.shift
        bias = bias + _product(read(weight, None), read(norm_bias, None).double())
    if change.added is not None:
        weight, mean = change.added
        gained = mean.double() if change.gain is None else mean * folded_gain(change.gain, read)
        bias = bias + _product(read(weight, None), gained)
    if change.taken is not None:
        kept = len(bias) - len(change.taken)
        bias = torch.cat([bias[:kept], bias[kept:] - change.taken])
    if change.outputs is not None:
        bias = turn(bias, change.outputs)
    return (bias if change.rows is None else bias[change.rows]).float()


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix [N, K] times a float64 vector [K]."""
    rows = max(1, _CHUNK // vector.numel())
    return torch.cat([piece.double() @ vector for piece in matrix.split(rows)])


def _changed_matrix(original: Tensor, change: Change, read: Read) -> Tensor:
    gain = None if change.gain is None else folded_gain(change.gain, read)
    result = empty(original.shape, torch.float32)
    # rows are mixed by a basis of the outputs, and only by that
    rows = max(1, _CHUNK // original.shape[1]) if change.outputs is None else len(original)
    for start in range(0, len(original), rows):
        part = slice(start, start + rows)
        piece = original[part if change.rows is None else change.rows[part]].double()
        if gain is not None:
            piece = piece * gain  # a float64 original must not change
        if change.columns is not None:
            piece = piece[:, change.columns]
        if change.inputs is not None:
            piece = turn(piece, change.inputs)
        if change.outputs is not None:
            piece = turn(piece.T, change.outputs).T
        result[part] = piece
    return result
