"""Llama and the models that share its blocks: SmolLM (model type llama), Mistral, SmolLM3, and the
language model of Emu3."""

from quantlib.models.families import ATTENTION, FINAL_NORM, MLP, OPTIONAL_BIASES, Family, norms

FAMILIES = (
    Family(
        model_types=("llama", "mistral", "smollm3", "emu3_text_model"),
        groups=(*ATTENTION, *MLP),
        kept=(
            *norms("input_layernorm", "post_attention_layernorm"),
            FINAL_NORM,
            OPTIONAL_BIASES,  # attention_bias, mlp_bias
        ),
    ),
)
