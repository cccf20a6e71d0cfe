"""Tiny random models of every family the native engine knows, and packed checkpoints of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from quantlib.checkpoint.writer import write_checkpoint
from quantlib.formats import CompositeWeight, Scheme, pack_stored, quantize_rtn
from quantlib.formats.composite import ROWS, StoredWeight, rows_of_blocks
from quantlib.rounding.rows import assign_rows

from .conftest import COMMON, SCHEMES

KEPT = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
WINDOW = 8
"""Of the families with sliding windows: prompts of the tests are longer."""

LAYERS = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

# name -> prefix of the classes in transformers, fields besides COMMON
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True} | QWEN_WINDOW),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "phi3": ("Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 24, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3",
        {
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": LAYERS,
            "rope_parameters": GEMMA3_ROPES,
            "final_logit_softcapping": 20.0,
        },
    ),
}
SIZES = COMMON | {"hidden_size": 64}
"""Heads of 16 columns in all families, also in those that derive their size."""


def config_of(name: str, **changes: Any) -> Any:
    """The configuration of a model of MODELS, with other fields if wanted."""
    prefix, fields = MODELS[name]
    text = "Text" if prefix == "Gemma3" else ""
    made: Any = getattr(transformers, f"{prefix}{text}Config")(**(SIZES | fields | changes))
    return made


def build(name: str, **changes: Any) -> Any:
    """A random model of MODELS, in float32; norms and biases are random too.

    Embeddings are small, so that layers have their say: where the head is tied to them, a model
    would otherwise repeat its last token for ever.
    """
    config = config_of(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.get_input_embeddings().weight.data *= 0.1
    return model


def rounded(matrix: Tensor, scheme: Scheme) -> StoredWeight:
    """A matrix rounded to the nearest; of blocks of rows, the longest rows are in the first."""
    if not scheme.rows:
        return quantize_rtn(matrix, scheme.segments(matrix.shape[-1]))
    rows, columns = matrix.shape
    block = assign_rows(scheme, matrix.norm(dim=1))
    parts = {
        f"{ROWS}{index}": quantize_rtn(matrix[own], Scheme(part.format).segments(columns))
        for index, (part, own) in enumerate(
            zip(scheme.rows, rows_of_blocks(block, rows), strict=True)
        )
    }
    return CompositeWeight(scheme, (rows, columns), parts, block)


def write(model: Any, folder: Path, schemes: Mapping[str, str] | None = None) -> Path:
    """Round a model and write it packed: returns the folder.

    schemes: end of a weight's name -> scheme, "" for all others; None: kinds of SCHEMES in turn.
    """
    matrices = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}
    given = {name: SCHEMES[i % len(SCHEMES)] for i, name in enumerate(matrices)}
    if schemes is not None:
        given = {n: next(s for end, s in schemes.items() if n.endswith(end)) for n in matrices}
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.dim() == 1}
    for name, matrix in matrices.items():
        scheme = Scheme.parse(given[name])
        if scheme.weight is None:
            tensors[name] = matrix.to(KEPT[given[name]])
        else:
            packed = pack_stored(rounded(matrix, scheme))
            tensors |= {name + suffix: tensor for suffix, tensor in packed.items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    config = {key: value for key, value in config.items() if value is not None}
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    write_checkpoint(folder, tensors, config, given, shapes)
    return folder
