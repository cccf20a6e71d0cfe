"""Rotations that packed linears do themselves, while they round their inputs.

A rotated model has hooks (`transforms.online`) that multiply inputs of down projections by Hadamard
matrices. On a GPU that is a pass of its own over memory, right before the kernel that rounds; so a
packed linear takes the rotation over from the hook, and asks for both at once where a kernel does
both (`kernels.turned`). Elsewhere it rotates as the hook did.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from quantlib.kernels.cuda import quantizer
from quantlib.transforms import hadamard, online
from quantlib.transforms.changes import Blocks


class InputTurn:
    """A rotation of a linear's inputs by Hadamard matrices of order `size`: as the hook applied it
    (a call), and as the quantizer takes it (`fused`)."""

    def __init__(self, hook: online.Turn, size: int) -> None:
        self.hook, self.size = hook, size

    def __call__(self, x: Tensor) -> Tensor:
        return self.hook(x)

    def fused(self, device: torch.device) -> quantizer.Turn:
        """For inputs on this device."""
        return _fused(self.size, device)


@lru_cache(maxsize=64)
def _fused(size: int, device: torch.device) -> quantizer.Turn:
    dense, sylvester = hadamard.split(size)
    signs = None if dense == 1 else hadamard.signs(dense).to(device)
    return quantizer.hadamard(signs, sylvester)


def take_turn(module: nn.Module) -> InputTurn | None:
    """The rotation that the module's only pre-hook applies to its input, with the hook taken away;
    None, and nothing is changed, where there is another one or none."""
    hooks = list(module._forward_pre_hooks.items())
    if len(hooks) != 1 or module._forward_pre_hooks_with_kwargs:
        return None
    number, hook = hooks[0]
    turn = getattr(hook, "__self__", None)
    if not isinstance(turn, online.Turn) or not isinstance(turn.basis, Blocks):
        return None
    if turn.basis.columns is not None:  # the quantizer rotates all columns
        return None
    del module._forward_pre_hooks[number]
    return InputTurn(turn, turn.basis.size)
