"""Predictors that were taught on a language model, asked about a model they never saw: linears of
DINOv2-small, a vision transformer, on pictures of Fashion-MNIST. Losses are squared errors of each
linear's outputs relative to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from quantlib.bench.beds.dinov2 import PIXELS, fetch_dinov2, open_resized
from quantlib.bench.beds.fashion import fetch_fashion, read_fashion
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize
from quantlib.rounding import RoundingOptions, round_group
from quantlib.rounding.hessian import damped, inverse_factor
from quantlib.search.gnn import column_graph
from quantlib.search.predict import Example, Ridge
from quantlib.search.predict_graph import Taught
from quantlib.search.predict_rows import linear_rows

IMAGES = 40
"""Pictures, of 65 tokens each: more tokens than the widest linear has columns."""
BLOCKS = range(0, 12, 3)


def transfer_row(models: Mapping[str, Ridge | Taught], schemes: Sequence[Scheme]) -> dict[str, Any]:
    """How near each model's predictions are, and those of plain rounding."""
    others = vision_linears(schemes)
    guesses = {
        name: {key: model.predict(one.graph) for key, one in others.items()}
        for name, model in models.items()
    }
    guesses["plain_rounding"] = {key: one.graph.plain.sum(0) for key, one in others.items()}
    found: dict[str, Any] = {"model": "DINOv2-small", "weights": len(others)}
    for name, guess in guesses.items():
        pairs: dict[tuple[str, str], tuple[float, float]] = {}
        for key, one in others.items():
            triples = zip(schemes, guess[key].tolist(), one.losses.tolist(), strict=True)
            pairs |= {(key, str(scheme)): (own, true) for scheme, own, true in triples}
        found[name] = compared(pairs)
    return found


def compared(pairs: Mapping[tuple[str, str], tuple[float, float]]) -> dict[str, float]:
    """(weight, scheme) -> (predicted, true): rank correlations and errors of the logs."""
    guess = torch.tensor([pair[0] for pair in pairs.values()], dtype=torch.float64)
    true = torch.tensor([pair[1] for pair in pairs.values()], dtype=torch.float64)
    by_scheme: dict[str, list[tuple[float, float]]] = {}
    for (_, scheme), pair in pairs.items():
        by_scheme.setdefault(scheme, []).append(pair)
    within = [float(spearmanr(own).statistic) for own in by_scheme.values()]
    missed = (guess.log() - true.log()).abs()
    return {
        "spearman": float(spearmanr(guess, true).statistic),
        "spearman_within_schemes": sum(within) / len(within),
        "median_error": float(missed.median().expm1()),
        "worst_error": float(missed.max().expm1()),
    }


@torch.no_grad()
def vision_linears(schemes: Sequence[Scheme]) -> dict[str, Example]:
    """Linears of BLOCKS, rounded in full and scored."""
    found = {}
    for name, (weight, hessian) in dinov2_inputs().items():
        scaled = damped(hessian, RoundingOptions().damping)
        energy = float(((weight @ hessian) * weight).sum())
        columns = weight.shape[1]
        layouts = [scheme.segments(columns) for scheme in schemes]
        rounded = round_group({"": weight}, hessian, layouts)
        fisher = torch.full((len(weight),), 2 / energy)
        losses = [
            float(linear_rows(dequantize(rounded["", i]) - weight, hessian, fisher).sum())
            for i in range(len(layouts))
        ]
        rows = hessian.diagonal().double().mean() * torch.ones(len(weight)).double() / energy
        formats = [layout[0].format for layout in layouts]
        graph = column_graph(weight, scaled, inverse_factor(scaled), rows, formats)
        found[name] = Example(graph, torch.tensor(losses, dtype=torch.float64))
    return found


def dinov2_inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (weight [N, K], second moment of its input [K, K]) of linears of BLOCKS."""
    model = open_resized(fetch_dinov2())
    images, _ = read_fashion(fetch_fashion(), "t10k")
    pixels = images[:IMAGES, None].float().div(255).sub(0.5).div(0.25).expand(-1, 3, -1, -1)
    pixels = nn.functional.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear")
    moments: dict[str, Tensor] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f"layer.{i}." in name for i in BLOCKS)
    }

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            x = inputs[0].flatten(0, -2)
            moments[name] = x.T @ x / len(x)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    model(pixel_values=pixels)
    for one in hooks:
        one.remove()
    return {name: (module.weight.float(), moments[name]) for name, module in layers.items()}
