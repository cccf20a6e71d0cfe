"""The tests of the attention kernel are not blind: each of these faults, put into its source, is
noticed, by the emulator or by a result that is not right."""

from functools import partial

import pytest

from quantlib.kernels.cuda import attention

from .faults import mutated, noticed
from .test_attention import F16, is_right, run

KERNEL = "kv_attention.cu"
FAULTS = {
    "the last split does not wait": (
        KERNEL,
        "while (ptx::load_acquire(p.flags + pair * p.splits + other) == 0) {\n      }",
        "",
    ),
    "flags that stay up": (
        KERNEL,
        "ptx::store_release(p.flags + pair * p.splits + other, 0);",
        "ptx::store_release(p.flags + pair * p.splits + other, 1);",
    ),
    "sums published before all threads have written them": (
        KERNEL,
        "  __syncthreads();\n  if (thread == 0) ptx::store_release(p.flags",
        "  if (thread == 0) ptx::store_release(p.flags",
    ),
    "no barrier before scores are weighed": (
        KERNEL,
        "  __syncthreads();\n  if (thread / 32 < kHeads) weigh",
        "  if (thread / 32 < kHeads) weigh",
    ),
    "no barrier before values are summed up": (
        KERNEL,
        "weigh(thread / 32, thread % 32);\n  __syncthreads();",
        "weigh(thread / 32, thread % 32);",
    ),
    "a position too many is seen": (
        KERNEL,
        "position >= first && position < length",
        "position >= first && position <= length",
    ),
    "a window that is one too long": (
        KERNEL,
        "length > window ? length - window : 0",
        "length > window ? length - window - 1 : 0",
    ),
    "zero points without a sign": (
        KERNEL,
        "static_cast<int>((word & 0xffffu) ^ 0x8000u) - 0x8000",
        "static_cast<int>(word & 0xffffu)",
    ),
    "scales of the group before": (
        KERNEL,
        "bytes += kBlock * (4 + columns(i) * bits_of(i) / 8);",
        "bytes += kBlock * (columns(i) * bits_of(i) / 8);",
    ),
    "a wide slice that counts as a group": (
        KERNEL,
        "index == 0 ? 0 : wide + (index - 1) * group",
        "index * group",
    ),
    "halves of bytes change places": (
        KERNEL,
        "less_zero(codes, 8 * i + 4 * half, kMask",
        "less_zero(codes, 8 * i + 4 * (kHalves - 1 - half), kMask",
    ),
    "values of the first split for all": (
        KERNEL,
        "values + (blocks_before + before / kBlock) * kValueBytes",
        "values + blocks_before * kValueBytes",
    ),
    "splits are added without their maxima": (
        KERNEL,
        "const float weight = ptx::power_of_two(own - most);",
        "const float weight = 1.f;",
    ),
    "one split is left out": (
        KERNEL,
        "for (int other = 0; other < splits - 1; ++other) {\n        const float* from",
        "for (int other = 1; other < splits - 1; ++other) {\n        const float* from",
    ),
    "keys of the head before": (
        KERNEL,
        "int64_t{1} * pair * blocks;",
        "int64_t{1} * (pair / 2 * 2) * blocks;",
    ),
}
# Nibbles with a wide slice in three splits, groups of bytes and nibbles, a window, two heads.
CASES = [
    ("int4h16", 64, 2, 2, [600], 0, F16),
    ("int8/int4g16h16", 80, 1, 2, [64, 1], 0, F16),
    ("int4g32", 64, 1, 1, [530], 100, F16),
]

pytestmark = pytest.mark.usefixtures("compiler")


def faults_of(source, case):
    """What runs of the kernel are found to have done wrong; None: nothing."""

    def found(seed, offset):
        right = is_right(*run(case, seed, launches=2, source=source, offset=offset))
        return None if right.all() else "wrong numbers"

    return noticed([partial(found, *given) for given in ((0, 0.0), (1, 0.0), (2, 8.0))])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_the_kernel_itself_is_found_right(tmp_path, case):
    assert faults_of(mutated(tmp_path, attention.SOURCE, None), case) is None


@pytest.mark.kernels
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(tmp_path, name):
    source = mutated(tmp_path, attention.SOURCE, FAULTS[name])
    assert any(faults_of(source, case) for case in CASES)
