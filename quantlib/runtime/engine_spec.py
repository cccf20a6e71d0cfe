"""What the native engine must know of a model besides its weights, read from its configuration.

The engine computes one thing, a Llama-like decoder with parts that can be left out (the formulas
stand in `kernels/cpu/src/engine.h`). A family of models is a row of FAMILIES: which parts it has
and which fields of the configuration say how large they are. `unsupported` says in a sentence what
a model has that the engine has not; such a model runs the plain way, through transformers.

Nothing here opens a weight or imports a model class of transformers: rope parameters come from its
own initialisation functions, and everything else is a field of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.kernels.kv_format import MAX_HEAD_DIM

QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = (*QKV, "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of activations -> the engine's."""
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Types of rope whose frequencies do not depend on the length of the text."""


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from Llama. Field names are the configuration's.

    architecture:    the class whose checkpoints these are.
    biases:          modules -> field that says whether they have a bias; None: they always have.
    head_norms:      q and k are normed head by head (`q_norm`, `k_norm`).
    output_norms:    attention and MLP outputs are normed before they are added.
    unit_norms:      norms multiply by 1 + weight.
    fused:           one `qkv_proj` and one `gate_up_proj`.
    scaled_embedding: embeddings are multiplied by the square root of their size.
    activation:      field with the activation's name.
    windows:         "none"; "all" layers have `sliding_window` if it is set; "typed": those that
                     `layer_types` says.
    typed_ropes:     rope parameters by layer type.
    partial_rope:    `partial_rotary_factor` counts for default ropes too.
    query_scale:     field with the number whose square root divides the scores; None: head_dim.
    attention_softcap, logit_softcap: fields, None where the family has none.
    """

    architecture: str
    biases: tuple[tuple[tuple[str, ...], str | None], ...] = ()
    head_norms: bool = False
    output_norms: bool = False
    unit_norms: bool = False
    fused: bool = False
    scaled_embedding: bool = False
    activation: str = "hidden_act"
    windows: str = "none"
    typed_ropes: bool = False
    partial_rope: bool = False
    query_scale: str | None = None
    attention_softcap: str | None = None
    logit_softcap: str | None = None


_ATTENTION_BIAS = ((_ATTENTION, "attention_bias"),)
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", (*_ATTENTION_BIAS, (_MLP, "mlp_bias"))),
    "mistral": Family("MistralForCausalLM", windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", ((QKV, None),), windows="typed"),
    "qwen3": Family("Qwen3ForCausalLM", _ATTENTION_BIAS, head_norms=True, windows="typed"),
    "phi3": Family("Phi3ForCausalLM", fused=True, windows="all", partial_rope=True),
    "gemma": Family("GemmaForCausalLM", _ATTENTION_BIAS, unit_norms=True, scaled_embedding=True),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _ATTENTION_BIAS,
        output_norms=True,
        unit_norms=True,
        scaled_embedding=True,
        activation="hidden_activation",
        windows="typed",
        query_scale="query_pre_attn_scalar",
        attention_softcap="attn_logit_softcapping",
        logit_softcap="final_logit_softcapping",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _ATTENTION_BIAS,
        head_norms=True,
        output_norms=True,
        unit_norms=True,
        scaled_embedding=True,
        activation="hidden_activation",
        windows="typed",
        typed_ropes=True,
        query_scale="query_pre_attn_scalar",
        logit_softcap="final_logit_softcapping",
    ),
}
"""By `model_type`. SmolLM and SmolLM2 are Llamas."""


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotation angles are position * inverse_frequencies (float32 [rotary_dims / 2]); cosine and
    sine are multiplied by `scaling`."""

    inverse_frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class LayerSpec:
    """window: positions a token sees, itself included; 0: all. rope: index into the ropes."""

    window: int
    rope: int


@dataclass(frozen=True, eq=False)
class EngineSpec:
    """A decoder of the engine's kind: sizes, constants, and which parts it has."""

    family: Family
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[Rope, ...]
    biased: frozenset[str]
    norm_epsilon: float
    embedding_scale: float
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    activation: str
    tied: bool

    @staticmethod
    def from_config(config: Any) -> EngineSpec:
        """The spec of a configuration (a transformers config object) that `unsupported` passes."""
        family = FAMILIES[config.model_type]
        layer_types = _layer_types(config, family)
        kinds = _rope_kinds(layer_types, family)
        return EngineSpec(
            family=family,
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            layers=tuple(
                LayerSpec(
                    window=config.sliding_window if kind == "sliding_attention" else 0,
                    rope=kinds.index(kind) if family.typed_ropes else 0,
                )
                for kind in layer_types
            ),
            ropes=tuple(_rope(config, family, kind) for kind in kinds),
            biased=frozenset(_biased(config, family)),
            norm_epsilon=config.rms_norm_eps,
            embedding_scale=config.hidden_size**0.5 if family.scaled_embedding else 1.0,
            attention_scale=_query_scale(config, family) ** -0.5,
            attention_softcap=_softcap(config, family.attention_softcap),
            logit_softcap=_softcap(config, family.logit_softcap),
            activation=_ACTIVATIONS[getattr(config, family.activation)],
            tied=bool(config.tie_word_embeddings),
        )


def unsupported(config: Any) -> str | None:
    """Why the native engine cannot run a model with this configuration; None: it can.

    The sentence fits after "the native engine does not run this model: ".
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"{config.model_type} is not one of its families ({', '.join(FAMILIES)})"
    architectures = config.architectures or [family.architecture]
    if architectures != [family.architecture] or getattr(config, "auto_map", None):
        return f"it is a {architectures[0]} of its own, not the {family.architecture} it knows"
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        return f"it has no activation {activation}"
    if getattr(config, "use_bidirectional_attention", False):
        return "it lets tokens see later ones"
    if config.num_attention_heads % config.num_key_value_heads:
        return "its number of heads is no multiple of that of its key and value heads"
    if _head_dim(config) > MAX_HEAD_DIM:
        return f"its heads have more than {MAX_HEAD_DIM} columns"
    strange = set(_layer_types(config, family)) - {"full_attention", "sliding_attention"}
    if strange:
        return f"it has layers of type {min(strange)}"
    return _unsupported_rope(config, family)


def _unsupported_rope(config: Any, family: Family) -> str | None:
    for kind in _rope_kinds(_layer_types(config, family), family):
        rope_type = (_rope_parameters(config, kind) or {}).get("rope_type")
        if rope_type not in _FIXED_ROPES:
            return f"its rope is of type {rope_type}, and may change with the length of the text"
        dims, head_dim = 2 * len(_rope(config, family, kind).inverse_frequencies), _head_dim(config)
        if dims > head_dim or (dims < head_dim and not family.partial_rope):
            return f"its rope turns {dims} of the {head_dim} columns of a head"
    return None


def _layer_types(config: Any, family: Family) -> list[str]:
    """The attention of every layer; a window that is not set is full attention."""
    count, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if family.windows == "none" or window is None:
        return ["full_attention"] * count
    if family.windows == "all":
        return ["sliding_attention"] * count
    return list(config.layer_types)


def _rope_kinds(layer_types: list[str], family: Family) -> list[str | None]:
    """The layer types with ropes of their own; [None] where all layers share one."""
    return [*sorted(set(layer_types))] if family.typed_ropes else [None]


def _head_dim(config: Any) -> int:
    size: int | None = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def _query_scale(config: Any, family: Family) -> float:
    return float(getattr(config, family.query_scale) if family.query_scale else _head_dim(config))


def _softcap(config: Any, field: str | None) -> float:
    return float((getattr(config, field) if field else None) or 0.0)


def _biased(config: Any, family: Family) -> Iterator[str]:
    for modules, field in family.biases:
        if field is None or getattr(config, field):
            yield from modules


def _rope_parameters(config: Any, kind: str | None) -> Any:
    parameters = config.rope_parameters
    return parameters if kind is None or parameters is None else parameters.get(kind)


def _rope(config: Any, family: Family, kind: str | None) -> Rope:
    """Frequencies as transformers makes them: default ones by its models' formula, in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = _rope_parameters(config, kind)
    if parameters["rope_type"] != "default":
        initialise = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, scaling = initialise(config, torch.device("cpu"), layer_type=kind)
        return Rope(frequencies.to(torch.float32).contiguous(), float(scaling))
    share = parameters.get("partial_rotary_factor", 1.0) if family.partial_rope else 1.0
    dims = int(_head_dim(config) * share)
    steps = torch.arange(0, dims, 2, dtype=torch.float32, device="cpu")
    return Rope(1.0 / (parameters["rope_theta"] ** (steps / dims)), 1.0)
