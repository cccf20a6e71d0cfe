"""Outliers put into a small model without changing what it computes.

Large language models have activation channels tens to hundreds of times larger than the others;
135 million parameters have milder ones. These functions give a Llama-like model what the large ones
have, exactly: every factor that goes in before a linear comes out of its weights again.

aligned   some channels are scaled: by the gains of the norms (residual stream), by the rows of up
          projections (hidden layers), of values, and of keys (both channels of a rotary pair).
          Smoothing, which divides channels by factors, can undo the first of these.
rotated   first the gains move into the linears, and the residual stream is rotated in planes: each
          of its own largest channels, one after the other with some ordinary ones. Now an outlier
          lies across many channels, and no factor per channel can take it out again. Then the same
          gains as above. Values are scaled along directions between channels, too; hidden layers
          and keys as above, as their non-linearities allow nothing else.

    python -P -m quantlib.bench.outliers       build the variants of SmolLM2, print their statistics
"""

from __future__ import annotations

import copy
import math
import statistics as stats
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlib.bench import assets
from quantlib.bench.packages import built_once, default_cache
from quantlib.bench.w4a4.grids import Grid, round_tokens
from quantlib.bench.w4a4.methods import ALPHAS
from quantlib.bench.w4a4.sites import Site, linear, sites_of, weight
from quantlib.bench.w4a4.statistics import collect
from quantlib.calibration.data import load_windows
from quantlib.evaluation.compare import load_tokenizer
from quantlib.transforms.apply import rotate_module
from quantlib.transforms.attention import watched_attention
from quantlib.transforms.binding import wire
from quantlib.transforms.rotation import Rotation
from quantlib.transforms.wiring import Attention, Wiring

Kind = Literal["plain", "aligned", "rotated"]
KINDS: tuple[Kind, ...] = ("plain", "aligned", "rotated")

SHARE, GAINS = 0.02, (20.0, 60.0)
HIDDEN_SHARE, HIDDEN_GAINS = 0.005, (5.0, 15.0)
HEAD_GAINS = (4.0, 12.0)
"""Share of the channels that are scaled, and the smallest and largest factor, drawn evenly in the
logarithm: of the residual stream; of hidden layers; in heads, where one channel in each is. Large
models have the tallest outliers in the residual stream. In hidden layers theirs belong to few
tokens; channels of every token as tall as that would leave no 4-bit method anything to do."""
LARGEST, PARTNERS = 8, 16
ANGLES = (0.2, 0.35)
"""So many of the largest channels are rotated with so many ordinary ones each, by angles (radians)
between these. A channel twenty times larger than its partner then outweighs it fivefold in its own
place: small angles in many planes cost smoothing more than 45 degrees in one."""
TOKENS = 256
"""Of a sample, on which errors are measured."""
VERSION = 2
"""Of what these functions do: part of the cached folders' names."""


@torch.no_grad()
def with_outliers(model: Any, kind: Kind, energy: Tensor | None = None, seed: int = 0) -> Any:
    """A copy of a Llama-like model with outliers of this kind; the function stays, up to float32.

    energy: [D], mean square of the residual stream's channels behind norms without gain, for
            "rotated": the channels with the most are rotated away from the axes.
    A rotated model has a head of its own, as a shared table cannot be in two bases.
    """
    model = copy.deepcopy(model)
    if kind == "plain":
        return model
    generator = torch.Generator().manual_seed(seed)
    wiring = wire(model)
    width = wiring.streams[0].width
    if kind == "rotated":
        if energy is None:
            raise ValueError("rotated outliers need the energy of the channels")
        _untie(model)
        wiring = wire(model)
        rotate_module(model, wiring, Rotation(residual=plane_rotations(energy, generator)))
    count = max(2, round(SHARE * width))
    gains = torch.ones(width)
    gains[torch.randperm(width, generator=generator)[:count]] = _factors(count, GAINS, generator)
    for site in sites_of(wiring):
        if site.norm is not None:
            model.get_parameter(site.norm.weight).mul_(gains)
            for reader in site.readers:
                weight(model, reader).div_(gains)
    for attention in wiring.attentions:
        _scale_values(model, attention, kind == "rotated", generator)
        _scale_keys(model, attention, generator)
    for hidden in wiring.hiddens:
        _scale_hidden(model, hidden.down.weight, hidden.width, generator)
    return model


def plane_rotations(energy: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal float64 [D, D]: the product of rotations of each of the `LARGEST` channels by
    `energy` [D] with `PARTNERS` of the others (as many as there are), no channel twice."""
    width = len(energy)
    order = energy.argsort(descending=True)
    largest = order[: min(LARGEST, width // 4)]
    others = order[len(largest) :][torch.randperm(width - len(largest), generator=generator)]
    basis = torch.eye(width, dtype=torch.float64)
    for channel, partners in zip(largest, others.split(PARTNERS), strict=False):
        for partner in partners:
            basis = basis @ plane(width, int(channel), int(partner), ANGLES, generator)
    return basis


def plane(
    width: int, first: int, second: int, angles: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Rotation of two of `width` axes by an angle between two, float64 [width, width]."""
    angle = angles[0] + (angles[1] - angles[0]) * float(torch.rand(1, generator=generator))
    basis = torch.eye(width, dtype=torch.float64)
    basis[first, first] = basis[second, second] = math.cos(angle)
    basis[first, second], basis[second, first] = math.sin(angle), -math.sin(angle)
    return basis


def _factors(count: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    low, high = math.log(bounds[0]), math.log(bounds[1])
    return (low + (high - low) * torch.rand(count, generator=generator)).exp()


def _untie(model: Any) -> None:
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _scale_values(
    model: Any, attention: Attention, across: bool, generator: torch.Generator
) -> None:
    """v <- v M and the output projection's columns by M^-1, per KV head. M scales one channel, or
    (`across`) the direction between two."""
    d = attention.head_dim
    matrices = []
    for _ in range(attention.kv_heads):
        first, second = torch.randperm(d, generator=generator)[:2].tolist()
        diagonal = torch.ones(d, dtype=torch.float64)
        diagonal[first] = float(_factors(1, HEAD_GAINS, generator))
        angles = (math.pi / 6, math.pi / 3) if across else (0.0, 0.0)
        turn = plane(d, first, second, angles, generator)
        matrices.append(turn @ diagonal.diag() @ turn.T)
    stretch = torch.stack(matrices)
    values = weight(model, attention.values).view(attention.kv_heads, d, -1)
    values.copy_(stretch.mT @ values.double())
    groups = attention.heads // attention.kv_heads
    output = weight(model, attention.output).view(-1, attention.heads, d)
    inverse = stretch.inverse().mT.repeat_interleave(groups, 0)
    output.copy_(torch.einsum("nhd,hde->nhe", output.double(), inverse))


def _scale_keys(model: Any, attention: Attention, generator: torch.Generator) -> None:
    """Keys of one rotary pair per head are larger, queries smaller; both channels of the pair by
    one factor, as the rotary embedding turns them into each other."""
    d, groups = attention.head_dim, attention.heads // attention.kv_heads
    factors = torch.ones(attention.kv_heads, d)
    for head in factors:
        channel = int(torch.randint(0, d // 2, (1,), generator=generator))
        head[[channel, channel + d // 2]] = _factors(1, HEAD_GAINS, generator)
    keys = model.get_parameter(f"{attention.module}.k_proj.weight")
    queries = model.get_parameter(f"{attention.module}.q_proj.weight")
    keys.mul_(factors.flatten()[:, None])
    queries.div_(factors.repeat_interleave(groups, 0).flatten()[:, None])


def _scale_hidden(model: Any, down: str, width: int, generator: torch.Generator) -> None:
    """Some rows of an up projection are larger, the down projection's columns smaller."""
    count = max(1, round(HIDDEN_SHARE * width))
    drawn = torch.randperm(width, generator=generator)[:count]
    factors = torch.ones(width)
    factors[drawn] = _factors(count, HIDDEN_GAINS, generator)
    model.get_parameter(down.replace("down_proj", "up_proj")).mul_(factors[:, None])
    model.get_parameter(down).div_(factors)


# -- statistics ----------------------------------------------------------------------------------


@torch.no_grad()
def channel_statistics(model: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """How far channels differ at each kind of site, and in keys, as medians over sites.

    amax_ratio: the largest channel's max |x| over the median channel's;
    kurtosis:   fourth moment over squared second moment of all numbers together (3: Gaussian);

    Behind norms also, with inputs rounded to 4 bits per token (asymmetric) and weights exact:

    error:      relative error of what the readers put out;
    smoothed:   the same with the best of SmoothQuant's factors: what no factor per channel mends.
    """
    wiring = wire(model)
    found: dict[str, dict[str, list[float]]] = {}

    def note(kind: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(kind, {}).setdefault(name, []).append(value)

    def hook(site: Site) -> Any:
        def seen(_: Any, inputs: Any) -> None:
            x = inputs[0].flatten(0, -2)
            note(site.kind, _spread(x))
            if site.norm is not None:
                readers = torch.cat([weight(model, reader) for reader in site.readers])
                note(site.kind, _smoothing(x[:: max(1, len(x) // TOKENS)], readers))

        return seen

    handles = [
        linear(model, site.readers[0]).register_forward_pre_hook(hook(site))
        for site in sites_of(wiring)
    ]
    observers = {
        a.module: lambda _, key, __: note("keys", _spread(key.transpose(1, 2).flatten(2)[0]))
        for a in wiring.attentions
    }
    try:
        with watched_attention(model, observers):
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        kind: {name: stats.median(values) for name, values in rows.items()}
        for kind, rows in found.items()
    }


def _spread(x: Tensor) -> dict[str, float]:
    """Of tokens x [T, K]."""
    amax = x.abs().amax(0)
    kurtosis = x.double().pow(4).mean() / x.double().square().mean().square()
    return {"amax_ratio": float(amax.max() / amax.median()), "kurtosis": float(kurtosis)}


def _smoothing(x: Tensor, readers: Tensor) -> dict[str, float]:
    """Errors of tokens x [T, K] in front of readers [N, K]."""
    exact = x @ readers.T

    def error(factor: Tensor) -> float:
        rounded = round_tokens(x / factor, (Grid(x.shape[1], 4),)) * factor
        return float((rounded @ readers.T - exact).norm() / exact.norm())

    reach, largest = x.abs().amax(0).clamp(min=1e-5), readers.abs().amax(0).clamp(min=1e-5)
    smoothed = [error(reach.pow(alpha) / largest.pow(1 - alpha)) for alpha in ALPHAS]
    return {"error": error(torch.ones_like(reach)), "smoothed": min(smoothed)}


def residual_energy(model: Any, wiring: Wiring, ids: Tensor) -> Tensor:
    """Mean square [D] of the residual stream's channels behind norms without gain, mean over the
    sites."""
    folded = copy.deepcopy(model)
    rotate_module(folded, wiring, Rotation(fold_norms=True))
    sites = tuple(site for site in sites_of(wiring) if site.norm is not None)
    seen = collect(
        folded, wiring, sites, lambda one: one.base_model(input_ids=ids, use_cache=False)
    )
    return torch.stack([seen.inputs[site.name].second.diagonal() for site in sites]).mean(0)


# -- SmolLM2 -------------------------------------------------------------------------------------


def variant_folder(kind: Kind, cache: Path | None = None) -> Path:
    """Folder of SmolLM2 with these outliers, float32; built on the first call (half a minute)."""
    plain = assets.fetch_smollm2(cache)
    if kind == "plain":
        return plain

    def build(_: Path, target: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        ids = sample(plain)
        energy = residual_energy(model, wire(model), ids)
        with_outliers(model, kind, energy).save_pretrained(target)
        load_tokenizer(plain).save_pretrained(target)

    name = f"smollm2-135m-instruct-{kind}-outliers-{VERSION}"
    return built_once((cache or default_cache()) / "bench" / name, build)


def sample(folder: Path) -> Tensor:
    """Two windows of calibration text, int64 [2, 512]: enough for statistics of channels."""
    text = str(assets.wikipedia_text("calibration"))
    return load_windows(text, load_tokenizer(folder), 512, 2, seed=1)


def describe(found: Mapping[str, Mapping[str, float]]) -> str:
    """The statistics in lines of text."""
    lines = []
    for kind, row in found.items():
        line = f"  {kind:9} max/median channel {row['amax_ratio']:7.1f}"
        line += f"   kurtosis {row['kurtosis']:8.1f}"
        if "error" in row:
            line += f"   A4 error {row['error']:.3f}, smoothed {row['smoothed']:.3f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Build every variant and print what it has."""
    ids = sample(assets.fetch_smollm2())
    reference = None
    for kind in KINDS:
        folder = variant_folder(kind)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        reference = logits if reference is None else reference
        difference = float((logits - reference).norm() / reference.norm())
        print(f"{kind}: {folder}\n  logits differ from the plain model's by {difference:.1e}")
        print(describe(channel_statistics(model, ids)))


if __name__ == "__main__":
    main()
