"""Means taken out of what is rounded, and put into biases: another change that no output notices.

A linear computes W x + b = W (x - m) + (b + W m), with the mean m of its input over calibration
data. What is rounded then has no mean, so a scale need not span it. Where m goes:

    behind a norm with a bias    the norm's bias becomes -m: nothing is left to do while it runs
    values                       the value projection's bias loses m; attention's weights sum to 1,
                                 so what reaches the output projection loses m, too
    a hidden layer               m is subtracted while the model runs (`online.Shift`)

Keys behind such a norm lose a constant that the softmax never sees (`wiring.Matrix.drops_shift`),
and their cache is rounded without it.

Norms without bias keep their means: those would have to be subtracted online, before every linear,
for what a wide direction holds already (a mean is a principal component).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantlib.errors import TransformError
from quantlib.transforms.wiring import Attention, Hidden, Matrix, Norm, Wiring


def means_of(inputs: Mapping[str, Tensor], wiring: Wiring) -> dict[str, Tensor]:
    """`Rotation.means` of every place of the model that can have one, float64.

    inputs: weight -> the mean of what it reads [K], of the folded model; places without are left
    out. Query heads that share a KV head share the mean of what they make of its values.
    """
    found: dict[str, Tensor] = {}
    for norm in _norms(wiring):
        means = [inputs[reader.weight] for reader in norm.readers if reader.weight in inputs]
        if means and not _norm_obstacle(norm):
            found[norm.name] = means[0].double()
    for attention in wiring.attentions:
        name = attention.output.weight
        if name in inputs and not _value_obstacle(attention):
            heads = inputs[name].double().unflatten(0, (attention.kv_heads, -1))
            found[name] = heads.unflatten(1, (-1, attention.head_dim)).mean(1)
    for hidden in wiring.hiddens:
        name = hidden.down.weight
        if name in inputs and not _hidden_obstacle(hidden):
            found[name] = inputs[name].double()
    return found


def takes_means(wiring: Wiring) -> bool:
    """Whether there is a place in this model whose mean can be taken out, gains folded."""
    return any(not obstacle for _, obstacle in _places(wiring, lambda stream: True).values())


def check_means(means: Mapping[str, Tensor], wiring: Wiring, folds: Callable[[str], bool]) -> None:
    """Raise TransformError unless every mean belongs to a place of this model.

    folds: whether the gains of a stream's norms, by the stream's name, move into their readers.
    """
    places = _places(wiring, folds)
    for name, mean in means.items():
        if name not in places:
            raise TransformError(
                f"the rotation takes a mean out of {name}, and this {wiring.model_type} has no "
                "such norm, output projection or down projection: it was made for another model."
            )
        shape, obstacle = places[name]
        if obstacle:
            raise TransformError(f"the mean of {name} cannot be taken out: {obstacle}.")
        if tuple(mean.shape) != shape:
            raise TransformError(
                f"the mean of {name} is {list(mean.shape)}, this model needs {list(shape)}: it "
                "was made for another model."
            )
        if not bool(torch.isfinite(mean).all()):
            raise TransformError(f"the mean of {name} is not finite: calibrate again.")


def _norms(wiring: Wiring) -> list[Norm]:
    return [norm for stream in wiring.streams for norm in stream.norms]


def _places(wiring: Wiring, folds: Callable[[str], bool]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape of its mean, why it cannot be taken out or "")."""
    places: dict[str, tuple[tuple[int, ...], str]] = {}
    for stream in wiring.streams:
        unfolded = "" if folds(stream.name) else "its gain is not folded into what reads it"
        for norm in stream.norms:
            places[norm.name] = (stream.width,), unfolded or _norm_obstacle(norm)
    for attention in wiring.attentions:
        shape = attention.kv_heads, attention.head_dim
        places[attention.output.weight] = shape, _value_obstacle(attention)
    for hidden in wiring.hiddens:
        places[hidden.down.weight] = (hidden.width,), _hidden_obstacle(hidden)
    return places


def _norm_obstacle(norm: Norm) -> str:
    if norm.bias is None:
        return "the norm has no bias"
    bare = next((r for r in norm.readers if _without_bias(r) and not r.drops_shift), None)
    return f"{bare.weight} has no bias" if bare is not None else ""


def _value_obstacle(attention: Attention) -> str:
    bare = next(filter(_without_bias, (attention.values, attention.output)), None)
    return f"{bare.weight} has no bias" if bare is not None else ""


def _hidden_obstacle(hidden: Hidden) -> str:
    if hidden.inner:
        return "it arises inside a module of experts"
    return f"{hidden.down.weight} has no bias" if _without_bias(hidden.down) else ""


def _without_bias(matrix: Matrix) -> bool:
    return matrix.bias is None
