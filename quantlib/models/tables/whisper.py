"""Whisper: an encoder of spectrograms (two convolutions, then blocks), and a decoder that also
attends to what the encoder wrote, whose keys and values therefore read another input than its
queries."""

from quantlib.models.families import (
    AUDIO,
    LANGUAGE_MODEL,
    Family,
    Part,
    each,
    keep,
    linears,
    lookup,
)
from quantlib.models.tables.vision import POSITIONS, attention

_BLOCK = (*attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), *each("fc1", "fc2"))

FAMILIES = (
    Family(
        model_types=("whisper",),
        architecture="WhisperForConditionalGeneration",
        groups=(
            *_BLOCK,
            *each("encoder_attn.q_proj", "encoder_attn.out_proj"),
            linears("encoder_attn.kv", "encoder_attn.k_proj", "encoder_attn.v_proj", fused=True),
        ),
        blocks="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens.weight",),
        head="proj_out.weight",
        parts=(
            Part(AUDIO, each("model.encoder.conv1", "model.encoder.conv2", kind="conv")),
            Part(AUDIO, (lookup("model.encoder.embed_positions"),)),
            Part(AUDIO, _BLOCK, ("model.encoder.layers.*",), blocks=True),
        ),
        kept=(
            *keep(LANGUAGE_MODEL, POSITIONS, "model.decoder.embed_positions.weight"),
            *keep(AUDIO, "normalisation", "model.encoder.*layer_norm.weight"),
            *keep(LANGUAGE_MODEL, "normalisation", "model.decoder.*layer_norm.weight"),
            *keep(AUDIO, "bias", "model.encoder.*.bias"),
            *keep(LANGUAGE_MODEL, "bias", "model.decoder.*.bias"),
        ),
    ),
)
