"""Loading and launching of CUDA kernels, with a simulated driver: what reaches it is checked, and
that what it is given computes; that a GPU takes it is not.

`Simulated` stands where CuPy does (`loading.Driver`) and notes what it is given; the emulator then
runs the same source on the same arguments. `FakeCupy` is narrower still: a module of that name, to
see what is asked of it.
"""

import sys
import types
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlib.kernels import workspace
from quantlib.kernels.cpu.build import BuildError, find_compiler
from quantlib.kernels.cuda import cache, decode, launch, loading, toolkit
from quantlib.kernels.emulator.build import compile_kernel
from quantlib.kernels.emulator.machine import Kernel, Writable

from .emulated import expected

F16 = torch.float16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "user_folder", lambda: tmp_path / "cubins")


def name_of(macros, architecture=80):
    return cache.file_name(decode.SOURCE, macros, architecture)


MACROS = decode.plan(decode.DecodeCase(4, F16, 1, 4, True), 80).macros()


def test_a_cubins_name_follows_from_everything_that_it_is_made_of(tmp_path, monkeypatch):
    assert name_of(MACROS).startswith("decode_gemm-sm_80-")
    other = {**MACROS, "QL_BITS": 5}
    assert len({name_of(MACROS), name_of(other), name_of(MACROS, 90)}) == 3
    assert name_of(dict(reversed(MACROS.items()))) == name_of(MACROS)
    for path in decode.SOURCE.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = tmp_path / decode.SOURCE.name
    assert cache.file_name(copy, MACROS, 80) == name_of(MACROS)
    (tmp_path / "work.h").write_text("// another schedule\n")  # included, not named
    assert cache.file_name(copy, MACROS, 80) != name_of(MACROS)


class Simulated:
    """A driver that notes what it is given."""

    def __init__(self) -> None:
        self.loaded: list[tuple[bytes, str, int]] = []
        self.launched: list[tuple[Any, int, int, int, int, list[np.generic]]] = []

    def load(self, cubin: bytes, name: str, shared_bytes: int) -> str:
        self.loaded.append((cubin, name, shared_bytes))
        return name

    def launch(
        self,
        kernel: Any,
        blocks: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[np.generic],
    ) -> None:
        self.launched.append((kernel, blocks, threads, shared_bytes, stream, list(arguments)))


def test_a_kernel_is_compiled_once_and_found_again(tmp_path):
    compiled = []

    def compile_source(source, macros, architecture):
        compiled.append((source.name, architecture))
        return b"\x7fELF of " + source.name.encode()

    driver = Simulated()
    loader = loading.Loader(driver, 90, compile_source)
    for _ in range(2):
        assert loader.kernel(decode.SOURCE, decode.NAME, MACROS, 50000) == decode.NAME
    assert compiled == [("decode_gemm.cu", 90)]
    assert driver.loaded == [(b"\x7fELF of decode_gemm.cu", "decode_gemm", 50000)]
    # Another process finds the file.
    again = loading.Loader(Simulated(), 90, compile_source)
    again.kernel(decode.SOURCE, decode.NAME, MACROS, 50000)
    assert len(compiled) == 1
    assert [path.name for path in (tmp_path / "cubins").iterdir()] == [name_of(MACROS, 90)]


def test_a_prebuilt_cubin_is_used_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PREBUILT", tmp_path / "prebuilt")
    cache.PREBUILT.mkdir()
    (cache.PREBUILT / name_of(MACROS)).write_bytes(b"made by nvcc")

    def refuse(*_):
        raise AssertionError("nothing is to be compiled")

    driver = Simulated()
    loading.Loader(driver, 80, refuse).kernel(decode.SOURCE, decode.NAME, MACROS, 0)
    assert driver.loaded[0][0] == b"made by nvcc"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "user_folder", lambda: tmp_path / "file" / "below")
    driver = Simulated()
    loader = loading.Loader(driver, 80, lambda *_: b"cubin")
    loader.kernel(decode.SOURCE, decode.NAME, MACROS, 0)
    assert driver.loaded[0][0] == b"cubin"


@pytest.mark.skipif(toolkit.find_nvrtc() is None, reason="needs NVRTC: nvidia-cuda-nvrtc")
def test_nvrtc_makes_what_is_loaded():
    driver = Simulated()
    loading.Loader(driver, 80).kernel(decode.SOURCE, decode.NAME, MACROS, 0)
    assert driver.loaded[0][0].startswith(b"\x7fELF")


def test_a_launch_hands_over_addresses_and_numbers_of_the_right_sizes(draw, monkeypatch):
    """What the simulated driver is given is what the emulator computes the right result from."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    weight, _ = draw(70, [("w4g64z", 136)])
    generator = torch.Generator().manual_seed(0)
    x, bias = (torch.randn(size, generator=generator).to(F16) for size in ((5, 136), (70,)))
    driver, own = Simulated(), decode.pack(weight)
    loader = loading.Loader(driver, 80, lambda *_: b"cubin")
    simulated = launch.GpuRunner(loader, torch.device("cpu"), processors=2)
    kept = []
    monkeypatch.setattr(launch, "_stream", lambda device: 77)
    monkeypatch.setattr(launch, "_on", lambda device: nullcontext())
    original = launch.number
    monkeypatch.setattr(launch, "number", lambda a: kept.append(a) or original(a))
    out = launch.decode_linear(simulated, x, own, bias)
    kernel, blocks, threads, shared, stream, arguments = driver.launched[0]
    case = own.case(5, F16, 80)
    assert (kernel, threads, shared, stream) == (decode.NAME, 256, case.shared_bytes, 77)
    assert blocks == 2 * case.blocks_per_sm
    wide = [isinstance(given, torch.Tensor) or given is None for given in kept]
    assert [a.dtype.itemsize for a in arguments] == [8 if is_wide else 4 for is_wide in wide]
    assert all(int(a) == t.data_ptr() for a, t in zip(arguments, kept) if hasattr(t, "data_ptr"))
    given = [Writable(a) if index in (5, 6, 7) else a for index, a in enumerate(kept)]
    Kernel(compile_kernel(decode.SOURCE, case.macros())).launch(given, blocks, threads, shared)
    exact, bound = expected(weight, x, bias)
    assert ((out.double() - exact).abs() <= bound).all()
    assert not workspace.flags(torch.device("cpu")).any()


class FakeCupy(types.ModuleType):
    """What of CuPy is used, noting what is asked of it."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.asked: list[Any] = []
        self.cuda = types.SimpleNamespace(ExternalStream=self._stream)

    def RawModule(self, path):
        self.asked.append(("module", Path(path).read_bytes()))
        return types.SimpleNamespace(get_function=self._function)

    def _function(self, name):
        self.asked.append(("function", name))

        def kernel(grid, block, arguments, shared_mem):
            self.asked.append(("launch", grid, block, arguments, shared_mem))

        kernel.max_dynamic_shared_size_bytes = 0
        return kernel

    def _stream(self, pointer):
        self.asked.append(("stream", pointer))
        return nullcontext()


def test_cupy_is_asked_for_a_module_a_function_and_a_launch_on_the_stream(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    driver = loading.CupyDriver()
    kernel = driver.load(b"cubin", "decode_gemm", 70000)
    assert kernel.max_dynamic_shared_size_bytes == 70000
    driver.launch(kernel, 216, 256, 70000, 1234, [np.uint64(5), np.int32(6)])
    assert fake.asked == [
        ("module", b"cubin"),
        ("function", "decode_gemm"),
        ("stream", 1234),
        ("launch", (216,), (256,), (np.uint64(5), np.int32(6)), 70000),
    ]


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        *(((8, 0), 80), ((8, 6), 86), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 0), 120)),
        # Another generation, or features of one capability, or (8.7) not a desktop's.
        *(((7, 5), None), ((8, 7), None), ((10, 3), None), ((11, 0), None), ((12, 1), None)),
    ],
)
def test_machine_code_runs_on_its_own_generation(capability, architecture):
    assert loading.architecture_of(capability) == architecture


def test_what_is_missing_is_a_sentence(monkeypatch):
    assert "not on 'cpu'" in loading.why_not(torch.device("cpu"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'quantlib-torch[cuda]'" in loading.why_not(torch.device("cuda"))
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 is none" in loading.why_not(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(loading, "find_nvrtc", lambda: None)
    assert "pip install nvidia-cuda-nvrtc" in loading.why_not(torch.device("cuda"))
    with pytest.raises(BuildError, match="nvidia-cuda-nvrtc"):
        loading.loader_for.__wrapped__(torch.device("cuda"))
