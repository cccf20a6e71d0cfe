"""`quantlib train-search`: a language model's formats and weights, found in one training run.

The full-precision model teaches its own low-precision copy (distillation on text: the KL of their
next-token distributions), while FLIQS learns which formats the layers should have. Needs the model
twice in memory in float32, its gradients and moments: it is for models that can be trained here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlib.calibration.data import load_windows, windows_sha256
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.checkpoint.provenance import digest, source_hash
from quantlib.checkpoint.writer import check_output
from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.models import skeleton
from quantlib.models.source import Source
from quantlib.pipeline.narrowed import Chosen, hidden_width, order_channels, write_choice
from quantlib.pipeline.opening import load_tokenizer
from quantlib.pipeline.run import Progress, Silent
from quantlib.pipeline.trained import Trainable
from quantlib.search.fliqs import Fliqs, Settings
from quantlib.search.latency import Latency
from quantlib.search.plan import Plan
from quantlib.search.trained.costs import FULL_BITS, Costs, bops, milliseconds
from quantlib.search.trained.layers import Layers, Space, decisions
from quantlib.search.trained.loop import Judge, Loop, Outcome, Report, Task, Training, judge_of
from quantlib.search.trained.measured import START_RATE, first_logits, losses
from quantlib.search.trained.numbers import space_of

STATE_FILE, LOSSES_FILE = "training.safetensors", "measured.json"
_BITS = re.compile(r"(?P<weights>\d+(?:\.\d+)?)x(?P<inputs>\d+(?:\.\d+)?)")
_SHARE = re.compile(r"(?P<share>\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Request:
    """What is asked of a training run.

    data:    as `load_windows` takes it. cost: "4x8", "12.5%" (of 16-bit operations) or a latency
             ("12ms", "prefill=90ms@512": of the products alone).
    space:   of candidates (`numbers.space_of`). shared: what gets one decision (`layers.SHARED`).
    steps, rate, seed, autocast: of the training; delay, settle: of the search, parts of the steps.
    draws:   choices that a step of the search judges beside the one that it trains.
    measured: batches on which every option of every decision is judged alone before training, for
             the search to begin with; 0: it begins undecided, and draws uniformly at first.
    widths:  shares of the MLPs' hidden channels to choose from, too; none: all of them stay.
    batch, seqlen, windows: of the text.
    rest:    scheme of the weights that nothing is decided about.
    """

    data: str
    cost: str
    space: str = "int-l"
    shared: str = "group"
    steps: int = 300
    rate: float = 2e-5
    delay: float = 0.1
    settle: float = 0.4
    draws: int = 2
    measured: int = 0
    widths: tuple[float, ...] = ()
    batch: int = 2
    seqlen: int = 64
    windows: int = 512
    seed: int = 0
    rest: str = "w8g64"
    autocast: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if not (self.delay >= 0 and self.settle >= 0 and self.delay + self.settle < 1):
            raise UsageError(
                f"shares of {self.delay:g} and {self.settle:g} of the steps, before and after the "
                "search, leave it none: give less than 1 together"
            )
        if self.widths and (
            "ms" in self.cost or any(option.scheme.high for option in space_of(self.space))
        ):
            raise UsageError(
                "widths are searched beside formats of whole layers, at a cost in bit operations: "
                "leave out --widths, or wider columns and milliseconds"
            )
        if self.measured and self.widths:
            raise UsageError(
                "a search that begins with measured losses is one of formats alone: leave out "
                "--widths or --measured"
            )
        if self.measured < 0:
            raise UsageError(f"{self.measured} batches to measure on: give 0 (none) or more")
        if min(self.batch, self.steps, self.windows) < 1:
            raise UsageError("steps, batch and windows are whole numbers from 1")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise UsageError(f"a learning rate of {self.rate}: give a number above 0, such as 2e-5")
        Scheme.parse(self.rest)

    def search(self, target: float) -> Settings:
        """The settings of the search for a target in the unit of its costs."""
        delay, settle = int(self.delay * self.steps), int(self.settle * self.steps)
        if self.measured:
            return replace(Settings.short(target, 0, settle, self.draws), rate=START_RATE)
        return Settings.short(target, delay, settle, self.draws)

    @property
    def training(self) -> Training:
        return Training(
            self.steps, self.rate, self.steps // 20, seed=self.seed, autocast=self.autocast
        )


@dataclass(frozen=True)
class Result:
    """A finished training run: its checkpoint and plan, and what it cost by `costs`."""

    path: Path
    plan: Plan
    cost: float
    target: float
    costs: Costs


def train_search(
    model: str | Path,
    out: str | Path,
    request: Request,
    *,
    work: Path | None = None,
    overwrite: bool = False,
    download: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train, and write the packed checkpoint to `out`; a run that was stopped goes on.

    work: the folder of its state, OUT.work unless said.
    Raises UsageError for what cannot be asked, SearchError for a cost out of reach (it says the
    range), for a state of other settings, and for training that diverges.
    """
    progress = progress or Silent()
    options = space_of(request.space)
    source = Source.open(model, allow_download=download)
    windows = load_windows(
        request.data, load_tokenizer(source.path), request.seqlen, request.windows, request.seed
    )
    about = {"model": source_hash(source), "data": windows_sha256(windows), "rest": request.rest}
    identity = digest([about, {**asdict(request), "data": None, "threads": None}])
    check_output(out, overwrite, identity)
    trainable = Trainable.open(source.path)
    numbers = decisions(trainable.model_map.weights, options, request.shared)
    widths = (hidden_width(trainable, request.widths),) if request.widths else ()
    layers = Layers(trainable.model, Space(numbers, widths))
    costs, target = priced(trainable.model, layers, windows, request)
    costs.check_target(target)
    _put_in_order(trainable.model, layers, windows[: request.batch])
    teacher = skeleton.build(source)
    skeleton.materialize(teacher, "", source)
    state = (work or Path(f"{out}.work")) / STATE_FILE
    task = distillation(teacher, windows, request.batch)
    judge = judge_of(trainable.model, task, request.training)
    start = None
    if request.measured:
        table = _measured(layers, judge, request, state.with_name(LOSSES_FILE), identity, progress)
        start = first_logits(table, costs, target)
    search = Fliqs(layers, costs, request.search(target), request.steps, request.seed, judge, start)
    progress.start("train", request.steps)
    try:
        Loop(
            trainable.model, task, search, request.training, state, about, _told(progress, costs)
        ).run()
    finally:
        progress.finish()
    choice = search.final()
    found = Chosen("fliqs", costs, choice, target)
    path, plan = write_choice(out, trainable, layers, found, request.rest, identity, overwrite)
    return Result(path, plan, costs.of(choice), target, costs)


def _measured(
    layers: Layers, judge: Judge, request: Request, file: Path, identity: str, progress: Progress
) -> list[list[float]]:
    """What every option loses alone, measured once for a run: kept in `file`."""
    kept = read_json(file) if file.exists() else {}
    if kept.get("identity") == identity:
        return [[float(lost) for lost in row] for row in kept["losses"]]
    progress.start("measure", len(layers.space.names))
    try:
        table = losses(layers, judge, request.measured, progress.tick)
    finally:
        progress.finish()
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps({"identity": identity, "losses": table}) + "\n")
    return table


def _put_in_order(model: nn.Module, layers: Layers, ids: Tensor) -> None:
    """Columns where some can be wider, hidden channels where some can be left out."""
    if any(o.scheme.high for decision in layers.space.numbers for o in decision.options):
        layers.order_columns(lambda: model(input_ids=ids))
    for width in layers.space.widths:
        order_channels(layers, width, lambda: model(input_ids=ids))


def priced(
    model: nn.Module, layers: Layers, windows: Tensor, request: Request
) -> tuple[Costs, float]:
    """The costs of the layers in the unit that the request limits, and its limit.

    Bit operations are those of one window. Raises UsageError for a cost that is none.
    """
    bits, share = _BITS.fullmatch(request.cost.strip()), _SHARE.fullmatch(request.cost.strip())
    if bits is None and share is None:
        try:
            latency = Latency.parse(request.cost)
        except UsageError as error:
            raise UsageError(
                f"{request.cost!r} is not a cost: write for example 4x8 (bits of weights times "
                "bits of inputs, on average), 12.5% (of what 16-bit numbers cost), or 12ms (of the "
                "products of a decoded token)"
            ) from error
        tokens = 1 if latency.phase == "decode" else latency.tokens
        threads = request.threads or torch.get_num_threads()
        return milliseconds(layers.space, layers.shapes(), tokens, threads), latency.ms
    layers.choose(None)
    products = layers.count_products(lambda: model(input_ids=windows[:1]))
    costs, total = bops(layers.space, products), sum(products.values())
    if bits is not None:
        return costs, float(bits["weights"]) * float(bits["inputs"]) * total
    assert share is not None
    return costs, float(share["share"]) / 100 * FULL_BITS * total


def distillation(teacher: nn.Module, windows: Tensor, batch: int) -> Task:
    """KL(teacher || model) over the next tokens of random windows [n, T], in nats; its negative is
    the quality."""

    def task(model: nn.Module, _: int, generator: torch.Generator) -> Outcome:
        ids = windows[torch.randint(0, len(windows), (batch,), generator=generator)]
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits
        return Outcome.of_divergence(wanted, model(input_ids=ids).logits)

    return task


def _told(progress: Progress, costs: Costs) -> Report:
    def tell(_: int, figures: Mapping[str, float]) -> None:
        progress.tick(f"KL {-figures['quality']:.4f}, cost {costs.text(figures['cost'])}")

    return tell
