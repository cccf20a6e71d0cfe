"""Gemma 2 and 3: four norms per block; the embedding module scales what it reads.

The vision-language Gemma 3 (`gemma3` in `vlm.py`) has the text decoder of this table inside.
"""

from quantlib.models.families import (
    ATTENTION,
    FINAL_NORM,
    MLP,
    OPTIONAL_BIASES,
    Family,
    norms,
)

_BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

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
)
