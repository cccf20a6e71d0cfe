"""The tests of kernel (a) are not blind: each of these faults, put into its source, is noticed."""

from functools import partial

import pytest
import torch

from quantlib.kernels.cuda import decode

from .emulated import expected, multiply
from .faults import mutated, noticed, verdict
from .test_sparse import pruned

GEMM, TILE = "decode_gemm.cu", "decode_tile.h"
# Name -> file, what stands there, what the fault is.
FAULTS = {
    "a wait that lets one stage too many be on its way": (
        GEMM,
        "ptx::wait_copies<kStages - 3>();",
        "ptx::wait_copies<kStages - 2>();",
    ),
    "no wait before the first stage": (
        GEMM,
        "ptx::wait_copies<kStages - 2>();\n    __syncthreads();",
        "__syncthreads();",
    ),
    "no barrier between stages": (
        GEMM,
        "ptx::wait_copies<kStages - 3>();\n    __syncthreads();",
        "ptx::wait_copies<kStages - 3>();",
    ),
    "the next stage is fetched before everybody has left it": (
        GEMM,
        "ptx::wait_copies<kStages - 3>();\n    __syncthreads();\n    ring.fetch();",
        "ring.fetch();\n    ptx::wait_copies<kStages - 2>();\n    __syncthreads();",
    ),
    "no barrier between warps that add up": (
        GEMM,
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
        GEMM,
        "kInputsAt + (thread ^ (thread / 8 & 7)) * 16",
        "kInputsAt + thread * 16",
    ),
    "only the writing side is swizzled": (
        TILE,
        "return column ^ (token & 7);",
        "return column;",
    ),
    "the zero point of a format one bit wider": (
        TILE,
        "constexpr float kMiddle = 1 << (kBits - 1);",
        "constexpr float kMiddle = 1 << kBits;",
    ),
    "the middle of the range is off by one": (
        "dequantize.h",
        "(1u << (bits - 1 - low));",
        "(1u << (bits - 1 - low)) + 1;",
    ),
    "scales of the row eight below": (
        TILE,
        "total[rows][tokens][j] += scale[j / 2] * sum;",
        "total[rows][tokens][j] += scale[1 - j / 2] * sum;",
    ),
    "inputs are not swizzled at all": (
        (TILE, "return column ^ (token & 7);", "return column;"),
        (GEMM, "kInputsAt + (thread ^ (thread / 8 & 7)) * 16", "kInputsAt + thread * 16"),
    ),
    "scales of the group before": (
        GEMM,
        "kPeriod == 4 ? p.group_of(slab) : slab * kGroups",
        "kPeriod == 4 ? p.group_of(slab) - (slab > 0) : slab * kGroups",
    ),
    "groups that run on": (
        TILE,
        "    set_zero(group);\n    set_zero(inputs);\n  }\n};",
        "    set_zero(inputs);\n  }\n};",
    ),
    "tokens are masked one late": (
        GEMM,
        "token < p.M || kManyTokens",
        "token <= p.M || kManyTokens",
    ),
    "columns are masked in eights": (
        GEMM,
        "bytes > 0 ? bytes : 0",
        "bytes > 0 ? 16 : 0",
    ),
    "rows are masked one late": (
        "finish.h",
        "if (n + i < N) {",
        "if (n + i <= N) {",
    ),
    "a stripe of the weight beyond its end": (
        GEMM,
        "work::least(ahead.tile * kWarpsN + chunk / kStripChunks, last)",
        "(ahead.tile * kWarpsN + chunk / kStripChunks)",
    ),
    "codes from the wrong bits": (
        "dequantize.h",
        "if (at - base + bits > kMantissa) base = at;",
        "if (at - base + bits > kMantissa + 2) base = at;",
    ),
    "a slab of the weight beyond its end": (
        GEMM,
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
# Of sparse weights alone.
SPARSE_FAULTS = {
    "places of the first columns for all": (
        TILE,
        "words.places[kSparse ? side : 0]",
        "words.places[0]",
    ),
    "places of the other rows": (
        TILE,
        "ptx::multiply_sparse<Element, 0>",
        "ptx::multiply_sparse<Element, 1>",
    ),
    "inputs of the first half for both": (
        TILE,
        "(kSparse ? half * kInputSlabBytes : 0)",
        "0",
    ),
    "the same columns twice": (
        TILE,
        "load_inputs(b, inputs, side * 32, tokens);",
        "load_inputs(b, inputs, 0, tokens);",
    ),
    "columns of 16 tokens for those of 8": (
        TILE,
        "kLong = kTokenTiles == 1 || kSparse;",
        "kLong = kTokenTiles == 1;",
    ),
    "later slabs are masked like the first": (
        GEMM,
        "work::least(input_bytes - slab * kSlab * 2, 16)",
        "work::least(input_bytes, 16)",
    ),
    "inputs go on as slowly as codes": (
        GEMM,
        "kStepColumns = kInputSlabs * kSlab;",
        "kStepColumns = kWarpsK * kSlab;",
    ),
}
# Formats with everything that the faults touch: groups that span slabs and groups inside of one.
SCHEMES = ("w4g64z", "w3g128z5")
SPARSE = "w4g128"

pytestmark = pytest.mark.usefixtures("compiler")


def faults_of(weight, source):
    """What runs of the kernel are found to have done wrong; None: nothing."""
    inputs = torch.randn(9, 700, generator=torch.Generator().manual_seed(2)).half()
    exact, bound = expected(weight, inputs)

    def run(seed):
        given = {"blocks": 3, "seed": seed, "stages": 3, "source": source, "launches": 2}
        output, counters = multiply(weight, inputs, **given)
        return verdict((output.double() - exact).abs() <= bound, counters)

    return noticed([partial(run, seed) for seed in range(4)])


def dense(draw, scheme):
    weight, _ = draw(141, [(scheme, 700)], seed=1)
    return weight


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_itself_is_found_right(draw, tmp_path, scheme):
    assert faults_of(dense(draw, scheme), mutated(tmp_path, decode.SOURCE, None)) is None


def test_the_sparse_kernel_itself_is_found_right(draw, tmp_path):
    weight = pruned(draw, SPARSE, 141, 700, seed=1)
    assert faults_of(weight, mutated(tmp_path, decode.SOURCE, None)) is None


@pytest.mark.kernels
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(draw, tmp_path, name):
    source = mutated(tmp_path, decode.SOURCE, FAULTS[name])
    assert any(faults_of(dense(draw, scheme), source) for scheme in SCHEMES)


@pytest.mark.kernels
@pytest.mark.parametrize("name", SPARSE_FAULTS)
def test_a_fault_of_sparse_products_is_noticed(draw, tmp_path, name):
    source = mutated(tmp_path, decode.SOURCE, SPARSE_FAULTS[name])
    assert faults_of(pruned(draw, SPARSE, 141, 700, seed=1), source)
