"""What is around the weights: clip factors, input orders and a rotation, written, read and
checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.surroundings import CacheSettings
from quantlib.checkpoint.tensorfile import LazyTensor, atomic_save_tensors, read_tensors
from quantlib.checkpoint.writer import planned_bytes, quantization_config
from quantlib.errors import CheckpointError
from quantlib.formats import (
    Scheme,
    dequantize,
    pack,
    payload_bytes,
    quantize_rtn,
    safetensors_file_bytes,
    with_clips,
)
from quantlib.kernels.kv_format import KvFormat
from quantlib.transforms.rotation import Rotation

Q = "quantization_config"
WEIGHT, STACK, PLAIN = "layers.0.o.weight", "layers.0.experts.down", "layers.0.q.weight"
CLIPS = {WEIGHT: [0.875, 1.0], STACK: [0.5]}

CACHES = {"layers.0.attn": CacheSettings(KvFormat.parse("int4h16/int8"), 4, 8)}


def orthogonal(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.fixture
def rotation() -> Rotation:
    return Rotation(
        residual=orthogonal(72), key={"layers.0": orthogonal(16)}, hidden={"layers.0": 8}
    )


@pytest.fixture
def rotated(parts: Any) -> Any:
    """The small checkpoint, with two weights in segments, one of them in another order, and a
    stack."""
    generator = torch.Generator().manual_seed(1)
    parts.schemes |= {WEIGHT: "w4a4zh8/8", STACK: "w4g32a4"}
    parts.shapes |= {WEIGHT: (20, 72), STACK: (3, 7, 40)}
    for name in (WEIGHT, STACK):
        weight = torch.randn(parts.shapes[name], generator=generator).flatten(0, -2)
        segments = Scheme.parse(parts.schemes[name]).segments(weight.shape[1])
        quantized = quantize_rtn(weight, segments)
        parts.weights[name] = dequantize(quantized)
        parts.tensors |= {name + suffix: tensor for suffix, tensor in pack(quantized).items()}
        order = torch.randperm(weight.shape[1], generator=generator)
        parts.tensors[name + "_order"] = order.to(torch.int32)
    return parts


@pytest.mark.parametrize("shard_bytes", [500, 10**9])
def test_what_was_written_is_read(rotated: Any, rotation: Rotation, shard_bytes: int) -> None:
    folder = rotated.write(clips=CLIPS, rotation=rotation, caches=CACHES, shard_bytes=shard_bytes)
    checkpoint = read_layout(folder)
    assert checkpoint.around.caches == CACHES
    assert checkpoint.config[Q]["version"] == 2
    scheme = Scheme.parse("w4a4zh8/8")
    assert checkpoint.segments(WEIGHT) == scheme.segments(72)
    assert checkpoint.activations(WEIGHT) == with_clips(scheme.activations(72), [0.875, 1.0])
    assert checkpoint.activations(STACK)[0].format.clip == 0.5
    assert checkpoint.activations(PLAIN) == ()
    assert checkpoint.activations("layers.1.k.weight") == ()
    for name in (WEIGHT, STACK):
        order = checkpoint.order(name)
        assert order is not None
        assert torch.equal(order, rotated.tensors[name + "_order"])
    assert checkpoint.order(PLAIN) is None
    found = dequantize(checkpoint.quantized(WEIGHT))
    torch.testing.assert_close(found, rotated.weights[WEIGHT], rtol=0, atol=0)
    assert sorted(checkpoint.kept_names) == ["layers.1.k.weight", "norm.weight", "scalar"]
    checkpoint.verify()


def test_a_rotation_comes_back_in_float32(rotated: Any, rotation: Rotation) -> None:
    found = read_layout(rotated.write(rotation=rotation)).rotation()
    assert found is not None
    assert (found.hidden, set(found.key), found.value) == ({"layers.0": 8}, {"layers.0"}, {})
    for basis, original in (
        (found.residual, rotation.residual),
        (found.key["layers.0"], rotation.key["layers.0"]),
    ):
        assert basis is not None
        assert basis.dtype == torch.float64
        assert torch.equal(basis, original.float().double())
        # `Rotation.check` allows 1e-6; float32 keeps 24 bits of every entry.
        identity = torch.eye(len(basis), dtype=torch.float64)
        assert float((basis.T @ basis - identity).abs().max()) <= 3e-7


def test_a_large_basis_in_float32_still_counts_as_orthogonal() -> None:
    basis = orthogonal(1024).float().double()
    identity = torch.eye(1024, dtype=torch.float64)
    assert float((basis.T @ basis - identity).abs().max()) <= 3e-7


def test_bytes_are_predicted_exactly(rotated: Any, rotation: Rotation) -> None:
    folder = rotated.write(clips=CLIPS, rotation=rotation)
    stored = read_tensors(folder / "model.safetensors")
    forms = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    size = (folder / "model.safetensors").stat().st_size
    lazy = {name: LazyTensor.of(tensor) for name, tensor in stored.items()}
    checkpoint = read_layout(folder)
    predicted = safetensors_file_bytes(forms, {"format": "pt"})
    assert size == checkpoint.total_bytes == planned_bytes(lazy) == predicted
    segments = Scheme.parse("w4a4zh8/8").segments(72)
    payload = sum(stored[WEIGHT + suffix].nbytes for suffix in checkpoint.layout(WEIGHT))
    assert payload == payload_bytes((20, 72), segments)


def test_a_checkpoint_without_any_of_it_is_one_of_version_1(parts: Any, rotated: Any) -> None:
    plain = {"a": "w4g64", "b": "w8a8", "c": "bf16"}
    shapes = dict.fromkeys(plain, (8, 64))
    assert quantization_config(plain, shapes) == {
        "quant_method": "quantlib",
        "version": 1,
        "schemes": plain,
        "shapes": {name: [8, 64] for name in plain},
    }
    for scheme in ("w4h8/8", "w4a4", "w8a8g128"):
        assert quantization_config({"a": scheme}, {"a": (8, 64)})["version"] == 2
    assert quantization_config(plain, shapes, orders=["a"])["version"] == 2


def test_version_1_is_still_read(parts: Any) -> None:
    folder = parts.write()
    assert json.loads((folder / "config.json").read_text())[Q]["version"] == 1
    checkpoint = read_layout(folder)
    assert checkpoint.rotation() is None
    assert checkpoint.activations("embed.weight") == Scheme.parse("w6ta8").activations(72)


@pytest.mark.parametrize(
    ("clips", "sentence"),
    [
        ({"nowhere": [1.0]}, "given for nowhere, which is no packed weight"),
        ({"layers.1.k.weight": [1.0]}, "which is no packed weight"),
        ({WEIGHT: [1.0]}, "1 clip factors for 2 activation segments"),
        ({WEIGHT: [0.0, 1.0]}, "above 0 and at most 1, not 0.0"),
        ({WEIGHT: [float("nan"), 1.0]}, "not nan"),
        ({PLAIN: [1.0]}, r"layers\.0\.q\.weight \(w4g32z\): 1 clip factors for 0"),
    ],
)
def test_clip_factors_that_do_not_fit_are_refused_before_anything_is_written(
    rotated: Any, clips: dict[str, list[float]], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        rotated.write(clips=clips)
    assert not rotated.out.exists()


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config[Q])
    (folder / "config.json").write_text(json.dumps(config))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "clips as a list": (lambda q: q.update(clips=[1]), "damaged .*clips are no mapping"),
    "a clip that is none": (
        lambda q: q["clips"].update({WEIGHT: ["all", 1]}),
        r"damaged \(the clip factors of layers\.0\.o\.weight are",
    ),
    "too few clips": (
        lambda q: q["clips"].update({WEIGHT: [1]}),
        r"layers\.0\.o\.weight \(w4a4zh8/8\): 1 clip factors for 2",
    ),
    "orders as a number": (lambda q: q.update(orders=3), "damaged .*orders no list"),
    "an order of nothing": (
        lambda q: q["orders"].append("layers.9.o.weight"),
        r"given for layers\.9\.o\.weight, which is no packed weight",
    ),
    "an order that is not there": (
        lambda q: q["orders"].append(PLAIN),
        r"lacks the tensor layers\.0\.q\.weight_order, which config\.json names",
    ),
    "an order that is not named": (
        lambda q: q["orders"].remove(WEIGHT),
        r"has the tensor layers\.0\.o\.weight_order, which w4a4zh8/8 has no use for",
    ),
    "another scheme": (
        lambda q: q["schemes"].update({WEIGHT: "w4a4zh8x3/16"}),
        r"layers\.0\.o\.weight_packed_1 in .* in w4a4zh8x3/16 needs",
    ),
    "transforms as a list": (lambda q: q.update(transforms=[]), "transforms are no mapping"),
    "another transform": (
        lambda q: q["transforms"].update(smoothing={}),
        "changed by 'smoothing', which this quantlib does not know",
    ),
    "a rotation without tensors": (
        lambda q: q["transforms"]["rotation"].pop("tensors"),
        "the rotation does not name its tensors",
    ),
    "tensors that are not there": (
        lambda q: q["transforms"]["rotation"]["tensors"].update({"key.layers.1": "somewhere"}),
        "lacks the tensor somewhere",
    ),
    "a rotation in another dtype": (
        lambda q: q["transforms"]["rotation"]["tensors"].update({"key.layers.1": "norm.weight"}),
        r"norm\.weight in .* is BF16 \[72\], expected torch\.float32",
    ),
    "caches as a list": (lambda q: q.update(caches=[]), "damaged .*caches are no mapping"),
    "a cache that is none": (
        lambda q: q["caches"].update(there=[1]),
        r"damaged \(the cache of there",
    ),
    "fewer than no sinks": (
        lambda q: q["caches"]["layers.0.attn"].update(sinks=-1),
        r"damaged \(the cache of layers\.0\.attn: .*-1",
    ),
    "half a sink": (
        lambda q: q["caches"]["layers.0.attn"].update(sinks=0.5),
        r"damaged \(the cache of layers\.0\.attn",
    ),
    "a cache in a format that is none": (
        lambda q: q["caches"]["layers.0.attn"].update(kv="int3"),
        r"the cache of layers\.0\.attn: 'int3' is not a format of a KV cache",
    ),
    "a newer rotation": (
        lambda q: q["transforms"]["rotation"].update(version=9),
        "the rotation has version 9",
    ),
    "settings of another form": (
        lambda q: q["transforms"]["rotation"].update(hidden=[1]),
        "rotation's settings are damaged",
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_config_that_does_not_fit_is_told(rotated: Any, rotation: Rotation, case: str) -> None:
    edit, sentence = EDITS[case]
    edit_config(rotated.write(clips=CLIPS, rotation=rotation, caches=CACHES), edit)
    with pytest.raises(CheckpointError, match=sentence):
        read_layout(rotated.out)


@pytest.mark.parametrize("values", [[0] * 72, [*range(71), 72], [-1, *range(1, 72)]])
def test_an_order_that_is_none_is_told(rotated: Any, values: list[int]) -> None:
    rotated.tensors[WEIGHT + "_order"] = torch.tensor(values, dtype=torch.int32)
    checkpoint = read_layout(rotated.write())
    with pytest.raises(CheckpointError, match=r"layers\.0\.o\.weight does not name each of 72"):
        checkpoint.order(WEIGHT)


@pytest.mark.parametrize(
    "order", [torch.arange(72), torch.arange(71, dtype=torch.int32)], ids=["int64", "short"]
)
def test_an_order_of_another_form_is_told(rotated: Any, order: torch.Tensor) -> None:
    path = rotated.write() / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    atomic_save_tensors(path, tensors | {WEIGHT + "_order": order}, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weight_order in .*, expected torch\.int32 \[72\]"):
        read_layout(rotated.out)


def test_questions_about_what_is_not_there_are_sentences(rotated: Any) -> None:
    checkpoint = read_layout(rotated.write())
    with pytest.raises(CheckpointError, match=r"out has no weight layers\.9"):
        checkpoint.activations("layers.9")
