"""Gemma 2 and 3: four norms per block; the embedding module scales what it reads.

Gemma 3 comes as a text decoder (`gemma3_text`) and inside a vision-language model (`gemma3`), where
the vision tower and the projector are kept: text calibration never reaches them.
"""

from quantlib.models.families import (
    ATTENTION,
    FINAL_NORM,
    MLP,
    OPTIONAL_BIASES,
    DiskRules,
    Family,
    KeptRule,
    norms,
)

_BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_NOT_REACHED = "text calibration does not reach it"

FAMILIES = (
    Family(
        model_types=("gemma2",),
        groups=(*ATTENTION, *MLP),
        kept=(*norms(*_BLOCK_NORMS), FINAL_NORM, OPTIONAL_BIASES),
    ),
    Family(
        model_types=("gemma3_text",),
        groups=(*ATTENTION, *MLP),
        kept=(*norms(*_BLOCK_NORMS, *_HEAD_NORMS), FINAL_NORM, OPTIONAL_BIASES),
    ),
    Family(
        model_types=("gemma3",),
        blocks="model.language_model.layers",
        embeddings=("model.language_model.embed_tokens.weight",),
        groups=(*ATTENTION, *MLP),
        kept=(
            *norms(*_BLOCK_NORMS, *_HEAD_NORMS, prefix="model.language_model.layers.*"),
            KeptRule("model.language_model.norm.weight", "normalisation"),
            KeptRule("model.language_model.*.bias", "bias", optional=True),
            KeptRule("model.vision_tower.*", _NOT_REACHED, component="vision_tower"),
            KeptRule("model.multi_modal_projector.*", _NOT_REACHED, component="projector"),
        ),
        disk=DiskRules(
            renames=(
                (r"^language_model\.model\.", "model.language_model."),
                (r"^language_model\.lm_head\.", "lm_head."),
                (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
                (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
            )
        ),
    ),
)
