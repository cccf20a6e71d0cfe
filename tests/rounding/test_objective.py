"""The loss of a block's error is the diagonal Fisher form, in the parts calibration keeps."""

from __future__ import annotations

import pytest
import torch

from quantlib.errors import RoundingError
from quantlib.rounding import OutputMetric


def test_it_is_the_fisher_form_when_gradients_are_a_product() -> None:
    """Gradients g_tn with squares a_t b_n: the loss is the mean over tokens of sum_n g^2 e^2."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(3, 10, generator=generator), torch.rand(8, generator=generator)
    squares = a[..., None] * b
    metric = OutputMetric.fisher(squares.sum(2).reshape(-1), squares.mean((0, 1)), (3, 10))
    error = torch.randn(10, 8, generator=generator)
    expected = (squares[1] * error.square()).sum(1).mean()
    torch.testing.assert_close(metric.loss(error, 1), expected)


def test_without_gradients_it_is_the_relative_error() -> None:
    outputs = torch.randn(4, 10, 8, generator=torch.Generator().manual_seed(0))
    metric = OutputMetric.relative(outputs)
    losses = [metric.loss(0.1 * outputs[window], window) for window in range(4)]
    torch.testing.assert_close(torch.stack(losses).mean(), torch.tensor(0.01))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_tempering_keeps_the_mean_and_evens_out(power: float) -> None:
    weight = torch.tensor([[0.0, 1.0, 100.0]])
    tempered = OutputMetric(weight, torch.ones(2)).tempered(power)
    torch.testing.assert_close(tempered.token_weight.mean(), weight.mean())
    share = float(tempered.token_weight.max() / tempered.token_weight.sum())
    assert share == pytest.approx({0.0: 1 / 3, 0.5: 10 / 11, 1.0: 100 / 101}[power], rel=1e-5)


def test_weights_of_other_windows_are_a_sentence() -> None:
    with pytest.raises(RoundingError, match="30 token weights are not of 4 windows"):
        OutputMetric.fisher(torch.ones(30), torch.ones(8), (4, 10))
