"""Why small floats do not beat integers in networks that are trained in them: what each format
leaves of the numbers that it has to hold.

    python -P -m quantlib.bench.formats_explained             all three models, a minute of one core
    python -P -m quantlib.bench.formats_explained resnet vit

The ResNet and the ViT of `bench.trained_search` before they are trained on in few bits, and every
third block of SmolLM2, whose weights are of another kind. Every linear and convolution is rounded
to every integer and float (two exponent bits or more) of 4 to 8 bits as FLIQS does it: weights with
one scale per output channel, inputs with one per token, of convolutions per picture. Told are, as
medians over layers,

    weights, inputs, output  decibels of signal over noise, of the layer's output (bias left out)
                             with both rounded
    wins                     the share of layers where the float is above the integer of its width
    any_float_wins           ... where the best of the floats of that width is
    crest, kurtosis          largest magnitude over root mean square of the numbers that share a
                             scale; fourth moment over squared second (3: Gaussian)
    by_crest                 of rows that share a scale, by their crest factor: how many there are,
                             and in which share of them E2M1 has less noise than 4-bit integers
    groups                   the same layers' weights with a scale per 64 and per 32 columns

An integer's step is the same everywhere, a float's grows with the number: a float pays where few
numbers are many times larger than the others, which is what a crest factor says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from quantlib.bench import assets, record
from quantlib.bench.beds.fashion_networks import NETWORKS, pictures
from quantlib.bench.packages import console
from quantlib.bench.trained_search import trained_before
from quantlib.calibration.data import load_windows
from quantlib.checkpoint.disk import read_json
from quantlib.errors import QuantlibError, UsageError
from quantlib.pipeline.opening import load_tokenizer
from quantlib.pipeline.trained import Trainable
from quantlib.search.trained.layers import Layers, Rounded, RoundedLinear, Space, decisions
from quantlib.search.trained.numbers import SPACES, Candidate, space_of
from quantlib.search.trained.quantizers import round_inputs, round_samples, round_weight

RESULT = "formats_explained"
SEEDS = {"resnet": 3, "vit": 1}
"""Networks that `bench.trained_search` has uniform integers or floats of."""
PICTURES = 64
WINDOWS, SEQLEN, EVERY = 2, 64, 3
SPACE = ",".join((*SPACES["int-l"], *SPACES["float-l"]))
INTEGER, FLOAT = Candidate.parse("w4a4"), Candidate.parse("e2m1")
CRESTS = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Borders between classes of crest factors."""
GROUPS = (64, 32)


@dataclass(frozen=True)
class Layer:
    """A layer in place and the inputs that it saw, float32 [..., K] or [B, C, H, W]."""

    name: str
    module: Rounded
    inputs: Tensor

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        return self.module.weight.detach().float().flatten(1)

    @property
    def tokens(self) -> Tensor:
        """Inputs [T, K]: a row has one scale."""
        if isinstance(self.module, RoundedLinear):
            return self.inputs.flatten(0, -2)
        return self.inputs.flatten(1)

    def rounded_tokens(self, candidate: Candidate) -> Tensor:
        """`tokens` as a candidate holds them."""
        if isinstance(self.module, RoundedLinear):
            return round_inputs(self.tokens, candidate)
        return round_samples(self.inputs, candidate).flatten(1)

    def output(self, candidate: Candidate | None) -> Tensor:
        """What it computes of its inputs, both rounded so (None: as they are)."""
        self.module.candidate = candidate
        try:
            found: Tensor = self.module(self.inputs)
        finally:
            self.module.candidate = None
        return found


def decibels(exact: Tensor, rounded: Tensor, signal: Tensor | None = None) -> float:
    """10 log10 of signal over noise; the signal is `exact` unless given."""
    noise = float((rounded - exact).double().square().sum())
    power = float((exact if signal is None else signal).double().square().sum())
    return 10 * math.log10(power / noise) if power and noise else math.inf


def crests(rows: Tensor) -> Tensor:
    """Largest magnitude over root mean square of every row [R, K] that is not all zeros."""
    rows = rows[rows.abs().amax(1) > 0].double()
    return rows.abs().amax(1) / rows.square().mean(1).sqrt()


def kurtosis(rows: Tensor) -> float:
    """Fourth moment over squared second of numbers whose rows are brought to one power."""
    rows = rows[rows.abs().amax(1) > 0].double()
    scaled = rows / rows.square().mean(1, keepdim=True).sqrt()
    return float(scaled.pow(4).mean())


def less_noise(rows: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """bool, of every row [R, K] that is not all zeros: whether `ours` is nearer than `theirs`."""
    used = rows.abs().amax(1) > 0
    return ((ours - rows).square().sum(1) < (theirs - rows).square().sum(1))[used]


@torch.no_grad()
def seen(
    trainable: Trainable, keep: Callable[[str], bool], run: Callable[[nn.Module], object]
) -> Iterator[Layer]:
    """The layers whose weights' names `keep` wants, with the inputs of one run of the model."""
    weights = [weight for weight in trainable.model_map.weights if keep(weight.name)]
    layers = Layers(trainable.model.eval(), Space(decisions(weights, space_of(SPACE), "weight")))
    found: dict[str, Tensor] = {}

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = inputs[0].detach().float()

    handles = [
        module.register_forward_pre_hook(partial(hook, name)) for name, module in layers.of.items()
    ]
    run(trainable.model)
    for handle in handles:
        handle.remove()
    for name, module in layers.of.items():
        yield Layer(name, module, found[name])


@torch.no_grad()
def layer_row(layer: Layer) -> dict[str, Any]:
    """Figures of one layer: its statistics, and decibels by format."""
    weight, tokens, exact = layer.weight, layer.tokens, layer.output(None)
    bias = layer.module.bias
    if bias is not None and exact.ndim == 4:
        bias = bias.view(-1, 1, 1)
    signal = exact if bias is None else exact - bias
    formats = {}
    for candidate in space_of(SPACE):
        formats[candidate.name] = {
            "weights": decibels(weight, round_weight(weight, candidate)),
            "inputs": decibels(tokens, layer.rounded_tokens(candidate)),
            "output": decibels(exact, layer.output(candidate), signal),
        }
    rows = {
        "weights": (weight, round_weight(weight, FLOAT), round_weight(weight, INTEGER)),
        "inputs": (tokens, layer.rounded_tokens(FLOAT), layer.rounded_tokens(INTEGER)),
    }
    groups = {}
    for size in (size for size in GROUPS if weight.shape[1] % size == 0):
        integer, small = (Candidate.parse(f"{name}g{size}") for name in ("w4", "fp4"))
        groups[str(size)] = {
            "crest": float(crests(weight.reshape(-1, size)).median()),
            "integer": decibels(weight, round_weight(weight, integer)),
            "float": decibels(weight, round_weight(weight, small)),
        }
    return {
        "name": layer.name,
        "crest": {part: float(crests(found[0]).median()) for part, found in rows.items()},
        "kurtosis": {part: kurtosis(found[0]) for part, found in rows.items()},
        "formats": formats,
        "groups": groups,
        "by_crest": {part: _counted(*found) for part, found in rows.items()},
    }


def _counted(rows: Tensor, ours: Tensor, theirs: Tensor) -> list[tuple[int, int]]:
    """(rows, those where `ours` has less noise) of every class of crest factors."""
    classes = torch.bucketize(crests(rows), torch.tensor(CRESTS, dtype=torch.float64))
    better, count = less_noise(rows, ours, theirs), len(CRESTS) + 1
    won = torch.bincount(classes[better], minlength=count)
    return list(zip(torch.bincount(classes, minlength=count).tolist(), won.tolist(), strict=True))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the layers of a model have in common."""
    parts = ("weights", "inputs")
    by_bits: dict[str, dict[str, Any]] = {}
    for candidate in space_of(SPACE):
        form = candidate.scheme.weight
        assert form is not None
        middle = {
            part: round(median(row["formats"][candidate.name][part] for row in rows), 2)
            for part in (*parts, "output")
        }
        kind = by_bits.setdefault(str(form.bits), {"integer": {}, "floats": {}})
        if form.is_integer:
            kind["integer"] = {"name": candidate.name, **middle}
        else:
            rival = f"w{form.bits}a{form.bits}"
            wins = {
                part: _share([_above(row, candidate.name, rival, part) for row in rows])
                for part in (*parts, "output")
            }
            kind["floats"][form.element] = {"name": candidate.name, **middle, "wins": wins}
    for kind in by_bits.values():
        names = [one["name"] for one in kind["floats"].values()]
        rival = kind["integer"]["name"]
        kind["any_float_wins"] = {
            part: _share([any(_above(row, name, rival, part) for name in names) for row in rows])
            for part in (*parts, "output")
        }
    return {
        "layers": len(rows),
        "crest": {p: round(median(row["crest"][p] for row in rows), 2) for p in parts},
        "kurtosis": {p: round(median(row["kurtosis"][p] for row in rows), 2) for p in parts},
        "bits": by_bits,
        "by_crest": {part: _classes([row["by_crest"][part] for row in rows]) for part in parts},
        "groups": _grouped(rows),
    }


def _above(row: Mapping[str, Any], name: str, rival: str, part: str) -> bool:
    formats = row["formats"]
    return bool(formats[name][part] > formats[rival][part])


def _share(wins: Sequence[bool]) -> float:
    return round(sum(wins) / len(wins), 3)


def _classes(counted: Sequence[Sequence[tuple[int, int]]]) -> list[dict[str, Any]]:
    """Classes of crest factors that have rows, over all layers."""
    found = []
    borders = [0.0, *CRESTS, None]
    for index, (low, high) in enumerate(pairwise(borders)):
        rows, won = (sum(layer[index][place] for layer in counted) for place in (0, 1))
        if rows:
            found.append({"from": low, "to": high, "rows": rows, "e2m1": round(won / rows, 3)})
    return found


def _grouped(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Weights with scales of fewer columns, of the layers whose columns divide so."""
    found = []
    for size in map(str, GROUPS):
        fitting = [row["groups"][size] for row in rows if size in row["groups"]]
        if fitting:
            wins = _share([one["float"] > one["integer"] for one in fitting])
            middle = {
                name: round(median(one[name] for one in fitting), 2)
                for name in ("crest", "integer", "float")
            }
            found.append({"group": int(size), "layers": len(fitting), **middle, "wins": wins})
    return found


def _network(name: str) -> Iterator[Layer]:
    network, seed = NETWORKS[name], SEEDS[name]
    trainable = Trainable.open(trained_before(network, seed))
    pixels = pictures("test").first(PICTURES).pixels
    yield from seen(trainable, lambda _: True, lambda model: model(pixel_values=pixels))


def _smollm2() -> Iterator[Layer]:
    folder = assets.fetch_smollm2()
    trainable = Trainable.open(folder)
    text = str(assets.wikipedia_text("held_out"))
    ids = load_windows(text, load_tokenizer(folder), SEQLEN, WINDOWS, 0)
    blocks = {f"{block}." for block in trainable.model_map.blocks[::EVERY]}
    yield from seen(
        trainable,
        lambda name: any(name.startswith(block) for block in blocks),
        lambda model: model(input_ids=ids),
    )


SUBJECTS: dict[str, Callable[[], Iterator[Layer]]] = {
    "resnet": partial(_network, "resnet"),
    "vit": partial(_network, "vit"),
    "smollm2": _smollm2,
}


def main(
    subjects: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(SUBJECTS)}; all.")
    ] = None,
) -> None:
    """Round the layers to all formats; writes bench/results/formats_explained.json."""
    try:
        unknown = [name for name in subjects or () if name not in SUBJECTS]
        if unknown:
            raise UsageError(f"unknown subject {unknown[0]!r}: use {', '.join(SUBJECTS)}")
        file = record.path_of(RESULT)
        found = dict(read_json(file)["subjects"]) if file.exists() else {}
        for name in subjects or SUBJECTS:
            found[name] = summary([layer_row(layer) for layer in SUBJECTS[name]()])
            said = {part: found[name][part] for part in ("layers", "crest", "kurtosis")}
            console.print(f"{name}: {said}", markup=False)
        print(record.write(RESULT, {"seeds": SEEDS, "subjects": found}))
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
