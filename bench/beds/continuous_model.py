"""The `unified-continuous` bed's model: `models.pisces` in 4.7 million parameters, and its losses.

Words, questions and scenes are those of `unified`. A picture is read as 36 tokens and written as
nine vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlib.bench.beds import unified_model as unified
from quantlib.bench.beds.scenes import SIDE

GUIDANCE = 1.5
"""Classifier-free guidance that vectors are predicted with."""
READER_LAYERS, DECODER_LAYERS = 3, 4
VECTOR_NOISE = 0.2
"""Standard deviation that vectors (mean square 1) are disturbed by wherever a part learns to take
them in: at the end they come from a language model that errs."""


def build() -> Any:
    """A PiscesForConditionalGeneration with weights that wait to be drawn (`initialise`)."""
    from transformers import GenerationConfig

    from quantlib.models.pisces import PiscesConfig, PiscesForConditionalGeneration

    janus = unified.configuration()
    config = PiscesConfig(
        text_config=janus.text_config,
        vision_config=janus.vision_config,
        image_encoder_config=_tower(READER_LAYERS),
        decoder_config=_tower(DECODER_LAYERS),
        pooling=2,
        vector_size=64,
        image_token_id=unified.IDS[unified.IMAGE],
        begin_image_token_id=unified.IDS[unified.BEGIN],
    )
    model = PiscesForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=unified.IDS[unified.PAD],
        bos_token_id=unified.IDS[unified.BOS],
        eos_token_id=unified.IDS[unified.EOS],
        guidance_scale=GUIDANCE,
        generation_kwargs={"boi_token_id": unified.IDS[unified.BEGIN]},
    )
    return model.eval()


def _tower(layers: int) -> Any:
    from transformers import JanusVisionConfig

    return JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=unified.PATCH,
        mlp_ratio=4.0,
        projection_dim=unified.HIDDEN,
        num_image_tokens=unified.TOKENS,
    )


def start_from(model: Any, janus: Any) -> None:
    """Take reader, language model and words from a trained `unified` model, as Pisces starts from
    SigLIP and a Llama."""
    ours, theirs = model.model, janus.model
    for mine, trained in (
        (ours.vision_model, theirs.vision_model),
        (ours.aligner, theirs.aligner),
        (ours.language_model, theirs.language_model),
    ):
        mine.load_state_dict(trained.state_dict())


def drawing_loss(model: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching of pictures in -1..1 [n, 3, SIDE, SIDE] under their own vectors: the mean
    squared error of the clean picture that the decoder sees behind the noise.

    Times crowd at the beginning, where there is nothing but vectors to go by: what a decoder can
    read off a picture with little noise teaches the encoder nothing.
    """
    body, count = model.model, len(pixels)
    vectors = disturbed(body.image_encoder(pixels), generator)
    time = torch.rand(count, generator=generator).square()
    noise = torch.randn(pixels.shape, generator=generator)
    share = time[:, None, None, None]
    clean = body.image_decoder(share * pixels + (1 - share) * noise, time, vectors)
    return F.mse_loss(clean.float(), pixels)


def disturbed(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors with noise of up to `VECTOR_NOISE`."""
    level = VECTOR_NOISE * torch.rand(len(vectors), 1, 1, generator=generator)
    return vectors + level * torch.randn(vectors.shape, generator=generator)


def vector_losses(
    model: Any, ids: Tensor, vectors: Tensor, dropped: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The mean squared error of vectors [n, count, size] predicted behind prompts [n, T] (ids where
    `dropped` have no words), and the cross-entropy of the other prompts' own words."""
    predicted = model.predicted_vectors(ids, disturbed(vectors, generator))
    states = model.model.language_model(
        inputs_embeds=model.get_input_embeddings()(ids[~dropped, :-1]), use_cache=False
    ).last_hidden_state
    words = model.lm_head(states).float()
    text = F.cross_entropy(words.flatten(0, 1), ids[~dropped, 1:].flatten())
    return F.mse_loss(predicted.float(), vectors), text
