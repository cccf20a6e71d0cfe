"""The `unified` bed's model: Janus with every part it has at full size, in 6.7 million parameters.

Separate encoders for reading (a vision transformer) and writing (VQ codes), a Llama between them, a
head of its own for image codes. A picture is 36 tokens in both directions, a caption nine words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlib.bench.beds.scenes import BACKGROUNDS, COLORS, DIGITS, SIDE, Scenes

PAD, BOS, EOS, BEGIN, END, IMAGE, UNKNOWN = SPECIAL = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image>",
    "<unk>",
)
_WORDS = ("a", "on", "background", "what", "digit", "color", "describe", "the", "picture", "?")
_USED = (*SPECIAL, *DIGITS, *COLORS, *BACKGROUNDS, *_WORDS)
VOCABULARY = (*_USED, *(f"<reserved_{index}>" for index in range(64 - len(_USED))))
IDS = {word: index for index, word in enumerate(VOCABULARY)}

PATCH = 4
TOKENS = (SIDE // PATCH) ** 2
HIDDEN = 256
VQ_LEVELS = (1, 1, 2)
"""Channel multipliers; one level less than the halvings from a pixel to a patch, plus one."""

GUIDANCE = 3.0
"""Classifier-free guidance that pictures are drawn with."""

DESCRIBE = "describe the picture"
QUESTIONS = ("what digit ?", "what color ?", "what background ?")


def configuration() -> Any:
    """The JanusConfig."""
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    vision = JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        mlp_ratio=4.0,
        projection_dim=HIDDEN,
        num_image_tokens=TOKENS,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=512,
        latent_channels=64,
        base_channels=64,
        channel_multiplier=list(VQ_LEVELS),
        num_res_blocks=1,
        projection_dim=HIDDEN,
        image_token_embed_dim=HIDDEN,
    )
    text = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=256,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        tie_word_embeddings=True,
    )
    return JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=IDS[IMAGE]
    )


def build() -> Any:
    """A JanusForConditionalGeneration with weights that wait to be drawn (`initialise`)."""
    from transformers import GenerationConfig, JanusForConditionalGeneration

    model = JanusForConditionalGeneration(configuration())
    model.generation_config = GenerationConfig(
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        guidance_scale=GUIDANCE,
        generation_kwargs={"boi_token_id": IDS[BEGIN]},
    )
    return model.eval()


def ids_of(text: str) -> list[int]:
    """Token ids of words apart by spaces, without a beginning."""
    return [IDS[word] for word in text.split()]


def text_of(ids: list[int]) -> str:
    """The words of ids up to the end of the text."""
    ended = ids.index(IDS[EOS]) if IDS[EOS] in ids else len(ids)
    return " ".join(VOCABULARY[index] for index in ids[:ended])


def question_ids(question: str) -> list[int]:
    """Token ids of a question about a picture, as the processor makes them of `<image>question`."""
    return [IDS[BOS], IDS[BEGIN], *[IDS[IMAGE]] * TOKENS, IDS[END], *ids_of(question)]


@dataclass(frozen=True)
class Batch:
    """Padded on the right: ids and labels int64 [n, T]; label -100 where there is no loss."""

    ids: Tensor
    labels: Tensor


def answers(scenes: Scenes) -> list[dict[str, str]]:
    """What is right to say of every scene: question -> answer."""
    colors, backgrounds = list(COLORS), list(BACKGROUNDS)
    shown = zip(scenes.digit.tolist(), scenes.color.tolist(), scenes.background.tolist())
    return [
        dict(zip((DESCRIBE, *QUESTIONS), (sentence, DIGITS[digit], colors[c], backgrounds[b])))
        for sentence, (digit, c, b) in zip(scenes.captions(), shown)
    ]


def questions_batch(scenes: Scenes, generator: torch.Generator) -> Batch:
    """A question for every scene: half are to be described, the rest asked about one thing, most
    of them about the digit."""
    kinds = torch.multinomial(
        torch.tensor([0.5, 0.3, 0.1, 0.1]), len(scenes), replacement=True, generator=generator
    )
    rows, labels = [], []
    for right, kind in zip(answers(scenes), kinds.tolist()):
        question = (DESCRIBE, *QUESTIONS)[kind]
        asked = question_ids(question)
        said = [*ids_of(right[question]), IDS[EOS]]
        rows.append(torch.tensor(asked + said))
        labels.append(torch.tensor([-100] * len(asked) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(pad(rows, True, IDS[PAD]), pad(labels, True, -100))


def answer_loss(model: Any, pixels: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of answers about pictures in -1..1 [n, 3, SIDE, SIDE].

    Padding stands behind, where attention is causal: nothing in front sees it.
    """
    states = model.model(
        input_ids=batch.ids, pixel_values=pixels, use_cache=False
    ).last_hidden_state
    said = batch.labels[:, 1:] != -100
    logits = model.lm_head(states[:, :-1][said])
    return F.cross_entropy(logits.float(), batch.labels[:, 1:][said])


def prompts(scenes: Scenes, dropped: Tensor) -> Tensor:
    """Ids [n, T] of the captions as prompts for a picture; where dropped (bool [n]), all words are
    padding, as the rows of classifier-free guidance have it."""
    rows = [[IDS[BOS], *ids_of(text), IDS[BEGIN]] for text in scenes.captions()]
    ids = torch.tensor(rows)
    words = (ids != IDS[BOS]) & (ids != IDS[BEGIN])
    return ids.masked_fill(words & dropped[:, None], IDS[PAD])


def image_codes(model: Any, pixels: Tensor) -> Tensor:
    """VQ codes [n, TOKENS] of pictures in -1..1."""
    with torch.no_grad():
        codes: Tensor = model.model.vqmodel.encode(pixels).image_tokens
    return codes.view(len(pixels), -1)


def image_losses(model: Any, ids: Tensor, codes: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of image codes [n, TOKENS] after prompts [n, T], and of the prompts' own
    words where they were not dropped."""
    written = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    spoken = model.get_input_embeddings()(ids)
    states = model.model.language_model(
        inputs_embeds=torch.cat([spoken.to(written.dtype), written], 1), use_cache=False
    ).last_hidden_state
    length = ids.shape[1]
    logits = model.model.generation_head(states[:, length - 1 :])
    image = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
    words = model.lm_head(states[~dropped, : length - 1]).float()
    text = F.cross_entropy(words.flatten(0, 1), ids[~dropped, 1:].flatten())
    return image, text
