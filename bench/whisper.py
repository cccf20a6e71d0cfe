"""Whisper out of a CTranslate2 file: the container is read, its names are mapped to transformers'.

The container (binary, little end first): a version u32; the name of the specification; a revision
u32; the number of variables u32; then per variable its name, its number of dimensions u8, the
dimensions u32, a type u8 and the bytes u32 and data. A string is its length u16 and its bytes.

CTranslate2 fuses what reads one input: `linear_0` of self-attention is q, k and v one above the
other, `linear_1` of cross-attention is k and v. Whisper's keys have no bias, so the fused one holds
zeros there. The head is the embedding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantlib.errors import DataError

Array = npt.NDArray[np.generic]

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
ENGLISH_VOCABULARY = 51864
"""Entries of the English-only models; the multilingual ones have one more, and other tokens."""
_END, _START = 50256, 50257


def read_ctranslate2(path: Path) -> dict[str, Array]:
    """Every variable of a CTranslate2 file. Raises DataError when it is not one."""
    data = path.read_bytes()
    try:
        variables = dict(_variables(data))
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read as a CTranslate2 model: {error}") from error
    return variables


def _variables(data: bytes) -> Iterator[tuple[str, Array]]:
    offset = 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from("<" + code, data, offset)
        offset += struct.calcsize(code)
        return int(value)

    def text() -> str:
        nonlocal offset
        length = number("H")
        offset += length
        return data[offset - length : offset].rstrip(b"\0").decode()

    number("I"), text(), number("I")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = np.dtype(_DTYPES[number("B")]), number("I")
        yield name, np.frombuffer(data, dtype, size // dtype.itemsize, offset).reshape(shape)
        offset += size


def export_whisper(weights: Path, tokenizer: Path, target: Path) -> None:
    """Save a CTranslate2 file of an English-only Whisper as a folder that transformers loads.

    Raises DataError when a variable is missing or one is left over.
    """
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    variables = read_ctranslate2(weights)
    try:
        config = WhisperConfig(**config_values(variables))
        parameters = map_parameters(variables, config.encoder_layers)
    except KeyError as error:
        raise DataError(f"{weights} is not a Whisper model: it has no variable {error}") from error
    model = WhisperForConditionalGeneration(config).to(torch.float16).eval()
    problems = model.load_state_dict(parameters, strict=False)
    missing = set(problems.missing_keys) - {"proj_out.weight"}  # tied to the embedding
    if missing or problems.unexpected_keys:
        raise DataError(
            f"{weights} does not fill a Whisper model: missing {sorted(missing)}, left over "
            f"{problems.unexpected_keys}"
        )
    model.tie_weights()
    model.save_pretrained(target)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(target)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)


def config_values(variables: dict[str, Array]) -> dict[str, int | None]:
    """Fields of `WhisperConfig`, read from shapes. Raises DataError for a multilingual model."""
    width = variables["encoder/conv1/weight"].shape[0]
    vocabulary = variables["decoder/embeddings/weight"].shape[0]
    if vocabulary != ENGLISH_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocabulary} is not that of an English-only Whisper "
            f"({ENGLISH_VOCABULARY})"
        )
    layers, heads = _layers(variables), int(variables["encoder/num_heads"])
    return {
        "vocab_size": vocabulary,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
        "pad_token_id": _END,
        "bos_token_id": _END,
        "eos_token_id": _END,
        "decoder_start_token_id": _START,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }


def _layers(variables: dict[str, Array]) -> int:
    names = {name.split("/")[1] for name in variables if name.startswith("encoder/layer_")}
    return len([name for name in names if name.removeprefix("layer_").isdigit()])


def map_parameters(variables: dict[str, Array], layers: int) -> dict[str, Tensor]:
    """transformers' names -> float16 tensors. Raises KeyError with the first variable missing."""
    out: dict[str, Tensor] = {}

    def put(name: str, value: Array) -> None:
        out[name] = torch.from_numpy(np.array(value, dtype=np.float16))

    def copy(source: str, target: str) -> None:
        """A linear or a convolution."""
        put(f"{target}.weight", variables[f"{source}/weight"])
        put(f"{target}.bias", variables[f"{source}/bias"])

    def norm(source: str, target: str) -> None:
        put(f"{target}.weight", variables[f"{source}/gamma"])
        put(f"{target}.bias", variables[f"{source}/beta"])

    def split(source: str, target: str, letters: str) -> None:
        """Fused projections; a key's bias is dropped, as it is zero and has no place."""
        weight = np.split(variables[f"{source}/weight"], len(letters))
        bias = np.split(variables[f"{source}/bias"], len(letters))
        for letter, rows, offsets in zip(letters, weight, bias, strict=True):
            put(f"{target}.{letter}_proj.weight", rows)
            if letter != "k":
                put(f"{target}.{letter}_proj.bias", offsets)
            elif bool(np.any(offsets)):
                raise DataError(f"{source}: its keys have a bias, which Whisper's do not")

    for side in ("encoder", "decoder"):
        for index in range(layers):
            theirs, ours = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            split(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", "qkv")
            copy(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                copy(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                split(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", "kv")
                copy(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            copy(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            copy(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        positions = variables[f"{side}/position_encodings/encodings"]
        put(f"model.{side}.embed_positions.weight", positions)
    for convolution in ("conv1", "conv2"):
        copy(f"encoder/{convolution}", f"model.encoder.{convolution}")
    put("model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    return out
