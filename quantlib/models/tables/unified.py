"""Models that read and write images: Janus (separate encoders, a head for image codes), Chameleon
and Emu3 (one vocabulary of words and image codes).

What generates images is never run by the model's `forward` (Janus), or shares all its weights with
what reads them; calibration has to drive it explicitly (`calibration.forwards`).
"""

from quantlib.models.families import (
    ATTENTION,
    FINAL_NORM,
    GENERATION_EMBEDDINGS,
    GENERATION_HEAD,
    GENERATION_PROJECTOR,
    LANGUAGE_MODEL,
    MLP,
    PROJECTOR,
    DiskRules,
    Family,
    Part,
    Submodel,
    each,
    keep,
    lookup,
    norms,
    whole,
)

_GENERATION_EMBEDDINGS = "model.generation_embeddings"

JANUS_READS = (
    Submodel("model.vision_model", "vision_config", default="janus_vision_model"),
    Part(PROJECTOR, each("model.aligner.fc1")),
    Part(PROJECTOR, (whole(optional=True),), ("model.aligner.hidden_layers.*",)),
)
"""What Janus, and models of its form, read pictures with."""
JANUS_KEEPS = (
    *keep(PROJECTOR, "bias", "model.aligner.*.bias"),
    *keep(GENERATION_PROJECTOR, "bias", "model.generation_aligner.*.bias"),
    *keep(GENERATION_HEAD, "bias", "model.generation_head.*.bias"),
)
"""What is kept of that, and of what leads from the language model to pictures and back."""


def janus_head(*outputs: str) -> Part:
    """What the language model writes pictures with."""
    return Part(GENERATION_HEAD, each(*(f"model.generation_head.{name}" for name in outputs)))


FAMILIES = (
    Family(
        model_types=("janus",),
        architecture="JanusForConditionalGeneration",
        language=Submodel("model.language_model", "text_config", default="llama"),
        groups=(),
        parts=(
            *JANUS_READS,
            Part(GENERATION_EMBEDDINGS, (lookup(_GENERATION_EMBEDDINGS),)),
            Part(GENERATION_PROJECTOR, each("model.generation_aligner.fc1")),
            Part(
                GENERATION_PROJECTOR,
                (whole(optional=True),),
                ("model.generation_aligner.hidden_layers.*",),
            ),
            janus_head("proj_out", "vision_head"),
            Submodel("model.vqmodel", "vq_config", default="janus_vqgan"),
        ),
        kept=JANUS_KEEPS,
    ),
    Family(
        model_types=("chameleon",),
        architecture="ChameleonForConditionalGeneration",
        groups=(*ATTENTION, *MLP),
        parts=(Submodel("model.vqmodel", "vq_config", default="chameleon_vqgan"),),
        kept=(
            *norms("input_layernorm", "post_attention_layernorm"),
            *norms("self_attn.q_norm", "self_attn.k_norm"),
            FINAL_NORM,
            *keep(LANGUAGE_MODEL, "bias", "model.layers.*.bias", optional=True),
        ),
    ),
    Family(
        model_types=("emu3",),
        architecture="Emu3ForConditionalGeneration",
        language=Submodel("model.text_model", "text_config", default="emu3_text_model"),
        groups=(),
        parts=(Submodel("model.vqmodel", "vq_config", default="emu3_vqgan"),),
        kept=(),
        disk=DiskRules(
            renames=(
                (r"^text_model\.lm_head\.", "lm_head."),
                (r"^text_model\.model\.", "model.text_model."),
                (r"^vqmodel\.", "model.vqmodel."),
            )
        ),
    ),
)
