"""Which kernel computes a product: chosen by device, architecture, number of tokens and scheme.

    on the CPU       the C++ kernels; without a compiler the torch reference
    on NVIDIA GPUs   rounded inputs: CUDA's product of integers where it takes them and the output
                     has 16 bits, otherwise Triton's
                     up to 64 tokens of 16 bits by one integer format: the CUDA kernel for those
                     up to 256 tokens: Triton
                     more: the weight is dequantized once, and torch multiplies
    elsewhere        the torch reference

Attention on a packed KV cache: the C++ kernels in main memory, CUDA's kernel for one new token on
GPUs, otherwise the torch reference (`choose_attention`).

What is missing (CuPy, a driver, Triton) is passed over and said once. `choose` is a pure function
of a `Product` and a `Machine`; `machine` looks around.

QUANTLIB_KERNELS forces a choice, for tests and for measurements: "cpu", "reference", "triton" or
"cuda", or "emulator", which runs the CUDA kernels on the processor. On a processor "triton" means
Triton's interpreter, which wants TRITON_INTERPRET=1 too.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from quantlib.errors import FormatError, UsageError
from quantlib.formats.activation import ActivationSegment
from quantlib.kernels.cuda import segmented
from quantlib.kernels.packed import parse_layout

VARIABLE = "QUANTLIB_KERNELS"
BACKENDS = ("cpu", "cuda", "emulator", "reference", "triton")
"""What the variable may be."""
CPU, TRITON, DENSE, REFERENCE = "cpu", "triton", "dense", "reference"
DECODE, SEGMENTED, ATTENTION = "decode", "segmented", "attention"
"""Choices: the C++ kernels, Triton's products, torch's product of the dequantized weight, the torch
reference; the CUDA kernels (or their emulation) for few tokens, for rounded inputs, and for
attention."""
FEW_TOKENS, MANY_TOKENS = 64, 256
"""Tokens up to which the CUDA kernel, and then Triton, multiply packed weights by inputs that are
not rounded."""
_WITHOUT_NIBBLES = 90
"""An architecture whose tensor cores multiply bytes alone: what it takes, all others take."""


@dataclass(frozen=True)
class Product:
    """A linear, as far as the choice depends on it. activations: how its inputs are rounded, ():
    not at all."""

    tokens: int
    dtype: torch.dtype
    layout: str
    activations: tuple[ActivationSegment, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What there is for tensors of a device.

    kind:   "cpu", "cuda", ...
    cpu:    whether the C++ kernels are there.
    cuda, triton: why CUDA kernels and Triton's cannot be run here; "": they can.
    forced: what QUANTLIB_KERNELS asks for, if it is set.
    """

    kind: str
    cpu: bool
    cuda: str
    triton: str
    forced: str | None = None


def choose(product: Product, machine: Machine) -> str:
    """Which kernel computes the product. Raises UsageError when what is forced is not there."""
    if machine.forced is not None:
        return _forced(product, machine, machine.forced)
    if machine.kind == "cpu":
        return CPU if machine.cpu else REFERENCE
    if machine.kind != "cuda":
        return REFERENCE
    own = None if machine.cuda else cuda_kernel(product)
    if own == SEGMENTED or (own == DECODE and product.tokens <= FEW_TOKENS):
        return own
    if machine.triton:
        return REFERENCE
    return TRITON if product.activations or product.tokens <= MANY_TOKENS else DENSE


def _forced(product: Product, machine: Machine, name: str) -> str:
    missing = {
        "cpu": "" if machine.cpu and machine.kind == "cpu" else "the C++ kernels are not to be had",
        "cuda": machine.cuda,
        "emulator": "" if machine.kind == "cpu" else "the emulator computes in main memory",
        "triton": machine.triton,
    }.get(name, "")
    if missing:
        raise UsageError(f"{VARIABLE}={name}, but {missing}: unset it")
    if name in ("cuda", "emulator"):
        return cuda_kernel(product) or REFERENCE
    return {"cpu": CPU, "triton": TRITON}.get(name, REFERENCE)


def choose_rows(machine: Machine) -> str:
    """Who gives rows of a weight as numbers: CPU, TRITON or REFERENCE. Raises UsageError when what
    is forced is not there."""
    if machine.forced in ("cuda", "emulator"):  # those kernels only multiply
        return REFERENCE
    if machine.forced is not None:
        return _forced(Product(1, torch.float32, ""), machine, machine.forced)
    if machine.kind == "cuda" and not machine.triton:
        return TRITON
    return CPU if machine.cpu else REFERENCE


def choose_attention(taken: bool, machine: Machine) -> str:
    """Who attends to a packed KV cache: CPU, ATTENTION or REFERENCE. taken: whether CUDA's kernel
    takes the cache and the queries. Raises UsageError when what is forced is not there."""
    if machine.forced in ("cuda", "emulator"):
        _forced(Product(1, torch.float32, ""), machine, machine.forced)
        return ATTENTION if taken else REFERENCE
    if machine.kind == "cuda":
        return ATTENTION if taken and machine.forced is None and not machine.cuda else REFERENCE
    return CPU if machine.cpu else REFERENCE


def cuda_kernel(product: Product) -> str | None:
    """The CUDA kernel that multiplies this, None when there is none: inputs of 16 bits by integers
    in one format (DECODE), or rounded to integers, by integers in up to three (SEGMENTED)."""
    if product.dtype not in (torch.float16, torch.bfloat16):
        return None
    if product.activations:
        return SEGMENTED if _integers(product.layout, product.activations) else None
    return DECODE if _one_integer_format(product.layout) else None


@lru_cache(maxsize=4096)
def _one_integer_format(layout: str) -> bool:
    _, segments = parse_layout(layout)
    form = segments[0].format
    return len(segments) == 1 and form.is_integer and not form.shares_exponent


@lru_cache(maxsize=4096)
def _integers(layout: str, activations: tuple[ActivationSegment, ...]) -> bool:
    """Whether kernel (b) has a layout for a weight's segments and those of its inputs."""
    _, segments = parse_layout(layout)
    try:
        segmented.layout(segments, activations, _WITHOUT_NIBBLES)
    except FormatError:
        return False
    return True


@cache
def forced() -> str | None:
    """What QUANTLIB_KERNELS asks for, read once. Raises UsageError on an unknown name."""
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise UsageError(f"{VARIABLE} is {name!r}: use one of {', '.join(BACKENDS)}, or unset it")
    return name


def tiles_allowed() -> bool:
    """Whether the C++ kernels may compute, so that weights are rearranged for them."""
    return forced() in (None, "cpu")


@lru_cache(maxsize=16)
def machine(device: torch.device) -> Machine:
    """What there is for tensors of a device. What is missing on a GPU is said, once."""
    from quantlib.kernels.cpu import library as cpu

    asked = forced()
    on_cpu = device.type == "cpu"
    has_cpu = on_cpu and asked in (None, "cpu") and cpu.load() is not None
    without_cuda = without_triton = "these tensors are in main memory"
    if device.type == "cuda" or asked is not None:
        from quantlib.kernels.cuda import loading
        from quantlib.kernels.triton import launch

        without_cuda, without_triton = loading.why_not(device), launch.why_not(device)
    if device.type == "cuda" and asked is None:
        last = "the torch reference"
        instead = {without_cuda: last if without_triton else "Triton", without_triton: last}
        for missing in filter(None, instead):
            say_once(f"{missing}; {instead[missing]} computes in its place")
    return Machine(device.type, has_cpu, without_cuda, without_triton, asked)


@cache
def say_once(sentence: str) -> None:
    """A warning, the first time only."""
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)
