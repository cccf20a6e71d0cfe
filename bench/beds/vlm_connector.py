"""The connector of the test-bed `vlm`: 384 wide vectors of DINOv2 into 576 wide ones that SmolLM2
reads as if they were words. Only it is trained; both backbones stay as they are.

Two stages. Alone, it learns to point at the embeddings of the words that name a picture, which
costs seconds. Then it learns from the answers, too, through the frozen language model, which is
where the time goes (a third of a second a picture on one core). Features of the pictures are
computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from quantlib.bench.beds.fashion import KINDS
from quantlib.bench.beds.training import Schedule, Stage
from quantlib.bench.packages import built_once, console

ALONE = Schedule(steps=600, rate=1e-3, warmup=30)
ALONE_BATCH = 64
THROUGH = Schedule(steps=540, rate=2e-3, warmup=10)
FEW = 3
"""In the first two thirds of the steps the language model reads every so manieth patch only, drawn
anew each time: a step then costs half."""
ANCHOR = 0.5
"""Weight of pointing at the right words in the second stage. Without it the first steps, in which
the form of an answer is learned, forget what the pictures show: 86 % of test pictures
point at their own kind before them, and 43 % after 66 steps (measured once, on 600)."""
SHARPNESS = 20.0
"""Of the softmax over cosines with the words of all kinds."""
PICTURES = 6000
"""Training pictures whose features are computed."""


@dataclass(frozen=True)
class Prompt:
    """Token ids around the picture: before it, behind it, and of each kind's answer with its end.
    The language model reads `before`, the picture's vectors, `behind`, and the answer."""

    before: Tensor
    behind: Tensor
    answers: Sequence[Tensor]


class Connector(nn.Module):
    """LLaVA's connector behind a normalisation of its inputs, which `folded` puts into its first
    linear. mean, scale: float32 [in] of the inputs."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(len(mean), out_features)
        self.linear_2 = nn.Linear(out_features, out_features)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, in] -> [B, T, out]."""
        inputs = (features.float() - self.mean) / self.scale
        hidden: Tensor = self.linear_2(F.gelu(self.linear_1(inputs)))
        return hidden

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Parameters of the same function without the normalisation."""
        weight = self.linear_1.weight / self.scale
        return {
            "linear_1.weight": weight,
            "linear_1.bias": self.linear_1.bias - weight @ self.mean,
            "linear_2.weight": self.linear_2.weight.clone(),
            "linear_2.bias": self.linear_2.bias.clone(),
        }


def train(
    folder: Path,
    vision: Any,
    pixels: Callable[[], Tensor],
    labels: Tensor,
    language: Any,
    prompt: Prompt,
    seed: int,
    schedules: tuple[Schedule, Schedule] = (ALONE, THROUGH),
) -> dict[str, Tensor]:
    """Train the connector, or go on with it, and return `Connector.folded`.

    folder:   keeps the features and the state of both stages.
    vision:   Dinov2Model. labels: int64 [N] of the pictures.
    pixels:   gives them as the model reads them, float32 [N, 3, H, W]; asked where their features
              are not there yet.
    language: LlamaForCausalLM, frozen.
    """
    language.requires_grad_(False)
    features = kept_features(folder / "features.safetensors", vision, pixels)
    first = features[:1000].float()
    generator = torch.Generator().manual_seed(seed)
    words = word_embeddings(language, prompt)
    connector = Connector(first.mean((0, 1)), first.std((0, 1)) + 1e-3, words.shape[1])
    with torch.no_grad():
        for part in (connector.linear_1, connector.linear_2):
            part.weight.normal_(0, part.in_features**-0.5, generator=generator)
            part.bias.zero_()
    length = language.get_input_embeddings().weight.float().norm(dim=1).mean()

    def alone(step: int, draw: torch.Generator) -> dict[str, Tensor]:
        batch = torch.randint(len(features), (ALONE_BATCH,), generator=draw)
        return pointing_loss(connector(features[batch]).float(), labels[batch], words, length)

    of_kind = [(labels == kind).nonzero()[:, 0] for kind in range(len(KINDS))]

    def through(step: int, draw: torch.Generator) -> dict[str, Tensor]:
        # One picture of each kind: fewer are needed than of a batch that is drawn blindly.
        batch = torch.stack(
            [some[torch.randint(len(some), (), generator=draw)] for some in of_kind]
        )
        vectors = connector(features[batch])
        if 3 * step < 2 * schedules[1].steps:
            drawn = torch.randperm(vectors.shape[1], generator=draw)
            vectors = vectors[:, drawn[: len(drawn) // FEW].sort().values]
        pointing = pointing_loss(vectors.float(), labels[batch], words, length)
        return {
            "answer": answer_loss(language, vectors, labels[batch], prompt),
            "kind": ANCHOR * pointing["kind"],
        }

    Stage(folder / "alone.safetensors", connector, schedules[0], seed).run(alone)
    Stage(folder / "through.safetensors", connector, schedules[1], seed).run(through)
    return connector.folded()


def kept_features(file: Path, vision: Any, pixels: Callable[[], Tensor]) -> Tensor:
    """`vision_features` of all pictures, computed once."""

    def build(_: Path, target: Path) -> None:
        console.print("Computing features of the training pictures (only this once)")
        found = [vision_features(vision, part) for part in pixels().split(50)]
        safetensors.torch.save_file({"features": torch.cat(found)}, target)

    with safe_open(built_once(file, build), framework="pt") as opened:
        features: Tensor = opened.get_tensor("features")
    return features


@torch.no_grad()
def vision_features(vision: Any, pixels: Tensor) -> Tensor:
    """float16 [B, patches, width]: what LlavaForConditionalGeneration gives its connector for
    `vision_feature_layer=-1` without the class token: before the final norm."""
    found: Tensor = vision(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return found.half()


def word_embeddings(language: Any, prompt: Prompt) -> Tensor:
    """float32 [kinds, width]: the mean embedding of each answer's words, without its article and
    its end."""
    table = language.get_input_embeddings().weight
    words = []
    for name, ids in zip(KINDS, prompt.answers, strict=True):
        first = 1 if " " in name else 0  # the articles are one token
        words.append(table[ids[first:-1]].float().mean(0))
    return torch.stack(words)


def pointing_loss(
    vectors: Tensor, labels: Tensor, words: Tensor, length: Tensor
) -> dict[str, Tensor]:
    """Of vectors [B, T, width]: their mean should point at the words of its kind rather than at
    those of the others, and each should be as long as an embedding (relative squared error)."""
    cosines = F.cosine_similarity(vectors.mean(1)[:, None], words[None], dim=-1)
    lengths = vectors.norm(dim=-1) / length
    return {
        "kind": F.cross_entropy(SHARPNESS * cosines, labels),
        "length": (lengths - 1).square().mean(),
    }


def answer_loss(language: Any, vectors: Tensor, labels: Tensor, prompt: Prompt) -> Tensor:
    """Cross-entropy per token of the right answers and their ends, float32 [], for pictures
    [B, T, width] that are read between `prompt.before` and `prompt.behind`."""
    embed = language.get_input_embeddings()
    answers = [prompt.answers[label] for label in labels.tolist()]
    longest = max(len(ids) for ids in answers)
    padded = torch.stack([F.pad(ids, (0, longest - len(ids)), value=-100) for ids in answers])
    batch = len(answers)
    parts = [
        embed(prompt.before).expand(batch, -1, -1),
        vectors.to(embed.weight.dtype),
        embed(prompt.behind).expand(batch, -1, -1),
        embed(padded[:, :-1].clamp_min(0)),
    ]
    hidden = language.model(inputs_embeds=torch.cat(parts, 1), use_cache=False).last_hidden_state
    logits = language.lm_head(hidden[:, -longest:])
    return F.cross_entropy(logits.float().flatten(0, 1), padded.flatten(), ignore_index=-100)
