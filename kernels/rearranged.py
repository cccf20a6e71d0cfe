"""Other forms of packed weights, made at their first use, which they do not outlive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Form = TypeVar("Form")


class Rearranged(Generic[Form]):
    """A form of weights, kept by their first tensor.

    A tensor that was written to since, or belongs to another weight now, has its form made again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = WeakTensorKeyDictionary()

    def of(self, tensors: list[Tensor], layout: str, make: Callable[[], Form]) -> Form:
        """The form that a weight has, or gets now from `make`."""
        stamp = (layout, tuple((t.data_ptr(), _version(t)) for t in tensors))
        with self._lock:
            known = self._known.get(tensors[0])
            if known is None or known[0] != stamp:
                known = self._known[tensors[0]] = (stamp, make())
            form: Form = known[1]
            return form


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version
