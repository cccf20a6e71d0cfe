"""What a rounding error costs: scores of one weight in one scheme, and their standard errors.

The KL divergence between the model and itself with one weight W changed by E is, to second order,
half the Fisher information in the direction of E. With gradients g_t = dL/dy_t of a loss on labels
sampled from the model, and taking gradients of different outputs and tokens as uncorrelated,

    KL per token  ~  1/2 mean_t sum_n g_tn^2 (e_n . x_t)^2  ~  1/2 sum_n fisher_n  e_n H e_n^T

where H is the token-weighted second moment of the inputs (see `calibration.statistics`). The first
form on a sample of tokens gives the standard error, by bootstrap over calibration windows; the
second, on all tokens, the score.

For a tied embedding the two uses add: as a head the Fisher information is exact, `diag(p) - p p^T`,
of which the diagonal is kept; as an embedding, row v matters in proportion to how often token v is
looked up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.calibration.statistics import EmbeddingStatistics, MatrixStatistics
from quantlib.errors import SearchError

BOOTSTRAP_DRAWS = 200


def fisher_score(error: Tensor, statistics: MatrixStatistics, weight: str) -> float:
    """Predicted KL per token, in nats, of the rounding error `error` = Q - W [N, K]."""
    fisher = statistics.fisher.get(weight)
    if fisher is None:
        raise SearchError(f"the statistics of {weight} hold no gradients: use output_score")
    return 0.5 * float(fisher @ _row_energy(error, statistics.hessian))


def output_score(weight: Tensor, error: Tensor, statistics: MatrixStatistics) -> float:
    """Relative squared output error of `error` on `weight` [N, K]: the block-local score where
    there are no gradients."""
    energy = _row_energy(weight, statistics.hessian).sum().clamp_(min=1e-30)
    return float(_row_energy(error, statistics.hessian).sum() / energy)


def row_scores(weight: Tensor, error: Tensor, statistics: MatrixStatistics, name: str) -> Tensor:
    """What every row of an error [N, K] costs, [N]: rows are independent, so these add up to
    `fisher_score`, or where there are no gradients to `output_score`."""
    fisher = statistics.fisher.get(name)
    energy = _row_energy(error, statistics.hessian)
    if fisher is not None:
        return 0.5 * fisher * energy
    return energy / _row_energy(weight, statistics.hessian).sum().clamp_(min=1e-30)


def activation_score(
    weight: Tensor, inputs: Tensor, statistics: MatrixStatistics, name: str
) -> float:
    """What rounding its inputs costs `weight` [N, K] as it will be multiplied.

    inputs: the error of the sampled inputs [S, K], rounded less exact. Predicted KL per token in
    nats where there are gradients; else squared output error relative to the outputs.
    """
    fisher = statistics.fisher.get(name)
    if fisher is None:
        energy = _row_energy(weight, statistics.hessian).sum().clamp_(min=1e-30)
        return float((inputs @ weight.T).square().sum(1).mean() / energy)
    tokens = torch.stack([g.float().square().sum(1) for g in statistics.sample_g.values()]).sum(0)
    share = tokens / tokens.sum().clamp(min=1e-30)
    return 0.5 * float(((inputs @ weight.T).square() * share[:, None]).sum(0) @ fisher)


def embedding_score(
    error: Tensor, statistics: EmbeddingStatistics, head: bool, lookup: bool
) -> float:
    """Predicted KL per token of the error `error` [V, D] of an embedding (`lookup`), a head, or
    both when they are tied."""
    score = 0.0
    if head:
        score += 0.5 * float(statistics.variance @ _row_energy(error, statistics.head_input))
    if lookup:
        frequency = statistics.frequency / statistics.tokens
        score += 0.5 * float(frequency @ (error.square() @ statistics.gradient))
    return score


def relative_error(
    error: Tensor, statistics: MatrixStatistics, weight: str, generator: torch.Generator
) -> float:
    """Standard error of a score divided by the score, by bootstrap over calibration windows.

    Uses the sampled tokens: every window's mean of sum_n g_n^2 (e_n . x)^2 is one observation. 0
    when there are fewer than two windows.
    """
    outputs = statistics.sample_x.float() @ error.T
    if statistics.fisher:
        outputs = outputs * statistics.sample_g[weight].float()
    return _bootstrap(outputs.square().sum(1), statistics.sample_window, generator)


def embedding_relative_error(
    error: Tensor, statistics: EmbeddingStatistics, generator: torch.Generator
) -> float:
    """As `relative_error`, for a head: windows differ in their head inputs."""
    outputs = (statistics.sample_h @ error.T).square() @ statistics.variance
    return _bootstrap(outputs, statistics.sample_window, generator)


def _row_energy(error: Tensor, hessian: Tensor) -> Tensor:
    """e_n H e_n^T for every row, [N]; never negative."""
    return ((error @ hessian) * error).sum(1).clamp_(min=0)


def _bootstrap(values: Tensor, window: Tensor, generator: torch.Generator) -> float:
    """Relative standard error of the mean over windows of the per-token `values` [S]; `window` [S]
    int64."""
    windows, index = torch.unique(window, return_inverse=True)
    if len(windows) < 2:
        return 0.0
    counts = torch.bincount(index, minlength=len(windows)).float()
    means = torch.zeros(len(windows)).index_add_(0, index, values.float()) / counts
    center = float(means.mean())
    if not center > 0:
        return 0.0
    draws = torch.randint(len(windows), (BOOTSTRAP_DRAWS, len(windows)), generator=generator)
    return float(means[draws].mean(1).std()) / center
