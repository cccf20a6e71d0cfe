"""What compilers make of the attention kernel: no spilled registers, two blocks to a
multiprocessor, and codes read in whole words. Needs nvcc and nvdisasm, or NVRTC; no GPU."""

import pytest
import torch

from quantlib.kernels.cuda import attention, machine_code, toolkit
from quantlib.kernels.cuda import compile as compilers
from quantlib.kernels.cuda.decode import RESERVED_SHARED, SHARED_KB
from quantlib.kernels.kv_format import KvFormat

# Format, head_dim, query heads to a KV head: Llama 3, Qwen 2.5, Gemma's wide heads, ResQ's slices.
CASES = [("int8", 128, 4), ("int4g32", 64, 7), ("int4h16", 128, 4), ("int4", 256, 2)]
MOST_REGISTERS = 65536 // (2 * attention.THREADS)
needs_nvcc = pytest.mark.skipif(
    toolkit.find_nvcc() is None or toolkit.find_nvdisasm() is None,
    reason="needs nvcc and nvdisasm: a CUDA toolkit, or nvidia-cuda-nvcc and nvidia-cuda-nvdisasm",
)


def macros_of(case):
    name, head_dim, heads = case
    return attention.macros(KvFormat.parse(name), head_dim, heads, torch.float16)


def check(case, architecture):
    cubin, resources = compilers.with_nvcc(attention.SOURCE, macros_of(case), architecture)
    assert resources.spilled == resources.stack == 0
    assert resources.registers <= MOST_REGISTERS
    room = SHARED_KB[architecture] * 1024 // 2 - RESERVED_SHARED
    assert attention.shared_bytes(*case[1:]) <= room
    code = machine_code.read(cubin)
    assert code.count("LDL|STL") == 0
    # Queries are read one by one, once; codes and their scales in words, one for each lane of a
    # warp side by side.
    assert code.count(r"LDG\.E\.(U16|S16)") <= 2
    assert code.count(r"LDG\.E\.(U8|S8)") == 0
    assert code.count(r"LDG\.E\.CONSTANT$|LDG\.E$|LDG\.E\.CONSTANT\.SYS|LDG\.E\.SYS") > 0
    # Queries come out of shared memory four at a time.
    assert code.count(r"LDS\.128") > 0
    assert not [name for name in code.instructions if name.startswith("I2F.U8")]


@needs_nvcc
def test_eight_bits_on_ampere():
    check(CASES[0], 80)


@pytest.mark.kernels
@needs_nvcc
@pytest.mark.parametrize("architecture", compilers.ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_nvccs_machine_code(case, architecture):
    check(case, architecture)


@pytest.mark.kernels
@pytest.mark.skipif(toolkit.find_nvrtc() is None, reason="needs NVRTC: nvidia-cuda-nvrtc")
@pytest.mark.parametrize("architecture", compilers.ARCHITECTURES)
def test_nvrtc_takes_the_same_source(architecture):
    cubin = compilers.with_nvrtc(attention.SOURCE, macros_of(CASES[2]), architecture)
    assert cubin.startswith(b"\x7fELF")
