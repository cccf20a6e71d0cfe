"""What an error at an input costs at the outputs that matter: the second factor of a product.

Where x is rounded to x + e, a linear y = x W^T changes by e W^T. If outputs are priced by their
Fisher information f (mean squared gradients, `MatrixStatistics.fisher`), the price of e is

    e S e^T    with    S = W^T diag(f) W,    f = 1 where there are no gradients,

which is the second moment of gradients at the input, E[g g^T], as far as the gradients of different
outputs are uncorrelated. Consumers of one input add.

Weights must be those of the model whose moments they are multiplied with: norms' gains folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from quantlib.calibration.statistics import GroupStatistics
from quantlib.errors import DataError
from quantlib.transforms.wiring import Attention

Read = Callable[[str], Tensor]
"""read(name): a weight [N, K], or a stack [E, N, K], of any floating dtype."""

Fisher = Callable[[str], Tensor]
"""fisher(name): of a weight's outputs, [N]; [E, N] for a stack, each expert's multiplied by its
share of the tokens."""


def fisher_of(statistics: Iterable[GroupStatistics]) -> Fisher:
    """The Fisher information of all weights of these groups.

    The result raises DataError for a weight that has none.
    """
    found: dict[str, Tensor] = {}
    for group in statistics:
        total = max(sum(matrix.tokens for matrix in group.matrices), 1)
        names = {name for matrix in group.matrices for name in matrix.fisher}
        for name in names:
            width = next(len(m.fisher[name]) for m in group.matrices if name in m.fisher)
            none = torch.zeros(width)  # of an expert that saw no token
            parts = [m.fisher.get(name, none) * (m.tokens / total) for m in group.matrices]
            found[name] = parts[0] if len(parts) == 1 else torch.stack(parts)

    def fisher(name: str) -> Tensor:
        if name not in found:
            raise DataError(
                f"calibration left no gradients for {name}: calibrate with gradients, or choose "
                "bases by the energy of weights"
            )
        return found[name]

    return fisher


def input_energy(names: Iterable[str], read: Read, fisher: Fisher | None = None) -> Tensor:
    """S of all weights `names` that read one input, float64 [K, K].

    Without `fisher` a stack of experts counts with its mean: a token sees few of them.
    """
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        weight = read(name)
        price = None if fisher is None else fisher(name)
        if weight.ndim == 2:
            total = total + _energy(weight, price)
        else:
            for expert, matrix in enumerate(weight):
                share = 1 / len(weight) if price is None else 1.0
                total = total + share * _energy(matrix, None if price is None else price[expert])
    return total


def value_energy(attention: Attention, read: Read, fisher: Fisher | None = None) -> Tensor:
    """S of an output projection at each KV head's values, float64 [H_kv, d, d]: the column blocks
    of all query heads that use it added."""
    name = attention.output.weight
    blocks = read(name).unflatten(1, (attention.kv_heads, -1, attention.head_dim))
    price = None if fisher is None else fisher(name)
    return torch.stack(
        [
            torch.stack([_energy(block, price) for block in blocks[:, head].unbind(1)]).sum(0)
            for head in range(attention.kv_heads)
        ]
    )


def _energy(weight: Tensor, price: Tensor | None) -> Tensor:
    """W^T diag(price) W, float64 [K, K], of a weight [N, K]."""
    weight = weight.double()
    scaled = weight if price is None else weight * price.double()[:, None]
    return weight.T @ scaled
