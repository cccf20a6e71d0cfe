"""Searches that train, judged on two networks: FLIQS and CSQ beside uniform formats and the exact
solver.

    python -P -m quantlib.bench.trained_search                      all rows that are missing
    python -P -m quantlib.bench.trained_search --network vit --method fliqs-int --seeds 1
    python -P -m quantlib.bench.trained_search --list               which rows are there
    python -P -m quantlib.bench.trained_search --tuning             judge on other pictures

Fashion-MNIST, 55,000 pictures to train on, 10,000 to test. A seed draws one network, which is
trained in full precision once; every method then trains that network on, for the same steps over
the same batches with the same learning rates, so a difference is the method's. Settings were chosen
on networks of other seeds and 5,000 further pictures (--tuning): the test set only reports. The
unit of cost is
bit operations (multiplications x weight bits x input bits); every layer is quantized, the first and
the last too, weights by output channel, inputs by token (of convolutions: by picture). Every
quantized network that quantlib stores is written as a checkpoint, loaded again, and judged as it
runs there. Rows are kept in the user's cache and in the result file, which is written after each,
and made once; a run that was stopped goes on. A machine whose cache is empty goes on where the
result file is.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from quantlib.bench import artifacts, record
from quantlib.bench.beds.fashion_networks import (
    NETWORKS,
    Network,
    Pictures,
    answers,
    classification,
    likeness,
    pictures,
)
from quantlib.bench.packages import console
from quantlib.bench.trained_table import ANSWERS, as_hex, compared, table
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.checkpoint.provenance import source_hash
from quantlib.errors import CheckpointError, QuantlibError, SearchError, UsageError
from quantlib.formats.scheme import Scheme
from quantlib.pipeline.narrowed import Chosen, write_choice
from quantlib.pipeline.trained import Found, Trainable, write_trained
from quantlib.runtime.load import load
from quantlib.search.csq import Csq
from quantlib.search.csq import Settings as CsqSettings
from quantlib.search.fliqs import Fixed, Fliqs, Settings
from quantlib.search.trained.costs import FULL_BITS, Costs, bops
from quantlib.search.trained.layers import Choice, Layers, Space, decisions
from quantlib.search.trained.loop import Judge, Loop, Method, Report, Training, judge_of
from quantlib.search.trained.measured import (
    BATCHES,
    START_ENTROPY,
    START_RATE,
    best_of_random,
    first_logits,
    least_lost,
    losses,
    wide_ends,
)
from quantlib.search.trained.numbers import SPACES, space_of

BEFORE = {"resnet": 900, "vit": 8000}
"""Steps in full precision, once for each seed. After 1,600 a transformer still learns so fast that
training on hides what 4 bits cost."""
STEPS = 600
"""Steps of every method."""
SEARCHES = {
    "resnet": Settings.short(0.0, delay=40, settle=300),
    "vit": replace(Settings.short(0.0, delay=20, settle=450, draws=8), rate=0.2),
}
"""Of FLIQS, without its target. A transformer forgets more in formats that it does not keep: its
search is shorter, and takes more choices a step."""
RESULT = "search_trained"
TUNING_SEED = 100
MEASURED: dict[str, Any] = {"delay": 0, "settle": 500, "rate": START_RATE}
"""What is otherwise where it begins with measured losses."""
FOUR = 16.0
"""Bit operations of a multiplication in 4-bit numbers."""
EIGHTH = FULL_BITS / 8


@dataclass(frozen=True)
class Entry:
    """One row of the comparison, but for network and seed.

    says:    what it is. space: candidates. uniform: all layers in this one, no search.
    target:  bit operations of a multiplication that a search may spend, on average.
    widths:  shares of hidden channels to choose from. csq: mean bits of weights, beside inputs in
             the uniform candidate.
    exact:   whether formats are chosen before training, from measured losses (`trained.measured`).
    random:  of how many random choices the best is trained in.
    otherwise: the candidate of layers that cannot have the uniform one.
    measured: whether FLIQS begins with measured losses, and draws nothing uniformly.
    ends:    the candidate of the first and the last layer, the others being alike.
    alike:   whether choices are judged by their divergence from the network before, not by labels.
    """

    name: str
    says: str
    space: str = "int-xl"
    uniform: str = ""
    target: float = 0.0
    widths: tuple[float, ...] = ()
    csq: float = 0.0
    exact: bool = False
    random: int = 0
    otherwise: str = ""
    measured: bool = False
    ends: str = ""
    alike: bool = False

    @property
    def about(self) -> dict[str, Any]:
        """What a row's key depends on. Fields that came later count where they are set, so that
        rows from before stay valid."""
        later = ("exact", "random", "otherwise", "measured", "ends", "alike")
        return {name: value for name, value in asdict(self).items() if name not in later or value}


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("full", "full precision, trained on for as long"),
        Entry("int4", "uniform 4-bit integers", uniform="w4a4"),
        Entry("e2m1", "uniform 4-bit floats", "mixed-xl", uniform="e2m1"),
        Entry(
            "int4-zero",
            "uniform 4-bit integers, inputs with zero points (of convolutions without)",
            "zero-pairs",
            uniform="w4a4z",
            otherwise="w4a4",
        ),
        Entry("w3a5", "uniform, 3-bit weights and 5-bit inputs", "int-pairs", uniform="w3a5"),
        Entry("fliqs-tied", "FLIQS, integers of 3 to 8 bits", "int-xl", target=FOUR),
        Entry("fliqs-int", "FLIQS, weights and inputs of 2 to 8 bits", "int-pairs", target=FOUR),
        Entry("fliqs-mixed", "FLIQS, these and floats", "mixed-pairs", target=FOUR),
        Entry(
            "exact",
            "exact knapsack over measured losses, of these, then trained in its choice",
            "mixed-pairs",
            target=FOUR,
            exact=True,
        ),
        Entry(
            "random",
            "the best of 12 random choices of these, then trained in it",
            "mixed-pairs",
            target=FOUR,
            random=12,
        ),
        Entry(
            "first-last",
            "first and last layer in 8 bits, the others in what that leaves, alike",
            "mixed-pairs",
            target=FOUR,
            ends="w8a8",
        ),
        Entry(
            "fliqs-zero",
            "FLIQS, weights and inputs of 2 to 8 bits, floats, inputs with zero points",
            "zero-pairs",
            target=FOUR,
        ),
        Entry(
            "fliqs-measured",
            "FLIQS over these that begins with measured losses",
            "zero-pairs",
            target=FOUR,
            measured=True,
        ),
        Entry(
            "fliqs-fours",
            "FLIQS over 4-bit integers, with zero points of inputs and without, and floats, that "
            "begins with measured losses",
            "fours",
            target=FOUR,
            measured=True,
        ),
        Entry(
            "exact-zero",
            "exact knapsack over measured losses, of these, then trained in its choice",
            "zero-pairs",
            target=FOUR,
            exact=True,
        ),
        Entry(
            "fliqs-alike",
            "FLIQS that begins with measured divergences, of all these",
            "zero-pairs",
            target=FOUR,
            measured=True,
            alike=True,
        ),
        Entry(
            "exact-alike",
            "exact knapsack over measured divergences, of all these, then trained in its choice",
            "zero-pairs",
            target=FOUR,
            exact=True,
            alike=True,
        ),
        Entry("csq", "CSQ, 4 bits a weight, 4-bit inputs", uniform="w4a4", csq=4.0),
        Entry("fliqs-int-8th", "FLIQS-L, integers of 4 to 8 bits", "int-l", target=EIGHTH),
        Entry("fliqs-float-8th", "FLIQS-L, floats of 4 to 8 bits", "float-l", target=EIGHTH),
        Entry(
            "fliqs-int-width",
            "FLIQS, integers of 4 to 8 bits and widths",
            "int-l",
            target=FOUR,
            widths=(0.5, 0.625, 0.75, 0.875, 1.0),
        ),
    )
}


@dataclass(frozen=True)
class Row:
    """A row's place: what, on which network, from which seed, judged on which pictures."""

    network: Network
    entry: Entry
    seed: int
    judged_on: str = "test"

    @property
    def name(self) -> str:
        part = "" if self.judged_on == "test" else f"-{self.judged_on}"
        return f"{self.network.name}-{self.entry.name}-{self.seed}{part}"

    @property
    def state(self) -> str:
        """Name of its training state."""
        return f"{self.name}-{self.key[:8]}"

    @property
    def search(self) -> Settings:
        """Of FLIQS; its target is that of one multiplication."""
        policy = SEARCHES[self.network.name]
        if self.entry.measured:
            policy = replace(policy, **MEASURED)
        return replace(policy, target=self.entry.target)

    @property
    def key(self) -> str:
        """sha256 over what the row depends on."""
        parts = [self.entry.about, self.seed, self.network.digest, self.network.rate]
        parts += [BEFORE[self.network.name], STEPS]
        if self.entry.ends:
            parts += [SPACES[self.entry.space]]
        elif self.entry.exact or self.entry.random:
            parts += [BATCHES, SPACES[self.entry.space]]
        elif self.entry.target:
            parts += [asdict(self.search), SPACES[self.entry.space]]
            parts += [BATCHES, START_ENTROPY] if self.entry.measured else []
        elif self.entry.csq:
            parts += [self.search.settle]
        if self.entry.widths:
            parts += [self.network.widths.__name__]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def folder() -> Path:
    """Where rows and states lie."""
    return artifacts.folder() / "trained-search"


def main(
    network: Annotated[
        list[str] | None, typer.Option(help=f"Only this one, of {', '.join(NETWORKS)}. Repeatable.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Only this one, of {', '.join(ENTRIES)}. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    first: Annotated[int, typer.Option("--from", min=0, help="The first seed.")] = 0,
    tuning: Annotated[
        bool,
        typer.Option(
            "--tuning",
            help=f"Seeds are {TUNING_SEED} higher and judged on pictures that are neither trained "
            "on nor the test set: for choosing settings. Prints a table and writes no result.",
        ),
    ] = False,
    only_list: Annotated[
        bool, typer.Option("--list", help="Print the rows and whether they are there, or older.")
    ] = False,
) -> None:
    """Make the rows that are missing, and write bench/results/search_trained.json of all there are.

    Example: python -P -m quantlib.bench.trained_search --network resnet --seeds 1
    """
    try:
        networks = _named(NETWORKS, network, "network")
        entries = _named(ENTRIES, method, "method")
        offset, part = (TUNING_SEED, "held_out") if tuning else (0, "test")
        drawn = range(first + offset, first + offset + seeds)
        rows = [Row(n, e, seed, part) for n in networks for seed in drawn for e in entries]
        if only_list:
            for row in rows:
                print(f"{_standing(row):7}  {row.name}")
            return
        found = []
        for row in rows:
            found.append(measured(row))
            if not tuning:
                path = report()
        if tuning:
            print(table(compared(found)))
        else:
            print(table(read_json(path)["comparison"]))
            console.print(f"wrote {path.name}")
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


def _named(known: Mapping[str, Any], asked: Sequence[str] | None, what: str) -> list[Any]:
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise UsageError(f"unknown {what} {unknown[0]!r}: use {', '.join(known)}")
    return [known[name] for name in asked or known]


def report() -> Path:
    """Keep all rows that are there, and what they say of each other: the result file."""
    written = _written()
    rows = []
    for row in (
        Row(n, e, s) for n in NETWORKS.values() for e in ENTRIES.values() for s in range(10)
    ):
        earlier = (told for told in written["rows"] if _is_of(row, told))
        found = _kept(row) or next(earlier, None)
        if found is not None:
            rows.append(found)
    settings = {
        "before": BEFORE,
        "steps": STEPS,
        "measured": MEASURED,
        "policies": {name: asdict(search) for name, search in SEARCHES.items()},
    }
    says = {name: entry.says for name, entry in ENTRIES.items()}
    figures = compared(rows, written["comparison"])
    document = {"settings": settings, "methods": says, "comparison": figures, "rows": rows}
    return record.write(RESULT, document)


def _written() -> dict[str, list[dict[str, Any]]]:
    """Rows and comparison of the result file; none where there is no file. Raises CheckpointError
    when it is damaged: its rows would be lost by writing over it."""
    path = record.path_of(RESULT)
    file = read_json(path) if path.exists() else {}
    made = {name: file[name] for name in ("date", "machine") if name in file}
    rows = [{**made, **row} for row in file.get("rows", [])]
    return {"rows": rows, "comparison": file.get("comparison", [])}


def _is_of(row: Row, told: Mapping[str, Any]) -> bool:
    """Whether a row of the result file stands in this place."""
    place = (row.network.name, row.entry.name, row.seed)
    return place == (told["network"], told["method"], told["seed"])


def _kept(row: Row) -> dict[str, Any] | None:
    """The row that was made before, None when there is none, or of other settings."""
    try:
        made = [read_json(folder() / "rows" / f"{row.name}.json")]
    except CheckpointError:
        made = []
    if row.judged_on == "test":
        made += [told for told in _written()["rows"] if _is_of(row, told)]
    return next((one for one in made if one.get("key") == row.key and ANSWERS in one), None)


def _standing(row: Row) -> str:
    """Whether a row is "there", "missing", or "older": in the result file with other settings or
    none. Such a row made anew replaces the old one, and begins with a network of this machine."""
    if _kept(row) is not None:
        return "there"
    is_older = row.judged_on == "test" and any(_is_of(row, told) for told in _written()["rows"])
    return "older" if is_older else "missing"


def measured(row: Row) -> dict[str, Any]:
    """The row's figures; made if they are not there."""
    kept = _kept(row)
    if kept is not None:
        return kept
    console.print(f"Training {row.name}")
    source = trained_before(row.network, row.seed)
    started, resumed = time.monotonic(), _state_file(row.state).exists()
    found: dict[str, Any] = {"key": row.key, **record.when_and_where()}
    found |= {"network": row.network.name, "method": row.entry.name, "seed": row.seed}
    found |= _measure(row, source)
    found["seconds"] = None if resumed else round(time.monotonic() - started, 1)
    path = folder() / "rows" / f"{row.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(found, indent=1) + "\n")
    console.print(f"  {found['accuracy']:.4f}", markup=False)
    return found


def trained_before(network: Network, seed: int) -> Path:
    """The folder of the network that all methods of a seed begin with."""
    steps = BEFORE[network.name]
    name = f"{network.name}-{network.digest[:8]}-{seed}-{steps}"

    def build(made: Path, scratch: Path) -> None:
        model = network.drawn(seed)
        model.save_pretrained(scratch / "drawn")
        trainable = Trainable.open(scratch / "drawn")
        layers = Layers(trainable.model, _space(trainable, ENTRIES["full"], network))
        training = Training(steps, network.rate, steps // 10, seed=seed)
        _train(trainable, Fixed(layers, None), training, f"before-{name}")
        model.load_state_dict(trainable.model.state_dict())
        model.save_pretrained(made)

    return artifacts.kept(f"trained-search-{name}", build)


def _train(trainable: Trainable, method: Method, training: Training, name: str) -> None:
    about = {"model": source_hash(trainable.source), "data": "fashion-mnist"}
    task = classification(pictures("train"))
    Loop(trainable.model, task, method, training, _state_file(name), about, _shown(name)).run()


def _state_file(name: str) -> Path:
    return folder() / "states" / f"{name}.safetensors"


def _shown(name: str) -> Report:
    """Says every hundred steps how far it is."""

    def show(step: int, figures: Mapping[str, float]) -> None:
        if step % 100 == 0:
            told = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            console.print(f"  {name} {step}  {told}", style="dim", markup=False)

    return show


def _space(trainable: Trainable, entry: Entry, network: Network) -> Space:
    numbers = decisions(trainable.model_map.weights, space_of(entry.space))
    if not entry.widths:
        return Space(numbers)
    return Space(numbers, network.widths(trainable, entry.widths))


def _measure(row: Row, source: Path) -> dict[str, Any]:
    """Train, and judge."""
    trainable, test = Trainable.open(source), pictures(row.judged_on)
    layers = Layers(trainable.model, _space(trainable, row.entry, row.network))
    example = test.first(1).pixels
    trainable.model.eval()
    products = layers.count_products(lambda: trainable.model(pixel_values=example))
    costs = bops(layers.space, products)
    training = Training(STEPS, row.network.rate / 4, STEPS // 20, seed=row.seed)
    judging = classification(pictures("train"))
    if row.entry.alike:
        judging = likeness(Trainable.open(source).model.train(), pictures("train"))
    judge = judge_of(trainable.model, judging, training)
    trainable.model.train()
    method = _method(row, layers, costs, products, judge)
    _train(trainable, method, training, row.state)
    found, spent = _ended(method, layers, costs, products, row.entry)
    trainable.model.eval()
    right = answers(trainable.model, test)
    per_product = spent / sum(products.values())
    return {
        "began_with": source_hash(trainable.source),
        "accuracy": float(right.float().mean()),
        "pictures": len(right),
        ANSWERS: as_hex(right),
        "bops": spent,
        "bits_product": per_product,
        "share_of_bf16": per_product / FULL_BITS,
        **found.told,
        **_as_shipped(trainable, layers, found.ships, test, right),
    }


@dataclass(frozen=True)
class Ended:
    """What a method ended with: what the row tells of it, and what ships (a sentence: why nothing
    does)."""

    told: dict[str, Any]
    ships: Found | Chosen | str


def _method(
    row: Row, layers: Layers, costs: Costs, products: Mapping[str, float], judge: Judge
) -> Fixed | Fliqs | Csq:
    entry = row.entry
    if entry.csq:
        both = STEPS - row.search.settle
        search = CsqSettings(entry.csq, both * 2 // 3, both - both * 2 // 3)
        search.check(STEPS)
        return Csq(layers, products, layers.space.uniform(entry.uniform), search)
    if entry.target:
        target = entry.target * sum(products.values())
        if entry.ends:
            return Fixed(layers, wide_ends(costs, target, entry.ends))
        if entry.exact:
            return Fixed(layers, least_lost(losses(layers, judge, BATCHES), costs, target))
        if entry.random:
            drawing = torch.Generator().manual_seed(row.seed)
            draws = (drawing, entry.random, BATCHES)
            return Fixed(layers, best_of_random(layers, judge, costs, target, *draws))
        start = None
        if entry.measured:
            start = first_logits(losses(layers, judge, BATCHES), costs, target)
        policy = replace(row.search, target=target)
        return Fliqs(layers, costs, policy, STEPS, row.seed, judge, start)
    uniform = layers.space.uniform(entry.uniform, entry.otherwise) if entry.uniform else None
    return Fixed(layers, uniform)


def _ended(
    method: Fixed | Fliqs | Csq,
    layers: Layers,
    costs: Costs,
    products: Mapping[str, float],
    entry: Entry,
) -> tuple[Ended, float]:
    """What there is when training has ended, and the bit operations of a picture."""
    if isinstance(method, Csq):
        packed = method.quantized()
        bits = {name: weight.segments[0].segment.format.bits for name, weight in packed.items()}
        inputs = Scheme.parse(entry.uniform).activation_bits
        schemes = {name: f"w{bit}a{inputs}" for name, bit in bits.items()}
        spent = method.mean_bits * inputs * sum(products.values())
        csq = {"schemes": schemes, "mean_bits": method.mean_bits}
        return Ended(csq, Found("csq", schemes, packed)), spent
    choice = method.final() if isinstance(method, Fliqs) else method.choice
    layers.choose(choice)
    if choice is None:
        return Ended({}, "nothing is quantized"), costs.whole or 0.0
    told: dict[str, Any] = {"schemes": _names(layers, choice)}
    told["entropy"] = method.figures().get("entropy")
    if layers.space.widths:
        widths = zip(layers.space.widths, choice[len(layers.space.numbers) :], strict=True)
        told["widths"] = {width.name: width.options[index] for width, index in widths}
    return Ended(told, Chosen(method.settings["method"], costs, choice)), costs.of(choice)


def _names(layers: Layers, choice: Choice) -> dict[str, str]:
    picked = zip(layers.space.numbers, choice)
    return {decision.name: decision.options[index].name for decision, index in picked}


def _as_shipped(
    trainable: Trainable, layers: Layers, ships: Found | Chosen | str, test: Pictures, right: Tensor
) -> dict[str, Any]:
    """The network as a checkpoint: its bytes, its accuracy there, and how many answers differ in
    being right from those of the network that was trained."""
    if isinstance(ships, str):
        return {"checkpoint": None, "why_none": ships}
    with tempfile.TemporaryDirectory(prefix=".out-", dir=folder()) as scratch:
        target = Path(scratch, "model")
        try:
            if isinstance(ships, Found):
                out, plan = write_trained(target, trainable, layers, ships)
            else:
                out, plan = write_choice(target, trainable, layers, ships)
        except SearchError as error:
            return {"checkpoint": None, "why_none": str(error)}
        with torch.no_grad():
            shipped = answers(load(out).model, test)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    figures = {
        "accuracy": float(shipped.float().mean()),
        "changed": int((shipped != right).sum()),
        "bytes": size,
        "planned_bytes": plan.bytes,
    }
    return {"checkpoint": figures}


if __name__ == "__main__":
    typer.run(main)
