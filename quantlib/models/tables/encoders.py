"""Encoders that write vectors: BERT, and the pairs of towers of CLIP and SigLIP."""

from quantlib.models.families import (
    POSITION_IDS,
    PROJECTOR,
    TEXT_ENCODER,
    VISION,
    DiskRules,
    Family,
    Part,
    Submodel,
    each,
    keep,
    linears,
)
from quantlib.models.tables.vision import MLP, POSITIONS, attention

_BERT_GROUPS = (
    linears(
        "attention.self.qkv",
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        fused=True,
    ),
    *each("attention.output.dense", "intermediate.dense", "output.dense"),
)


def _text_tower(model_type: str, parts: tuple[Part, ...] = ()) -> Family:
    return Family(
        model_types=(model_type,),
        groups=(*attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), *MLP),
        kept=(
            *keep(TEXT_ENCODER, POSITIONS, "embeddings.position_embedding.weight"),
            *keep(TEXT_ENCODER, "normalisation", "encoder.layers.*.layer_norm?.weight"),
            *keep(TEXT_ENCODER, "normalisation", "final_layer_norm.weight"),
            *keep(TEXT_ENCODER, "bias", "*.bias"),
        ),
        blocks="encoder.layers",
        embeddings=("embeddings.token_embedding.weight",),
        head=None,
        component=TEXT_ENCODER,
        parts=parts,
        root="",
        disk=DiskRules(ignored=POSITION_IDS),
    )


def _pair(model_type: str, architecture: str, parts: tuple[Part, ...] = ()) -> Family:
    return Family(
        model_types=(model_type,),
        architecture=architecture,
        language=Submodel("text_model", "text_config", default=f"{model_type}_text_model"),
        groups=(),
        head=None,
        parts=(
            Submodel("vision_model", "vision_config", default=f"{model_type}_vision_model"),
            *parts,
        ),
        kept=(*keep(PROJECTOR, "scale and shift of the similarity", "logit_*"),),
    )


FAMILIES = (
    Family(
        model_types=("bert",),
        architecture="BertModel",
        groups=_BERT_GROUPS,
        kept=(
            *keep(TEXT_ENCODER, POSITIONS, "embeddings.position_embeddings.weight"),
            *keep(TEXT_ENCODER, "two rows for two sentences", "embeddings.token_type_*.weight"),
            *keep(TEXT_ENCODER, "normalisation", "*.LayerNorm.weight"),
            *keep(TEXT_ENCODER, "bias", "*.bias"),
        ),
        blocks="encoder.layer",
        embeddings=("embeddings.word_embeddings.weight",),
        head=None,
        component=TEXT_ENCODER,
        parts=(Part(TEXT_ENCODER, each("pooler.dense", optional=True)),),
        root="",
        disk=DiskRules(
            renames=(
                (r"^bert\.", ""),
                (r"LayerNorm\.gamma$", "LayerNorm.weight"),
                (r"LayerNorm\.beta$", "LayerNorm.bias"),
            ),
            ignored=POSITION_IDS,
        ),
    ),
    _text_tower("clip_text_model"),
    _text_tower("siglip_text_model", (Part(TEXT_ENCODER, each("head")),)),
    _pair(
        "clip",
        "CLIPModel",
        (
            Part(VISION, each("visual_projection")),
            Part(TEXT_ENCODER, each("text_projection")),
        ),
    ),
    _pair("siglip", "SiglipModel"),
)
