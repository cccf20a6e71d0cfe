"""The emulator forbids what a GPU forbids, and only that: what it lets pass can be believed."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from quantlib.kernels.cpu.build import BuildError, find_compiler
from quantlib.kernels.cuda import decode, fragments
from quantlib.kernels.emulator import build
from quantlib.kernels.emulator.machine import Counters, Kernel, KernelFault, Writable

HERE = Path(__file__).parent
WHAT = re.findall(r"^  (k\w+),$", (HERE / "rules.cu").read_text(), re.MULTILINE)
ALLOWED = {"kInOrder", "kReleased", "kOneBank"}
FAULTS = {
    "kReadUnwritten": "read at 0, where nobody has written",
    "kMissingBarrier": "without a barrier between|where nobody has written",
    "kWriteWhileRead": "which others read without a barrier|written .* without a barrier between",
    "kReadBeforeWait": "read at .*, where a copy may be writing",
    "kReadBeforeBarrierAfterWait": "a copy may be writing|without a barrier|nobody has written",
    "kWriteUnderCopy": "write at .*, where a copy may be writing",
    "kUnalignedCopy": "not aligned to 16 bytes",
    "kUnalignedShared": "4 bytes at 2 are not aligned",
    "kOutsideShared": "4 bytes at 1024, of 1024",
    "kOutsideGlobal": "4 bytes at offset 5.. of a buffer of 512",
    "kCopyOutsideGlobal": "1 bytes at offset 1024 of a buffer of 1024",
    "kWriteToInput": "write into a buffer that is only read",
    "kDivergence": "lanes of a warp diverge",
    "kMissingLanes": "deadlock: .* waits for ever at a store to shared memory",
    "kSomeThreadsAtBarrier": "waits for memory that nobody is going to change",
    "kWaitForEver": "waits for memory that nobody is going to change",
    "kUnreleased": "written by thread .* of block 0 and not released to this one",
    "kReleasedBeforeBarrier": "not released to this one",
    "kUnacquired": "not released to this one",
    "kCopyLeftBehind": "ends before its copies have arrived",
}


@pytest.fixture(scope="module")
def rules() -> Kernel:
    return kernel_of(HERE / "rules.cu")


def kernel_of(source: Path, *flags: str) -> Kernel:
    include = f"-I{decode.SOURCE.parent}"
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    return Kernel(build.compile_kernel(source, extra_flags=(include, *flags)))


def run(kernel: Kernel, name: str, seed: int = 0) -> tuple[torch.Tensor, Counters]:
    output, flags = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    given = torch.arange(256, dtype=torch.int32)
    arguments = [given, Writable(output), Writable(flags), WHAT.index(name)]
    counters = kernel.launch(arguments, blocks=2, threads=64, shared_bytes=1024, seed=seed)
    return output, counters


SEEN_LATE = {"kUnreleased", "kUnacquired", "kReleasedBeforeBarrier"}
"""Who reads too early sees what was there before, and nothing is wrong yet."""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(set(FAULTS) - SEEN_LATE))
def test_what_a_gpu_forbids_is_a_fault_in_every_schedule(rules, name, seed):
    with pytest.raises(KernelFault, match=FAULTS[name]):
        run(rules, name, seed)


@pytest.mark.parametrize("name", sorted(SEEN_LATE))
def test_memory_of_other_blocks_in_the_wrong_order_is_a_fault_in_some_schedule(rules, name):
    found = []
    for seed in range(20):
        try:
            run(rules, name, seed)
        except KernelFault as fault:
            found.append(str(fault))
    assert found
    assert all(re.search(FAULTS[name], text) for text in found)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_in_order_passes_in_every_schedule(rules, seed):
    other = (torch.arange(64) + 32) % 64
    output, _ = run(rules, "kInOrder", seed)
    assert torch.equal(output[:64], (other + torch.arange(64)).int())
    output, _ = run(rules, "kReleased", seed)
    assert torch.equal(output[64:], other.int())


def test_every_rule_has_a_case():
    assert set(WHAT) == ALLOWED | set(FAULTS)


def test_bank_conflicts_are_wavefronts_beyond_the_first(rules):
    _, counters = run(rules, "kOneBank")
    assert counters.bank_conflicts == 2 * 7  # in each block, 8 words of one bank
    _, counters = run(rules, "kInOrder")
    assert counters.bank_conflicts == 0


def test_a_seed_is_a_schedule(rules):
    """Which thread breaks a rule first depends on the seed, and on nothing else."""

    def first(seed):
        with pytest.raises(KernelFault) as fault:
            run(rules, "kOutsideShared", seed)
        return str(fault.value)

    assert first(3) == first(3)
    assert len({first(seed) for seed in range(6)}) > 1


PROBE = """
#include "device.h"
__global__ void probe(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = ptx::load_global<uint32_t>(a + lane * 4 + i);
  for (int i = 0; i < 2; ++i) right[i] = ptx::load_global<uint32_t>(b + lane * 2 + i);
  for (int i = 0; i < 4; ++i) sums[i] = ptx::load_global<float>(c + lane * 4 + i);
  ptx::multiply<ptx::Half>(sums, left, right);
  for (int i = 0; i < 4; ++i) ptx::store_global(c + lane * 4 + i, sums[i]);
}
QL_KERNEL(probe)
"""


def test_the_matrix_product_has_the_manuals_fragments(tmp_path):
    """fragments.py and emulated_device.h are written apart from each other."""
    source = tmp_path / "probe.cu"
    source.write_text(PROBE)
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-8, 9, (16, 16), generator=generator).to(torch.float16)
    right = torch.randint(-8, 9, (16, 8), generator=generator).to(torch.float16)
    sums = torch.randint(-8, 9, (16, 8), generator=generator).float()
    a, b = torch.empty(32, 4, 2, dtype=torch.float16), torch.empty(32, 2, 2, dtype=torch.float16)
    c = torch.empty(32, 4)
    for lane in range(32):
        for register in range(4):
            c[lane, register] = sums[fragments.sum_element(lane, register)]
            for side in range(2):
                a[lane, register, side] = left[fragments.left_element(lane, register, side)]
        for register in range(2):
            for side in range(2):
                b[lane, register, side] = right[fragments.right_element(lane, register, side)]
    kernel_of(source).launch([a, b, Writable(c)], blocks=1, threads=32, shared_bytes=0)
    expected = sums + left.float() @ right.float()
    for lane in range(32):
        for register in range(4):
            assert c[lane, register] == expected[fragments.sum_element(lane, register)]


CONVERSIONS = """
#include "device.h"
__global__ void conversions(const float* values, uint32_t* halves, float* back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float value = ptx::load_global<float>(values + i);
  const uint32_t pair = ptx::to_pair<ptx::Half>(value, 0.f) & 0xffff;
  const uint32_t both = pair | ptx::to_pair<ptx::BFloat>(0.f, value);
  ptx::store_global(halves + i, both);
  ptx::store_global(back + 2 * i, ptx::to_float<ptx::Half>(both));
  ptx::store_global(back + 2 * i + 1, ptx::to_float<ptx::BFloat>(both >> 16));
}
QL_KERNEL(conversions)
"""


def test_sixteen_bit_numbers_are_torchs(tmp_path):
    source = tmp_path / "conversions.cu"
    source.write_text(CONVERSIONS)
    every_half = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16).float()
    every_bfloat = torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16).float()
    between = torch.cat([every_half, every_bfloat]) * (1 + 2.0**-11)
    values = torch.cat([every_half, every_bfloat, between]).nan_to_num(1.0, torch.inf, -torch.inf)
    halves = torch.empty(len(values), 2, dtype=torch.int16)
    back = torch.empty(len(values), 2)
    arguments = [values, Writable(halves), Writable(back)]
    kernel_of(source).launch(arguments, blocks=len(values) // 1024, threads=1024, shared_bytes=0)
    half, bfloat = values.half(), values.bfloat16()
    assert torch.equal(halves[:, 0], half.view(torch.int16))
    assert torch.equal(halves[:, 1], bfloat.view(torch.int16))
    assert torch.equal(back[:, 0], half.float())
    assert torch.equal(back[:, 1], bfloat.float())


def test_a_tensor_that_is_not_contiguous_is_refused(rules):
    with pytest.raises(ValueError, match="contiguous tensors in main memory"):
        rules.launch([torch.zeros(4, 4).T], blocks=1, threads=32, shared_bytes=0)


def test_a_block_is_made_of_whole_warps(rules):
    with pytest.raises(ValueError, match="2 blocks of 48 threads"):
        rules.launch([], blocks=2, threads=48, shared_bytes=0)


def test_the_machine_itself_has_no_undefined_behaviour(capfd):
    kernel = kernel_of(HERE / "rules.cu", *build.SANITIZE)
    for name in WHAT:
        with contextlib.suppress(KernelFault):
            run(kernel, name, seed=1)
    assert "runtime error" not in capfd.readouterr().err


def test_the_sanitizer_sees_a_kernel(tmp_path, capfd):
    source = tmp_path / "shift.cu"
    source.write_text(
        """
#include "device.h"
__global__ void shift(int* output, int by) {
  ptx::store_global(output + threadIdx.x, 1 << by);
}
QL_KERNEL(shift)
"""
    )
    output = torch.zeros(32, dtype=torch.int32)
    sanitized = kernel_of(source, *build.SANITIZE)
    sanitized.launch([Writable(output), 40], blocks=1, threads=32, shared_bytes=0)
    assert "shift exponent 40 is too large" in capfd.readouterr().err


def test_counters_have_the_machines_fields():
    """Two lists in two languages."""
    header = (build.SOURCES / "machine.h").read_text()
    body = re.search(r"struct Counters \{(.*?)\};", header, re.DOTALL)
    assert body is not None
    names = re.findall(r"\b([a-z_]+)(?=[,;])", body[1])
    assert names == list(Counters.__dataclass_fields__)
