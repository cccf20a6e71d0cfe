"""Run by test_memory.py in a process of its own: kernels on memory that ends at a forbidden page.

    python guarded.py LIBRARY

Every packed tensor, the tiles and the activations are placed so that the byte after their last one
cannot be touched: reading past the end kills the process. Prints the number of calls that gave the
right answer.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

from quantlib.formats import Scheme, Segment, pack, quantize_rtn
from quantlib.kernels import reference, tile_reference
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.packed import PackedWeight

PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE
SCHEMES = ["w2", "w3g16z", "w4g64", "w5g32z3", "w6tz", "w7g128z", "w8g256", "w4g32zs5", "w8tz"]
FLOATS = ["fp8g64", "fp6", "nvfp4", "mxfp4"]
held: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """A copy of `tensor` whose last byte is the last one of a readable page."""
    size = -(-tensor.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + PAGE)
    held.append(memory)
    offset = size - tensor.nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    copy.copy_(tensor.reshape(-1))
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), PAGE, NO_ACCESS):
        raise OSError("mprotect failed")
    return copy.view(tensor.shape)


def check(library: cpu.Library, isa: str, scheme: str, length: int, rows: int) -> int:
    """Calls made with one weight; raises AssertionError on a wrong answer."""
    form = Scheme.parse(scheme).weight
    generator = torch.Generator().manual_seed(length)
    weight = quantize_rtn(
        torch.randn(rows, length, generator=generator), (Segment(0, length, form),)
    )
    tensors = {suffix: guarded(tensor) for suffix, tensor in pack(weight).items()}
    packed = PackedWeight.from_tensors(tensors, weight.shape, (Segment(0, length, form),))
    stored = list(packed.tensors.values())
    tiles = guarded(library.pack(stored, packed.layout, isa=isa))
    for tensor, again in zip(stored, library.unpack(tiles, packed.layout, isa=isa)):
        assert torch.equal(tensor, again)
    described = library.describe(tiles, packed.layout)
    assert torch.equal(library.dequantize(described, isa=isa), tile_reference.dequantize(weight))
    calls = 3
    for tokens, mode in ((1, "exact"), (3, "exact"), (1, "int8"), (7, "int8"), (17, "int8")):
        x = guarded(torch.randn(tokens, length, generator=generator))
        bias = guarded(torch.randn(rows, generator=generator))
        expected = reference.linear(x, weight, bias, 8 if mode == "int8" else 16)
        found = library.linear(described, x, bias, mode, isa=isa)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        calls += 1
    return calls


def main(path: str) -> None:
    """Check every scheme and ragged length on every instruction set of the library."""
    library = cpu.Library(Path(path))
    calls = 0
    for isa in cpu.ISAS[1:]:
        if not library.supports(isa):
            continue
        for scheme in [*SCHEMES, *FLOATS]:
            for length, rows in ((1, 1), (31, 5), (64, 33), (100, 3), (577, 2)):
                calls += check(library, isa, scheme, length, rows)
    print(calls)


if __name__ == "__main__":
    main(sys.argv[1])
