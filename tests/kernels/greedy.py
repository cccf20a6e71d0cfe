"""The likeliest tokens of a packed checkpoint, and which kernels were launched for them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.kernels import accelerated, dispatch, turned
from quantlib.kernels.cuda import attend
from quantlib.runtime.packed_cache import packed_cache

PROMPT = (119, 249, 177, 355, 266, 26)
"""The likeliest tokens behind it lead by more than a standard deviation of the logits in the model
with inputs of 4 bits (`test_dispatch_models.py`), where a code that tips over moves much."""
ROTATING = {"multiply_turned": dispatch.SEGMENTED, "turned_by_triton": dispatch.TRITON}
"""Functions that rotate inputs too -> the kernel that multiplies them."""


def greedy(
    checkpoint: Path, dtype: torch.dtype, count: int, device: str = "cpu", fused: bool = True
) -> tuple[list[int], Tensor, Counter[str]]:
    """`count` tokens by transformers and packed modules: the prompt at once, then token by token
    with a KV cache, packed where CUDA's kernels (or the emulator) attend. With the logits of the
    last step, and how often what was launched.

    fused: False leaves rotations to hooks and keys to transformers' cache, as on the CPU.
    """
    launched: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("multiply", "multiply_rounded", *ROTATING, "rows"):
            patch.setattr(accelerated, name, counting(name, launched))
        patch.setattr(attend, "attend", counting("attend", launched))
        if not fused:
            patch.setattr(turned, "fuses", lambda *_: False)
        loaded = quantlib.load(checkpoint, mode="scheme", engine="plain", dtype=dtype)
        model, tokens = loaded.model.eval().to(device), list(PROMPT)
        given, cache = tokens, packed_cache(model) if fused else None
        with torch.inference_mode():
            for _ in range(count):
                ids = torch.tensor([given], device=device)
                found = model(ids, past_key_values=cache, use_cache=True)
                logits, cache = found.logits[0, -1].float().cpu(), found.past_key_values
                given = [int(logits.argmax())]
                tokens += given
    return tokens[len(PROMPT) :], logits, launched


def natively(checkpoint: Path, count: int) -> list[int]:
    """`count` tokens by the native engine and its packed cache, inputs rounded as schemes say."""
    engine = quantlib.load(checkpoint, mode="scheme").make_engine(1, 64)
    tokens = [int(engine.prefill(PROMPT).argmax())]
    while len(tokens) < count:
        tokens.append(int(engine.decode_best(tokens[-1:])))
    return tokens


def counting(name: str, launched: Counter[str]) -> Callable[..., Tensor]:
    """The function of that name, counted: a product under the kernel that was chosen for it too."""
    own = getattr(attend if name == "attend" else accelerated, name)

    def counted(*given: Any, **named: Any) -> Tensor:
        launched[name] += 1
        if name in ROTATING:
            launched[ROTATING[name]] += 1
        elif name.startswith("multiply"):
            launched[given[0]] += 1
        found: Tensor = own(*given, **named)
        return found

    return counted
