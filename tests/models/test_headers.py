"""A safetensors header is read exactly, and a damaged file is refused with its name."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from quantlib.errors import ModelError
from quantlib.models.headers import TORCH_DTYPES, read_headers

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(1.0),
    "empty": torch.empty(0, 4),
}


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_headers_say_where_every_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    headers, raw = read_headers(path)
    content = path.read_bytes()
    assert raw == content[8 : 8 + len(raw)]
    assert headers.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        header = headers[name]
        assert header.file == "x.safetensors"
        assert (TORCH_DTYPES[header.dtype], header.shape) == (tensor.dtype, tuple(tensor.shape))
        data = content[header.start : header.start + header.nbytes]
        assert data == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@given(st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = save(TENSORS)
    length = data.draw(st.integers(0, len(content) - 1))
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    path.write_bytes(content[:length])
    with pytest.raises(ModelError, match=r"cut\.safetensors is truncated"):
        read_headers(path)


@given(st.binary(min_size=8, max_size=200))
def test_arbitrary_bytes_are_refused_with_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("noise") / "noise.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"noise\.safetensors"):
        read_headers(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1, 2], "not a JSON object"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "header entry of w is malformed"),
        ({"w": 3}, "header entry of w is malformed"),
        ({"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, "unsupported dtype C64"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, r"w is F32 \[3\]"),
        ({"w": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, "needs 8 bytes"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "damaged"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, header: object, message: str
) -> None:
    path = with_header(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(ModelError, match=message):
        read_headers(path)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.safetensors cannot be read"):
        read_headers(tmp_path / "gone.safetensors")
