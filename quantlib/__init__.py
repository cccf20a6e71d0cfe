"""Decides how many bits every part of a model deserves, rounds it to those bits, runs the result.

    import quantlib
    quantlib.compress("path/or/hub-id", size="90MB", out="out")
    model = quantlib.load("out")   # or transformers.AutoModelForCausalLM.from_pretrained("out")

Importing this package imports neither torch nor transformers: `compress` and `load` are looked up
at first use, and transformers learns of packed checkpoints when it is itself imported
(`quantlib.runtime.autoregister`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantlib.errors import QuantlibError
from quantlib.runtime.autoregister import register_with_transformers

if TYPE_CHECKING:
    from quantlib.pipeline.compress import compress
    from quantlib.runtime.load import load

__all__ = ["QuantlibError", "__version__", "compress", "load"]
__version__ = "0.1.0"

_LAZY = {"compress": "quantlib.pipeline.compress", "load": "quantlib.runtime.load"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
