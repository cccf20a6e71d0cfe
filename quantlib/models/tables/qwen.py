"""Qwen2 (biases on q, k, v) and Qwen3 (no biases; queries and keys are normalised per head)."""

from quantlib.models.families import (
    ATTENTION,
    BIASES,
    FINAL_NORM,
    MLP,
    OPTIONAL_BIASES,
    Family,
    norms,
)

FAMILIES = (
    Family(
        model_types=("qwen2", "qwen2_5_vl_text", "qwen2_5_omni_text"),
        groups=(*ATTENTION, *MLP),
        kept=(*norms("input_layernorm", "post_attention_layernorm"), FINAL_NORM, BIASES),
    ),
    Family(
        model_types=("qwen3",),
        groups=(*ATTENTION, *MLP),
        kept=(
            *norms(
                "input_layernorm",
                "post_attention_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
            ),
            FINAL_NORM,
            OPTIONAL_BIASES,  # attention_bias
        ),
    ),
)
