"""Mixtral and Qwen3-MoE: all experts of a layer are two 3-D parameters in transformers 5.

`gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]`. Published checkpoints, and those that
transformers itself saves, store one 2-D tensor per expert and projection; 3-D tensors are accepted
too.
"""

from dataclasses import replace

from quantlib.models.families import (
    ATTENTION,
    EXPERTS,
    FINAL_NORM,
    MIXTRAL_EXPERT_PARTS,
    MLP,
    OPTIONAL_BIASES,
    QWEN_EXPERT_PARTS,
    ROUTER,
    DiskRules,
    Family,
    norms,
)

FAMILIES = (
    Family(
        model_types=("mixtral",),
        groups=(*ATTENTION, *EXPERTS),
        kept=(*norms("input_layernorm", "post_attention_layernorm"), FINAL_NORM, ROUTER),
        disk=DiskRules(renames=((r"\.block_sparse_moe\.", ".mlp."),), experts=MIXTRAL_EXPERT_PARTS),
    ),
    Family(
        model_types=("qwen3_moe",),
        # mlp_only_layers and decoder_sparse_step make some blocks dense
        groups=(*ATTENTION, *EXPERTS, *(replace(rule, optional=True) for rule in MLP)),
        kept=(
            *norms(
                "input_layernorm",
                "post_attention_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
            ),
            FINAL_NORM,
            ROUTER,
            OPTIONAL_BIASES,  # attention_bias
        ),
        disk=DiskRules(experts=QWEN_EXPERT_PARTS),
    ),
)
