"""The Triton kernels become machine code for GPUs that are not here, with no more shared memory
than there is, and the matrix instructions that were meant."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from quantlib.errors import UsageError
from quantlib.kernels.triton import ahead

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs Triton: pip install 'quantlib-torch[triton]'",
)

FEW_REGISTERS = 64
"""Bytes."""


def compiled(*arguments: str) -> list[ahead.Compiled]:
    """What the command finds in another process, where nothing is interpreted."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quantlib.kernels.triton.ahead", "--json", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [ahead.Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def assert_fit(made: ahead.Compiled) -> None:
    assert made.shared_bytes <= ahead.SHARED_BYTES[made.architecture], made
    # Integers and rotations may keep a few registers in memory meanwhile; a sum may not.
    few = made.name.startswith("rotate") or "a8 " in made.name
    assert made.stack <= (FEW_REGISTERS if few else 0), made
    if made.name.startswith("rotate") or made.name.endswith("rows") or made.name == "sum":
        return
    # Hopper and Blackwell's warp groups multiply; elsewhere warps do.
    integer = re.fullmatch(r"w[2468](g(32|64|128|256))?(z\d?)?(s\d|e)?a8 .*", made.name)
    float8 = re.match(r"(mx)?fp8(e5m2)?(g\d+)?a(mx)?fp8", made.name)
    kinds = {"IMMA", "IGMMA", "UTCIMMA"} if integer else {"HMMA", "HGMMA", "UTCHMMA"}
    kinds = {"QMMA", "QGMMA", "UTCQMMA"} if float8 else kinds
    assert made.matrix, made
    assert set(made.matrix) <= kinds, made


def test_products_of_four_bits_for_hopper():
    """Weights as the left operand: warp group products, with no weight through shared memory."""
    numbers, integers, rows = compiled("--quick", "--only", "w4g64z", "--architectures", "90")
    for made in (numbers, integers, rows):
        assert_fit(made)
        assert made.stack == 0
    # 128 columns are 8 products of 16, or 4 of 32.
    assert numbers.matrix == {"HGMMA": 8}
    assert integers.matrix == {"IGMMA": 4}
    # Inputs (16 x 128 x 2 bytes) and codes (64 x 64) of four stages, and where sums change hands.
    assert numbers.shared_bytes <= 4 * (4096 + 4096) + 2048


def test_eight_bit_floats_are_multiplied_as_they_are():
    """By tensor cores from Ada on: no operand becomes 16 bits wide on the way. On Hopper by warp
    groups, of which Triton takes none where sums of single products are asked for."""
    ada, hopper = compiled("--quick", "--only", "fp8afp8", "--architectures", "89", "90")
    for made, instruction in ((ada, "QMMA"), (hopper, "QGMMA")):
        assert_fit(made)
        assert set(made.matrix) == {instruction}
    assert {arch for one, arch in ahead.matrix() if "afp8" in one.name} == {89, 90, 100, 120}


@pytest.mark.kernels
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
def test_every_form_and_every_configuration(architecture):
    """Some are compiled for every architecture, the others for one after another."""
    found = compiled("--architectures", str(architecture))
    wanted = [program.name for program, own in ahead.matrix() if own == architecture]
    assert [made.name for made in found] == wanted
    for made in found:
        assert made.architecture == architecture
        assert_fit(made)


def test_the_matrix_covers_everything():
    chosen = list(ahead.matrix())
    names = {program.name for program, _ in chosen}
    for form in ahead.weights():
        assert any(name.startswith(f"{form} ") for name in names)
    for form in ahead.EVERYWHERE:
        own = [(program, arch) for program, arch in chosen if program.name.startswith(f"{form} f")]
        assert {arch for _, arch in own} == set(ahead.ARCHITECTURES)
        assert len({program.name for program, _ in own}) == 4  # configurations


def test_nothing_is_compiled_under_the_interpreter(interpreter):
    program, architecture = next(ahead.matrix())
    with pytest.raises(UsageError, match="TRITON_INTERPRET is set"):
        ahead.compile_for(program, architecture)
