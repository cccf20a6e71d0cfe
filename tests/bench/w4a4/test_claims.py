"""Claims hold or fail as the means say, and nothing is claimed of rows that are missing."""

from __future__ import annotations

from typing import Any

import pytest

from quantlib.bench.w4a4.claims import Claim, claims, told

BITS = {"weights": 4.4, "weight_codes": 4.1}


def line(method: str, kl: float, spread: float | None = None, model: str = "aligned") -> Any:
    interval = None if spread is None else [kl - spread, kl + spread]
    return {
        "model": model,
        "method": method,
        "seeds": 1 if spread is None else 3,
        "bits": BITS,
        "kl": {"mean": kl, "interval": interval},
    }


def by_text(found: list[Claim]) -> dict[str, Claim]:
    return {claim.text: claim for claim in found}


def test_the_order_of_published_methods() -> None:
    lines = [line("rtn", 9.0), line("smoothquant", 1.5), line("quarot", 1.0), line("resq", 0.4)]
    found = by_text(claims(lines))
    assert found["rtn is at least 2 times as far off as quarot"].holds
    smooth = found["smoothquant is at least 2 times as far off as quarot"]
    assert not smooth.holds
    assert smooth.ratio == pytest.approx(1.5)
    assert found["quarot is farther off than resq"].ratio == pytest.approx(2.5)


@pytest.mark.parametrize(("kl", "holds"), [(0.5, True), (0.3, False)])
def test_leaving_a_projection_out_of_resq(kl: float, holds: bool) -> None:
    (found,) = claims([line("resq_no_b", kl), line("resq", 0.4)])
    assert found.text == "resq is farther off without the value bases"
    assert found.holds is holds


@pytest.mark.parametrize(
    ("ours", "spread", "share", "parted"),
    [(0.2, 0.05, True, True), (0.2, 0.2, True, False), (0.3, 0.01, False, True)],
)
def test_quantlib_beside_resq(ours: float, spread: float, share: bool, parted: bool) -> None:
    found = by_text(claims([line("quantlib", ours, spread), line("resq", 0.4, 0.05)]))
    assert found["quantlib has at most 60% of resq's KL at its true bits"].holds is share
    assert found["their 95 % intervals part (3 and 3 seeds)"].holds is parted


def test_strict_points_say_their_bits() -> None:
    (found,) = claims([line("quantlib_strict", 0.5), line("resq", 0.4)])
    assert found.text.startswith("quantlib_strict (4.40 bits of weights, 4.10 of them codes)")
    assert not found.holds


def test_nothing_is_claimed_without_the_rows() -> None:
    assert claims([line("rtn", 9.0), line("quarot", 1.0), line("quantlib", 0.1)]) == []
    assert claims([line("rtn", 9.0), line("resq", 0.4)]) == []
    other = [line("quarot", 1.0, model="plain"), line("resq", 0.4)]
    assert claims(other) == [], "of another model"


def test_what_is_told_shows_what_fails() -> None:
    text = told(claims([line("quarot", 0.1), line("resq", 0.4)]))
    assert text == "aligned  FAILS    0.25  quarot is farther off than resq"
