"""Runs an emulated kernel on torch tensors: `Kernel(library).launch(...)`.

All blocks of a launch are alive at once, and the seed decides who runs when. Seed 0 runs warps in
order; any other gives a random schedule, the same one each time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock

from torch import Tensor

_MESSAGE_BYTES = 512
_WARP = 32
_BUSY = Lock()
"""A library has one machine, however often it is loaded."""


class KernelFault(RuntimeError):
    """A kernel did what a GPU forbids or leaves open; the text says what, and which thread."""


@dataclass(frozen=True)
class Counters:
    """What a launch did (`src/machine.h` has the same fields in the same order).

    switches:        of fibers, the emulator's own cost.
    barriers:        passed by a block.
    matrix_products: of warps (mma).
    matrix_loads:    of warps (ldmatrix.x4).
    bank_conflicts:  wavefronts of warp-wide accesses of shared memory beyond those that their bytes
                     need.
    copies:          asynchronous, 16 bytes each; copied_bytes of them came from global memory.
    global_reads, global_writes: of threads, any width.
    """

    switches: int
    barriers: int
    matrix_products: int
    matrix_loads: int
    bank_conflicts: int
    copies: int
    copied_bytes: int
    global_reads: int
    global_writes: int


class _Counters(ctypes.Structure):
    _fields_ = [(field.name, ctypes.c_uint64) for field in fields(Counters)]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int32),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Writable:
    """A tensor that the kernel may write to; others may only be read."""

    tensor: Tensor


Argument = Tensor | Writable | int | float | None
"""A pointer (None: null), an int or a float of 32 bits."""


class Kernel:
    """A kernel's library, from `build.compile_kernel`."""

    def __init__(self, library: Path) -> None:
        """Raises OSError when the file is no library."""
        self._launch = ctypes.CDLL(str(library)).ql_emulator_launch
        self._launch.argtypes = [
            ctypes.POINTER(_Launch),
            ctypes.POINTER(_Counters),
            ctypes.c_char_p,
        ]

    def launch(
        self,
        arguments: Sequence[Argument],
        blocks: int,
        threads: int,
        shared_bytes: int,
        seed: int = 0,
    ) -> Counters:
        """Run the kernel on a grid of `blocks` with `threads` each, a multiple of 32.

        Bounds are those of the tensors' bytes; contiguous tensors in main memory only. Raises
        KernelFault when the kernel breaks a rule of `src/machine.h`, with whatever it has written
        by then left as it is.
        """
        if blocks < 1 or threads < 1 or threads % _WARP:
            raise ValueError(f"a grid of {blocks} blocks of {threads} threads: whole warps, please")
        buffers: list[_Buffer] = []
        values: list[ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float] = []
        for argument in arguments:
            if isinstance(argument, Tensor | Writable):
                buffers.append(_buffer(argument))
                values.append(ctypes.c_void_p(buffers[-1].base))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                values.append(
                    ctypes.c_void_p(None) if argument is None else ctypes.c_int32(argument)
                )
        places = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
        launch = _Launch(
            (ctypes.c_void_p * len(places))(*places),
            (_Buffer * len(buffers))(*buffers),
            len(buffers),
            blocks,
            threads,
            shared_bytes,
            seed,
        )
        counted, message = _Counters(), ctypes.create_string_buffer(_MESSAGE_BYTES)
        with _BUSY:
            failed = self._launch(ctypes.byref(launch), ctypes.byref(counted), message)
        if failed:
            raise KernelFault(message.value.decode())
        return Counters(*(getattr(counted, field.name) for field in fields(Counters)))


def _buffer(argument: Tensor | Writable) -> _Buffer:
    tensor = argument.tensor if isinstance(argument, Writable) else argument
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError("the emulator takes contiguous tensors in main memory")
    return _Buffer(tensor.data_ptr(), tensor.nbytes, isinstance(argument, Writable))
