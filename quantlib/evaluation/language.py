"""How much of a language model is left: perplexity, and KL divergence from the model it came from.

Perplexity of a quantized model moves for two reasons, that it says other things and that it says
them less surely, and on a small text the two can cancel. KL(reference || model) cannot cancel: it
is zero only where the two distributions agree. It needs no labels, so its standard error over
windows is far smaller too. Both are reported, with the share of positions where the most likely
token is the same, each with a standard error over windows (`estimate.py` says why windows).

Numbers: log-softmax in float32, sums over the vocabulary and over tokens in float64, a bounded
number of vocabulary entries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.data import windows_sha256
from quantlib.errors import DataError, ModelError
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.reference import (
    Progress,
    Reference,
    first_scored,
    window_logits,
)
from quantlib.evaluation.tokens import kl_sum, nll_sum, same_top_sum

CHUNK_ELEMENTS = 1 << 22
"""Log-probabilities in flight at once: 16 MB in float32, a handful of copies of which are alive."""

_METRICS = ("nll", "reference_nll", "kl", "same_top")


@dataclass(frozen=True)
class LanguageResult:
    """What one evaluation found. Everything that compares is None without a reference.

    nll: mean negative log-likelihood, nats per scored token; `perplexity` is its exponential.
    kl: mean KL(reference || model), nats per scored token.
    same_top: share of scored positions where both models' most likely token is the same.
    perplexity_ratio: perplexity / reference perplexity; its error is that of the paired
        differences, so it is far smaller than either perplexity's own.
    per_window: nll, reference_nll, kl and same_top -> their means in each window, in order.
    """

    windows: int
    tokens_per_window: int
    windows_sha256: str
    nll: Estimate
    perplexity: Estimate
    reference_nll: Estimate | None = None
    reference_perplexity: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    kl: Estimate | None = None
    same_top: Estimate | None = None
    per_window: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def from_windows(
        per_window: dict[str, list[float]], tokens_per_window: int, sha256: str
    ) -> LanguageResult:
        """Assemble the estimates from per-window means (`nll` at least)."""
        nll = Estimate.mean(per_window["nll"])
        compared: dict[str, Estimate] = {}
        if "kl" in per_window:
            pairs = zip(per_window["nll"], per_window["reference_nll"], strict=True)
            compared = {
                name: Estimate.mean(per_window[name])
                for name in ("reference_nll", "kl", "same_top")
            }
            compared["reference_perplexity"] = compared["reference_nll"].exp()
            compared["perplexity_ratio"] = Estimate.mean(
                [ours - theirs for ours, theirs in pairs]
            ).exp()
        return LanguageResult(
            windows=len(per_window["nll"]),
            tokens_per_window=tokens_per_window,
            windows_sha256=sha256,
            nll=nll,
            perplexity=nll.exp(),
            per_window=per_window,
            **compared,
        )

    def to_json(self) -> dict[str, Any]:
        estimates = {name: getattr(self, name) for name in _ESTIMATES}
        return {
            "windows": self.windows,
            "tokens_per_window": self.tokens_per_window,
            "windows_sha256": self.windows_sha256,
            **{name: value.to_json() for name, value in estimates.items() if value is not None},
            "per_window": self.per_window,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> LanguageResult:
        """Inverse of `to_json`: the estimates follow from the per-window means.

        Raises DataError when `data` is something else.
        """
        try:
            means = data["per_window"]
            per_window = {n: [float(x) for x in means[n]] for n in _METRICS if n in means}
            tokens, sha256 = int(data["tokens_per_window"]), str(data["windows_sha256"])
            return LanguageResult.from_windows(per_window, tokens, sha256)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the evaluation is damaged ({error!r}); evaluate again") from error


_ESTIMATES = (
    "nll",
    "perplexity",
    "reference_nll",
    "reference_perplexity",
    "perplexity_ratio",
    "kl",
    "same_top",
)


def evaluate_language(
    model: nn.Module,
    windows: Tensor,
    reference: nn.Module | Reference | None = None,
    *,
    second_half: bool = True,
    progress: Progress | None = None,
) -> LanguageResult:
    """Score `model` on windows int64 `[W, seqlen]`, against `reference` when there is one.

    model: a causal language model whose forward takes ids and returns `.logits`.
    reference: another such model (run beside this one), or what `reference_logprobs` kept of it.
    second_half: score the tokens that have at least half a window of context (`first_scored`).

    Raises DataError when windows do not fit the model or the reference, ModelError on nan logits.
    """
    if windows.ndim != 2 or windows.shape[0] < 1:
        raise DataError(
            f"windows have shape {tuple(windows.shape)}; expected [windows, tokens] with at least "
            "one window"
        )
    first = first_scored(windows.shape[1], second_half)
    sha256 = windows_sha256(windows)
    _require_vocabulary(model, windows)
    if isinstance(reference, nn.Module):
        reference.eval()
    elif reference is not None and (reference.sha256, reference.first) != (sha256, first):
        raise DataError(
            "the reference was computed on other windows; compute it again with reference_logprobs"
        )
    model.eval()
    per_window: dict[str, list[float]] = {}
    for index, window in enumerate(windows):
        logits = window_logits(model, window, first)
        scores = _score(
            logits, window[first + 1 :], _reference_source(reference, window, index, first)
        )
        for name, value in scores.items():
            if value != value:
                raise ModelError(
                    f"{name} of window {index} is nan: a model's logits are not finite there; its "
                    "weights or its precision are broken"
                )
            per_window.setdefault(name, []).append(value)
        if progress is not None:
            progress(index + 1, len(windows))
    return LanguageResult.from_windows(per_window, windows.shape[1] - 1 - first, sha256)


ReferenceLogits = Callable[[int, int], Tensor]
"""`(start, stop) -> float32 logits [stop - start, V]` of one window's scored positions."""


def _reference_source(
    reference: nn.Module | Reference | None, window: Tensor, index: int, first: int
) -> ReferenceLogits | None:
    if reference is None:
        return None
    if isinstance(reference, nn.Module):
        logits = window_logits(reference, window, first)
        return lambda start, stop: logits[start:stop].float()
    return lambda start, stop: reference.logits(index, start, stop)


@torch.no_grad()
def _score(logits: Tensor, labels: Tensor, reference: ReferenceLogits | None) -> dict[str, float]:
    """Means over the positions of one window: logits `[P, V]`, labels `[P]`."""
    positions, vocabulary = logits.shape
    labels = labels.to(logits.device)
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    totals: dict[str, float] = {}
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        ours = torch.log_softmax(logits[start:stop].float(), dim=-1)
        sums = {"nll": nll_sum(ours, labels[start:stop])}
        if reference is not None:
            raw = reference(start, stop).to(ours.device)
            if raw.shape != ours.shape:
                raise ModelError(
                    f"the model's vocabulary is {ours.shape[1]}, the reference's {raw.shape[1]}: "
                    "they cannot be compared; give the model it was made from"
                )
            theirs = torch.log_softmax(raw, dim=-1)
            sums["reference_nll"] = nll_sum(theirs, labels[start:stop])
            sums["same_top"] = same_top_sum(theirs, ours)
            sums["kl"] = kl_sum(theirs, ours)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
    return {name: total / positions for name, total in totals.items()}


def _require_vocabulary(model: nn.Module, windows: Tensor) -> None:
    config = getattr(model, "config", None)
    size = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    largest = int(windows.max())
    if size is not None and largest >= size:
        raise DataError(
            f"the data has token id {largest} and the model a vocabulary of {size}: the tokenizer "
            "belongs to another model"
        )
