"""`bench.compiled`: what is said of the whole model lies on the line through two small ones."""

from pathlib import Path

import pytest

from quantlib.bench import checkpoints, compiled
from quantlib.bench.checkpoints import LlamaShape
from quantlib.kernels.cpu import library

TINY = LlamaShape("tiny", 3, 64, 96, 4, 2, 32, 160, tied=True)


def test_the_whole_model_is_on_the_line_through_the_small_ones() -> None:
    rows = [
        {"way": way, "layers": layers, "ms": fixed + per_layer * layers}
        for way, fixed, per_layer in (("native", 0.5, 0.1), ("compiled", 1.0, 0.3))
        for layers in (2, 6)
    ]
    native, other = compiled.whole_model(rows, 30)
    assert (native["way"], other["way"]) == ("native", "compiled")
    assert native["full_ms"] == pytest.approx(3.5)
    assert native["of_native"] == 1.0
    assert other["layer_ms"] == pytest.approx(0.3)
    assert other["of_native"] == pytest.approx(10.0 / 3.5)


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels")
def test_the_transformers_model_steps_with_either_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling itself takes too long for a test: what would be compiled runs here as it is."""
    monkeypatch.setattr(compiled.torch, "compile", lambda model, **options: model)
    packed = checkpoints.pack_random(TINY, tmp_path / "p", compiled.SMOLLM2_QUICK)
    for static in (True, False):
        assert compiled.Modules(packed, compiled=static).seconds(3) > 0
