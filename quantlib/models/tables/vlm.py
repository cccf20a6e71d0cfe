"""Vision-language models: a vision tower, a projector, and a language model that reads both.

Tower and language model have tables of their own, so here is only what joins them.
"""

from quantlib.models.families import (
    PROJECTOR,
    DiskRules,
    Family,
    KeptRule,
    Part,
    Submodel,
    each,
    keep,
)

_PUBLISHED = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
"""Names that LLaVA and Gemma 3 are published under."""

_TOWER = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"


def _idefics(model_type: str, architecture: str) -> Family:
    return Family(
        model_types=(model_type,),
        architecture=architecture,
        language=Submodel("model.text_model", "text_config", default="llama"),
        groups=(),
        parts=(
            Submodel("model.vision_model", "vision_config", default=f"{model_type}_vision"),
            Part(PROJECTOR, each("model.connector.modality_projection.proj")),
        ),
        kept=(),
    )


FAMILIES = (
    Family(
        model_types=("llava",),
        architecture="LlavaForConditionalGeneration",
        language=Submodel("model.language_model", "text_config", default="llama"),
        groups=(),
        parts=(
            Submodel(_TOWER, "vision_config", default="clip_vision_model"),
            Part(PROJECTOR, each(f"{_PROJECTOR}.linear_1", f"{_PROJECTOR}.linear_2")),
        ),
        kept=(*keep(PROJECTOR, "bias", f"{_PROJECTOR}.*.bias", optional=True),),
        disk=DiskRules(renames=_PUBLISHED),
    ),
    Family(
        model_types=("gemma3",),
        language=Submodel("model.language_model", "text_config", default="gemma3_text"),
        groups=(),
        parts=(Submodel(_TOWER, "vision_config", default="siglip_vision_model"),),
        kept=(
            KeptRule(
                f"{_PROJECTOR}.mm_input_projection_weight",
                "projection stored as [inputs, outputs], not as a linear",
                PROJECTOR,
            ),
            *keep(PROJECTOR, "normalisation", f"{_PROJECTOR}.mm_soft_emb_norm.weight"),
        ),
        disk=DiskRules(renames=_PUBLISHED),
    ),
    _idefics("idefics3", "Idefics3ForConditionalGeneration"),
    _idefics("smolvlm", "SmolVLMForConditionalGeneration"),
    Family(
        model_types=("qwen2_5_vl",),
        architecture="Qwen2_5_VLForConditionalGeneration",
        language=Submodel("model.language_model", "text_config", default="qwen2_5_vl_text"),
        groups=(),
        parts=(Submodel("model.visual", "vision_config", default="qwen2_5_vl_vision"),),
        kept=(),
        disk=DiskRules(
            renames=(
                (r"^visual\.", "model.visual."),
                (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
            )
        ),
    ),
)
