"""Targets are judged on ratios of the same row or run; what was not measured is not judged."""

from typing import Any

import pytest

from quantlib.bench import targets

BITS = {"int4": 4, "dense": 16}
SHAPE = {"N": 4096, "K": 4096}


def kernel_row(scheme: str, tokens: int, ms: float, **rest: Any) -> dict[str, Any]:
    row = {"scheme": scheme, **SHAPE, "M": tokens, "ms": ms, "times_as_fast": {}, "roof_ms": ms}
    return row | rest


def judged(rows: list[dict[str, Any]]) -> dict[str, tuple[float, bool]]:
    found = targets.of_kernels(rows, BITS)
    return {f"{t.where}: {t.what}": (t.value, t.met) for t in found}


def test_one_token_is_judged_by_bandwidth_and_best_peer() -> None:
    row = kernel_row("w4g128", 1, 1.0, roof_ms=0.92, times_as_fast={"int4": 1.5, "dense": 9.0})
    found = judged([row])
    where = "w4g128 4096x4096 M=1: "
    assert found[where + "share of the read bandwidth"] == (pytest.approx(0.92), True)
    assert found[where + "speed against the best peer"] == (pytest.approx(1.5), False)


def test_eight_tokens_are_compared_with_int4_alone() -> None:
    row = kernel_row("w4g128", 8, 1.0, times_as_fast={"int4": 3.6, "dense": 1.0})
    assert list(judged([row]).values()) == [(pytest.approx(3.6), True)]
    assert judged([kernel_row("w4g128", 8, 1.0, times_as_fast={"dense": 1.0})]) == {}


def test_many_tokens_are_compared_with_any_precision_at_every_width() -> None:
    rows = [
        kernel_row(f"w{b}g128", 512, 1.0, times_as_fast={"int4": 9, "dense": 2.2})
        for b in range(2, 9)
    ]
    assert list(judged(rows).values()) == [(pytest.approx(2.2), True)] * 7


def test_widths_are_compared_per_byte() -> None:
    """Half the bytes in 60 % of the time: 0.83 per byte. Twice the bytes in twice the time: 1."""
    rows = [
        kernel_row("w4g128", 1, 1.0, bytes=100),
        kernel_row("w2g128", 1, 0.6, bytes=50, speed_of_w4g128=1 / 0.6),
        kernel_row("w8g128", 1, 2.0, bytes=200, speed_of_w4g128=0.5),
    ]
    found = judged(rows)
    assert found["w2g128 4096x4096 M=1: speed per byte against 4 bits"] == (
        pytest.approx(5 / 6),
        False,
    )
    assert found["w8g128 4096x4096 M=1: speed per byte against 4 bits"] == (1.0, True)


def test_other_shapes_and_schemes_are_not_judged() -> None:
    assert judged([kernel_row("w4g64z5s5", 128, 1.0, times_as_fast={"dense": 1.0})]) == {}
    assert judged([kernel_row("w4g128", 128, 1.0, times_as_fast={"dense": 1.0}) | {"N": 96}]) == {}


def model_row(engine: str, nbytes: int, decode: float, kl: float | None = None) -> dict[str, Any]:
    return {
        "model": "m", "engine": engine, "bytes": nbytes, "decode_tok_s": decode,
        "prefill_tok_s": 10 * decode, "kl": kl,
    }  # fmt: skip


def test_a_model_is_judged_at_no_more_bytes() -> None:
    rows = [
        model_row("peer", 100, 10.0, kl=0.2),
        model_row("quantlib int8", 99, 20.0, kl=0.1),
        model_row("quantlib larger", 101, 90.0, kl=0.1),
        model_row("other", 50, 90.0),
    ]
    found = targets.of_models(rows, "peer", {"m": 1.5})
    assert [(t.value, t.least, t.met) for t in found] == [
        (2.0, 1.5, True),
        (2.0, 2.5, False),
        (2.0, 1.0, True),
    ]


def test_without_the_peer_or_a_kl_there_is_nothing_to_judge() -> None:
    assert targets.of_models([model_row("quantlib", 1, 1.0)], "peer", {"m": 1.5}) == []
    rows = [model_row("peer", 100, 1.0, kl=0.2), model_row("quantlib", 99, 1.0)]
    assert not [t for t in targets.of_models(rows, "peer", {"m": 1.5}) if "KL" in t.what]


def test_memory() -> None:
    row = {"model": "m", "bytes": 1e9, "resident_bytes": 1.25e9}
    (found,) = targets.of_footprints([row])
    assert (found.what, found.value) == ("memory allowed over used", pytest.approx(1.0))
    assert found.met
    assert not targets.of_footprints([row | {"resident_bytes": 1.26e9}])[0].met


def test_nan_is_never_a_success() -> None:
    assert not targets.Target("here", "ratio", float("nan"), 1.0).met
