"""The tests of kernel (b) are not blind: each of these faults, put into its source, is noticed, by
the emulator, by a result that is not right to the last bit, or by bank conflicts."""

from functools import partial

import pytest
import torch

from quantlib.kernels.cuda import segmented

from .emulated_segmented import expected, linear, multiply
from .faults import mutated, noticed, verdict

GEMM, TILE, SEGMENTS = "segmented_gemm.cu", "segmented_tile.h", "segments.h"
# Name -> file, what stands there, what the fault is.
FAULTS = {
    "a wait that lets one stage too many be on its way": (
        GEMM,
        "ptx::wait_copies<kStages - 3>();",
        "ptx::wait_copies<kStages - 2>();",
    ),
    "no barrier between stages": (
        GEMM,
        "ptx::wait_copies<kStages - 3>();\n    __syncthreads();",
        "ptx::wait_copies<kStages - 3>();",
    ),
    "no barrier before a tile is stored": (
        GEMM,
        "    __syncthreads();\n#pragma unroll\n    for (int v = 0;",
        "#pragma unroll\n    for (int v = 0;",
    ),
    "only the reading side is swizzled": (
        GEMM,
        "Place::swizzled(thread / 4, thread % 4) * 16",
        "thread % 4 * 16",
    ),
    "tokens are not swizzled": (TILE, "return sixteen ^ (token / 2 % 4);", "return sixteen;"),
    "chunks change places": (TILE, "place.token_offset ^ (chunk * 32)", "place.token_offset"),
    "zero points of tokens are added": (
        TILE,
        "sum -= tokens.zero[side] * rows.sum[h];",
        "sum += tokens.zero[side] * rows.sum[h];",
    ),
    "zero points of tokens count twice where a span is cut": (
        TILE,
        "zero[0] = ends_span ? static_cast<int>(zeros.x) : 0;",
        "zero[0] = static_cast<int>(zeros.x);",
    ),
    "zero points of weights in stored units": (
        TILE,
        "ptx::fma(stored, -p.zero_steps[s], p.middles[s])",
        "p.middles[s] - stored",
    ),
    "scales of the row eight below": (
        TILE,
        "t = ptx::fma(ptx::as_float(sum), rows.scale[h], rows.magic[h]);",
        "t = ptx::fma(ptx::as_float(sum), rows.scale[1 - h], rows.magic[1 - h]);",
    ),
    "scales of the other token": (
        TILE,
        "total[j] = ptx::fma(t, tokens.scale[side], total[j]);",
        "total[j] = ptx::fma(t, tokens.scale[1 - side], total[j]);",
    ),
    "a constant that is off by one": (
        SEGMENTS,
        "kMagic = 12582912.f;",
        "kMagic = 12582913.f;",
    ),
    "segments that keep the unit of the one before": (
        GEMM,
        "if (step > at.step) sums.multiply_rows(ratios);",
        "",
    ),
    "a span that runs on into the next segment": (
        SEGMENTS,
        "span_steps == 0 ? 2 * steps : (steps + span_steps - 1) / span_steps",
        "span_steps == 0 ? 2 * steps : steps / span_steps + 1",
    ),
    "a tile's only span is added to the tile before": (
        GEMM,
        "          sums.clear();\n          sums.add_span<s>",
        "          sums.add_span<s>",
    ),
    "weights of the segment before": (
        GEMM,
        "p.row_tiles * segments::bytes_before(s)",
        "p.row_tiles * segments::bytes_before(s > 0 ? s - 1 : 0)",
    ),
    "signs of unsigned nibbles": (
        TILE,
        "ptx::multiply_integers<ptx::Int4, ptx::Uint4>",
        "ptx::multiply_integers<ptx::Int4, ptx::Int4>",
    ),
    "tokens are masked one late": (
        GEMM,
        "first_token + (base + thread) / 4 < p.M",
        "first_token + (base + thread) / 4 <= p.M",
    ),
    "strips are masked one late": (
        GEMM,
        "first_row_tile + strip + i * kStripsAtOnce < p.row_tiles",
        "first_row_tile + strip + i * kStripsAtOnce <= p.row_tiles",
    ),
    "one partial sum is left out": (
        "finish.h",
        "#pragma unroll 1\n      for (int other = run + 1; other < others_end; ++other) {\n"
        "        const float4*",
        "#pragma unroll 1\n      for (int other = run + 2; other < others_end; ++other) {\n"
        "        const float4*",
    ),
}
SCHEMES = ("w4g64z5s5a4zg64h8/8", "w4za4zh8/8", "w8a8")

pytestmark = pytest.mark.usefixtures("compiler")


def faults_of(draw, source, scheme):
    """What runs of the kernel are found to have done wrong; None: nothing."""
    own = linear(draw, scheme, 141, 700, seed=1)
    inputs = torch.randn(9, 700, generator=torch.Generator().manual_seed(2))
    wanted = expected(own, inputs)

    def run(blocks, seed):
        given = {"blocks": blocks, "seed": seed, "stages": 3, "source": source, "launches": 2}
        output, counters = multiply(own, inputs, **given)
        if blocks == 1:
            return verdict(output == wanted.half(), counters)
        # Three blocks cut spans: other sums of the same numbers, so not the same bits.
        near = (output.float() - wanted).abs() <= wanted.abs() * 2.0**-10 + 0.01
        return verdict(near, counters)

    return noticed([partial(run, *case) for case in ((1, 0), (3, 1), (3, 2), (3, 3))])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_itself_is_found_right(draw, tmp_path, scheme):
    assert faults_of(draw, mutated(tmp_path, segmented.SOURCE, None), scheme) is None


@pytest.mark.kernels
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(draw, tmp_path, name):
    source = mutated(tmp_path, segmented.SOURCE, FAULTS[name])
    assert any(faults_of(draw, source, scheme) for scheme in SCHEMES)
