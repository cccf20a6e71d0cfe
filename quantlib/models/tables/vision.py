"""Vision towers: CLIP, SigLIP, DINOv2, those of Idefics 3, SmolVLM, Janus and Qwen2.5-VL.

Names begin at the tower's own module, so one table serves the tower alone and inside a larger
model. Patches are embedded by a convolution, whose matrix is [width, channels x patch x patch].
"""

from quantlib.models.families import (
    POSITION_IDS,
    VISION,
    DiskRules,
    Family,
    GroupRule,
    KeptRule,
    Part,
    each,
    keep,
    linears,
)

POSITIONS = "positions: added to every token, never multiplied with one"
POOLING = (
    "attention pooling of one token per image; its query, key and value projections are one "
    "parameter that reads two inputs"
)
MLP = each("mlp.fc1", "mlp.fc2")


def attention(name: str, *leaves: str) -> tuple[GroupRule, GroupRule]:
    """Query, key and value of one input as `leaves[:3]` of the module `name`, and the output."""
    *inputs, output = (f"{name}.{leaf}" for leaf in leaves)
    return linears(f"{name}.qkv", *inputs, fused=True), linears(output, output)


def _tower(
    model_type: str,
    attends: tuple[GroupRule, ...],
    patches: str,
    kept: list[KeptRule],
    *,
    positions: str = "embeddings.position_embedding.weight",
    norms: tuple[str, ...] = ("encoder.layers.*.layer_norm?", "post_layernorm"),
    mlp: tuple[GroupRule, ...] = MLP,
    blocks: str = "encoder.layers",
    architecture: str = "",
    parts: tuple[Part, ...] = (),
    disk: DiskRules | None = None,
) -> Family:
    """A tower that can also be a model of its own, if it has an `architecture`."""
    return Family(
        model_types=(model_type,),
        groups=(*attends, *mlp),
        kept=(
            *kept,
            *keep(VISION, POSITIONS, *([positions] if positions else [])),
            *keep(VISION, "normalisation", *(f"{name}.weight" for name in norms)),
            *keep(VISION, "bias", "*.bias", optional=True),
        ),
        blocks=blocks,
        embeddings=(),
        head=None,
        component=VISION,
        parts=(Part(VISION, each(patches, kind="conv")), *parts),
        architecture=architecture,
        root="",
        disk=disk or DiskRules(ignored=POSITION_IDS),
    )


_ALONE = DiskRules(renames=((r"^vision_model\.", ""),), ignored=POSITION_IDS)
"""Towers alone were published with one more name in front."""

_OUT_PROJ = attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj")
_PATCHES = "embeddings.patch_embedding"

FAMILIES = (
    _tower(
        "clip_vision_model",
        _OUT_PROJ,
        _PATCHES,
        keep(VISION, "class token", "embeddings.class_embedding"),
        norms=("pre_layrnorm", "encoder.layers.*.layer_norm?", "post_layernorm"),
        architecture="CLIPVisionModel",
        disk=_ALONE,
    ),
    _tower(
        "siglip_vision_model",
        _OUT_PROJ,
        _PATCHES,
        [
            *keep(VISION, POOLING, "head.probe", "head.attention.*_weight", optional=True),
            *keep(VISION, POOLING, "head.attention.out_proj.weight", optional=True),
            *keep(VISION, "bias", "head.attention.in_proj_bias", optional=True),
            *keep(VISION, "normalisation", "head.layernorm.weight", optional=True),
        ],
        architecture="SiglipVisionModel",
        parts=(Part(VISION, each("head.mlp.fc1", "head.mlp.fc2", optional=True)),),
        disk=_ALONE,
    ),
    *(
        _tower(model_type, _OUT_PROJ, _PATCHES, [])
        for model_type in ("idefics3_vision", "smolvlm_vision")
    ),
    _tower(
        "janus_vision_model",
        attention("self_attn", "q_proj", "k_proj", "v_proj", "projection_layer"),
        _PATCHES,
        keep(VISION, "normalisation", "encoder.layers.*.self_attn.?_norm.weight", optional=True),
    ),
    _tower(
        "dinov2",
        attention("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
        "embeddings.patch_embeddings.projection",
        [
            *keep(VISION, "class token", "embeddings.cls_token"),
            *keep(VISION, "token for masked patches", "embeddings.mask_token", optional=True),
            *keep(VISION, "scale of a residual branch", "encoder.layer.*.layer_scale?.lambda1"),
        ],
        positions="embeddings.position_embeddings",
        norms=("encoder.layer.*.norm?", "layernorm"),
        blocks="encoder.layer",
        architecture="Dinov2Model",
        disk=DiskRules(
            renames=(
                (r"\.attention\.attention\.query\.", ".attention.q_proj."),
                (r"\.attention\.attention\.key\.", ".attention.k_proj."),
                (r"\.attention\.attention\.value\.", ".attention.v_proj."),
                (r"\.attention\.output\.dense\.", ".attention.o_proj."),
            )
        ),
    ),
    _tower(
        "qwen2_5_vl_vision",
        each("attn.qkv", "attn.proj"),
        "patch_embed.proj",
        [],
        positions="",
        norms=("blocks.*.norm?", "merger.ln_q"),
        mlp=(
            linears("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj", fused=True),
            *each("mlp.down_proj"),
        ),
        blocks="blocks",
        parts=(Part(VISION, each("merger.mlp.0", "merger.mlp.2")),),
    ),
)
