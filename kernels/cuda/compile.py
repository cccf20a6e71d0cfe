"""Compiles a `.cu` file to machine code for one architecture, with nvcc or with NVRTC.

Both get the same macros, and need no CUDA header. Nothing here needs a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda.toolkit import find_nvcc, find_nvrtc

ARCHITECTURES = {
    80: "sm_80",
    86: "sm_86",
    89: "sm_89",
    90: "sm_90a",
    100: "sm_100a",
    120: "sm_120a",
}
"""Compute capability -> what compilers call it, with its own features where it has any."""

_SECONDS = 300
_OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Resources:
    """What ptxas says of a kernel: registers of a thread, bytes of stack and of spilled
    registers."""

    registers: int
    stack: int
    spilled: int


def with_nvcc(
    source: Path, macros: Mapping[str, int], architecture: int, options: Sequence[str] = ()
) -> tuple[bytes, Resources]:
    """A cubin and its resources (of several kernels, those of the first). options: further ones.
    Raises BuildError when nvcc is missing or refuses the source."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "there is no nvcc: install a CUDA toolkit, or pip install nvidia-cuda-nvcc"
        )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        command = [
            str(nvcc),
            *_OPTIONS,
            *options,
            f"-arch={ARCHITECTURES[architecture]}",
            "-cubin",
            "-Xptxas=-v",
            *_defines(macros),
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode != 0:
            raise BuildError(f"nvcc refuses {source.name}:\n{done.stderr.strip()}")
        return cubin.read_bytes(), _resources(done.stderr)


def with_nvrtc(source: Path, macros: Mapping[str, int], architecture: int) -> bytes:
    """A cubin. Raises BuildError when the library is missing or refuses the source."""
    path = find_nvrtc()
    if path is None:
        raise BuildError("there is no NVRTC: pip install nvidia-cuda-nvrtc")
    nvrtc = ctypes.CDLL(str(path))
    options = [
        *_OPTIONS,
        f"-arch={ARCHITECTURES[architecture]}",
        f"-I{source.parent}",
        *_defines(macros),
    ]
    program = ctypes.c_void_p()
    text = source.read_bytes()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, source.name.encode(), 0, None, None
    )
    if status != 0:
        raise BuildError(f"NVRTC cannot be used: status {status}")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given) != 0:
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise BuildError(f"NVRTC refuses {source.name}:\n{log.decode(errors='replace')}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(
    size_of: Callable[..., object], read: Callable[..., object], program: ctypes.c_void_p
) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def _defines(macros: Mapping[str, int]) -> list[str]:
    return [f"-D{name}={value}" for name, value in sorted(macros.items())]


def _resources(log: str) -> Resources:
    """From what `ptxas -v` prints of the only kernel of a file."""
    registers = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    if registers is None or stack is None:
        raise BuildError(f"ptxas does not say what the kernel uses:\n{log.strip()}")
    return Resources(int(registers[1]), int(stack[1]), int(stack[2]) + int(stack[3]))
