"""From a `.cu` file to something that can be launched on a GPU: NVRTC, the cache, CuPy.

A kernel is compiled for one set of macros and one architecture, by NVRTC, unless a cubin of just
that is there (`cache.py`). CuPy loads it, on the device that is current, and launches it on torch's
stream. Only `Driver` knows CuPy: tests put another one in its place.
"""

from __future__ import annotations

import importlib.util
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import cache as cubins
from quantlib.kernels.cuda.compile import ARCHITECTURES, with_nvrtc
from quantlib.kernels.cuda.toolkit import find_nvrtc

Number = np.generic
"""An argument of a launch: its dtype is its size."""


class Driver(Protocol):
    """What loads machine code and starts it."""

    def load(self, cubin: bytes, name: str, shared_bytes: int) -> Any:
        """The kernel `name` of a cubin, allowed that much shared memory, on the current device."""

    def launch(
        self,
        kernel: Any,
        blocks: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Number],
    ) -> None:
        """Start it on a stream. Returns at once, and allocates nothing."""


class CupyDriver:
    """CUDA's driver, through CuPy."""

    def load(self, cubin: bytes, name: str, shared_bytes: int) -> Any:
        """See `Driver`."""
        import cupy

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            kernel = cupy.RawModule(path=file.name).get_function(name)
            # Setting it loads the module: the file is not needed any more.
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        return kernel

    def launch(
        self,
        kernel: Any,
        blocks: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Number],
    ) -> None:
        """See `Driver`."""
        import cupy

        with cupy.cuda.ExternalStream(stream):
            kernel((blocks,), (threads,), tuple(arguments), shared_mem=shared_bytes)


class Loader:
    """Kernels of one device, each loaded at its first use."""

    def __init__(
        self,
        driver: Driver,
        architecture: int,
        compile_source: Callable[[Path, Mapping[str, int], int], bytes] = with_nvrtc,
    ) -> None:
        """architecture: a key of `compile.ARCHITECTURES`."""
        self.driver, self.architecture = driver, architecture
        self._compile = compile_source
        self._loaded: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def kernel(self, source: Path, name: str, macros: Mapping[str, int], shared_bytes: int) -> Any:
        """The kernel, from memory, from a file, or compiled. Raises BuildError when NVRTC is
        missing or refuses the source."""
        key = (source, name, tuple(sorted(macros.items())))
        with self._lock:
            if key not in self._loaded:
                cubin = self._cubin(source, macros)
                self._loaded[key] = self.driver.load(cubin, name, shared_bytes)
            return self._loaded[key]

    def _cubin(self, source: Path, macros: Mapping[str, int]) -> bytes:
        name = cubins.file_name(source, macros, self.architecture)
        cubin = cubins.find(name)
        if cubin is None:
            cubin = self._compile(source, macros, self.architecture)
            cubins.keep(name, cubin)
        return cubin


def architecture_of(capability: tuple[int, int]) -> int | None:
    """The key of `compile.ARCHITECTURES` whose machine code runs on a compute capability, None when
    there is none.

    Only its own: code for 8.x would run on later ones of desktops, but all of those are known, and
    from 9.0 on it is compiled for the features of one capability.
    """
    own = 10 * capability[0] + capability[1]
    return own if own in ARCHITECTURES else None


def why_not(device: torch.device) -> str:
    """Why CUDA kernels cannot be run on a device; "" when they can."""
    if device.type != "cuda":
        return f"CUDA kernels run on NVIDIA GPUs, not on {device.type!r}"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy, which loads kernels, is not installed: pip install 'quantlib-torch[cuda]'"
    if architecture_of(torch.cuda.get_device_capability(device)) is None:
        name = torch.cuda.get_device_name(device)
        return f"there are CUDA kernels for {', '.join(ARCHITECTURES.values())}, and {name} is none"
    if find_nvrtc() is None and not cubins.PREBUILT.is_dir():
        return "NVRTC, which compiles CUDA kernels, is missing: pip install nvidia-cuda-nvrtc"
    return ""


@cache
def loader_for(device: torch.device) -> Loader:
    """The loader of a GPU. Raises BuildError unless `why_not` is ""."""
    if reason := why_not(device):
        raise BuildError(reason)
    architecture = architecture_of(torch.cuda.get_device_capability(device))
    assert architecture is not None  # why_not says so
    return Loader(CupyDriver(), architecture)
