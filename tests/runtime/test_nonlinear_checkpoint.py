"""A checkpoint says which layers compute in integers, and a model that is loaded does so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import quantlib  # noqa: F401  (teaches transformers the format)
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.errors import CheckpointError
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.kernels.nonlinear import Operator
from quantlib.kernels.nonlinear.rule import choose
from quantlib.runtime import nonlinear
from quantlib.runtime.nonlinear_fit import measure

from ..models.stacked_models import build

SCHEME = "w8g32"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(model: Any) -> Tensor:
    pixels = random(2, 3, 28, 28)
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixels, vision_feature_layer=-1)
            return torch.cat(list(found.pooler_output))
        output: Tensor = model(pixel_values=pixels).last_hidden_state
        return output


def write(model: PreTrainedModel, folder: Path, operators: dict[str, Operator]) -> Path:
    """The linears of the model's encoders rounded to SCHEME, everything else kept."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    schemes, shapes = {}, {}
    for name, module, _ in nonlinear.encoder_modules(model):
        if isinstance(module, nn.Linear) and "head" not in name:
            weight = tensors.pop(f"{name}.weight")
            segments = Scheme.parse(SCHEME).segments(weight.shape[1])
            packed = pack(quantize_rtn(weight, segments))
            tensors |= {f"{name}.weight{suffix}": tensor for suffix, tensor in packed.items()}
            schemes[f"{name}.weight"], shapes[f"{name}.weight"] = SCHEME, tuple(weight.shape)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    write_checkpoint(folder, tensors, config, schemes, shapes, nonlinear=operators)
    return folder


@pytest.mark.parametrize("case", ["dinov2", "siglip_vision", "llava_dinov2"])
def test_what_was_written_in_integers_is_loaded_in_integers(case: str, tmp_path: Path) -> None:
    model = build(case)
    operators = choose(measure(model, [lambda: encode(model)]), 10.0)
    assert {operator.kind for operator in operators.values()} == {"softmax", "gelu", "layer_norm"}
    folder = write(model, tmp_path / "out", operators)
    assert read_layout(folder).around.nonlinear == operators
    loaded = type(model).from_pretrained(folder)
    assert nonlinear.attached(loaded) == operators
    found = encode(loaded)
    # The same in floats is another result.
    nonlinear.detach(loaded)
    assert not torch.equal(encode(loaded), found)
    nonlinear.attach(loaded, operators)
    assert torch.equal(encode(loaded), found)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert nonlinear.attached(again) == operators
    assert torch.equal(encode(again), found)


def test_a_damaged_operator_is_reported(tmp_path: Path) -> None:
    model = build("dinov2")
    operators = {"encoder.layer.0.norm1": Operator("layer_norm", "ibert8", 0.5)}
    folder = write(model, tmp_path / "out", operators)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for given, what in (
        ({"encoder.layer.0.norm1": {"kind": "layer_norm"}}, "encoder.layer.0.norm1"),
        ([1], "nonlinear is no mapping"),
    ):
        config["quantization_config"]["nonlinear"] = given
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=what):
            read_layout(folder)
