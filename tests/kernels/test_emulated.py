"""Units for instruction sets that a processor lacks, on emulated intrinsics, give the same bits.

AVX-512 comes from SIMDe, a collection of portable intrinsics (on Debian: apt install libsimde-dev).
Of these units products and rows are called; packing, attention and the engine are AVX2's. It takes
minutes to compile, so it runs when it is asked for: `-m kernels`.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantlib.kernels import layouts, tile_reference
from quantlib.kernels.cpu import build
from quantlib.kernels.cpu import library as cpu

from .conftest import Draw
from .schemes import EVERY, FLOATS, MIXED, TWO_LEVEL
from .test_bits import same_bits

pytestmark = pytest.mark.kernels
HEADERS = Path(__file__).with_name("emulated")
SIMDE = "simde/x86/avx512"
AVX2 = ("-DQL_X86", "-mavx2", "-mfma", "-mbmi2", "-mf16c")
EMULATED = ("avx2vnni", "avx512vnni", "avx512")
SCHEMES = [*FLOATS, *TWO_LEVEL, *EVERY[:: len(EVERY) // 16]]


def names(folder: Path) -> str:
    """Definitions of the intrinsics of the sources: SIMDe's, or else ours."""
    used = set()
    for source in (*build.SOURCES.glob("*.h"), *build.SOURCES.glob("*.cpp")):
        used |= set(re.findall(r"\b_mm512_\w+", source.read_text()))
    known = "".join(path.read_text() for path in folder.glob("*.h"))
    there = {name for name in used if re.search(rf"\bsimde{name}\b", known)}
    return "".join(
        f"#define {name} {'simde' if name in there else 'emulated'}{name}\n"
        for name in sorted(used)
    )


def simde(folder: Path) -> Path:
    """Where SIMDe's headers of AVX-512 are. Raises BuildError when the compiler finds none."""
    found, probe = folder / "found.d", folder / "probe.cpp"
    probe.write_text(f"#include <{SIMDE}.h>\n")
    build.run_compiler(build.find_compiler(), "-M", "-mavx2", str(probe), "-o", str(found))
    header = re.search(rf"\S*/{SIMDE}\.h", found.read_text())
    assert header is not None
    return Path(header[0]).with_suffix("")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cpu.Library]:
    """The library with emulated units, not optimized; "best" is AVX2."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("emulated are units for x86")
    folder = tmp_path_factory.mktemp("emulated")
    try:
        (folder / "names.h").write_text(names(simde(folder)))
    except build.BuildError:
        pytest.skip("SIMDe's headers are not there: on Debian, apt install libsimde-dev")
    avx512 = (*AVX2, "-flax-vector-conversions", "-w", f"-I{folder}", "-include")
    avx512 = (*avx512, str(HEADERS / "avx512.h"))
    units = build._units() | {
        "avx2vnni.cpp": (*AVX2, "-include", str(HEADERS / "avx2vnni.h")),
        "avx512vnni.cpp": avx512,
        "avx512.cpp": (*avx512, "-DEMULATED_VBMI"),
        "isa.cpp": ("-DQL_X86", "-include", str(HEADERS / "isa.h")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_units", lambda *_: units)
        patch.setenv("QUANTLIB_ISA", "avx2")
        library = cpu.Library(build.build_into(folder, ("-O0",)))
        assert library.isa == "avx2"
        patch.setattr(cpu, "load", lambda: library)
        yield library


@pytest.mark.parametrize("isa", EMULATED)
@pytest.mark.parametrize("parts", [*([(scheme, 100)] for scheme in SCHEMES), *MIXED])
def test_emulated_units_give_the_bits_of_the_reference(
    emulated: cpu.Library, draw: Draw, isa: str, parts: list[tuple[str, int]]
) -> None:
    weight, packed = draw(45, parts)
    tiled = layouts.tile(packed)
    x = torch.randn(19, weight.shape[1], generator=torch.Generator().manual_seed(1))
    bias = torch.randn(45, generator=torch.Generator().manual_seed(2))
    for mode, group in (("exact", 0), ("int8", 0), ("int8", 128)):
        expected = tile_reference.linear(x, weight, bias, mode, group)
        for tokens in (1, 3, 8, 19):
            found = emulated.linear(
                tiled.description, x[:tokens], bias, mode, isa=isa, act_group=group
            )
            assert same_bits(found, expected[:tokens]), (mode, group, tokens)
    rows = emulated.dequantize(tiled.description, isa=isa)
    assert same_bits(rows, tile_reference.dequantize(weight))
