"""Qwen2.5-Omni: a thinker that reads text, images and sound and writes text; a talker that writes
codes of speech from the thinker's states; and token2wav, a diffusion transformer from codes to
spectrograms with a convolutional vocoder behind it."""

from quantlib.models.families import (
    ATTENTION,
    AUDIO,
    MLP,
    VISION,
    DiskRules,
    Family,
    KeptRule,
    Part,
    Submodel,
    each,
    keep,
    linears,
    lookup,
    whole,
)
from quantlib.models.tables.vision import attention

TALKER = "talker"
TOKEN2WAV = "token2wav"

_DIT = "token2wav.code2wav_dit_model"
_SPEAKER = f"{_DIT}.input_embed.spk_encoder"
_VOCODER = "token2wav.code2wav_bigvgan_model"

_AUDIO_TOWER = Family(
    model_types=("qwen2_5_omni_audio_encoder",),
    groups=(*attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), *each("fc1", "fc2")),
    kept=(
        *keep(AUDIO, "two rows that begin and end a clip", "audio_bos_eos_token.weight"),
        *keep(AUDIO, "normalisation", "layers.*layer_norm.weight", "ln_post.weight"),
        *keep(AUDIO, "bias", "*.bias"),
    ),
    blocks="layers",
    embeddings=(),
    head=None,
    component=AUDIO,
    parts=(Part(AUDIO, each("conv1", "conv2", kind="conv")), Part(AUDIO, each("proj"))),
    root="",
)

_VISION_TOWER = Family(
    model_types=("qwen2_5_omni_vision_encoder",),
    groups=(
        linears("attn.qkv", "attn.q", "attn.k", "attn.v", fused=True),
        linears("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj", fused=True),
        *each("attn.proj", "mlp.down_proj"),
    ),
    kept=(
        *keep(VISION, "normalisation", "blocks.*.norm?.weight", "merger.ln_q.weight"),
        *keep(VISION, "bias", "*.bias"),
    ),
    blocks="blocks",
    embeddings=(),
    head=None,
    component=VISION,
    parts=(
        Part(VISION, each("patch_embed.proj", kind="conv")),
        Part(VISION, each("merger.mlp.0", "merger.mlp.2")),
    ),
    root="",
)


_TALKER = (
    Part(TALKER, (*ATTENTION, *MLP), ("talker.model.layers.*",), blocks=True),
    Part(TALKER, (lookup("talker.model.embed_tokens"),)),
    Part(TALKER, each("talker.thinker_to_talker_proj", "talker.codec_head")),
)

_TOKEN2WAV = (
    Part(
        TOKEN2WAV,
        (
            linears("attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v", fused=True),
            *each("attn_norm.linear", "attn.to_out.0", "ff.ff.0", "ff.ff.3"),
        ),
        (f"{_DIT}.transformer_blocks.*",),
        blocks=True,
    ),
    Part(TOKEN2WAV, (lookup(f"{_DIT}.text_embed.codec_embed"),)),
    Part(TOKEN2WAV, (whole(),), (f"{_DIT}.time_embed.time_mlp.*",)),
    Part(
        TOKEN2WAV,
        each(f"{_DIT}.input_embed.proj", f"{_DIT}.norm_out.linear", f"{_DIT}.proj_out"),
    ),
    Part(
        TOKEN2WAV,
        (whole("conv"),),
        (
            f"{_SPEAKER}.blocks.*.conv",
            f"{_SPEAKER}.blocks.*.tdnn*.conv",
            f"{_SPEAKER}.blocks.*.res2net_block.blocks.*.conv",
            f"{_SPEAKER}.blocks.*.se_block.conv*",
            f"{_SPEAKER}.mfa.conv",
            f"{_SPEAKER}.asp.tdnn.conv",
            f"{_SPEAKER}.asp.conv",
            f"{_SPEAKER}.fc",
            f"{_VOCODER}.conv_*",
            f"{_VOCODER}.resblocks.*.convs*.*",
        ),
    ),
)

_KEPT: tuple[KeptRule, ...] = (
    *keep(TALKER, "normalisation", "talker.model.layers.*norm.weight", "talker.model.norm.weight"),
    *keep(TALKER, "bias", "talker.*.bias"),
    *keep(TOKEN2WAV, "bias", "token2wav.*.bias"),
    *keep(
        TOKEN2WAV, "scales of an activation function", f"{_VOCODER}.*.alpha", f"{_VOCODER}.*.beta"
    ),
    *keep(
        TOKEN2WAV,
        "transposed convolution: it multiplies inputs with columns, not with rows",
        f"{_VOCODER}.ups.*.weight",
    ),
)

FAMILIES = (
    _AUDIO_TOWER,
    _VISION_TOWER,
    Family(
        model_types=("qwen2_5_omni",),
        architecture="Qwen2_5OmniForConditionalGeneration",
        language=Submodel(
            "thinker.model.language_model", "thinker_config.text_config", "qwen2_5_omni_text"
        ),
        groups=(),
        head="thinker.lm_head.weight",
        parts=(
            Submodel(
                "thinker.model.visual",
                "thinker_config.vision_config",
                "qwen2_5_omni_vision_encoder",
            ),
            Submodel(
                "thinker.model.audio_tower",
                "thinker_config.audio_config",
                "qwen2_5_omni_audio_encoder",
            ),
            *_TALKER,
            *_TOKEN2WAV,
        ),
        kept=_KEPT,
        disk=DiskRules(
            renames=(
                (r"^thinker\.(visual|audio_tower)\.", r"thinker.model.\1."),
                (
                    r"^thinker\.model\.(?!language_model\.|visual\.|audio_tower\.)",
                    "thinker.model.language_model.",
                ),
            )
        ),
    ),
)
