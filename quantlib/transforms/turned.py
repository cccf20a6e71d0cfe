"""Statistics in another basis without another pass: what calibration saw of a folded model, as it
would see it of the rotated one.

A rotation multiplies the input of every linear, x <- x A, and the outputs of some, y <- y B, by
orthogonal matrices (or puts them in another order), and the model computes what it did before. So
with gradients g = dL/dy,

    Hessians               A^T H A
    samples                x A,  g B
    Fisher information     the diagonal of B^T E[g^T g] B
    token weights          as they were: a gradient's length does not change

Only the third needs more than calibration keeps of every weight: the second moment of the gradients
of outputs that will be turned (`turned_outputs`, `MatrixStatistics.outputs`).

A stream whose norms subtract the mean is no such case: the rotated model's norms do not, and what
its gradients have along the mean cannot be told from the folded model (`turns`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantlib.calibration.statistics import (
    EmbeddingStatistics,
    GroupStatistics,
    MatrixStatistics,
)
from quantlib.errors import DataError
from quantlib.transforms.changes import Change, turn
from quantlib.transforms.wiring import Wiring

_NONE = Change()


def turns(wiring: Wiring) -> bool:
    """Whether statistics of this model, folded, can be turned into any of its rotations' bases."""
    return not any(stream.centred for stream in wiring.streams)


def turned_outputs(wiring: Wiring) -> frozenset[str]:
    """Names of the weights whose outputs a rotation may multiply by a basis."""
    writers = (matrix.weight for stream in wiring.streams for matrix in stream.writers)
    return frozenset([*writers, *(attention.values.weight for attention in wiring.attentions)])


def turned_group(group: GroupStatistics, changes: Mapping[str, Change]) -> GroupStatistics:
    """The statistics of a group of the folded model, of the rotated one.

    changes: of the rotation (`transforms.changes.changes`); the gains in them are folded already.
    Raises DataError when the moments of an output that is turned were not kept.
    """
    return GroupStatistics(group.name, [_matrix(matrix, changes) for matrix in group.matrices])


def turned_embedding(
    stats: EmbeddingStatistics, table: Change | None, head: Change | None
) -> EmbeddingStatistics:
    """The same of the embedding, and of the head; None: a matrix that is not changed.

    The gradients of different channels of the embedding count as uncorrelated.
    """
    gradient = stats.gradient
    if table is not None and isinstance(table.inputs, Tensor):
        gradient = gradient @ table.inputs.to(gradient).square()
    change = head or _NONE
    return replace(
        stats,
        gradient=gradient,
        head_input=_on_both_sides(stats.head_input, change),
        sample_h=_inputs(stats.sample_h, change),
    )


def _matrix(stats: MatrixStatistics, changes: Mapping[str, Change]) -> MatrixStatistics:
    names = list(stats.fisher)
    if not stats.tokens or not names:
        return stats
    shared = changes.get(names[0], _NONE)  # one input, one basis
    own = {name: changes.get(name, _NONE) for name in names}
    return replace(
        stats,
        hessian=_on_both_sides(stats.hessian, shared),
        sample_x=_inputs(stats.sample_x, shared),
        fisher={name: _fisher(stats, name, change) for name, change in own.items()},
        sample_g={name: _outputs(stats.sample_g[name], change) for name, change in own.items()},
        outputs={},
    )


def _inputs(x: Tensor, change: Change) -> Tensor:
    """x [..., K] as the changed weight reads it."""
    ordered = x if change.columns is None else x[..., change.columns]
    return ordered if change.inputs is None else turn(ordered, change.inputs)


def _outputs(y: Tensor, change: Change) -> Tensor:
    """y [..., N] as the changed weight writes it."""
    turned = y if change.outputs is None else turn(y, change.outputs)
    return turned if change.rows is None else turned[..., change.rows]


def _on_both_sides(moment: Tensor, change: Change) -> Tensor:
    """A second moment of inputs [K, K] after the change. Along what the inputs never have (a mean
    that was taken out), sums of float32 leave nothing, or a little less."""
    turned = _inputs(_inputs(moment, change).T, change).T.contiguous()
    turned.diagonal().clamp_(min=0)
    return turned


def _fisher(stats: MatrixStatistics, name: str, change: Change) -> Tensor:
    if change.outputs is None:
        return _outputs(stats.fisher[name], change)
    if name not in stats.outputs:
        raise DataError(
            f"the statistics of {name} cannot be turned into another basis: they are of an older "
            "version; delete the work directory's statistics and calibrate again"
        )
    half = turn(stats.outputs[name].double(), change.outputs)
    return turn(half.T, change.outputs).diagonal().clamp(min=0).to(torch.float32)
