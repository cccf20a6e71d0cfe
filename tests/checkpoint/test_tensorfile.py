"""Our safetensors files are the library's, byte for byte, written in the memory of one tensor."""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from quantlib.checkpoint.disk import atomic_write
from quantlib.checkpoint.tensorfile import (
    LazyTensor,
    TensorFile,
    atomic_save_tensors,
    header_bytes,
    read_tensors,
    tensor_content,
)
from quantlib.errors import CheckpointError, FormatError
from quantlib.formats.size import safetensors_file_bytes
from quantlib.models.headers import TORCH_DTYPES

METADATA = {"format": "pt"}


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Every dtype, scalars, empty tensors, names that JSON has to escape."""
    names = draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=6))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from([TORCH_DTYPES[name] for name in TORCH_DTYPES]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        tensors[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return {name: t for name, t in tensors.items() if name != "__metadata__"}


@given(tensor_dicts())
def test_the_bytes_are_those_of_the_library(tmp_path_factory, tensors) -> None:
    path = tmp_path_factory.mktemp("t") / "f.safetensors"
    atomic_save_tensors(path, tensors, METADATA)
    assert path.read_bytes() == save(tensors, METADATA)


@given(tensor_dicts())
def test_the_size_is_the_one_that_budgets_count(tensors: dict[str, torch.Tensor]) -> None:
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    size = len(header_bytes(lazy, METADATA)) + sum(tensor.nbytes for tensor in lazy.values())
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in lazy.items()}
    assert size == safetensors_file_bytes(layout, METADATA)


@given(tensor_dicts())
def test_what_is_written_is_read_back_bit_for_bit(tmp_path_factory, tensors) -> None:
    path = tmp_path_factory.mktemp("t") / "f.safetensors"
    atomic_save_tensors(path, tensors)
    for read in (read_tensors(path), load_file(path)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert read[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_the_order_of_the_dictionary_does_not_matter(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16), "c": torch.ones(1)}
    atomic_save_tensors(tmp_path / "1", tensors)
    atomic_save_tensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_strided_and_shared_tensors_are_written_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    atomic_save_tensors(tmp_path / "f", {"t": base.t(), "row": base[1], "again": base[1]})
    read = read_tensors(tmp_path / "f")
    torch.testing.assert_close(read["t"], base.t(), rtol=0, atol=0)
    torch.testing.assert_close(read["again"], base[1], rtol=0, atol=0)


def test_one_lazy_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def load() -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(100)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    lazy = {f"t{i}": LazyTensor(torch.float32, (100,), load) for i in range(20)}
    atomic_write(tmp_path / "f", tensor_content(lazy))
    assert most == 1


_PEAK = """
import resource, sys
import torch
from quantlib.checkpoint.tensorfile import LazyTensor, atomic_save_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def tensors(count):
    load = lambda: torch.ones(1 << 20, dtype=torch.float32)
    return {f"t{i}": LazyTensor(torch.float32, (1 << 20,), load) for i in range(count)}

atomic_save_tensors(sys.argv[1], tensors(2))
before = peak()
atomic_save_tensors(sys.argv[1], tensors(48))
print(peak() - before)
"""


def test_peak_memory_is_one_tensor(tmp_path: Path) -> None:
    """48 tensors of 4 MB: their 200 MB must not show; a second 4 MB tensor and some noise may."""
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "f")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "f").stat().st_size > 48 * (4 << 20)
    assert grown < 12 << 20


def test_a_tensor_that_is_not_what_it_said_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    for dtype, shape in ((torch.float16, (2, 2)), (torch.float32, (4,))):
        lazy = {"x": LazyTensor(dtype, shape, lambda: torch.zeros(2, 2))}
        with pytest.raises(CheckpointError, match="x was announced as"):
            atomic_save_tensors(tmp_path / "f", lazy)
    with pytest.raises(FormatError, match=r"x is torch\.complex128, which safetensors"):
        atomic_save_tensors(tmp_path / "f", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_reading_maps_and_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "f"
    atomic_save_tensors(path, {"x": torch.zeros(4)})
    tensor = TensorFile.open(path).read("x")
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\x80\x3f")
    assert tensor[3] == 1  # seen through the map: nothing had been copied


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_a_sentence_and_not_a_crash(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "f.safetensors"
    atomic_save_tensors(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"f\.safetensors is truncated"):
        TensorFile.open(path)


def test_other_damage_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        TensorFile.open(path)
    path.write_bytes(b"PK\x03\x04 is a zip file, for instance a pickled model")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        TensorFile.open(path)
    atomic_save_tensors(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes() + b"more")
    file = TensorFile.open(path)
    with pytest.raises(CheckpointError, match=r"f\.safetensors is damaged"):
        file.read("x")
    with pytest.raises(CheckpointError, match="has no tensor y"):
        file.read("y")


def test_the_library_opens_it_by_name(tmp_path: Path) -> None:
    atomic_save_tensors(tmp_path / "f", {"x": torch.arange(3)}, METADATA)
    with safetensors.safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == METADATA
        assert file.get_tensor("x").tolist() == [0, 1, 2]
