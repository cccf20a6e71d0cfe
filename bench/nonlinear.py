"""Integer softmax, GELU and LayerNorm in a real DINOv2-small: one method everywhere, and the one
that suits each layer.

    python -P -m quantlib.bench.nonlinear

Operators are fitted on pictures of Fashion-MNIST's training set, and judged on pictures of its test
set by what is left of the class token's vector behind the last norm: its signal over noise, and the
cosine of the angle to the one of floats. Weights stay in float32, so nothing else is to blame.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import typer
from torch import Tensor

from quantlib.bench import record
from quantlib.bench.beds.dinov2 import fetch_dinov2, image_processor, open_resized
from quantlib.bench.beds.fashion import fetch_fashion, read_fashion
from quantlib.bench.beds.folders import picture
from quantlib.kernels.nonlinear import Operator, sqnr
from quantlib.kernels.nonlinear.operators import METHODS, describe
from quantlib.kernels.nonlinear.rule import Fits, choose
from quantlib.runtime import nonlinear
from quantlib.runtime.nonlinear_fit import measure

CALIBRATION, JUDGED, BATCH = 16, 64, 16
DECIBELS = (15.0, 20.0, 25.0, 30.0)


def run() -> dict[str, Any]:
    """Every row of the table, by name."""
    model: Any = open_resized(fetch_dinov2())
    folder = fetch_fashion()
    (images, _), (others, _) = read_fashion(folder, "train"), read_fashion(folder, "t10k")
    parts = pixels(images[:CALIBRATION]).split(BATCH)
    fits = measure(model, [partial(model, pixel_values=part) for part in parts])
    judged = pixels(others[:JUDGED])
    exact = vectors(model, judged)
    rows = {}
    for name, operators in tables(fits).items():
        nonlinear.attach(model, operators)
        rows[name] = figures(exact, vectors(model, judged), operators)
        nonlinear.detach(model)
        print(name, rows[name], flush=True)
    return {
        "layers": len(fits),
        "settings": {"calibration": CALIBRATION, "judged": JUDGED},
        "mean_sqnr": mean_sqnr(fits),
        "rows": rows,
    }


def tables(fits: Fits) -> dict[str, dict[str, Operator]]:
    """Name of a row -> layer -> operator. A method that has no operator for a layer leaves it in
    floats."""
    found = {
        method: {name: fitted[method][0] for name, fitted in fits.items() if method in fitted}
        for method in METHODS
    }
    eight = {
        name: {method: f for method, f in fitted.items() if METHODS[method][1] == 8}
        for name, fitted in fits.items()
    }
    found["best of 8 bits"] = choose(eight, float("-inf"))
    return found | {f"sqnr={decibels:g}": choose(fits, decibels) for decibels in DECIBELS}


def mean_sqnr(fits: Fits) -> dict[str, float]:
    """Kind and method -> mean SQNR of layers' own outputs, in dB."""
    sums: dict[str, list[float]] = {}
    for fitted in fits.values():
        for method, (operator, decibels) in fitted.items():
            sums.setdefault(f"{operator.kind} {method}", []).append(decibels)
    return {name: round(sum(values) / len(values), 2) for name, values in sorted(sums.items())}


def figures(exact: Tensor, found: Tensor, operators: Mapping[str, Operator]) -> dict[str, Any]:
    """One row."""
    cosine = torch.nn.functional.cosine_similarity(exact, found, dim=-1)
    return {
        "in_integers": len(operators),
        "operators": describe(operators),
        "class_token_sqnr": round(sqnr(exact, found), 2),
        "mean_cosine": round(float(cosine.mean()), 5),
    }


@torch.no_grad()
def vectors(model: Any, images: Tensor) -> Tensor:
    """Class tokens behind the final norm, float32 [N, width]."""
    parts = [model(pixel_values=part).last_hidden_state[:, 0] for part in images.split(BATCH)]
    return torch.cat(parts)


def pixels(images: Tensor) -> Tensor:
    """uint8 [N, 28, 28] as DINOv2 reads them: float32 [N, 3, side, side]."""
    pictures = [picture(image) for image in images]
    found: Tensor = image_processor()(images=pictures, return_tensors="pt").pixel_values
    return found


def main() -> None:
    """Measure, and keep `results/nonlinear_dinov2.json`."""
    print(record.write("nonlinear_dinov2", run()))


if __name__ == "__main__":
    typer.run(main)
