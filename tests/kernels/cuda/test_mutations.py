"""The tests are not blind: each of these faults, put into the kernel's source, is noticed.

A fault is a piece of the source (or several) and what stands there instead. It is noticed when the
emulator refuses the kernel, when a result is not right, or, for those that only cost time, when
there are bank conflicts.
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
        "ptx::wait_copies<kStages - 2>();\n    __syncthreads();",
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
        "          }\n        }\n      }\n      __syncthreads();\n    }",
        "          }\n        }\n      }\n    }",
    ),
    "partial sums published before all threads have written them": (
        "finish.h",
        "  if (!owner) {\n    __syncthreads();",
        "  if (!owner) {",
    ),
    "an owner that does not wait": (
        "finish.h",
        "while (ptx::load_acquire(flags + other) == 0) {\n      }",
        "",
    ),
    "flags that stay up": (
        "finish.h",
        "ptx::store_release(flags + other, 0);",
        "ptx::store_release(flags + other, 1);",
    ),
    "one partial sum is left out": (
        "finish.h",
        "#pragma unroll 1\n      for (int other = run + 1; other < others_end; ++other) {\n"
        "        const float4*",
        "#pragma unroll 1\n      for (int other = run + 2; other < others_end; ++other) {\n"
        "        const float4*",
    ),
    "only the reading side is swizzled": (
        "decode_gemm.cu",
        "kInputsAt + (thread ^ (thread / 8 & 7)) * 16",
        "kInputsAt + thread * 16",
    ),
    "only the writing side is swizzled": (
        "decode_gemm.cu",
        "return column ^ (token & 7);",
        "return column;",
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
    "inputs are not swizzled at all": (
        "decode_gemm.cu",
        ("return column ^ (token & 7);", "kInputsAt + (thread ^ (thread / 8 & 7)) * 16"),
        ("return column;", "kInputsAt + thread * 16"),
    ),
    "scales of the group before": (
        "decode_gemm.cu",
        "kPeriod == 4 ? p.group_of(slab) : slab * kGroups",
        "kPeriod == 4 ? p.group_of(slab) - (slab > 0) : slab * kGroups",
    ),
    "groups that run on": (
        "decode_gemm.cu",
        "    set_zero(group);\n    set_zero(inputs);\n  }\n};",
        "    set_zero(inputs);\n  }\n};",
    ),
    "tokens are masked one late": (
        "decode_gemm.cu",
        "token < p.M || kInputCopies > 1",
        "token <= p.M || kInputCopies > 1",
    ),
    "columns are masked in eights": (
        "decode_gemm.cu",
        "bytes > 0 ? bytes : 0",
        "bytes > 0 ? 16 : 0",
    ),
    "rows are masked one late": (
        "finish.h",
        "if (n + i < N) {",
        "if (n + i <= N) {",
    ),
    "a stripe of the weight beyond its end": (
        "decode_gemm.cu",
        "work::least(ahead.tile * kWarpsN + chunk / kStripChunks, last)",
        "(ahead.tile * kWarpsN + chunk / kStripChunks)",
    ),
    "codes from the wrong bits": (
        "dequantize.h",
        "if (at - base + bits > kMantissa) base = at;",
        "if (at - base + bits > kMantissa + 2) base = at;",
    ),
    "a slab of the weight beyond its end": (
        "decode_gemm.cu",
        "kWarpsK == 2 && step * 2 + 1 < p.slabs ? weights",
        "kWarpsK == 2 ? weights",
    ),
    "a part that skips a step of its tile": (
        "work.h",
        "    left -= steps;\n",
        "    left -= steps + 1;\n",
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


def put_in(sources: Path, file: str, here: str | tuple[str, ...], instead) -> None:
    """Replaces a piece, or several, of a file."""
    pairs = [(here, instead)] if isinstance(here, str) else zip(here, instead, strict=True)
    text = (sources / file).read_text()
    for old, new in pairs:
        assert old in text, "the source has moved on: say the fault anew"
        text = text.replace(old, new)
    (sources / file).write_text(text)


def mutated(folder: Path, name: str | None) -> Path:
    """The kernel in a folder of its own, with the fault."""
    sources = folder / "src"
    shutil.copytree(decode.SOURCE.parent, sources)
    if name is not None:
        put_in(sources, *FAULTS[name])
    return sources / decode.SOURCE.name


def faults_of(draw, source: Path, scheme: str) -> str | None:
    """What a run of the kernel is found to have done wrong; None: nothing."""
    weight, _ = draw(141, [(scheme, 700)], seed=1)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(9, 700, generator=generator).half()
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
