"""Figures from what two models did: rows that can be worked out by hand."""

import math

import pytest
import torch

from quantlib.evaluation.figures import (
    Figure,
    TokenScores,
    answer_figures,
    decoder_figures,
    distance_figures,
    judged_figures,
    speech_figures,
    token_figures,
    vector_figures,
)
from quantlib.evaluation.judge import Verdict
from quantlib.evaluation.spool import Spool


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    assert len({figure.name for figure in figures}) == len(figures)
    return {figure.name: figure for figure in figures}


def test_samples_count_by_their_tokens() -> None:
    ours = TokenScores([1, 3], [2.0, 3.0], [1, 0], [0.5, 0.1], [1, 2])
    theirs = TokenScores([1, 3], [1.0, 3.0], [1, 3])
    rows = by_name(token_figures("text", "token", ours, theirs))
    assert rows["NLL per token (nats)"].model.value == 5 / 4
    assert rows["NLL per token (nats)"].reference.value == 4 / 4
    assert rows["NLL per token (nats)"].change.value == 1 / 4
    assert rows["KL per token (nats)"].model.value == pytest.approx(0.6 / 4)
    assert rows["KL per token (nats)"].reference is None
    assert rows["same likeliest token"].model.value == 3 / 4
    assert rows["true token likeliest"].reference.value == 1.0
    assert len(token_figures("text", "token", theirs, None)) == 2, "nothing to compare with"


def test_a_flip_is_an_answer_that_changes_sides() -> None:
    expected = ["three", "four", "five", "six"]
    theirs = ["three", "nine", "five", "two"]
    ours = ["A three.", "four", "six", "seven"]
    rows = by_name(answer_figures(ours, expected, theirs))
    assert rows["answers right"].model.value == rows["answers right"].reference.value == 2 / 4
    assert rows["answers right"].change.value == 0
    assert rows["answers flipped"].model.value == 2 / 4
    assert rows["answers in other words"].model.value == 4 / 4
    assert list(by_name(answer_figures(ours, expected, None))) == ["answers right"]


def test_the_word_error_rate_is_of_all_words_together() -> None:
    spoken = ["one two three four", "five"]
    rows = by_name(speech_figures(["one two four", "six"], spoken, spoken))
    assert rows["word error rate"].model.value == 2 / 5
    assert rows["word error rate"].reference.value == 0
    assert rows["words changed"].model.value == 2 / 5


def verdict(features: torch.Tensor, **answers: list[str]) -> Verdict:
    return Verdict(features, answers)


def test_pictures_are_right_when_the_judge_sees_what_was_asked_for() -> None:
    asked = [{"digit": "one", "color": "red"}, {"digit": "two"}, {}]
    none = torch.zeros(3, 2)
    ours = verdict(none, digit=["one", "one", "one"], color=["red", "red", "red"])
    theirs = verdict(none, digit=["one", "two", "one"], color=["blue", "red", "red"])
    rows = by_name(judged_figures("image", asked, ours, theirs))
    assert (rows["digit right"].model.value, rows["digit right"].reference.value) == (0.5, 1.0)
    assert (rows["color right"].model.value, rows["color right"].reference.value) == (1.0, 0.0)
    assert rows["color right"].model.samples == 1
    assert rows["all of it right"].model.value == rows["all of it right"].reference.value == 0.5


def test_distances_are_to_the_truth_and_to_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    true = verdict(torch.randn(40, 3, generator=generator))
    near, far = verdict(true.features + 0.1), verdict(true.features + 1.0)
    rows = by_name(distance_figures("image", far, near, true))
    truth = rows["Frechet distance to true pictures"]
    assert truth.model.value == pytest.approx(3.0, rel=1e-5)
    assert truth.reference.value == pytest.approx(0.03, rel=1e-4)
    apart = rows["Frechet distance to the reference's"].model
    assert apart.value == pytest.approx(3 * 0.9**2, rel=1e-5)
    assert apart.standard_error <= 1e-6, "each resample is the same shift"


def test_a_decoder_is_judged_against_the_truth_and_the_reference() -> None:
    true = torch.full((4, 3, 2, 2), 0.5)
    rows = by_name(decoder_figures(true + 0.1, true + 0.05, true))
    assert rows["PSNR to true pictures (dB)"].model.value == pytest.approx(20, abs=1e-3)
    assert rows["PSNR to true pictures (dB)"].change.value == pytest.approx(
        -20 * math.log10(2), abs=1e-3
    )
    reference = rows["PSNR to the reference's pictures (dB)"].model.value
    assert reference == pytest.approx(-20 * math.log10(0.05), abs=1e-3)


def test_vectors_of_samples_of_different_length() -> None:
    expected = [torch.ones(2, 4), torch.ones(5, 4)]
    ours = [1.1 * expected[0], 0.8 * expected[1]]
    rows = by_name(vector_figures("vectors", "true vectors", ours, expected, expected))
    error = rows["relative error to true vectors"]
    assert error.model.value == pytest.approx((0.01 + 0.04) / 2, rel=1e-5)
    assert error.reference.value == 0
    assert rows["cosine to true vectors"].model.value == pytest.approx(1.0)


def test_a_spool_gives_matrices_back_in_any_order() -> None:
    matrices = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (2, 1, 4)]
    with Spool() as spool:
        for matrix in matrices:
            spool.add(matrix)
        for index in (2, 0, 1, 2):
            assert torch.equal(spool[index], matrices[index])
        assert len(spool) == 3
