"""Convolutional image encoders and decoders around a codebook, as Janus and Chameleon have them.

Residual blocks of two 3x3 convolutions, attention by 1x1 convolutions, and convolutions between
resolutions. The codebook is kept: the encoder finds the nearest of its vectors and the decoder
reads them, so both have to see the same numbers, and it is small.
"""

from quantlib.models.families import (
    CODEBOOK,
    IMAGE_DECODER,
    IMAGE_ENCODER,
    Family,
    GroupRule,
    KeptRule,
    Part,
    each,
    keep,
    linears,
    whole,
)

CODES = "codebook: the encoder compares with the vectors that the decoder reads"

RESIDUAL = (
    *each("conv1", "conv2", kind="conv"),
    *each("nin_shortcut", "conv_shortcut", kind="conv", optional=True),
)
_ATTENTION = (
    GroupRule("qkv", ("q.weight", "k.weight", "v.weight"), kind="conv", fused=True, optional=True),
    *each("proj_out", kind="conv", optional=True),
)


def _coder(component: str, name: str, levels: str, between: str) -> tuple[Part, ...]:
    """The encoder or decoder `name`: blocks in the middle and at every level of resolution."""
    residual = (f"{name}.mid.block_*", f"{name}.{levels}.*.block.*")
    attention = (f"{name}.mid.attn_*", f"{name}.{levels}.*.attn.*")
    resampling = (f"{name}.{levels}.*.{between}.conv",)
    return (
        Part(component, RESIDUAL, residual, blocks=True),
        Part(component, _ATTENTION, attention, blocks=True),
        Part(component, (whole("conv", optional=True),), resampling),
        Part(component, each(f"{name}.conv_in", f"{name}.conv_out", kind="conv")),
    )


def _coder_kept(component: str, name: str) -> list[KeptRule]:
    return [
        *keep(component, "normalisation", f"{name}.*norm*.weight"),
        *keep(component, "bias", f"{name}.*.bias"),
    ]


def _autoencoder(model_type: str, decodes: bool) -> Family:
    """A VQ model; of those that only read images the decoder is left out."""
    decoder = _coder(IMAGE_DECODER, "decoder", "up", "upsample") if decodes else ()
    kept = (
        *_coder_kept(IMAGE_ENCODER, "encoder"),
        *keep(IMAGE_ENCODER, "bias", "quant_conv.bias"),
        *keep(IMAGE_DECODER, "bias", "post_quant_conv.bias"),
        *(_coder_kept(IMAGE_DECODER, "decoder") if decodes else ()),
    )
    parts = (
        *_coder(IMAGE_ENCODER, "encoder", "down", "downsample"),
        Part(IMAGE_ENCODER, each("quant_conv", kind="conv")),
        Part(IMAGE_DECODER, each("post_quant_conv", kind="conv")),
        *decoder,
    )
    return _family(model_type, kept, parts)


def _family(model_type: str, kept: tuple[KeptRule, ...], parts: tuple[Part, ...]) -> Family:
    """A VQ model from its parts: no embedding but the codebook, and no head."""
    return Family(
        model_types=(model_type,),
        groups=(),
        kept=(*keep(CODEBOOK, CODES, "quantize.embedding.weight"), *kept),
        embeddings=(),
        head=None,
        component=IMAGE_ENCODER,
        parts=parts,
        root="",
    )


def _video_coder(component: str, name: str, side: str, normalises: bool) -> tuple[Part, ...]:
    """Emu3's: attention by linears, and beside them convolutions over time. Its decoder normalises
    by what two 1x1 convolutions make of the codes."""
    level, middle = f"{name}.{side}_block.{side}.*", f"{name}.middle_block"
    norm = each("conv_y", "conv_b", kind="conv")
    inner = [f"{norm}.{conv}" for norm in ("norm1", "norm2") for conv in ("conv_y", "conv_b")]
    normalising = (
        Part(component, norm, (f"{middle}.attn_norm", f"{level}.attn_norms.*", f"{name}.norm_out")),
        Part(component, each(*inner, kind="conv"), (f"{middle}.block_*", f"{level}.block.*")),
    )
    return (
        Part(component, RESIDUAL, (f"{middle}.block_*", f"{level}.block.*"), blocks=True),
        Part(component, _LINEAR_ATTENTION, (f"{middle}.attn_1", f"{level}.attn.*"), blocks=True),
        Part(component, (whole("conv", optional=True),), (f"{level}.{side}sample.conv",)),
        Part(component, (whole("conv"),), (f"{name}.time_conv.*.conv.conv",)),
        Part(
            component,
            each("conv1.conv", "conv2.conv", kind="conv"),
            (f"{name}.time_res_stack.*",),
            blocks=True,
        ),
        Part(component, each(f"{name}.conv_in", f"{name}.conv_out", kind="conv")),
        *(normalising if normalises else ()),
    )


_LINEAR_ATTENTION = (
    linears("qkv", "q_proj", "k_proj", "v_proj", fused=True, optional=True),
    *each("out_proj", optional=True),
)

_EMU3 = _family(
    "emu3_vqgan",
    (
        *keep(IMAGE_ENCODER, "normalisation", "encoder.*norm*.weight"),
        *keep(IMAGE_DECODER, "normalisation", "decoder.*norm_layer.weight"),
        *keep(IMAGE_DECODER, "normalisation", "decoder.time_res_stack.*.norm?.weight"),
        *keep(IMAGE_ENCODER, "bias", "encoder.*.bias", "quant_conv.conv.bias"),
        *keep(IMAGE_DECODER, "bias", "decoder.*.bias", "post_quant_conv.conv.bias"),
    ),
    (
        *_video_coder(IMAGE_ENCODER, "encoder", "down", normalises=False),
        Part(IMAGE_ENCODER, each("quant_conv.conv", kind="conv")),
        Part(IMAGE_DECODER, each("post_quant_conv.conv", kind="conv")),
        *_video_coder(IMAGE_DECODER, "decoder", "up", normalises=True),
    ),
)

FAMILIES = (
    _EMU3,
    _autoencoder("janus_vqgan", decodes=True),
    _autoencoder("chameleon_vqgan", decodes=False),
)
