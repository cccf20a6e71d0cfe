"""A unified model that writes pictures as continuous vectors, in the form of Pisces (arXiv
2506.10395): separate encoders for reading and writing, a language model that predicts pooled
visual vectors one after the other, and a decoder that turns noise into pixels under them.

Pisces itself has published no weights and no code, and transformers has no model of this form. It
is here so that the form can be measured: an error in a predicted vector is not absorbed by the
choice of a code, it is passed on to the decoder. What stands in for what:

    reading    a vision transformer and an MLP (SigLIP and its MLP there)
    writing    a vision transformer whose grid is pooled (gen-CLIP), an MLP into the language model,
               and a regression head out of it
    decoder    a transformer over patches of the noisy picture, trained by flow matching (arXiv
               2210.02747); it predicts the clean picture, from which the velocity follows

The class is registered with transformers' AutoConfig and AutoModelForImageTextToText, and runs no
code from a model's folder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    JanusVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP, JanusVisionModel

MODEL_TYPE = "quantlib_pisces"
STEPS = 8
"""Euler steps from noise to a picture."""
TIME_WAVES = 32


@strict
class PiscesConfig(PreTrainedConfig):
    r"""
    vision_config, image_encoder_config, decoder_config: JanusVisionConfig of the reader, of what
        makes vectors of pictures, and of the decoder; one size and one patch for all.
    pooling: patches of a square that are averaged, along each side.
    vector_size: of a visual vector.
    begin_image_token_id: behind it, vectors follow.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults = {  # noqa: RUF012
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": JanusVisionConfig,
        "image_encoder_config": JanusVisionConfig,
        "decoder_config": JanusVisionConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    pooling: int = 2
    vector_size: int = 32
    image_token_id: int = 0
    begin_image_token_id: int = 0
    tie_word_embeddings: bool = True

    @property
    def grid(self) -> int:
        """Rows, and columns, of vectors."""
        encoder: Any = self.image_encoder_config
        return int(encoder.image_size // encoder.patch_size // self.pooling)


class PiscesImageEncoder(nn.Module):
    """Pictures [n, 3, rows, columns] -> vectors [n, grid * grid, vector_size] of mean 0 and mean
    square 1."""

    def __init__(self, config: PiscesConfig) -> None:
        super().__init__()
        encoder: Any = config.image_encoder_config
        self.pooling, self.side = config.pooling, encoder.image_size // encoder.patch_size
        self.tower = JanusVisionModel._from_config(encoder)
        self.projection = nn.Linear(encoder.hidden_size, config.vector_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.tower(pixel_values).last_hidden_state
        grid = states.transpose(1, 2).unflatten(2, (self.side, self.side))
        pooled = F.avg_pool2d(grid, self.pooling).flatten(2).transpose(1, 2)
        return standardised(self.projection(pooled))


def standardised(vectors: Tensor) -> Tensor:
    """Vectors [..., size] of mean 0 and mean square 1."""
    return F.layer_norm(vectors, vectors.shape[-1:])


class PiscesDecoder(nn.Module):
    """What the clean picture is, under vectors: [n, 3, rows, columns]."""

    def __init__(self, config: PiscesConfig) -> None:
        super().__init__()
        tower: Any = config.decoder_config
        self.pooling, self.grid, self.patch = config.pooling, config.grid, tower.patch_size
        self.tower = JanusVisionModel._from_config(tower)
        self.condition = nn.Linear(config.vector_size, config.pooling**2 * tower.hidden_size)
        self.time = nn.Linear(2 * TIME_WAVES, tower.hidden_size)
        self.pixels = nn.Linear(tower.hidden_size, 3 * tower.patch_size**2)

    def forward(self, noisy: Tensor, time: Tensor, vectors: Tensor) -> Tensor:
        """noisy: a picture mixed with noise. time [n]: the picture's share, 0 to 1."""
        tokens = self.tower.embeddings(noisy)
        entered = tokens + self._patches(self.condition(vectors)) + self.time(waves(time))[:, None]
        states = self.tower.encoder(inputs_embeds=entered).last_hidden_state
        drawn = self.pixels(self.tower.post_layernorm(states)).transpose(1, 2)
        return F.fold(drawn, tuple(noisy.shape[-2:]), self.patch, stride=self.patch)

    def _patches(self, cells: Tensor) -> Tensor:
        """What each vector tells its patches, [n, grid * grid, pooling * pooling * size], in the
        order of patches [n, patches, size]."""
        apart = cells.unflatten(2, (self.pooling, self.pooling, -1))
        rows = apart.unflatten(1, (self.grid, self.grid)).transpose(2, 3)
        return rows.flatten(1, 4)


def waves(time: Tensor) -> Tensor:
    """Cosines and sines [n, 2 * TIME_WAVES] of times [n] in 0..1."""
    rates = torch.exp(torch.linspace(0, math.log(1000), TIME_WAVES, device=time.device))
    angles = time.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1).to(time.dtype)


class PiscesAligner(nn.Module):
    """Visual vectors as tokens of the language model."""

    def __init__(self, config: PiscesConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        self.fc1 = nn.Linear(config.vector_size, text.hidden_size)
        self.fc2 = nn.Linear(text.hidden_size, text.hidden_size)

    def forward(self, vectors: Tensor) -> Tensor:
        tokens: Tensor = self.fc2(F.gelu(self.fc1(vectors)))
        return tokens


class PiscesHead(nn.Module):
    """States of the language model as the next visual vector, of mean 0 and mean square 1: the
    average of what may follow is shorter than what follows, and the decoder has seen no such."""

    def __init__(self, config: PiscesConfig) -> None:
        super().__init__()
        text: Any = config.text_config
        self.proj_out = nn.Linear(text.hidden_size, text.hidden_size)
        self.vector_head = nn.Linear(text.hidden_size, config.vector_size)

    def forward(self, states: Tensor) -> Tensor:
        return standardised(self.vector_head(F.gelu(self.proj_out(states))))


class PiscesPreTrainedModel(PreTrainedModel):
    """What transformers is told of both classes below."""

    config_class = PiscesConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True


@dataclass
class PiscesOutput(CausalLMOutputWithPast):
    """`logits` of words."""


class PiscesModel(PiscesPreTrainedModel):
    """All parts; `forward` reads."""

    def __init__(self, config: PiscesConfig) -> None:
        super().__init__(config)
        self.vision_model = JanusVisionModel._from_config(config.vision_config)
        self.aligner = JanusVisionAlignerMLP(config.vision_config)
        self.image_encoder = PiscesImageEncoder(config)
        self.generation_aligner = PiscesAligner(config)
        self.generation_head = PiscesHead(config)
        self.image_decoder = PiscesDecoder(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output; pictures replace the tokens that stand for them."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and input_ids is not None:
            features = self.aligner(self.vision_model(pixel_values).last_hidden_state)
            places = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            if int(places.sum()) != features.numel():
                raise ValueError(
                    f"{int(places.sum()) // features.shape[-1]} tokens stand for pictures, which "
                    f"have {features.shape[0] * features.shape[1]}"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places, features.to(inputs_embeds.dtype))
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class PiscesForConditionalGeneration(PiscesPreTrainedModel, GenerationMixin):
    """Reads through `forward` and `generate`, writes through `generate_vectors` and
    `decode_vectors`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    output_modalities = ("image", "text")

    def __init__(self, config: PiscesConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.model = PiscesModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> PiscesOutput:
        """Logits of the next word everywhere, and with labels the loss."""
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, last])
        text: Any = self.config.text_config
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size)
        return PiscesOutput(loss=loss, logits=logits, past_key_values=output.past_key_values)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Words; or with `generation_mode="image"`, as Janus has it, the vectors of a picture,
        moved away from those of a prompt without words by `guidance_scale`."""
        if kwargs.pop("generation_mode", "text") == "text":
            return super().generate(inputs, **{**kwargs, "guidance_scale": None})
        settings: Any = self.generation_config
        ids = inputs if inputs is not None else kwargs["input_ids"]
        scale = float(kwargs.get("guidance_scale") or settings.guidance_scale or 1.0)
        kept = (ids == settings.bos_token_id) | (ids == self.config.begin_image_token_id)
        return self.generate_vectors(ids, ids.where(kept, settings.pad_token_id), scale)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """The vectors [n, grid * grid, vector_size] that stand for pictures when they are
        written."""
        vectors: Tensor = self.model.image_encoder(pixel_values)
        return vectors

    def predicted_vectors(
        self, input_ids: Tensor, vectors: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing: what every vector [n, vectors, size] is predicted as from the true ones
        before it, behind a prompt [n, T] that ends with the token that begins a picture."""
        words = self.model.get_input_embeddings()(input_ids)
        written = self.model.generation_aligner(vectors[:, :-1])
        if attention_mask is not None:
            seen = torch.ones(written.shape[:2], dtype=attention_mask.dtype)
            attention_mask = torch.cat([attention_mask, seen], 1)
        states = self.model.language_model(
            inputs_embeds=torch.cat([words.to(written.dtype), written], 1),
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        predicted: Tensor = self.model.generation_head(states[:, input_ids.shape[1] - 1 :])
        return predicted

    @torch.no_grad()
    def generate_vectors(
        self, input_ids: Tensor, unconditional_ids: Tensor | None = None, guidance: float = 1.0
    ) -> Tensor:
        """Vectors of the picture that prompts [n, T] ask for; with prompts without words beside
        them, moved away from those by classifier-free guidance."""
        rows = [input_ids] if unconditional_ids is None else [input_ids, unconditional_ids]
        entered = self.model.get_input_embeddings()(torch.cat(rows))
        cache, vectors = DynamicCache(), []
        for _ in range(self.config.grid**2):
            states = self.model.language_model(
                inputs_embeds=entered, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1:]
            vector = self.model.generation_head(states)
            if unconditional_ids is not None:
                asked, unasked = vector.chunk(2)
                vector = standardised(unasked + guidance * (asked - unasked))
            vectors.append(vector)
            entered = self.model.generation_aligner(vector.repeat(len(rows), 1, 1))
        return torch.cat(vectors, 1)

    @torch.no_grad()
    def decode_vectors(self, vectors: Tensor, noise: Tensor, steps: int = STEPS) -> Tensor:
        """Pictures in -1..1 of vectors [n, vectors, size], out of noise [n, 3, rows, columns]."""
        pixels = noise
        for step in range(steps):
            time = torch.full((len(noise),), step / steps, dtype=noise.dtype)
            clean = self.model.image_decoder(pixels, time, vectors)
            # velocity (clean - pixels) / (1 - time), times a step of 1 / steps
            pixels = pixels + (clean - pixels) / (steps - step)
        return pixels


AutoConfig.register(MODEL_TYPE, PiscesConfig, exist_ok=True)
AutoModelForImageTextToText.register(PiscesConfig, PiscesForConditionalGeneration, exist_ok=True)
