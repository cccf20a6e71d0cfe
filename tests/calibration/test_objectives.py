"""Objectives: what counts of an output, its loss on the truth, and how far another output is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.calibration.objectives import TokenObjective, VectorObjective
from quantlib.errors import ModelError


def logits(seed: int, *shape: int) -> SimpleNamespace:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(logits=values)


def test_only_the_positions_that_count_are_said() -> None:
    where = torch.tensor([False, True, False, True])
    output = logits(0, 1, 4, 5)
    said = TokenObjective(where, torch.tensor([2, 3])).said(output)
    assert torch.equal(said, output.logits[0, [1, 3]])


def test_the_truth_is_the_likelihood_of_the_labels() -> None:
    output, labels = logits(0, 1, 3, 5), torch.tensor([2, 0, 4])
    found = TokenObjective(labels=labels).truth(output)
    expected = -output.logits[0].log_softmax(-1)[torch.arange(3), labels].sum()
    assert found.terms == 3
    torch.testing.assert_close(found.value, expected)
    # without labels: of what the model itself finds likeliest, which nothing is likelier than
    assert float(TokenObjective().truth(output).value) <= float(found.value)


@given(st.integers(0, 1000))
def test_divergence_of_tokens_is_kl(seed: int) -> None:
    one, other = (logits(seed + n, 4, 7).logits for n in range(2))
    asked = TokenObjective()
    found = asked.divergence(one, other)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), one.log_softmax(-1), reduction="sum", log_target=True
    )
    # float32 sums of 28 terms around 1
    assert float(found.value) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    assert float(asked.divergence(one, one).value) == 0
    assert found.terms == 4


def test_divergence_of_vectors_is_relative_to_the_reference() -> None:
    asked = VectorObjective(lambda output: output)
    reference = torch.full((2, 3), 2.0)
    mine = reference + 0.2
    # each number is off by a tenth of the root mean square: half of 0.01 each
    assert float(asked.divergence(reference, mine).value) == pytest.approx(6 * 0.5 * 0.01, rel=1e-5)
    assert float(asked.divergence(10 * reference, 10 * mine).value) == pytest.approx(
        6 * 0.5 * 0.01, rel=1e-5
    )


def test_the_truth_of_vectors_is_the_target_or_the_unit_of_relative_errors() -> None:
    output = torch.full((2, 3), 2.0)
    target = torch.full((1, 2, 3), 2.2)
    known = VectorObjective(lambda found: found, target).truth(output)
    assert (float(known.value), known.terms) == (pytest.approx(6 * 0.5 * 0.01, rel=1e-5), 2)
    unknown = VectorObjective(lambda found: found).truth(output)
    assert float(unknown.value) == pytest.approx(6 * 0.5)


def test_output_that_is_not_finite_is_no_answer() -> None:
    output = logits(0, 1, 3, 5)
    output.logits[0, 1, 2] = torch.nan
    with pytest.raises(ModelError, match="inf or nan"):
        TokenObjective().said(output)
    with pytest.raises(ModelError, match="inf or nan"):
        VectorObjective(lambda found: found.logits).said(output)
