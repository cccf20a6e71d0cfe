"""Training of the VQ model inside a Janus: pictures to codes and back.

First a plain autoencoder whose latents lie on the unit sphere (with noise, so that near latents
decode alike), then spherical k-means gives the codebook, then encoder, codebook and decoder go on
together with straight-through gradients. Codebooks that are learnt from the start collapse to a few
dozen used codes; this one begins with all of them in use.

The codebook stays on the sphere: transformers compares unnormalised latents with it, and decodes
normalised vectors of it, which is the same thing only there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlib.bench.beds.training import Schedule, Stage, console, step_generator

SCHEDULE = Schedule(steps=2400, rate=1e-3, warmup=100, decay=0.0)
PLAIN_STEPS = 900
BATCH = 16
NOISE = 0.1
"""Standard deviation per coordinate that the plain autoencoder's latents are disturbed by."""
COMMITMENT = 0.25
CLUSTERED_BATCHES = 100

Draw = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> pictures in -1..1, [count, 3, rows, columns]."""


def train_vq(
    vqmodel: Any, draw: Draw, file: Path, seed: int, schedule: Schedule = SCHEDULE
) -> None:
    """Train a `JanusVQVAE` in place, or go on."""
    plain = schedule.steps * PLAIN_STEPS // SCHEDULE.steps

    def before(step: int) -> None:
        if step == plain:
            set_codebook(vqmodel, draw, step_generator(seed + 1, step))

    def loss(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = draw(BATCH, generator)
        latents = encode(vqmodel, pixels)
        if step < plain:
            noise = torch.randn(latents.shape, generator=generator)
            decoded = decode(vqmodel, F.normalize(latents + NOISE * noise, dim=1))
            return {"mse": F.mse_loss(decoded.float(), pixels)}
        codebook = F.normalize(vqmodel.quantize.embedding.weight, dim=-1)
        chosen = codebook[nearest(latents, codebook.detach())].movedim(-1, 1)
        through = latents + (chosen - latents).detach()
        # Sums over coordinates: the squared distance of unit vectors, 0 to 4.
        apart = (chosen - latents.detach()).square().sum(1).mean()
        committed = (chosen.detach() - latents).square().sum(1).mean()
        mse = F.mse_loss(decode(vqmodel, through).float(), pixels)
        return {"mse": mse, "codebook": 0.1 * apart, "commitment": 0.1 * COMMITMENT * committed}

    Stage(file, vqmodel, schedule, seed).run(loss, before)
    with torch.no_grad():
        codebook = vqmodel.quantize.embedding.weight
        codebook.copy_(F.normalize(codebook, dim=-1))


def encode(vqmodel: Any, pixels: Tensor) -> Tensor:
    """Latents on the unit sphere, float32 [n, dimensions, rows, columns]."""
    return F.normalize(vqmodel.quant_conv(vqmodel.encoder(pixels)).float(), dim=1)


def decode(vqmodel: Any, latents: Tensor) -> Tensor:
    """Pictures of latents on the sphere."""
    decoded: Tensor = vqmodel.decoder(vqmodel.post_quant_conv(latents))
    return decoded


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code for latents [n, D, rows, columns]: int64 [n, rows, columns]."""
    with torch.autocast("cpu", enabled=False):
        return (latents.detach().movedim(1, -1) @ codebook.T).argmax(-1)


@torch.no_grad()
def set_codebook(vqmodel: Any, draw: Draw, generator: torch.Generator) -> None:
    """Put spherical k-means of what the encoder makes of pictures into the codebook."""
    batches = [encode(vqmodel, draw(BATCH, generator)) for _ in range(CLUSTERED_BATCHES)]
    points = torch.cat([batch.movedim(1, -1).flatten(0, 2) for batch in batches])
    codebook = vqmodel.quantize.embedding.weight
    codebook.copy_(spherical_kmeans(points, len(codebook), generator))
    console.print("vq: codebook set by k-means", style="dim")


def spherical_kmeans(
    points: Tensor, count: int, generator: torch.Generator, rounds: int = 15
) -> Tensor:
    """`count` unit vectors [count, D] that unit vectors `points` [n, D] gather around.

    They start at random points. One that loses all its points starts anew at the worst served.
    """
    centers = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(rounds):
        similarity, owner = (points @ centers.T).max(1)
        sums = torch.zeros_like(centers).index_add_(0, owner, points)
        empty = torch.bincount(owner, minlength=count) == 0
        sums[empty] = points[similarity.argsort()[: int(empty.sum())]]
        centers = F.normalize(sums, dim=-1)
    return centers
