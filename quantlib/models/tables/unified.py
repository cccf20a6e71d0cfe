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
    GroupRule,
    Part,
    Submodel,
    each,
    keep,
    norms,
    whole,
)

_GENERATION_EMBEDDINGS = "model.generation_embeddings"

FAMILIES = (
    Family(
        model_types=("janus",),
        architecture="JanusForConditionalGeneration",
        language=Submodel("model.language_model", "text_config", default="llama"),
        groups=(),
        parts=(
            Submodel("model.vision_model", "vision_config", default="janus_vision_model"),
            Part(PROJECTOR, each("model.aligner.fc1")),
            Part(PROJECTOR, (whole(optional=True),), ("model.aligner.hidden_layers.*",)),
            Part(
                GENERATION_EMBEDDINGS,
                (
                    GroupRule(
                        _GENERATION_EMBEDDINGS,
                        (f"{_GENERATION_EMBEDDINGS}.weight",),
                        kind="embedding",
                    ),
                ),
            ),
            Part(GENERATION_PROJECTOR, each("model.generation_aligner.fc1")),
            Part(
                GENERATION_PROJECTOR,
                (whole(optional=True),),
                ("model.generation_aligner.hidden_layers.*",),
            ),
            Part(
                GENERATION_HEAD,
                each("model.generation_head.proj_out", "model.generation_head.vision_head"),
            ),
            Submodel("model.vqmodel", "vq_config", default="janus_vqgan"),
        ),
        kept=(
            *keep(PROJECTOR, "bias", "model.aligner.*.bias"),
            *keep(GENERATION_PROJECTOR, "bias", "model.generation_aligner.*.bias"),
            *keep(GENERATION_HEAD, "bias", "model.generation_head.*.bias"),
        ),
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
