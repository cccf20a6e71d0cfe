"""The least-squares target is the least-squares solution, its step is as long as other windows
bear, and rounding it beats plain GPTQ and GPTAQ's column updates; Qronos is the same thing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantlib.errors import RoundingError
from quantlib.formats import Scheme, dequantize
from quantlib.rounding import Moments, least_squares_targets, round_integers
from quantlib.rounding.asymmetric import RIDGES, best_length, least_squares_step

COLUMNS, TOKENS = 32, 160


def noisy_inputs(seed: int, noise: float = 0.2, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """weight [16, K], inputs X [T, K], and what rounded layers before made of them: X' with an
    error that depends on X (a wrong mixing) and one that does not."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    mixing = (mixing + 0.5 * torch.eye(COLUMNS)) * torch.linspace(1, 0.2, COLUMNS)
    wrong = torch.randn(COLUMNS, COLUMNS, generator=generator) * noise / COLUMNS**0.5
    weight = torch.randn(16, COLUMNS, generator=generator)
    clean = torch.randn(tokens, COLUMNS, generator=generator) @ mixing
    other = torch.randn(tokens, COLUMNS, generator=generator) * noise / 2
    return weight, clean, clean + clean @ wrong + other


def moments(weight: Tensor, clean: Tensor, noisy: Tensor) -> Moments:
    found = Moments.zeros(*weight.shape)
    found.add(noisy, (clean - noisy) @ weight.T, torch.ones(len(clean)))
    return found


def output_error(rounded: Tensor, weight: Tensor, clean: Tensor, noisy: Tensor) -> float:
    """||X W^T - X' Q^T||^2"""
    difference = clean.double() @ weight.double().T - noisy.double() @ rounded.double().T
    return float(difference.square().sum())


def test_a_full_step_without_ridge_is_the_least_squares_solution() -> None:
    weight, clean, noisy = noisy_inputs(0)
    target = weight + least_squares_step(moments(weight, clean, noisy), 1e-9)
    expected = torch.linalg.lstsq(noisy.double(), clean.double() @ weight.double().T).solution.T
    # float32 moments: 2^-24 times the condition number of X' X'^T, about 10^3.
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)
    best = output_error(expected, weight, clean, noisy)
    assert output_error(target, weight, clean, noisy) <= best * (1 + 1e-5)


def test_token_weights_are_repeated_tokens() -> None:
    """A token of weight 2 counts as the same token twice."""
    weight, clean, noisy = noisy_inputs(1, tokens=40)
    lacks = (clean - noisy) @ weight.T
    weighted, repeated = Moments.zeros(*weight.shape), Moments.zeros(*weight.shape)
    weighted.add(noisy, lacks, torch.ones(40).index_fill(0, torch.arange(10), 2.0))
    repeated.add(noisy, lacks, torch.ones(40))
    repeated.add(noisy[:10], lacks[:10], torch.ones(10))
    torch.testing.assert_close(weighted.hessian, repeated.hessian)
    torch.testing.assert_close(weighted.missing, repeated.missing)


@pytest.mark.parametrize("most", [0.2, 1.0])
def test_the_length_of_a_step_is_the_best_on_the_windows_held_back(most: float) -> None:
    """Compared with a search over lengths, by the outputs themselves."""
    weight, clean, noisy = noisy_inputs(2, noise=0.5)
    half = TOKENS // 2
    step = least_squares_step(moments(weight, clean[:half], noisy[:half]), 0.01)
    held = (clean[half:], noisy[half:])
    length, gain = best_length(step, moments(weight, *held), most)

    def error(s: float) -> float:
        return output_error(weight + s * step, weight, *held)

    lengths = torch.linspace(0, most, 201).tolist()
    assert error(length) <= min(map(error, lengths)) * (1 + 1e-6)
    assert 0 < length <= most
    # Both errors in float64, the moments in float32.
    assert gain == pytest.approx(error(0) - error(length), rel=1e-4)


def test_noise_that_says_nothing_moves_nothing_far() -> None:
    """What outputs lack is unrelated to their inputs: a full step fits it, the chosen one hardly
    moves, and the error on a third part of the data stays."""
    generator = torch.Generator().manual_seed(0)
    weight, _, noisy = noisy_inputs(3, tokens=3 * TOKENS)
    lacks = torch.randn(len(noisy), len(weight), generator=generator)
    fit, held = Moments.zeros(*weight.shape), Moments.zeros(*weight.shape)
    ones = torch.ones(TOKENS)
    fit.add(noisy[:TOKENS], lacks[:TOKENS], ones)
    held.add(noisy[TOKENS : 2 * TOKENS], lacks[TOKENS : 2 * TOKENS], ones)
    target = least_squares_targets({"w": weight}, fit, held)["w"]
    full = least_squares_step(fit, 0.01)

    def error(step: Tensor) -> float:
        x, e = noisy[2 * TOKENS :], lacks[2 * TOKENS :]
        return float((e - x @ step.T).square().sum() / e.square().sum())

    assert error(full) > 1.1
    assert error(target.weight - weight) < 1.02


def test_without_a_gain_and_without_leave_the_weight_stays() -> None:
    weight, clean, noisy = noisy_inputs(4)
    none, some = moments(weight, clean, clean), moments(weight, clean, noisy)
    against = Moments(some.hessian, -some.missing)
    for fit, held, most in ((none, none, 1.0), (some, against, 1.0), (some, some, 0.0)):
        target = least_squares_targets({"w": weight}, fit, held, most)["w"]
        assert torch.equal(target.weight, weight)
        assert (target.strength, target.gain) == (0.0, 0.0)


def test_members_are_moved_one_by_one() -> None:
    """Each has its own length and ridge, and what it has alone."""
    weight, clean, noisy = noisy_inputs(5)
    fit = moments(weight, clean[:80], noisy[:80])
    held = moments(weight, clean[80:], noisy[80:])
    together = least_squares_targets({"a": weight[:4], "b": weight[4:]}, fit, held)
    for name, rows in (("a", slice(0, 4)), ("b", slice(4, 16))):
        own = (Moments(m.hessian, m.missing[rows]) for m in (fit, held))
        alone = least_squares_targets({name: weight[rows]}, *own)[name]
        torch.testing.assert_close(together[name].weight, alone.weight)
        assert together[name].ridge == alone.ridge
        assert together[name].ridge in RIDGES


def test_the_scale_of_the_moments_does_not_matter() -> None:
    weight, clean, noisy = noisy_inputs(6)
    found = moments(weight, clean, noisy)
    expected = least_squares_targets({"w": weight}, found, found)["w"]
    for factor in (1e-15, 1e15):
        scaled = Moments(found.hessian * factor, found.missing * factor)
        target = least_squares_targets({"w": weight}, scaled, scaled)["w"]
        torch.testing.assert_close(target.weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_an_input_that_died_keeps_its_weights() -> None:
    """Channel 5 is zero after rounding: nothing can be said through it, its weights stay."""
    weight, clean, noisy = noisy_inputs(7)
    noisy[:, 5] = 0
    found = moments(weight, clean, noisy)
    target = least_squares_targets({"w": weight}, found, found)["w"].weight
    assert torch.equal(target[:, 5], weight[:, 5])
    assert not torch.equal(target, weight)


@pytest.mark.parametrize("scheme", ["w3g32z", "w4g32z"])
def test_rounding_the_target_beats_plain_gptq(scheme: str) -> None:
    """On 12 problems, on tokens neither has seen; plain GPTQ sees the same rounded inputs, but
    keeps W as its target."""
    layout = Scheme.parse(scheme).segments(COLUMNS)
    logs = 0.0
    for seed in range(12):
        weight, clean, noisy = noisy_inputs(seed, tokens=4 * TOKENS)
        parts = [slice(0, 2 * TOKENS), slice(2 * TOKENS, 3 * TOKENS), slice(3 * TOKENS, None)]
        fit, held = (moments(weight, clean[part], noisy[part]) for part in parts[:2])
        target = least_squares_targets({"w": weight}, fit, held)["w"].weight
        errors = []
        for goal in (target, weight):
            (rounded,) = round_integers({"w": goal}, fit.hessian, [layout]).values()
            unseen = clean[parts[2]], noisy[parts[2]]
            errors.append(output_error(dequantize(rounded), weight, *unseen))
        logs += math.log(errors[0] / errors[1]) / 12
    assert math.exp(logs) < 0.9


def column_sweep(weight: Tensor, factor: Tensor, correction: Tensor, scale: Tensor) -> Tensor:
    """Symmetric 4-bit rounding of `weight` [N, K] in float64, column by column: GPTQ's update, and
    GPTAQ's beside it (arXiv:2504.02692): W[:, i:] -= err U[i, i:] - w_i P[i, i:]."""
    work, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for i in range(weight.shape[1]):
        column = work[:, i].clone()
        out[:, i] = (column / scale).round().clamp(-8, 7) * scale
        error = (column - out[:, i]) / factor[i, i]
        work[:, i:] -= torch.outer(error, factor[i, i:]) - torch.outer(column, correction[i, i:])
    return out


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_it_is_at_least_as_good_as_gptaqs_column_updates(alpha: float) -> None:
    """Same scales, same factor, same sweep, 40 problems: only the correction differs.

    P = alpha * triu_strict(dXX^T U^T) U with dXX^T = (X - X')^T X', as GPTAQ's code has it, where
    alpha is 0.25 (the paper's derivation has 1).
    """
    ratios = torch.zeros(40, 2, dtype=torch.float64)
    for seed in range(40):
        weight, clean, noisy = noisy_inputs(seed)
        hessian, cross = (noisy.T @ noisy).double(), ((clean - noisy).T @ noisy).double()
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
        factor = torch.linalg.cholesky(torch.linalg.inv(damped)).mT
        scale = (weight.abs().amax(1) / 7).double()
        gptaq = alpha * (cross @ factor.T).triu(1) @ factor
        none = torch.zeros_like(gptaq)
        target = weight + least_squares_step(moments(weight, clean, noisy), 0.01)
        errors = [
            output_error(column_sweep(goal, factor, correction, scale), weight, clean, noisy)
            for goal, correction in ((target, none), (weight, gptaq), (weight, none))
        ]
        ratios[seed, 0] = math.log(errors[0] / errors[1])
        ratios[seed, 1] = math.log(errors[1] / errors[2])
    ours, theirs = ratios.mean(0).exp().tolist()
    assert theirs < 1, f"GPTAQ as written here does not even beat GPTQ: {theirs:.2f}"
    assert ours < 0.8, f"{ours:.2f} of GPTAQ's error"


def test_qronos_is_gptq_of_the_target_from_the_second_column_on() -> None:
    """Qronos from its definition (arXiv:2505.11695): each column minimises the distance to X W with
    all later ones at their present values, and the later ones are then solved for again. Given the
    same first column, GPTQ's sweep over the target decides the same."""
    weight, clean, noisy = (value.double() for value in noisy_inputs(8))
    scale = weight.abs().amax(1) / 7

    def nearest(column: Tensor) -> Tensor:
        return (column / scale).round().clamp(-8, 7) * scale

    goal, work = clean @ weight.T, weight.clone()
    for i in range(COLUMNS):
        rest = goal - noisy @ work.T + torch.outer(noisy[:, i], work[:, i])
        work[:, i] = nearest(noisy[:, i] @ rest / noisy[:, i].square().sum())
        rest = goal - noisy[:, : i + 1] @ work[:, : i + 1].T
        if i + 1 < COLUMNS:
            work[:, i + 1 :] = torch.linalg.lstsq(noisy[:, i + 1 :], rest).solution.T
    target = torch.linalg.lstsq(noisy, goal).solution.T
    factor = torch.linalg.cholesky(torch.linalg.inv(noisy.T @ noisy)).mT
    swept = target.clone()
    for i in range(COLUMNS):
        value = work[:, 0] if i == 0 else nearest(swept[:, i])
        swept[:, i + 1 :] -= torch.outer((swept[:, i] - value) / factor[i, i], factor[i, i + 1 :])
        swept[:, i] = value
    assert torch.equal(swept[:, 0], work[:, 0])
    torch.testing.assert_close(swept, work, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_a_sentence() -> None:
    weight, clean, noisy = noisy_inputs(0)
    found = moments(weight, clean, noisy)
    with pytest.raises(RoundingError, match="w is"):
        least_squares_targets({"w": weight[:, :8]}, found, found)
    with pytest.raises(RoundingError, match="column for each"):
        least_squares_step(Moments(found.hessian, found.missing[:, :8]), 0.1)
    with pytest.raises(RoundingError, match="inf or nan"):
        least_squares_step(Moments(found.hessian, found.missing * torch.nan), 0.1)
    with pytest.raises(RoundingError, match="no calibration token"):
        least_squares_step(Moments.zeros(*weight.shape), 0.1)
    rank_one = torch.outer(noisy[0], noisy[0])
    wrong = rank_one - 0.5 * torch.diag(rank_one.diagonal())
    with pytest.raises(RoundingError, match="not positive definite"):
        least_squares_step(Moments(wrong, found.missing), 0.01)
