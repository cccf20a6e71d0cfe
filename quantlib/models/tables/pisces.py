"""Unified models that write pictures as continuous vectors (`models.pisces`): Pisces' form.

Its three towers are of one kind. Two of them are parts of the image encoder and of the decoder, and
are budgeted as such.
"""

from quantlib.models.families import (
    GENERATION_PROJECTOR,
    IMAGE_DECODER,
    IMAGE_ENCODER,
    Family,
    KeptRule,
    Part,
    Submodel,
    each,
    keep,
)
from quantlib.models.tables.unified import JANUS_KEEPS, JANUS_READS, janus_head
from quantlib.models.tables.vision import MLP, POSITIONS, attention

_BLOCK = (
    *attention("self_attn", "q_proj", "k_proj", "v_proj", "projection_layer"),
    *MLP,
)


def _tower(component: str, place: str, *linears: str) -> tuple[Part, ...]:
    """The tower of a larger part at `place`, and the part's own linears."""
    return (
        Part(component, _BLOCK, (f"{place}.tower.encoder.layers.*",), blocks=True),
        Part(component, each(f"{place}.tower.embeddings.patch_embedding", kind="conv")),
        Part(component, each(*(f"{place}.{name}" for name in linears))),
    )


def _tower_kept(component: str, place: str) -> tuple[KeptRule, ...]:
    return (
        *keep(component, POSITIONS, f"{place}.tower.embeddings.position_embedding.weight"),
        *keep(component, "normalisation", f"{place}.tower.encoder.layers.*.layer_norm?.weight"),
        *keep(component, "normalisation", f"{place}.tower.post_layernorm.weight"),
        *keep(component, "bias", f"{place}.*.bias"),
    )


FAMILIES = (
    Family(
        model_types=("quantlib_pisces",),
        architecture="PiscesForConditionalGeneration",
        language=Submodel("model.language_model", "text_config", default="llama"),
        groups=(),
        parts=(
            *JANUS_READS,
            *_tower(IMAGE_ENCODER, "model.image_encoder", "projection"),
            Part(
                GENERATION_PROJECTOR,
                each("model.generation_aligner.fc1", "model.generation_aligner.fc2"),
            ),
            janus_head("proj_out", "vector_head"),
            *_tower(IMAGE_DECODER, "model.image_decoder", "condition", "time", "pixels"),
        ),
        kept=(
            *JANUS_KEEPS,
            *_tower_kept(IMAGE_ENCODER, "model.image_encoder"),
            *_tower_kept(IMAGE_DECODER, "model.image_decoder"),
        ),
    ),
)
