"""Words, pictures and vectors: what the figures of an evaluation are made of."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.pictures import (
    HIGHEST_PSNR,
    cosines,
    frechet_distance,
    psnr,
    relative_errors,
)
from quantlib.evaluation.words import (
    edit_distance,
    plain_words,
    same_answer,
    spoken_words,
    word_errors,
)

SHORT = st.lists(st.sampled_from("abc"), max_size=6)


def slow_distance(given: list[str], expected: list[str]) -> int:
    """By the definition: the best of replacing, inserting and deleting the last word."""
    if not given or not expected:
        return max(len(given), len(expected))
    replaced = slow_distance(given[:-1], expected[:-1]) + (given[-1] != expected[-1])
    return min(
        replaced, slow_distance(given[:-1], expected) + 1, slow_distance(given, expected[:-1]) + 1
    )


@given(SHORT, SHORT)
def test_the_edit_distance_is_the_definition(first: list[str], second: list[str]) -> None:
    assert edit_distance(first, second) == slow_distance(first, second)


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert plain_words("It's a “Red” three.") == ["it's", "a", "red", "three"]
    assert word_errors("The cat sat", "the cat sat on mats") == (2, 5)
    assert word_errors("", "one two") == (2, 2)


def test_errors_of_speech_are_those_that_can_be_heard() -> None:
    assert spoken_words("Mr. 7's 40, 42; 100 and 007") == [
        *("mister", "7's", "forty", "forty", "two", "100", "and", "007")
    ]
    assert word_errors("10 of Clubs. 5 5", "ten of clubs five five") == (0, 5)
    assert word_errors("7F clubs", "seven of clubs") == (2, 3)
    assert [spoken_words(str(number)) for number in (0, 19, 20, 99)] == [
        ["zero"],
        ["nineteen"],
        ["twenty"],
        ["ninety", "nine"],
    ]


@pytest.mark.parametrize(
    ("given_text", "expected", "same"),
    [
        ("A three.", "three", True),
        ("three", "the Three", True),
        ("thirteen", "three", False),
        ("", "", False),
        ("a", "A", True),  # an article alone is an answer
        ("three three", "three", False),
    ],
)
def test_answers_are_the_same_when_their_words_are(
    given_text: str, expected: str, same: bool
) -> None:
    assert same_answer(given_text, expected) is same


# -- pictures --------------------------------------------------------------------------------------


def test_psnr_is_its_definition_and_equal_pictures_get_the_highest() -> None:
    pixels = torch.full((2, 3, 4, 4), 0.5)
    other = pixels.clone()
    other[0] += 0.1
    found = psnr(other, pixels)
    assert found[0] == pytest.approx(20.0, abs=1e-4)  # float32 of 0.6 - 0.5
    assert found[1] == HIGHEST_PSNR


def test_the_frechet_distance_of_known_gaussians() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(300, 5)) @ generator.normal(size=(5, 5))
    second = generator.normal(size=(300, 5)) @ generator.normal(size=(5, 5)) + 1.0
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    crossed = scipy.linalg.sqrtm(one @ two).real
    apart = first.mean(0) - second.mean(0)
    expected = apart @ apart + np.trace(one + two - 2 * crossed)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(first, first) <= 1e-9 * np.trace(one)
    assert frechet_distance(first + 2.0, first) == pytest.approx(5 * 2.0**2, rel=1e-9)


def test_fewer_samples_than_features_still_have_a_distance() -> None:
    features = np.random.default_rng(1).normal(size=(3, 8))
    found = frechet_distance(features, features[:2])
    assert math.isfinite(found)
    assert found > 0
    assert frechet_distance(features[:1], features[1:2]) > 0


def test_vectors_are_compared_relatively() -> None:
    expected = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    scaled = expected * torch.tensor([1.0, 1.1, -1.0]).view(3, 1, 1)
    assert relative_errors(scaled, expected) == pytest.approx([0.0, 0.01, 4.0], abs=1e-6)
    assert cosines(scaled, expected) == pytest.approx([1.0, 1.0, -1.0], abs=1e-6)


# -- errors ----------------------------------------------------------------------------------------

NUMBERS = st.lists(st.floats(-10, 10), min_size=8, max_size=40)


@given(NUMBERS)
def test_a_ratio_over_ones_is_the_mean_and_its_error_close_to_the_known_one(
    values: list[float],
) -> None:
    ratio, mean = Estimate.ratio(values, [1.0] * len(values)), Estimate.mean(values)
    assert ratio.value == pytest.approx(mean.value, abs=1e-9)
    # The bootstrap's variance lacks (n - 1) / n; 400 draws are right to a few times 4 %.
    known = mean.standard_error * math.sqrt((len(values) - 1) / len(values))
    assert ratio.standard_error == pytest.approx(known, rel=0.2, abs=1e-9)


def test_a_ratio_weighs_samples_by_their_size() -> None:
    assert Estimate.ratio([1, 0], [1, 9]).value == 0.1
    assert Estimate.ratio([3.0], [2.0]) == Estimate(1.5, None, 1)


def test_a_paired_change_is_surer_than_the_difference_of_two_figures() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=50)
    after = before + 0.01 * generator.normal(size=50) + 0.1
    change = Estimate.ratio_change(list(after), list(before), [1.0] * 50)
    assert change.value == pytest.approx(float(after.mean() - before.mean()))
    assert change.standard_error < Estimate.ratio(list(before), [1.0] * 50).standard_error / 20


def test_the_bootstrap_of_a_mean_has_the_error_of_a_mean() -> None:
    values = np.random.default_rng(3).normal(size=60)
    found = Estimate.bootstrap(lambda drawn: float(values[drawn].mean()), 60)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.standard_error == pytest.approx(float(values.std() / math.sqrt(60)), rel=0.2)
    assert Estimate.bootstrap(lambda drawn: 2.0, 1).standard_error is None
