"""What the full-precision model says about the windows, kept so that it is computed once.

Log-probabilities of a 49,152-word vocabulary over 12 half windows are 600 MB. But a language
model's logits are a linear map of its last hidden states, so a `HiddenReference` keeps those (7 MB
for the same windows) and its own copy of the output head, and multiplies again when asked: nothing
is rounded, and the model itself can be freed. That is only right when nothing happens between head
and logits, which is not assumed but checked, bit by bit, on every window: the known afterthoughts
(soft capping, logit scales) are replayed, and for any other model the logits are kept as they are
(`LogitReference`), up to a stated limit.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantlib.calibration.data import windows_sha256
from quantlib.checkpoint.disk import atomic_write
from quantlib.errors import DataError, ModelError

MAX_LOGIT_BYTES = 2 << 30
"""Most memory a LogitReference may take."""

AFTERTHOUGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
}
"""What some models do to the head's output, by the name of its number in their config."""

_CACHE_FORMAT = "quantlib-reference-1"

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""


@dataclass(frozen=True)
class HiddenReference:
    """Hidden states `[windows, positions, D]` before the head, and the head to put them through.

    The head's `weight` is `[V, D]`, its `bias` `[V]` or None; `afterthought` is a name from
    AFTERTHOUGHTS with its number. `first` is the first scored position (`first_scored`), and
    `sha256` that of the windows.
    """

    sha256: str
    first: int
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    afterthought: tuple[str, float] | None

    @property
    def nbytes(self) -> int:
        return sum(
            tensor.nbytes for tensor in (self.hidden, self.weight, self.bias) if tensor is not None
        )

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        """Float32 logits `[stop - start, V]` of some scored positions of one window."""
        logits = F.linear(self.hidden[window, start:stop], self.weight, self.bias)
        return _think_again(logits, self.afterthought).float()


@dataclass(frozen=True)
class LogitReference:
    """Logits `[windows, positions, V]` as the model computed them, in its own precision."""

    sha256: str
    first: int
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        """Float32 logits `[stop - start, V]` of some scored positions of one window."""
        return self.values[window, start:stop].float()


Reference = HiddenReference | LogitReference


def first_scored(seqlen: int, second_half: bool) -> int:
    """First scored position: `first .. seqlen - 2` each predict the token after them.

    With `second_half` every scored token has at least half a window of context, which is how the
    peers' own perplexity tools score (llama.cpp's `perplexity`), and how the tables of this project
    are made.
    """
    first = seqlen // 2 if second_half else 0
    if first > seqlen - 2:
        raise DataError(f"windows of {seqlen} tokens leave nothing to score; use at least 4 tokens")
    return first


@torch.no_grad()
def window_logits(model: nn.Module, window: Tensor, first: int) -> Tensor:
    """Logits `[seqlen - 1 - first, V]`, in the model's own precision, of ids `[seqlen]`."""
    keep = window.numel() - first
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    logits: Tensor = model(window.unsqueeze(0).to(model_device(model)), **options).logits[0]
    return logits[-keep:-1]


def reference_logprobs(
    model: nn.Module,
    windows: Tensor,
    *,
    second_half: bool = True,
    cache: str | Path | None = None,
    identity: str = "",
    progress: Progress | None = None,
) -> Reference:
    """Run `model` over windows `[W, seqlen]` once; keep what gives its log-probabilities back.

    With `cache` (a safetensors file), the result is read from there when it was written for the
    same windows, the same half and the same `identity` (a name or fingerprint of the model), and
    computed and written otherwise.

    Raises DataError when only logits can be kept and they exceed MAX_LOGIT_BYTES, ModelError on
    non-finite logits.
    """
    first = first_scored(windows.shape[1], second_half)
    key = {
        "format": _CACHE_FORMAT,
        "windows": windows_sha256(windows),
        "first": str(first),
        "identity": identity,
    }
    if cache is not None and (stored := _read_cache(Path(cache), key)) is not None:
        return stored
    model.eval()
    reference: Reference | None = _keep_hidden(model, windows, first, progress)
    if reference is None:
        reference = _keep_logits(model, windows, first, progress)
    if cache is not None:
        _write_cache(Path(cache), key, reference)
    return reference


def model_device(model: nn.Module) -> torch.device:
    """Where the model's tensors are (a packed model may hold buffers only)."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


# -- keeping -------------------------------------------------------------------------------------


def _keep_hidden(
    model: nn.Module, windows: Tensor, first: int, progress: Progress | None
) -> HiddenReference | None:
    """None when the model has no linear head, or its logits are not that head's output."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Linear):
        return None
    seen: dict[str, Tensor] = {}
    hook = head.register_forward_hook(
        lambda _, args, output: seen.update(hidden=args[0], output=output)
    )
    rows: list[Tensor] = []
    afterthought: tuple[str, float] | None = None
    try:
        for index, window in enumerate(windows):
            seen.clear()
            logits = window_logits(model, window, first)
            _require_finite(logits, index)
            if not seen:
                return None
            positions = slice(-logits.shape[0] - 1, -1)
            if index == 0:
                afterthought = _find_afterthought(model, seen["output"][0, positions], logits)
            if not torch.equal(_think_again(seen["output"][0, positions], afterthought), logits):
                return None
            rows.append(seen["hidden"][0, positions].clone())
            if progress is not None:
                progress(index + 1, len(windows))
    finally:
        hook.remove()
    # A copy: the head is often the embedding too, and callers go on to quantize that in place.
    bias = None if head.bias is None else head.bias.detach().clone()
    weight = head.weight.detach().clone()
    return HiddenReference(
        windows_sha256(windows), first, torch.stack(rows), weight, bias, afterthought
    )


def _keep_logits(
    model: nn.Module, windows: Tensor, first: int, progress: Progress | None
) -> LogitReference:
    rows: list[Tensor] = []
    for index, window in enumerate(windows):
        logits = window_logits(model, window, first)
        _require_finite(logits, index)
        total = logits.nbytes * len(windows)
        if total > MAX_LOGIT_BYTES:
            fitting = MAX_LOGIT_BYTES // logits.nbytes
            raise DataError(
                f"the reference's logits for {len(windows)} windows take {total / 1e9:.1f} GB and "
                f"its head cannot be replayed; use at most {fitting} windows, or shorter ones"
            )
        rows.append(logits.clone())
        if progress is not None:
            progress(index + 1, len(windows))
    return LogitReference(windows_sha256(windows), first, torch.stack(rows))


def _find_afterthought(
    model: nn.Module, output: Tensor, logits: Tensor
) -> tuple[str, float] | None:
    """The entry of AFTERTHOUGHTS that turns the head's output into the logits, bit by bit."""
    if torch.equal(output, logits):
        return None
    config: Any = getattr(model, "config", None)
    config = config and config.get_text_config()
    for name, function in AFTERTHOUGHTS.items():
        number = getattr(config, name, None)
        if isinstance(number, int | float) and torch.equal(function(output, number), logits):
            return name, float(number)
    return None


def _think_again(logits: Tensor, afterthought: tuple[str, float] | None) -> Tensor:
    if afterthought is None:
        return logits
    name, number = afterthought
    return AFTERTHOUGHTS[name](logits, number)


def _require_finite(logits: Tensor, window: int) -> None:
    if torch.isnan(logits).any():
        raise ModelError(
            f"the model's logits for window {window} contain nan; its weights or its precision "
            "(float16?) are broken: load it in float32 or bfloat16 and try again"
        )


# -- cache ---------------------------------------------------------------------------------------


def _write_cache(path: Path, key: dict[str, str], reference: Reference) -> None:
    """Whole or not at all. Raises CheckpointError when it cannot be written."""
    if isinstance(reference, LogitReference):
        tensors, afterthought = {"logits": reference.values}, None
    else:
        tensors = {"hidden": reference.hidden, "weight": reference.weight}
        if reference.bias is not None:
            tensors["bias"] = reference.bias
        afterthought = reference.afterthought
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**key, "afterthought": json.dumps(afterthought)}
    atomic_write(path, safetensors.torch.save(contiguous, metadata), durable=False)


def _read_cache(path: Path, key: dict[str, str]) -> Reference | None:
    """None when the file is missing, damaged, or of other windows or another model."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if any(metadata.get(name) != value for name, value in key.items()):
                return None
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
        sha256, first = key["windows"], int(key["first"])
        if "logits" in tensors:
            return LogitReference(sha256, first, tensors["logits"])
        stored = json.loads(metadata["afterthought"])
        afterthought = None if stored is None else (str(stored[0]), float(stored[1]))
        return HiddenReference(
            sha256, first, tensors["hidden"], tensors["weight"], tensors.get("bias"), afterthought
        )
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
