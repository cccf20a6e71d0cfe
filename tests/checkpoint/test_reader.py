"""Every damaged checkpoint is a sentence; a whole one costs no memory to open."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.tensorfile import atomic_save_tensors, read_tensors
from quantlib.errors import CheckpointError
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import dequantize


@pytest.mark.parametrize("shard_bytes", [500, 10**9])
def test_what_was_written_is_read(parts: Any, shard_bytes: int) -> None:
    checkpoint = read_layout(parts.write(shard_bytes=shard_bytes))
    assert set(checkpoint) == set(parts.schemes)
    assert len(checkpoint) == len(parts.schemes)
    assert checkpoint.schemes["embed.weight"] == Scheme.parse("w6ta8")
    assert checkpoint.shapes["layers.0.experts.up"] == (3, 7, 40)
    assert checkpoint.config["hidden_size"] == 72
    for name, expected in parts.weights.items():
        found = dequantize(checkpoint.quantized(name))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert sorted(checkpoint.kept_names) == ["layers.1.k.weight", "norm.weight", "scalar"]
    for name in checkpoint.kept_names:
        assert checkpoint.kept(name).equal(parts.tensors[name])
    sizes = [path.stat().st_size for path in parts.out.glob("*.safetensors")]
    assert checkpoint.total_bytes == sum(sizes)
    checkpoint.verify()


def test_tensors_come_by_suffix_from_the_memory_map(parts: Any) -> None:
    checkpoint = read_layout(parts.write())
    tensors = checkpoint.tensors("layers.0.q.weight")
    assert tensors.keys() == {"_packed", "_scale", "_zero_point"}
    assert checkpoint.tensors("layers.1.k.weight").keys() == {""}
    again = checkpoint.tensors("layers.0.q.weight")
    for suffix, tensor in tensors.items():
        assert tensor.data_ptr() == again[suffix].data_ptr()  # the map, not a copy


def test_questions_about_what_is_not_there_are_sentences(parts: Any) -> None:
    checkpoint = read_layout(parts.write())
    for ask in (checkpoint.tensors, checkpoint.quantized, checkpoint.segments, checkpoint.layout):
        with pytest.raises(CheckpointError, match=r"out has no weight layers\.9"):
            ask("layers.9")
    with pytest.raises(CheckpointError, match=r"out has no tensor layers\.9"):
        checkpoint.kept("layers.9")
    with pytest.raises(CheckpointError, match="is kept as bf16: read it with `kept`"):
        checkpoint.segments("layers.1.k.weight")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


Q = "quantization_config"
CONFIG_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unquantized": (lambda c: c.pop(Q), "is not quantized: give a folder that quantlib wrote"),
    "other method": (lambda c: c[Q].update(quant_method="gptq"), "was quantized by 'gptq'"),
    "newer": (lambda c: c[Q].update(version=4), "has version 4 .* update quantlib"),
    "unknown scheme": (
        lambda c: c[Q]["schemes"].update({"embed.weight": "w9"}),
        r"weight embed\.weight: 'w9' is not a scheme",
    ),
    "another scheme": (
        lambda c: c[Q]["schemes"].update({"embed.weight": "w5ta8"}),
        r"embed\.weight_packed in .* is I32 .* in w5ta8 needs torch\.int32",
    ),
    "scheme with more tensors": (
        lambda c: c[Q]["schemes"].update({"embed.weight": "w6tz"}),
        r"lacks the tensor embed\.weight_zero_point, which w6tz calls for",
    ),
    "scheme with fewer tensors": (
        lambda c: c[Q]["schemes"].update({"layers.0.q.weight": "w4g32"}),
        r"has the tensor layers\.0\.q\.weight_zero_point, which w4g32 has no use for",
    ),
    "kept but packed": (
        lambda c: c[Q]["schemes"].update({"embed.weight": "bf16"}),
        r"lacks the tensor embed\.weight, which bf16 calls for",
    ),
    "kept in another dtype": (
        lambda c: c[Q]["schemes"].update({"layers.1.k.weight": "f16"}),
        r"layers\.1\.k\.weight in .* is BF16 \[20, 72\], .* needs torch\.float16",
    ),
    "another shape": (
        lambda c: c[Q]["shapes"].update({"embed.weight": [21, 72]}),
        r"embed\.weight_packed in .* a weight of \[21, 72\] in w6ta8 needs",
    ),
    "shape without a column": (
        lambda c: c[Q]["shapes"].update({"embed.weight": []}),
        "quantization_config in .* is damaged",
    ),
    "no shape": (
        lambda c: c[Q]["shapes"].pop("embed.weight"),
        "quantization_config in .* is damaged .*embed",
    ),
    "empty shape": (
        lambda c: c[Q]["shapes"].update({"embed.weight": [0, 72]}),
        r"weight embed\.weight: ",
    ),
    "schemes as a list": (
        lambda c: c[Q].update(schemes=[]),
        "quantization_config in .* is damaged",
    ),
    "not an object": (lambda c: c.update({Q: 3}), "is not quantized"),
}


@pytest.mark.parametrize("case", CONFIG_EDITS)
def test_a_config_that_does_not_fit_is_told(parts: Any, case: str) -> None:
    edit, sentence = CONFIG_EDITS[case]
    edit_config(parts.write(), edit)
    with pytest.raises(CheckpointError, match=sentence):
        read_layout(parts.out)


def test_a_missing_or_unreadable_config_is_told(parts: Any) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        read_layout(parts.out)
    parts.write()
    (parts.out / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_layout(parts.out)
    (parts.out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"could not read .*config\.json"):
        read_layout(parts.out)


def test_a_missing_tensor_is_told(parts: Any) -> None:
    path = parts.write() / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    del tensors["layers.1.q.weight_row_scale"]
    atomic_save_tensors(path, tensors)
    with pytest.raises(CheckpointError, match=r"lacks the tensor layers\.1\.q\.weight_row_scale"):
        read_layout(parts.out)


def test_a_weight_both_packed_and_plain_is_told(parts: Any) -> None:
    parts.tensors["embed.weight"] = torch.zeros(20, 72)
    with pytest.raises(
        CheckpointError, match=r"has the tensor embed\.weight, which w6ta8 has no use"
    ):
        read_layout(parts.write())


@pytest.mark.parametrize("shard_bytes", [500, 10**9])
def test_missing_and_truncated_files_are_told(parts: Any, shard_bytes: int) -> None:
    parts.write(shard_bytes=shard_bytes)
    path = sorted(parts.out.glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated"):
        read_layout(parts.out)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"out lacks {path.name}"):
        read_layout(parts.out)
    path.write_bytes(data)
    read_layout(parts.out)


INDEX_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a name too many": (
        lambda i: i["weight_map"].update(extra="model-00001-of-{n}"),
        "about extra",
    ),
    "a name too few": (lambda i: i["weight_map"].pop("norm.weight"), r"about norm\.weight"),
    "no map": (lambda i: i.pop("weight_map"), "it has no weight_map"),
    "a file elsewhere": (
        lambda i: i["weight_map"].update({"norm.weight": "../x.safetensors"}),
        r"names \.\./x\.safetensors, which is not a file of its folder",
    ),
}


@pytest.mark.parametrize("case", INDEX_EDITS)
def test_an_index_that_does_not_fit_is_told(parts: Any, case: str) -> None:
    path = parts.write(shard_bytes=2000) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit, sentence = INDEX_EDITS[case]
    edit(index)
    first = sorted(file.name for file in parts.out.glob("*.safetensors"))[0]
    path.write_text(json.dumps(index).replace("model-00001-of-{n}", first))
    with pytest.raises(CheckpointError, match=sentence):
        read_layout(parts.out)


def test_flipped_bits_are_found_by_verify(parts: Any) -> None:
    path = parts.write() / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    checkpoint = read_layout(parts.out)  # headers alone cannot tell
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed since"):
        checkpoint.verify()


def test_values_that_are_no_numbers_are_told(parts: Any) -> None:
    name = "layers.0.q.weight"
    parts.tensors[name + "_scale"] = torch.full_like(parts.tensors[name + "_scale"], float("nan"))
    checkpoint = read_layout(parts.write())
    with pytest.raises(CheckpointError, match=r"layers\.0\.q\.weight in .*out: "):
        checkpoint.quantized(name)
