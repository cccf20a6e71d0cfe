"""The wiring of the known families, as data. `find("llama")` is a model type's table.

Names are module names, relative to a block where a block is meant; a stack of experts is named by
its parameter. A name that a block does not have is skipped (an MoE model's dense blocks), and every
parameter of a block must be named (`binding.py` checks it), so that nothing is left out by mistake.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantlib.transforms.wiring import DECODER, ENCODER, LAYER, RMS, RMS_PLUS_ONE


@dataclass(frozen=True)
class AttentionRule:
    """module: of the attention, in its block; the rest are names in that module.

    inputs: the linears that read the stream (the last one holds the values, as its last rows).
    source: the stream that keys and values are made from, if it is not the block's own: then only
            the first of `inputs` reads the block's stream.
    """

    module: str = "self_attn"
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    source: str | None = None


@dataclass(frozen=True)
class BlockRule:
    """One list of repeated blocks, and its residual stream.

    blocks:       name of the list; config keys of the numbers of its heads.
    norms:        (norm, what reads it), attentions' inputs included.
    down:         names of what reads an MLP's hidden layer; they write the stream.
    hidden:       names of what writes it, channel by channel; gate and up may be one linear.
    output_norms: norms between a writer and the stream.
    head_norms:   norms of single heads, inside an attention: no basis here concerns them.
    drops_shift:  linears whose outputs may be shifted by a constant, see `wiring.Matrix`.
    tables:       parameters whose rows are vectors of the stream, by module.
    embedding:    the module that begins the stream; None: something non-linear does, before the
                  first block (a convolution with its activation).
    writers:      linears outside the blocks that write the stream (a vision tower's projector).
    final_norm:   the norm behind the last block; head: what reads it, None: other streams' sources.
    """

    blocks: str
    stream: str
    kind: str
    norms: tuple[tuple[str, tuple[str, ...]], ...]
    attentions: tuple[AttentionRule, ...]
    down: tuple[str, ...]
    hidden: tuple[str, ...]
    final_norm: str
    embedding: str | None
    head: str | None = "lm_head"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    output_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    drops_shift: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The lists of blocks of the models of these types; encoders come first."""

    model_types: tuple[str, ...]
    rules: tuple[BlockRule, ...]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ROUTER = ("mlp.gate",)
_EXPERTS = ("mlp.experts.gate_up_proj",)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_DOWN = ("mlp.down_proj",)


def _decoder(
    prefix: str = "model",
    *,
    qkv: tuple[str, ...] = _QKV,
    mlp: tuple[str, ...] = _GATE_UP,
    router: tuple[str, ...] = (),
    mlp_norm: str = "post_attention_layernorm",
    down: tuple[str, ...] = _DOWN,
    kind: str = RMS,
    output_norms: tuple[str, ...] = (),
    head_norms: tuple[str, ...] = (),
    writers: tuple[str, ...] = (),
) -> BlockRule:
    """A decoder with Llama's names, except what is given."""
    inputs = tuple(name.rpartition(".")[2] for name in qkv)
    return BlockRule(
        blocks=f"{prefix}.layers",
        stream=DECODER,
        kind=kind,
        norms=(("input_layernorm", qkv), (mlp_norm, (*router, *mlp))),
        attentions=(AttentionRule(inputs=inputs),),
        down=down,
        hidden=mlp,
        final_norm=f"{prefix}.norm",
        embedding=f"{prefix}.embed_tokens",
        output_norms=output_norms,
        head_norms=head_norms,
        writers=writers,
    )


def _gemma(prefix: str, head_norms: tuple[str, ...] = ()) -> BlockRule:
    """Gemma 2 and 3: norms behind attention and MLP too."""
    return _decoder(
        prefix,
        kind=RMS_PLUS_ONE,
        mlp_norm="pre_feedforward_layernorm",
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms=head_norms,
    )


_WHISPER_ENCODER = BlockRule(
    blocks="model.encoder.layers",
    stream=ENCODER,
    kind=LAYER,
    norms=(("self_attn_layer_norm", _QKV), ("final_layer_norm", ("fc1",))),
    attentions=(AttentionRule(output="out_proj"),),
    down=("fc2",),
    hidden=("fc1",),
    final_norm="model.encoder.layer_norm",
    embedding=None,
    head=None,
    heads="encoder_attention_heads",
    kv_heads="encoder_attention_heads",
    drops_shift=("self_attn.k_proj",),
)
_WHISPER_DECODER = BlockRule(
    blocks="model.decoder.layers",
    stream=DECODER,
    kind=LAYER,
    norms=(
        ("self_attn_layer_norm", _QKV),
        ("encoder_attn_layer_norm", ("encoder_attn.q_proj",)),
        ("final_layer_norm", ("fc1",)),
    ),
    attentions=(
        AttentionRule(output="out_proj"),
        AttentionRule("encoder_attn", output="out_proj", source=ENCODER),
    ),
    down=("fc2",),
    hidden=("fc1",),
    final_norm="model.decoder.layer_norm",
    embedding="model.decoder.embed_tokens",
    head="proj_out",
    heads="decoder_attention_heads",
    kv_heads="decoder_attention_heads",
    drops_shift=("self_attn.k_proj", "encoder_attn.k_proj"),
    tables=("model.decoder.embed_positions",),
)

FAMILIES: tuple[Family, ...] = (
    Family(("llama", "mistral", "smollm3", "qwen2"), (_decoder(),)),
    Family(("qwen3",), (_decoder(head_norms=_HEAD_NORMS),)),
    Family(("phi3",), (_decoder(qkv=("self_attn.qkv_proj",), mlp=("mlp.gate_up_proj",)),)),
    Family(("gemma",), (_decoder(kind=RMS_PLUS_ONE),)),
    Family(("gemma2",), (_gemma("model"),)),
    Family(("gemma3_text",), (_gemma("model", _HEAD_NORMS),)),
    Family(("gemma3",), (_gemma("model.language_model", _HEAD_NORMS),)),
    Family(
        ("mixtral",),
        (_decoder(mlp=_EXPERTS, router=_ROUTER, down=("mlp.experts.down_proj",)),),
    ),
    Family(
        ("qwen3_moe",),
        (
            _decoder(
                mlp=(*_EXPERTS, *_GATE_UP),
                router=_ROUTER,
                down=("mlp.experts.down_proj", *_DOWN),
                head_norms=_HEAD_NORMS,
            ),
        ),
    ),
    Family(
        ("qwen2_vl", "qwen2_5_vl"),
        (_decoder("model.language_model", writers=("model.visual.merger.mlp.2",)),),
    ),
    Family(("whisper",), (_WHISPER_ENCODER, _WHISPER_DECODER)),
)


def crosses(model_type: str) -> bool:
    """Whether blocks of a model of this type read two streams: a decoder's that hears an encoder,
    whose parts are all in the family's table."""
    family = find(model_type)
    rules = family.rules if family is not None else ()
    return any(attention.source is not None for rule in rules for attention in rule.attentions)


def find(model_type: str) -> Family | None:
    """The family whose table lists this `model_type` of config.json."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
