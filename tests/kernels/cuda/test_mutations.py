"""The tests are not blind: each of these faults, put into the kernel's source, is noticed.

A fault is a piece of the source and what stands there instead. It is noticed when the emulator
refuses the kernel, when a result is not right, or, for those that only cost time, when there are
bank conflicts.
"""

import shutil
from pathlib import Path

import pytest
import torch

from quantlib.kernels.cpu.build import BuildError, find_compiler
from quantlib.kernels.cuda import decode
from quantlib.kernels.emulator.machine import KernelFault

from .emulated import expected, multiply

# Name -> file, what stands there, what the fault is.
FAULTS = {
    "a wait that lets one stage too many be on its way": (
        "decode_gemm.cu",
        "ptx::wait_copies<kStages - 3>();",
        "ptx::wait_copies<kStages - 2>();",
    ),
    "no wait before the first stage": (
        "decode_gemm.cu",
        "ptx::wait_copies<kStages - 2>();\n  __syncthreads();",
        "__syncthreads();",
    ),
    "no barrier between stages": (
        "decode_gemm.cu",
        "ptx::wait_copies<kStages - 3>();\n    __syncthreads();",
        "ptx::wait_copies<kStages - 3>();",
    ),
    "the next stage is fetched before everybody has left it": (
        "decode_gemm.cu",
        "ptx::wait_copies<kStages - 3>();\n    __syncthreads();\n    ring.fetch();",
        "ring.fetch();\n    ptx::wait_copies<kStages - 2>();\n    __syncthreads();",
    ),
    "no barrier between warps that add up": (
        "decode_gemm.cu",
        "          ptx::store_shared(at, sum);\n        }\n      }\n    }\n    __syncthreads();",
        "          ptx::store_shared(at, sum);\n        }\n      }\n    }",
    ),
    "partial sums published before all threads have written them": (
        "decode_gemm.cu",
        "  if (!owner) {\n    __syncthreads();",
        "  if (!owner) {",
    ),
    "an owner that does not wait": (
        "decode_gemm.cu",
        "while (ptx::load_acquire(p.flags + other) == 0) {\n        }",
        "",
    ),
    "flags that stay up": (
        "decode_gemm.cu",
        "ptx::store_release(p.flags + other, 0);",
        "ptx::store_release(p.flags + other, 1);",
    ),
    "one partial sum is left out": (
        "decode_gemm.cu",
        "#pragma unroll 1\n      for (int other = run + 1; other < others_end; ++other) {\n"
        "        const float4*",
        "#pragma unroll 1\n      for (int other = run + 2; other < others_end; ++other) {\n"
        "        const float4*",
    ),
    "inputs are not swizzled": (
        "decode_gemm.cu",
        "(column ^ (token & 7)) * 16",
        "column * 16",
    ),
    "only the writing side is swizzled": (
        "decode_gemm.cu",
        "inputs + token * 128 + (column ^ (token & 7)) * 16",
        "inputs + token * 128 + column * 16",
    ),
    "the zero point of a format one bit wider": (
        "decode_gemm.cu",
        "constexpr float kMiddle = 1 << (kBits - 1);",
        "constexpr float kMiddle = 1 << kBits;",
    ),
    "the middle of the range is off by one": (
        "dequantize.h",
        "(1u << (bits - 1 - low));",
        "(1u << (bits - 1 - low)) + 1;",
    ),
    "scales of the row eight below": (
        "decode_gemm.cu",
        "total[rows][tokens][j] += scale[j / 2] * sum;",
        "total[rows][tokens][j] += scale[1 - j / 2] * sum;",
    ),
    "scales of the group before": (
        "decode_gemm.cu",
        "kPeriod == 4 ? p.group_of(slab) :",
        "kPeriod == 4 ? p.group_of(slab) - (slab > 0) :",
    ),
    "groups that run on": (
        "decode_gemm.cu",
        "    set_zero(group);\n    set_zero(inputs);\n  }\n};",
        "    set_zero(inputs);\n  }\n};",
    ),
    "tokens are masked one late": (
        "decode_gemm.cu",
        "token < p.M && k < p.K",
        "token <= p.M && k < p.K",
    ),
    "columns are masked in eights": (
        "decode_gemm.cu",
        "work::least(p.K - k, 8)",
        "8",
    ),
    "rows are masked one late": (
        "decode_gemm.cu",
        "if (n + i < p.N) {",
        "if (n + i <= p.N) {",
    ),
    "a stripe of the weight beyond its end": (
        "decode_gemm.cu",
        "const bool exists = slab < p.slabs && along < p.strips * kStripChunks;",
        "const bool exists = slab < p.slabs;",
    ),
    "codes from the wrong bits": (
        "dequantize.h",
        "if (at - base + bits > kMantissa) base = at;",
        "if (at - base + bits > kMantissa + 2) base = at;",
    ),
    "runs that overlap by a step": (
        "work.h",
        "left += plan.begin(run + 1) - plan.begin(run);",
        "left += plan.begin(run + 1) - plan.begin(run) + 1;",
    ),
}
# Formats with everything that the faults touch: groups that span slabs and groups inside of one.
SCHEMES = ("w4g64z", "w3g128z5")


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def mutated(folder: Path, name: str | None) -> Path:
    """The kernel in a folder of its own, with the fault."""
    sources = folder / "src"
    shutil.copytree(decode.SOURCE.parent, sources)
    if name is not None:
        file, here, instead = FAULTS[name]
        text = (sources / file).read_text()
        assert here in text, "the source has moved on: say the fault anew"
        (sources / file).write_text(text.replace(here, instead))
    return sources / decode.SOURCE.name


def faults_of(draw, source: Path, scheme: str) -> str | None:
    """What a run of the kernel is found to have done wrong; None: nothing."""
    weight, _ = draw(141, [(scheme, 733)], seed=1)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(9, 733, generator=generator).half()
    exact, bound = expected(weight, inputs)
    for seed in range(4):
        try:
            output, counters = multiply(
                weight, inputs, blocks=3, seed=seed, stages=3, source=source, launches=2
            )
        except (KernelFault, AssertionError) as fault:
            return str(fault)
        if not ((output.double() - exact).abs() <= bound).all():
            return "wrong numbers"
        if counters.bank_conflicts:
            return "bank conflicts"
    return None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_itself_is_found_right(draw, tmp_path, scheme):
    assert faults_of(draw, mutated(tmp_path, None), scheme) is None


@pytest.mark.kernels
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(draw, tmp_path, name):
    source = mutated(tmp_path, name)
    assert any(faults_of(draw, source, scheme) for scheme in SCHEMES)
