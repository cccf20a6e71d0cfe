"""KL divergence of llama.cpp's files and of quantlib's engines on the same tokens.

llama.cpp cuts the text into consecutive windows and keeps their tokens beside the full model's
logits; quantlib is scored on those very tokens, by the engine that is timed: rounded activations,
keys and values are all in its figure. Both score the second half of each window against their own
run of the full-precision model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from quantlib.bench import artifacts, assets
from quantlib.bench.engines import Quantlib
from quantlib.bench.peers.llama_cpp import LlamaCpp
from quantlib.calibration.data import load_windows
from quantlib.evaluation.language import evaluate_language
from quantlib.evaluation.reference import Reference, reference_logprobs
from quantlib.models import skeleton
from quantlib.models.source import Source
from quantlib.pipeline.compress import load_tokenizer

WINDOWS, SEQLEN = 24, 512


class Loss(NamedTuple):
    """KL(full precision || quantized) in nats per token; llama.cpp's error is over tokens, ours
    over windows, which is larger."""

    kl: float
    error: float


def of_llama(llama: LlamaCpp, files: Mapping[str, Path]) -> tuple[dict[str, Loss], Tensor]:
    """Engine name -> loss of its GGUF file, by llama.cpp itself; and the windows, int64."""
    text = assets.wikipedia_text("held_out")
    with tempfile.TemporaryDirectory(prefix="quantlib-bench-") as scratch:
        base = Path(scratch, "logits")
        windows = llama.save_base(artifacts.smollm2_f32(llama), text, base, WINDOWS)
        found = {}
        for name, file in files.items():
            measured = llama.divergence(file, base)
            found[name] = Loss(measured.kl, measured.kl_error)
    return found, windows


def own_windows() -> Tensor:
    """Windows for when llama.cpp is not there to choose them."""
    model = assets.fetch_smollm2()
    text = str(assets.wikipedia_text("held_out"))
    return load_windows(text, load_tokenizer(model), SEQLEN, WINDOWS, seed=0)


def of_engines(engines: Sequence[Quantlib], windows: Tensor) -> dict[str, Loss]:
    """Engine name -> loss of what it computes on `windows`, int64 [W, tokens]."""
    reference = _reference(windows)
    return {
        engine.name: _loss(evaluate_language(_Scored(engine), windows, reference))
        for engine in engines
    }


class _Scored(nn.Module):
    """An engine as evaluation wants a model: ids [1, T] in, `.logits` [1, T, V] out."""

    def __init__(self, engine: Quantlib) -> None:
        super().__init__()
        self._engine = engine

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self._engine.logits(ids[0])[None])


def _reference(windows: Tensor) -> Reference:
    source = Source.open(assets.fetch_smollm2())
    dense = skeleton.build(source)
    skeleton.materialize(dense, "", source)
    return reference_logprobs(dense, windows)


def _loss(result: Any) -> Loss:
    return Loss(result.kl.value, result.kl.standard_error or 0.0)
