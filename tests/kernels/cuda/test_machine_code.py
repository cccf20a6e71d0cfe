"""What compilers make of kernel (a): no spilled registers, the instructions that were meant, and
none that a GPU would be slow at. Needs nvcc and nvdisasm, or NVRTC; no GPU."""

import sys
from pathlib import Path

import pytest
import torch

from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda import compile as compilers
from quantlib.kernels.cuda import cubins, decode, machine_code, toolkit

if __name__ == "__main__":  # as a program it has no package
    sys.path.insert(0, str(Path(__file__).parent))
    from recorded import has_not_grown, write
else:
    from .recorded import has_not_grown

F16, BF16 = torch.float16, torch.bfloat16
W4 = decode.DecodeCase(4, F16, 2, 4, False)
# Every width in both types; W4 for every number of tokens and every way of scaling.
WIDTHS = [
    decode.DecodeCase(bits, dtype, 2, 4, False) for bits in range(2, 9) for dtype in (F16, BF16)
]
FORMS = [
    decode.DecodeCase(4, dtype, tiles, period, zeros)
    for tiles in decode.TOKEN_TILES
    for dtype, period, zeros in ((F16, 4, True), (F16, 0, False), (BF16, 1, False), (F16, 2, True))
]
# Two of every four columns, in both types and every way of scaling.
SPARSE = [
    decode.DecodeCase(4, dtype, tiles, period, False, sparse=True)
    for dtype, tiles, period in ((F16, 1, 4), (F16, 2, 4), (BF16, 4, 2), (F16, 8, 0), (BF16, 2, 1))
]
MATRIX = [
    *((case, 80) for case in (*WIDTHS, *FORMS, *SPARSE)),
    *(
        (case, arch)
        for case in (*WIDTHS[::6], SPARSE[1])
        for arch in compilers.ARCHITECTURES
        if arch != 80
    ),
]

needs_nvcc = pytest.mark.skipif(
    toolkit.find_nvcc() is None or toolkit.find_nvdisasm() is None,
    reason="needs nvcc and nvdisasm: a CUDA toolkit, or nvidia-cuda-nvcc and nvidia-cuda-nvdisasm",
)
needs_nvrtc = pytest.mark.skipif(
    toolkit.find_nvrtc() is None, reason="needs NVRTC: nvidia-cuda-nvrtc"
)


def name_of(case: decode.DecodeCase, architecture: int) -> str:
    return f"{cubins.name_of(case)}-sm_{architecture}"


def assert_fit_for_a_gpu(code: machine_code.MachineCode, case: decode.DecodeCase) -> None:
    names = code.instructions
    # 2 x 16 rows and 4 x 16 columns for each 8 tokens, and the sums of inputs: one copy of all.
    products = case.token_tiles * (12 if case.zeros else 8)
    shape = r"HMMA\.SP\.16832\.F32" if case.sparse else r"HMMA\.16816\.F32"
    kind = shape + (r"\.BF16" if case.dtype == BF16 else "$")
    assert code.count(kind) == code.products == products
    assert all(".128" in name for name in names if name.startswith("LDGSTS"))
    assert all(name.endswith(".4") for name in names if name.startswith("LDSM"))
    # Each brings 16 columns of 16 tokens, or 32 of 8, and there are 64 columns, or twice that.
    columns = case.step_columns // 16
    assert code.count("LDSM") == max(columns // 2, columns // 2 * case.token_tiles)
    assert code.count(r"STG\.E\.64") > 0  # four 16-bit outputs at once
    # Converting integers is for divisions alone (.RP); an emulated instruction would be a function,
    # which returns.
    assert not [name for name in names if name.startswith("I2F") and ".RP" not in name]
    assert code.count("RET") == 0
    assert code.count("LDL|STL") == 0
    loop = code.multiplying()
    assert not loop["LDG"]
    assert not loop["F2F"]


@pytest.mark.kernels
@needs_nvcc
@pytest.mark.parametrize(("case", "arch"), MATRIX, ids=[name_of(*entry) for entry in MATRIX])
def test_nvccs_machine_code(case, arch):
    planned = decode.plan(case, arch)
    cubin, resources = compilers.with_nvcc(decode.SOURCE, planned.macros(), arch)
    assert resources.spilled == resources.stack == 0
    assert resources.registers <= 65536 // (decode.THREADS * planned.blocks_per_sm)
    code = machine_code.read(cubin)
    assert_fit_for_a_gpu(code, case)
    assert has_not_grown(name_of(case, arch), code)


@needs_nvcc
def test_w4_of_sixteen_tokens():
    planned = decode.plan(W4, 80)
    cubin, resources = compilers.with_nvcc(decode.SOURCE, planned.macros(), 80)
    assert resources.spilled == 0
    assert resources.registers <= 128
    assert_fit_for_a_gpu(machine_code.read(cubin), W4)


@pytest.mark.kernels
@needs_nvrtc
@pytest.mark.parametrize("arch", compilers.ARCHITECTURES)
def test_nvrtc_takes_the_same_source(arch):
    planned = decode.plan(W4, arch)
    cubin = compilers.with_nvrtc(decode.SOURCE, planned.macros(), arch)
    assert cubin.startswith(b"\x7fELF")
    if toolkit.find_nvdisasm() is not None:
        assert_fit_for_a_gpu(machine_code.read(cubin), W4)


@needs_nvrtc
def test_nvrtcs_complaint_is_quoted(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { cheese(); }")
    with pytest.raises(BuildError, match=r'refuses broken\.cu:(.|\n)*"cheese" is undefined'):
        compilers.with_nvrtc(source, {}, 80)


@needs_nvcc
def test_nvccs_complaint_is_quoted(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { cheese(); }")
    with pytest.raises(BuildError, match=r'refuses broken\.cu:(.|\n)*"cheese" is undefined'):
        compilers.with_nvcc(source, {}, 80)


def test_without_compilers_there_is_a_sentence(monkeypatch, tmp_path):
    for name in ("find_nvcc", "find_nvrtc"):
        monkeypatch.setattr(compilers, name, lambda: None)
    monkeypatch.setattr(machine_code, "find_nvdisasm", lambda: None)
    with pytest.raises(BuildError, match="pip install nvidia-cuda-nvcc"):
        compilers.with_nvcc(decode.SOURCE, {}, 80)
    with pytest.raises(BuildError, match="pip install nvidia-cuda-nvrtc"):
        compilers.with_nvrtc(decode.SOURCE, {}, 80)
    with pytest.raises(BuildError, match="pip install nvidia-cuda-nvdisasm"):
        machine_code.read(b"")


LISTING = """
        .section .text.kernel
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LOP3.LUT R2, R3, 0xf000f, R4, 0xea, !PT ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
.L_x_1:
        /*0040*/                   FADD R2, R2, R3 ;
        /*0050*/                   EXIT ;
"""


def test_a_listing_is_read_in_basic_blocks():
    code = machine_code.parse(LISTING)
    assert [len(block) for block in code.blocks] == [2, 2, 2]
    assert code.multiplying() == {"LOP3": 1, "HMMA": 1}
    assert (code.products, code.arithmetic) == (1, 1)
    assert code.count(r"FADD|MOV") == 2
    assert code.around("HMMA|FADD") == 4


def test_names_tell_cases_apart():
    names = [cubins.name_of(case) for case in cubins.cases()]
    assert len(names) == len(set(names)) == 7 * 2 * 4 * 3 + 2 * 4 * 4
    assert cubins.name_of(decode.DecodeCase(3, BF16, 4, 1, True)) == "w3z-g16-bf16-m32"
    assert cubins.name_of(SPARSE[1]) == "w4sparse-g128-f16-m16"


def test_cubins_without_nvcc_are_a_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)
    assert cubins.main([str(tmp_path / "cubins"), "--bits", "4"]) == 1
    assert "there is no nvcc" in capsys.readouterr().err


def test_programs_are_found_by_path_home_and_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    find = toolkit.find_nvcc.__wrapped__
    assert find() is None
    for folder in ("site/nvidia/cu13/bin", "toolkit/bin"):
        program = tmp_path / folder / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text("")
        assert find() == program
    library = tmp_path / "site/nvidia/cu13/lib/libnvrtc.so.13"
    library.parent.mkdir()
    library.write_text("")
    (library.parent / "libnvrtc-builtins.so.13.5").write_text("")
    assert toolkit.find_nvrtc.__wrapped__() == library


if __name__ == "__main__":
    for case, arch in MATRIX:
        write({name_of(case, arch): cubins.build(case, arch)[1].arithmetic})
