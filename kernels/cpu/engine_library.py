"""The native decoder from Python: steps of a model that `engine_model` describes.

`src/engine.h` has the rules of a step. A NativeEngine keeps the description alive as long as it
lives.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

from torch import Tensor

from quantlib.errors import QuantlibError, UsageError
from quantlib.kernels.cpu.engine_model import (
    FAST,
    MODES,
    Decoder,
    Description,
    Layer,
    Linear,
    RowBlocks,
)
from quantlib.kernels.cpu.engine_structs import STRUCTS, Model, Step
from quantlib.kernels.cpu.library import ISAS, Library, row_out_of_range
from quantlib.kernels.kv_format import KvFormat

__all__ = ["FAST", "MODES", "Decoder", "Layer", "Linear", "NativeEngine", "RowBlocks"]

_NO_MEMORY, _NO_SUCH_ISA = 1, 2
_BAD_TOKEN, _BAD_SEQUENCE, _FULL, _BAD_STEP = 17, 18, 19, 20
"""QlEngineStatus; 0 is success. Those of a bad model come with a text of the library's."""


class NativeEngine:
    """A decoder with the KV caches of `sequences` texts of at most `capacity` tokens each."""

    def __init__(
        self,
        library: Library,
        decoder: Decoder,
        sequences: int,
        capacity: int,
        kv: KvFormat | None = None,
        mode: str | None = None,
        isa: str = "best",
        integer_attention: bool | None = None,
    ) -> None:
        """`mode`: a key of MODES for all tiled weights; None: each weight's own.
        `kv`: how keys and values are kept; None: each layer's own way.
        `integer_attention`: multiply packed keys and values in integers (src/attention.h); None: in
        modes that round activations to 8 bits.

        Raises QuantlibError when the library refuses the model (its text says why) or has no memory
        for the caches, UsageError when the processor has no such instruction set, and FormatError
        when the kernels cannot do to an input what its linear asks for.
        """
        self._c = _declared(library)
        self.vocabulary = decoder.vocabulary
        self.sequences, self.capacity = sequences, capacity
        if integer_attention is None:
            integer_attention = mode not in (None, "exact")
        self._description = Description(decoder, sequences, capacity, mode, kv, integer_attention)
        handle = ctypes.c_void_p()
        status = self._c.ql_engine_create(
            ctypes.byref(self._description.model), ISAS.index(isa), ctypes.byref(handle)
        )
        if status == _NO_SUCH_ISA:
            raise UsageError(f"this processor has no {isa}: leave the instruction set to 'best'")
        if status == _NO_MEMORY:
            raise QuantlibError(
                f"no memory for the keys and values of {sequences} x {capacity} tokens: ask for "
                "fewer tokens, or a smaller cache (kv='int8')"
            )
        if status:
            reason = self._c.ql_engine_problem().decode()
            raise QuantlibError(
                f"the native engine refuses this model ({reason}): use engine='plain', and please "
                "report it"
            )
        self._handle = handle
        # The interpreter may be gone when an engine dies with it; a finalizer runs before that.
        self._finalizer = weakref.finalize(self, self._c.ql_engine_destroy, handle)

    def step(
        self,
        tokens: Tensor,
        sequences: Tensor,
        wanted: Tensor,
        threads: int,
        logits: Tensor | None = None,
        best: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> None:
        """Append tokens: int32 [count] each, those of a sequence side by side; see QlStep.

        wanted: int64 [w], rows whose `logits` (float32 [w, vocabulary]) or `best` token (int32 [w])
        are written. hidden_states: float32 [layers + 1, count, hidden], or None. All are contiguous
        and in main memory: callers see to that.
        Raises DataError for a token outside the vocabulary and UsageError for a text that is too
        long; nothing is appended then.
        """
        step = Step(
            tokens=tokens.data_ptr(),
            sequences=sequences.data_ptr(),
            wanted=wanted.data_ptr(),
            logits=_pointer(logits),
            best=_pointer(best),
            hidden_states=_pointer(hidden_states),
            count=len(tokens),
            wanted_count=len(wanted),
            threads=threads,
        )
        self._check(self._c.ql_engine_step(self._handle, ctypes.byref(step)))

    def length(self, sequence: int) -> int:
        """Tokens of a sequence so far."""
        length: int = self._c.ql_engine_length(self._handle, sequence)
        self._check(_BAD_SEQUENCE if length < 0 else 0)
        return length

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence from position `length` on."""
        self._check(self._c.ql_engine_truncate(self._handle, sequence, length))

    def copy(self, source: int, target: int) -> None:
        """Give the sequence `target` the tokens of `source`."""
        self._check(self._c.ql_engine_copy(self._handle, source, target))

    @property
    def memory(self) -> int:
        """Bytes of the caches and of the work space."""
        size: int = self._c.ql_engine_memory(self._handle)
        return size

    def _check(self, status: int) -> None:
        """Raise the sentence that belongs to a QlEngineStatus."""
        if status == _BAD_TOKEN:
            raise row_out_of_range(self.vocabulary)
        if status == _FULL:
            raise UsageError(
                f"a text would be longer than the {self.capacity} tokens that the engine was made "
                "for: make it with a larger capacity"
            )
        if status == _BAD_SEQUENCE:
            raise UsageError(
                f"the engine has sequences 0..{self.sequences - 1}, each as long as it was made, "
                "and takes the tokens of one side by side"
            )
        if status == _BAD_STEP:
            raise UsageError("a step needs tokens, and wants rows of its own")
        if status == _NO_MEMORY:
            raise QuantlibError("not enough memory for the engine's work space: use shorter steps")
        if status:
            raise QuantlibError(f"the native engine failed with status {status}: please report it")


def _declared(library: Library) -> Any:
    """The library's engine functions with their types. Raises OSError when its structs differ."""
    c = library.functions
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    sizes = (int64 * len(STRUCTS))()
    c.ql_engine_struct_bytes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in STRUCTS]:
        raise OSError("the compiled kernels have another interface than this version of quantlib")
    c.ql_engine_create.argtypes = [ctypes.POINTER(Model), int32, ctypes.POINTER(pointer)]
    c.ql_engine_destroy.argtypes, c.ql_engine_destroy.restype = [pointer], None
    c.ql_engine_problem.argtypes, c.ql_engine_problem.restype = [], ctypes.c_char_p
    c.ql_engine_step.argtypes = [pointer, ctypes.POINTER(Step)]
    c.ql_engine_length.argtypes, c.ql_engine_length.restype = [pointer, int32], int64
    c.ql_engine_truncate.argtypes = [pointer, int32, int64]
    c.ql_engine_copy.argtypes = [pointer, int32, int32]
    c.ql_engine_memory.argtypes, c.ql_engine_memory.restype = [pointer], int64
    return c


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
