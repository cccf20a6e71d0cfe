"""Vectors of sixteen lanes compute the same on every instruction set, and what they say."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlib.kernels.cpu import build

UNITS = {"portable": (), "avx2": build._ISA_FLAGS["avx2"], "avx512": build._ISA_FLAGS["avx512"]}
OPERATIONS = ("exp", "silu", "fma", "multiply, then add", "divide", "min", "max", "sqrt", "select")
OPERATIONS += ("integers", "f16", "sum and highest", "first", "swaps")
WITHIN_4_MILLION = ("round",)
WITHIN_BYTES = ("through i8",)

Probe = Callable[..., Tensor]


@pytest.fixture(scope="module")
def probes(library, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Probe]:
    """lanes_probe.cpp, compiled for every kind of vector that this processor has."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    folder, source = tmp_path_factory.mktemp("lanes"), Path(__file__).with_name("lanes_probe.cpp")
    units = {unit: flags for unit, flags in UNITS.items() if library.supports(unit)}
    for unit, flags in units.items():
        command = [compiler, *build._COMMON, *flags, "-shared", f"-I{build.SOURCES}", str(source)]
        subprocess.run([*command, "-o", str(folder / f"{unit}.so")], check=True)
    return {unit: _probe(folder / f"{unit}.so") for unit in units}


def _probe(path: Path) -> Probe:
    function = ctypes.CDLL(str(path)).probe
    function.restype = ctypes.c_bool

    def call(name: str, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        out = torch.full_like(a, 7.0)
        inputs = [
            ctypes.c_void_p((a if other is None else other).data_ptr()) for other in (a, b, c)
        ]
        count, to = ctypes.c_int64(len(a)), ctypes.c_void_p(out.data_ptr())
        assert function(name.encode(), *inputs, count, to), name
        return out

    return call


def any_bits(count: int, seed: int) -> Tensor:
    """Floats of every kind: each bit pattern is as likely."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    return bits.to(torch.int32).view(torch.float32)


def moderate(count: int, seed: int, largest: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(count, generator=generator) * 2 - 1) * largest
    values[::3] = (values[::3] * 2).round() / 2  # halfway between integers, and -0
    return values.clamp(-largest, largest)


def bits_of(values: Tensor) -> Tensor:
    """int32 bits; all NaNs alike."""
    return torch.where(values.isnan(), torch.nan, values).view(torch.int32)


def check_same(probes: dict[str, Probe], name: str, *inputs: Tensor) -> None:
    expected = bits_of(probes["portable"](name, *inputs))
    for unit, probe in probes.items():
        assert torch.equal(bits_of(probe(name, *inputs)), expected), (unit, name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kind_of_vector_gives_the_same_bits(probes, name):
    count = 1 << 16
    check_same(probes, name, *(any_bits(count, seed) for seed in range(3)))
    check_same(probes, name, *(moderate(count, seed, 100.0) for seed in range(3)))


@pytest.mark.parametrize("name", WITHIN_4_MILLION + WITHIN_BYTES)
def test_rounding_gives_the_same_bits_and_ties_go_to_even(probes, name):
    a = moderate(1 << 16, 0, 127.0 if name in WITHIN_BYTES else 2.0**22 - 1)
    check_same(probes, name, a)
    assert torch.equal(probes["portable"](name, a), a.round())


def test_exp_is_within_its_error(probes):
    """0.9 ulp, by float64; the last step of a subnormal result is worth 2^-149."""
    x = torch.cat([torch.linspace(-104, 88.72, 1 << 20), moderate(1 << 16, 1, 1e-3)])
    exact = x.double().exp()
    exponent = exact.log2().floor().clamp(min=-126)
    for unit, probe in probes.items():
        error = (probe("exp", x).double() - exact).abs() / torch.exp2(exponent - 23)
        assert float(error.max()) <= 0.9, unit
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, 89, -105, 0, -0.0, 1e38] * 2)
    expected = torch.tensor([torch.nan, torch.inf, 0, torch.inf, 0, 1, 1, torch.inf] * 2)
    assert torch.equal(bits_of(probes["portable"]("exp", ends)), bits_of(expected))


def test_halves_become_the_floats_they_are(probes):
    halves = torch.arange(1 << 16, dtype=torch.int32)
    expected = halves.to(torch.int16).view(torch.float16).float()
    for unit, probe in probes.items():
        found = probe("f16", halves.view(torch.float32))
        assert torch.equal(bits_of(found), bits_of(expected)), unit


def test_swapped_lanes_come_from_where_they_should(probes):
    a = torch.arange(32.0)
    lanes = torch.arange(32)
    expected = sum(distance * a[lanes ^ distance] for distance in (1, 2, 4, 8))
    for unit, probe in probes.items():
        assert torch.equal(probe("swaps", a), expected), unit


def test_first_lanes_leave_the_others_alone(probes):
    """Loads give zeros there, stores do not touch them."""
    a, b = torch.arange(1.0, 3537.0), -torch.arange(1.0, 3537.0)
    expected = torch.zeros_like(a).view(-1, 16)
    for i, row in enumerate(expected):
        loaded, stored = i % 17, i % 13
        row[:loaded] = a.view(-1, 16)[i, :loaded]
        row[:stored] = b.view(-1, 16)[i, :stored]
    for unit, probe in probes.items():
        assert torch.equal(probe("first", a, b).view(-1, 16), expected), unit
