"""Phi-3: q, k, v are one linear, gate and up another, so each is a group of one."""

from quantlib.models.families import FINAL_NORM, OPTIONAL_BIASES, Family, linears, norms

FAMILIES = (
    Family(
        model_types=("phi3",),
        groups=(
            linears("self_attn.qkv_proj", "self_attn.qkv_proj"),
            linears("self_attn.o_proj", "self_attn.o_proj"),
            linears("mlp.gate_up_proj", "mlp.gate_up_proj"),
            linears("mlp.down_proj", "mlp.down_proj"),
        ),
        kept=(
            *norms("input_layernorm", "post_attention_layernorm"),
            FINAL_NORM,
            OPTIONAL_BIASES,
        ),
    ),
)
