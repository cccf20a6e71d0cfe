"""The bench of integer operators: which rows its table has, from fits that are made up."""

import pytest
import torch

from quantlib.bench import nonlinear
from quantlib.kernels.nonlinear import CANDIDATES, Operator


def fits() -> dict[str, dict[str, tuple[Operator, float]]]:
    """A GELU and a LayerNorm, whose methods get better in the order they are listed in."""
    return {
        kind: {
            method: (Operator(kind, method, 1.0), 10.0 + 5 * place)
            for place, method in enumerate(CANDIDATES[kind])
        }
        for kind in ("gelu", "layer_norm")
    }


def test_rows_are_every_method_alone_and_mixtures_of_them() -> None:
    rows = nonlinear.tables(fits())
    assert set(rows["ibert8"]) == {"gelu", "layer_norm"}
    assert set(rows["fqvit8"]) == {"layer_norm"}  # it has no GELU
    best = {name: operator.method for name, operator in rows["best of 8 bits"].items()}
    assert best == {"gelu": "ivit8", "layer_norm": "fqvit8"}
    enough = {name: operator.method for name, operator in rows["sqnr=25"].items()}
    assert enough == {"gelu": "ivit16", "layer_norm": "fqvit8"}


def test_means_are_of_layers_and_figures_of_vectors() -> None:
    assert nonlinear.mean_sqnr(fits())["layer_norm ivit16"] == pytest.approx(25.0)
    exact = torch.eye(4)
    row = nonlinear.figures(exact, exact * 0.9, {})
    assert row["class_token_sqnr"] == pytest.approx(20.0, abs=0.01)
    assert row["mean_cosine"] == pytest.approx(1.0, abs=1e-5)
