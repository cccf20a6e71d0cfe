"""quantlib's own rows on a small language model: bits as allowed, work that is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.bench.w4a4 import ours
from quantlib.bench.w4a4.limits import Limits
from quantlib.bench.w4a4.subjects import Language
from quantlib.errors import UsageError
from quantlib.pipeline.calibrate import passes

LIMITS = Limits(4.4, 4.5, 5.2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path]) -> Language:
    folder = tiny_llama(
        tmp_path_factory.mktemp("subject") / "model",
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.randint(3, 300, (6, 32), generator=torch.Generator().manual_seed(0))
    return Language.open("small", folder, ids[:4], ids[4:])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Iterator[Path]:
    """One for all tests, which share the work of the first of them."""
    folder = tmp_path_factory.mktemp("cache")
    text = folder / "text.txt"
    text.write_text(sample_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "default_cache", lambda: folder)
        patch.setattr(ours.assets, "wikipedia_text", lambda _: text)
        yield folder


@pytest.fixture(scope="module")
def few(subject: Language, cache: Path) -> Any:
    """The first row, within LIMITS and by seed 0: it calibrates."""
    return ours.compressed(subject, 0, LIMITS)


def kl(subject: Language, found: Any) -> float:
    return subject.figures(found.model)["kl"]


def test_bits_are_those_allowed_and_more_of_them_lose_less(subject: Language, few: Any) -> None:
    many = ours.compressed(subject, 0, Limits(6.2, 5.0, 7.0))
    for found, limits in ((few, (4.4, 4.5, 5.2)), (many, (6.2, 5.0, 7.0))):
        bits = (found.bits.weights, found.bits.activations, found.bits.kv)
        assert all(3 < own <= limit for own, limit in zip(bits, limits, strict=True)), bits
    assert 0 < kl(subject, many) < kl(subject, few)


def test_codes_alone_can_be_limited_too(subject: Language) -> None:
    found = ours.compressed(subject, 0, Limits(4.6, 4.6, 5.2, codes=4.0)).bits
    assert max(found.weight_codes, found.activation_codes, found.kv_codes) <= 4.0 + 1e-6
    assert max(found.weights, found.activations) <= 4.6
    assert found.weights > 4.0
    assert found.activations > 4.0
    assert 4.5 <= found.kv <= 5.2


def test_another_seed_is_another_basis_and_no_other_calibration(
    subject: Language, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "backward", lambda *_: pytest.fail("calibrated again"))
    second = ours.compressed(subject, 1, LIMITS)
    assert "calibrate" in few.notes["seconds"]
    assert "calibrate" not in second.notes["seconds"]
    assert kl(subject, few) != kl(subject, second)


def test_a_refined_row_keeps_the_plan_and_its_bits(subject: Language, few: Any) -> None:
    refined = ours.compressed(subject, 0, LIMITS, refine=True)
    assert refined.bits == few.bits
    assert "re-round" in refined.notes["seconds"]
    assert kl(subject, refined) != kl(subject, few)


def test_whisper_is_not_refined(whisper: Any) -> None:
    with pytest.raises(UsageError, match="no chain of blocks"):
        ours.compressed(whisper, 0, LIMITS, refine=True)
