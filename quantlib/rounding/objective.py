"""What an error at a block's output costs: the loss that choices and learning inside a block share.

To second order, an error d_t [D] of token t's hidden state costs a KL divergence proportional to
d_t^T F_t d_t, with F_t the Fisher information of the model's own predictions. Its diagonal is the
mean square of sampled gradients, which calibration keeps as a product: the token's weight w_t (its
gradient's squared length) times an output's share f_n. Without gradients every token and output
counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import RoundingError


@dataclass(frozen=True)
class OutputMetric:
    """token_weight: float32 [windows, T]; output_weight: float32 [D]."""

    token_weight: Tensor
    output_weight: Tensor

    @staticmethod
    def fisher(token_weight: Tensor, fisher: Tensor, shape: tuple[int, int]) -> OutputMetric:
        """From the statistics of a linear whose output is added to the block's: the weights of all
        tokens [W * T], and the mean squared gradient of each output [D]; `shape` is (W, T).

        Raises RoundingError when they are not of these windows.
        """
        if token_weight.numel() != shape[0] * shape[1]:
            raise RoundingError(
                f"{token_weight.numel()} token weights are not of {shape[0]} windows of {shape[1]} "
                "tokens: calibrate again with the windows of this recipe"
            )
        shares = fisher / fisher.sum().clamp(min=1e-30)
        return OutputMetric(token_weight.reshape(shape), shares)

    @staticmethod
    def relative(outputs: Tensor) -> OutputMetric:
        """Squared error relative to the exact outputs [W, T, D]: all tokens and outputs alike."""
        energy = outputs.to(torch.float64).square().sum(2).mean().clamp(min=1e-30)
        scale = (1 / energy).to(torch.float32)
        return OutputMetric(torch.ones(outputs.shape[:2]), scale.expand(outputs.shape[2]))

    def tempered(self, power: float) -> OutputMetric:
        """The metric with token weights raised to `power` (1: as they are, 0: all alike), of the
        same mean: a fit by few tokens is a fit to their noise."""
        weight = self.token_weight.clamp(min=0).pow(power)
        weight = weight * (self.token_weight.mean() / weight.mean().clamp(min=1e-30))
        return OutputMetric(weight, self.output_weight)

    def loss(self, error: Tensor, window: int) -> Tensor:
        """Mean over the tokens of one window of its error [T, D]; differentiable."""
        squares = error.square() @ self.output_weight
        return (squares * self.token_weight[window]).mean()
