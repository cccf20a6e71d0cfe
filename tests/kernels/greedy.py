"""The likeliest tokens of a packed checkpoint, and which kernels were launched for them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.kernels import accelerated

PROMPT = (5, 200, 17, 301, 44, 99)


def greedy(
    checkpoint: Path, dtype: torch.dtype, count: int
) -> tuple[list[int], Tensor, Counter[str]]:
    """`count` tokens, the logits of the last step, and how often what was launched."""
    launched: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("multiply", "multiply_rounded", "rows"):
            patch.setattr(accelerated, name, counting(name, launched))
        loaded = quantlib.load(checkpoint, mode="scheme", engine="plain", dtype=dtype)
        model, tokens = loaded.model.eval(), list(PROMPT)
        with torch.inference_mode():
            for _ in range(count):
                logits = model(torch.tensor([tokens])).logits[0, -1].float()
                tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :], logits, launched


def counting(name: str, launched: Counter[str]) -> Callable[..., Tensor]:
    """The function of `accelerated`, counted: a product under the kernel that was chosen for it
    too."""
    own = getattr(accelerated, name)

    def counted(*given: Any) -> Tensor:
        launched[name] += 1
        if name != "rows":
            launched[given[0]] += 1
        found: Tensor = own(*given)
        return found

    return counted
