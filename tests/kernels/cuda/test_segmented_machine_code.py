"""What compilers make of kernel (b) and of the quantizer: no spilled registers, the matrix
instructions that were meant, and none that an architecture only emulates. Needs nvcc and nvdisasm,
or NVRTC; no GPU."""

import sys
from pathlib import Path

import pytest
import torch

from quantlib.formats import Scheme
from quantlib.kernels.cuda import cache, loading, machine_code, quantizer, segmented, toolkit
from quantlib.kernels.cuda import compile as compilers

if __name__ == "__main__":  # as a program it has no package
    sys.path.insert(0, str(Path(__file__).parent))
    from recorded import has_not_grown, write
else:
    from .recorded import has_not_grown

F16 = torch.float16
SCHEMES = (
    "w8a8",
    "w4a4h8/8",
    "w4a4zh8/8",
    "w4g128s5a4h8/8",
    "w4g128z5s5a4zg128h8/8",
    "w4g64z5s5a4zg64h8/8",
    "w4za4zh8/8",
    "w2a4zh4/4h8/8",
)
MATRIX = [
    (scheme, tokens, architecture)
    for scheme in SCHEMES
    for tokens in (1, 64, 4096)
    for architecture in compilers.ARCHITECTURES
]
RECORDED = 80
"""The architecture whose arithmetic instructions are recorded."""
needs_nvcc = pytest.mark.skipif(
    toolkit.find_nvcc() is None or toolkit.find_nvdisasm() is None,
    reason="needs nvcc and nvdisasm: a CUDA toolkit, or nvidia-cuda-nvcc and nvidia-cuda-nvdisasm",
)


def case_of(scheme: str, tokens: int, architecture: int) -> segmented.GemmCase:
    own = Scheme.parse(scheme)
    layout = segmented.layout(own.segments(4096), own.activations(4096), architecture)
    return segmented.case(layout, tokens, F16, architecture)


def name_of(scheme: str, tokens: int) -> str:
    return f"{scheme}-m{tokens}-sm_{RECORDED}"


def assert_fit_for_a_gpu(code: machine_code.MachineCode, case: segmented.GemmCase) -> None:
    names = code.instructions
    # Two chunks of each segment: one instruction for 16 rows and 8 tokens, 4 x 4 of them for
    # prompts, and one of each loop.
    each = 2 * (16 if case.token_tiles == segmented.PROMPT_TILES else case.token_tiles)
    for bits, shape in ((8, "IMMA.16832.S8"), (4, "IMMA.16864")):
        wanted = each * sum(own.kind.token_bits == bits for own in case.segments)
        assert code.count(shape) == wanted
    assert all(".128" in name for name in names if name.startswith("LDGSTS"))
    assert all(name.endswith(".4") for name in names if name.startswith("LDSM"))
    assert code.count(r"STG\.E\.64") > 0  # four 16-bit outputs at once
    # An emulated instruction would be a function, which returns.
    assert code.count("RET") == 0
    assert code.count("LDL|STL") == 0
    assert not code.multiplying()["LDG"]


def check(scheme: str, tokens: int, architecture: int) -> None:
    case = case_of(scheme, tokens, architecture)
    cubin, resources = compilers.with_nvcc(segmented.SOURCE, case.macros(), architecture)
    assert resources.spilled == resources.stack == 0
    assert resources.registers <= 255
    code = machine_code.read(cubin)
    assert_fit_for_a_gpu(code, case)
    if architecture == RECORDED:
        assert has_not_grown(name_of(scheme, tokens), code)


@pytest.mark.kernels
@needs_nvcc
@pytest.mark.parametrize(("scheme", "tokens", "architecture"), MATRIX)
def test_nvccs_machine_code(scheme, tokens, architecture):
    check(scheme, tokens, architecture)


@needs_nvcc
@pytest.mark.parametrize("architecture", [80, 90])
def test_prompts_in_resqs_form(architecture):
    check("w4a4zh8/8", 4096, architecture)


@pytest.mark.kernels
@needs_nvcc
@pytest.mark.parametrize("architecture", [80, 86, 89])
@pytest.mark.parametrize("scheme", ["w4a4h8/8", "w4a4zh8/8"])
def test_sums_of_long_spans_are_scaled_outside_of_the_loop(scheme, architecture):
    """Not with predicates within it, which would be issued with every step."""
    case = case_of(scheme, 4096, architecture)
    cubin, _ = compilers.with_nvcc(segmented.SOURCE, case.macros(), architecture)
    assert machine_code.read(cubin).multiplying()["FFMA"] == 0


needs_nvrtc = pytest.mark.skipif(
    toolkit.find_nvrtc() is None, reason="needs NVRTC: nvidia-cuda-nvrtc"
)


@pytest.mark.kernels
@needs_nvrtc
@pytest.mark.parametrize("architecture", compilers.ARCHITECTURES)
@pytest.mark.parametrize("scheme", ["w4a4zh8/8", "w2a4zh4/4h8/8"])
def test_nvrtc_bakes_the_segments_in(scheme, architecture):
    """The machine code of one, two or three segments has the matrix instructions of just those, and
    their lengths are constants: no argument of the kernel is one of them."""
    case = case_of(scheme, 16, architecture)
    cubin = compilers.with_nvrtc(segmented.SOURCE, case.macros(), architecture)
    assert cubin.startswith(b"\x7fELF")
    if toolkit.find_nvdisasm() is not None:
        assert_fit_for_a_gpu(machine_code.read(cubin), case)


@needs_nvrtc
def test_nvrtc_compiles_a_segment_table_once(tmp_path, monkeypatch):
    """Another table, another cubin: by the hash of the macros and of all sources."""
    monkeypatch.setattr(cache, "user_folder", lambda: tmp_path / "cubins")

    class Driver:
        def load(self, cubin, name, shared_bytes):
            return cubin

        def launch(self, *_):
            raise AssertionError("nothing is launched here")

    found = []
    for scheme in ("w4a4h8/8", "w4a4h8/16", "w4a4h8/8"):
        case = case_of(scheme, 1, 80)
        loader = loading.Loader(Driver(), 80)  # as in another process
        found.append(loader.kernel(segmented.SOURCE, segmented.NAME, case.macros(), 0))
    assert found[0] == found[2] != found[1]
    assert len(list((tmp_path / "cubins").iterdir())) == 2


@pytest.mark.kernels
@needs_nvrtc
@pytest.mark.parametrize("architecture", compilers.ARCHITECTURES)
def test_nvrtc_takes_the_quantizer(architecture):
    own = Scheme.parse("w4a4zh8/8")
    layout = segmented.layout(own.segments(4096), own.activations(4096), architecture)
    macros = quantizer.macros(layout, F16, quantizer.hadamard(None, 4096))
    assert compilers.with_nvrtc(quantizer.SOURCE, macros, architecture).startswith(b"\x7fELF")


@pytest.mark.kernels
@needs_nvcc
@pytest.mark.parametrize("architecture", compilers.ARCHITECTURES)
@pytest.mark.parametrize("order", [1, 4096])
def test_the_quantizer_spills_nothing(architecture, order):
    own = Scheme.parse("w4g64z5s5a4zg64h8/8")
    layout = segmented.layout(own.segments(4096), own.activations(4096), architecture)
    macros = quantizer.macros(layout, F16, quantizer.hadamard(None, order))
    cubin, resources = compilers.with_nvcc(quantizer.SOURCE, macros, architecture)
    assert resources.spilled == resources.stack == 0
    assert machine_code.read(cubin).count("LDL|STL") == 0


if __name__ == "__main__":
    for scheme, tokens, architecture in MATRIX:
        if architecture == RECORDED:
            own = case_of(scheme, tokens, architecture)
            cubin, _ = compilers.with_nvcc(segmented.SOURCE, own.macros(), architecture)
            write({name_of(scheme, tokens): machine_code.read(cubin).arithmetic})
