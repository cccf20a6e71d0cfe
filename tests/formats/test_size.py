"""Byte counts are those of real tensors and real files."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantlib.errors import FormatError
from quantlib.formats import (
    Scheme,
    bits_per_weight,
    kept_bytes,
    pack,
    packed_layout,
    payload_bytes,
    quantize_rtn,
    safetensors_file_bytes,
    true_bits,
)

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
specs = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3))


@given(
    tensors=st.dictionaries(text.filter(lambda name: name != "__metadata__"), specs, max_size=12),
    metadata=st.none() | st.dictionaries(text, text, max_size=3),
)
@settings(
    deadline=None,  # it writes files
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example overwrites its file
)
def test_file_size_is_predicted_to_the_byte(
    tensors: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str] | None,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(s, dtype=d) for name, (d, s) in tensors.items()}, path, metadata)
    assert path.stat().st_size == safetensors_file_bytes(tensors, metadata)


def test_offsets_of_every_pair_of_dtypes_are_in_the_writers_order(tmp_path: Path) -> None:
    # Offsets are text: 999 and 1000 differ in length, so a wrong order shows in the size only at
    # some sizes. These straddle a power of ten.
    path = tmp_path / "a.safetensors"
    for first in DTYPES:
        for second in DTYPES:
            tensors = {"a": torch.zeros(3, dtype=first), "b": torch.zeros(999, dtype=second)}
            save_file(tensors, path)
            layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
            assert path.stat().st_size == safetensors_file_bytes(layout), (first, second)


UNIFORM = ["w3g64zs6", "w5", "w2tz", "fp6g32", "mxfp4", "nvfp4"]
SEGMENTED = ["w4a4zh8/8", "w3g64zs4h7x3/16", "w2th4/2", "mxfp4hmxfp6/8", "nvfp4anvfp4hfp8/8"]


@pytest.mark.parametrize("name", [*UNIFORM, *SEGMENTED])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (7, 576)])
def test_a_packed_weight_takes_the_bytes_that_were_announced(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    segments = Scheme.parse(name).segments(shape[1])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = {"layer.weight" + key: t for key, t in pack(quantize_rtn(weight, segments)).items()}
    payload = sum(tensor.nbytes for tensor in tensors.values())
    assert payload == payload_bytes(shape, segments)
    assert bits_per_weight(shape, segments) == 8 * payload / weight.numel()
    layout = {"layer.weight" + key: form for key, form in packed_layout(shape, segments).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == safetensors_file_bytes(layout)


def test_true_bits_count_everything() -> None:
    segments = Scheme.parse("w4g64zs6").segments(576)
    # Per row: 4 bits a weight; nine groups' 6-bit scales in 7 bytes; nine 4-bit zeros; one float16.
    assert payload_bytes((8, 576), segments) == 8 * (288 + 7 + 2) + 9 * 4
    assert bits_per_weight((8, 576), segments) == pytest.approx(4.188, abs=1e-3)


def test_true_bits_of_a_scheme_are_means_over_its_segments() -> None:
    # ResQ's 4 and 8 bits, an eighth of the columns wide: two float16 scales per row of 576.
    weight, activation = true_bits(Scheme.parse("w4a4zh8/8"), (64, 576))
    assert weight == pytest.approx(4.5 + 2 * 16 / 576, abs=1e-12)
    assert activation == 4.5
    assert true_bits(Scheme.parse("w4a8g128h8x3/16"), (3, 8, 64))[1] == 8
    assert true_bits(Scheme.parse("w4g64zs6"), (8, 576)) == (
        bits_per_weight((8, 576), Scheme.parse("w4g64zs6").segments(576)),
        16,
    )
    assert true_bits(Scheme.parse("bf16a8"), (8, 576)) == (16, 8)
    assert true_bits(Scheme.parse("mxfp4amxfp4hmxfp6/8"), (8, 512)) == (4.5, 4.25)


def test_kept_weights_take_their_dtypes_bytes() -> None:
    assert kept_bytes((3, 4, 5), "bf16") == 120
    assert kept_bytes((), "f32") == 4
    with pytest.raises(FormatError, match="bf16"):
        kept_bytes((3,), "int8")


def test_a_dtype_without_a_name_in_the_format_is_refused() -> None:
    with pytest.raises(FormatError, match="complex128"):
        safetensors_file_bytes({"a": (torch.complex128, (2,))})
