"""Larger models trained on in low precision: SmolLM2 by distillation, and the `unified` bed.

    python -P -m quantlib.bench.trained_models smollm2            an hour on one core
    python -P -m quantlib.bench.trained_models unified
    python -P -m quantlib.bench.trained_models smollm2 --seeds 3  rows of seeds 0, 1, 2 that miss
    python -P -m quantlib.bench.trained_models smollm2 --quick    minutes: few steps, short test

Four rows each, of the same bit operations: all layers in one format and rounded to nearest, the
same format trained on, the formats that an exact solver chooses by measured losses trained on, and
FLIQS trained for as long. A model learns from its own full-precision self (SmolLM2) or from its
task (unified). A seed draws batches and choices; all seeds begin with the same model, so rounding
alone, which draws nothing, has one row (`bench.trained_seeds` compares them). Rows are kept in the
user's cache and in the result file, which is written after each, and made once; a run that was
stopped goes on. A machine whose cache is empty goes on where the result file is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from quantlib.bench import artifacts, assets, record
from quantlib.bench.beds import unified, unified_gates, unified_model
from quantlib.bench.beds.scenes import draw, fetch_digits, handwriting, normalised
from quantlib.bench.packages import console
from quantlib.bench.trained_seeds import UNDRAWN, compared, table
from quantlib.calibration.data import load_windows
from quantlib.checkpoint.disk import atomic_write_text, read_json
from quantlib.checkpoint.provenance import source_hash
from quantlib.errors import QuantlibError, UsageError
from quantlib.evaluation.judge import load_judge
from quantlib.evaluation.language import evaluate_language
from quantlib.models import skeleton
from quantlib.models.families import IMAGE_DECODER, IMAGE_ENCODER
from quantlib.models.rows import Weight
from quantlib.pipeline.opening import load_tokenizer
from quantlib.pipeline.train_search import distillation
from quantlib.pipeline.trained import Trainable
from quantlib.search.fliqs import Fixed, Fliqs, Settings
from quantlib.search.trained.costs import Costs, bops
from quantlib.search.trained.layers import Layers, Space, decisions
from quantlib.search.trained.loop import Judge, Loop, Outcome, Task, Training, judge_of
from quantlib.search.trained.measured import least_lost, losses
from quantlib.search.trained.numbers import space_of

METHODS = (UNDRAWN, "uniform", "exact", "fliqs")
BATCH, SEQLEN = 2, 64
TEST_WINDOWS, TEST_SEQLEN = 12, 256
QUICK_STEPS, QUICK_WINDOWS = 48, 4
DRAWS = 2
"""Choices that a step of a search judges beside the one that it trains."""
MEASURED_BATCHES = 4
"""That the exact solver judges every option on."""
SCENES = 16
"""Of each kind in a step of the unified bed."""


Prepared = tuple[Task, Callable[[Any], object], Callable[[Any], dict[str, Any]]]


@dataclass(frozen=True)
class Subject:
    """A model, what it learns from, and how it is judged.

    model:    its folder. uniform: the format of all layers; its cost is what FLIQS may spend.
    prepare:  (full-precision model, whether the test is to be short) -> (task, example that runs
              one sample, judge of a model).
    figures:  what methods are compared by, as far as rows have it.
    frozen:   components that stay as they are: the task does not run them.
    quick:    few steps and a short test: what it takes to see that all of it works.
    """

    name: str
    model: Callable[[], Path]
    space: str
    uniform: str
    training: Training
    prepare: Callable[[Any, bool], Prepared]
    figures: tuple[str, ...]
    frozen: tuple[str, ...] = field(default=())
    quick: bool = False

    def decided(self, weights: tuple[Weight, ...]) -> list[Weight]:
        """The weights that are searched over."""
        return [weight for weight in weights if weight.component not in self.frozen]

    @property
    def seed(self) -> int:
        """Of batches and choices."""
        return self.training.seed

    @property
    def label(self) -> str:
        """Its name in files."""
        return f"{self.name}_quick" if self.quick else self.name

    @property
    def result(self) -> str:
        """Name of its result file."""
        return f"search_trained_{self.label}"

    def place(self, method: str) -> str:
        """A row's name in files; that of seed 0 does not say its seed."""
        return f"{self.label}-{method}" + (f"-{self.seed}" if self.seed else "")

    def key(self, method: str) -> str:
        """sha256 over what a row depends on."""
        parts = [method, self.name, self.space, self.uniform, asdict(self.training), self.quick]
        parts += [asdict(self.search(0.0))] if method == "fliqs" else []
        parts += [MEASURED_BATCHES] if method == "exact" else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def search(self, target: float) -> Settings:
        """Of FLIQS: an eighth of the steps drawn uniformly, three eighths in the final formats."""
        steps = self.training.steps
        return Settings.short(target, steps // 8, steps * 3 // 8, DRAWS)

    def seeded(self, seed: int) -> Subject:
        """The same with other batches and choices."""
        return replace(self, training=replace(self.training, seed=seed))

    def quickly(self) -> Subject:
        """The same in minutes."""
        return replace(self, training=replace(self.training, steps=QUICK_STEPS), quick=True)


def _smollm2(teacher: Any, quick: bool) -> Prepared:
    tokenizer = load_tokenizer(assets.fetch_smollm2())
    train = load_windows(str(assets.wikipedia_text("calibration")), tokenizer, SEQLEN, 2048, 0)
    held_out = str(assets.wikipedia_text("held_out"))
    count = QUICK_WINDOWS if quick else TEST_WINDOWS
    test = load_windows(held_out, tokenizer, TEST_SEQLEN, count, 0)

    def judge(model: Any) -> dict[str, Any]:
        return dict(evaluate_language(model, test, teacher).to_json())

    return distillation(teacher, train, BATCH), lambda m: m(input_ids=train[:1]), judge


def _unified(_: Any, quick: bool) -> Prepared:
    digits, bed = fetch_digits(), unified.BED
    source, test = handwriting(digits, "train"), handwriting(digits, "test")
    reader = load_judge(bed.weights / "judge.safetensors")

    def losses(model: Any, generator: torch.Generator, count: int) -> torch.Tensor:
        seen = draw(source, count, generator, vary=True)
        batch = unified_model.questions_batch(seen, generator)
        answer = unified_model.answer_loss(model, normalised(seen.pixels), batch)
        asked = draw(source, count, generator, vary=True)
        kept = torch.zeros(count, dtype=torch.bool)
        codes = unified_model.image_codes(model, normalised(asked.pixels))
        prompts = unified_model.prompts(asked, kept)
        image, _ = unified_model.image_losses(model, prompts, codes, kept)
        return answer + image

    def task(model: nn.Module, _: int, generator: torch.Generator) -> Outcome:
        loss = losses(model, generator, SCENES)
        return Outcome(loss, -float(loss.detach()))

    def example(model: Any) -> object:
        return losses(model, torch.Generator().manual_seed(0), 1)

    def judge(model: Any) -> dict[str, Any]:
        if quick:
            with torch.no_grad():
                loss = losses(model.eval(), torch.Generator().manual_seed(1), 4 * SCENES)
            return {"loss": float(loss)}
        return unified_gates.as_json(unified_gates.measure(model.eval(), reader, test))

    return task, example, judge


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "smollm2",
            assets.fetch_smollm2,
            "w3g64a8,w4g64a8,w5g64a8,w6g64a8",
            "w4g64a8",
            Training(steps=300, rate=2e-5, warmup=15),
            _smollm2,
            ("kl", "nll", "same_top"),
        ),
        Subject(
            "unified",
            lambda: unified.BED.fetch() / "model",
            "int-xl",
            "w4a4",
            Training(steps=400, rate=2e-4, warmup=20),
            _unified,
            ("caption_digit", "answer_digit", "generation_digit", "loss"),
            (IMAGE_ENCODER, IMAGE_DECODER),
        ),
    )
}


def main(
    subject: Annotated[str, typer.Argument(help=f"One of {', '.join(SUBJECTS)}.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"Only this one, of {', '.join(METHODS)}. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    first: Annotated[int, typer.Option("--from", min=0, help="The first seed.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Few steps and a short test, in a result file of its own."),
    ] = False,
) -> None:
    """Make the rows that are missing, and write bench/results/search_trained_SUBJECT.json of all
    there are.

    Example: python -P -m quantlib.bench.trained_models smollm2 --method fliqs --seeds 3
    """
    try:
        if subject not in SUBJECTS or set(method or ()) - set(METHODS):
            raise UsageError(f"use one of {', '.join(SUBJECTS)}, and of {', '.join(METHODS)}")
        chosen = SUBJECTS[subject].quickly() if quick else SUBJECTS[subject]
        for seed in range(first, first + seeds):
            for name in method or METHODS:
                measured(_drawn(chosen, name, seed), name)
                path = report(chosen)
        print(table(read_json(path)["comparison"]))
        console.print(f"wrote {path.name}")
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


def _drawn(subject: Subject, method: str, seed: int) -> Subject:
    """The subject of a method's row of a seed: of what draws nothing always the first."""
    return subject.seeded(0 if method == UNDRAWN else seed)


def report(subject: Subject) -> Path:
    """Keep all rows that are there, and what they say of each other: the result file. A row of
    other settings stays until it is made anew, and is not compared."""
    written = _written(subject)
    seeds = sorted({row["seed"] for row in _cached(subject) + written})
    rows: list[dict[str, Any]] = []
    current: list[dict[str, Any]] = []
    for method, one in product(METHODS, map(subject.seeded, seeds)):
        kept = _kept(one, method)
        earlier = [row for row in written if _is_of(one, method, row)]
        current += [] if kept is None else [kept]
        rows += earlier[:1] if kept is None else [kept]
    policy = asdict(subject.search(0.0))
    del policy["target"]  # what the uniform format costs
    training = asdict(subject.training)
    del training["seed"]  # a row says its own
    settings = {**training, **{f"policy_{k}": v for k, v in policy.items()}}
    figures = compared(current, subject.figures)
    return record.write(subject.result, {"settings": settings, "comparison": figures, "rows": rows})


def folder() -> Path:
    """Where rows and states lie."""
    return artifacts.folder() / "trained-models"


def _row_file(subject: Subject, method: str) -> Path:
    return folder() / f"{subject.place(method)}.json"


def _state_file(subject: Subject, method: str) -> Path:
    """Where the state of a row's training lies."""
    return folder() / f"{subject.place(method)}-{subject.key(method)[:8]}.safetensors"


def _cached(subject: Subject) -> list[dict[str, Any]]:
    """The rows of all methods and seeds that lie in the cache. Raises CheckpointError when one is
    damaged."""
    return _rows([read_json(path) for path in sorted(folder().glob(f"{subject.label}-*.json"))])


def _written(subject: Subject) -> list[dict[str, Any]]:
    """The rows of the result file; none where there is no file. Raises CheckpointError when it is
    damaged: its rows would be lost by writing over it."""
    path = record.path_of(subject.result)
    return _rows(read_json(path)["rows"] if path.exists() else [])


def _rows(read: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are made today: those of seed 0 did not say their seed before 2026-11-24."""
    return [{**row, "seed": row.get("seed", 0)} for row in read]


def _is_of(subject: Subject, method: str, row: Mapping[str, Any]) -> bool:
    """Whether a row stands in this place."""
    return (row["method"], row["seed"]) == (method, subject.seed)


def _kept(subject: Subject, method: str) -> dict[str, Any] | None:
    """The row that was made before, None when there is none, or of other settings."""
    known, wanted = _cached(subject) + _written(subject), subject.key(method)
    return next((row for row in known if row.get("key") == wanted), None)


def measured(subject: Subject, method: str) -> dict[str, Any]:
    """The row's figures; made if they are not there."""
    kept = _kept(subject, method)
    if kept is not None:
        return kept
    console.print(f"Training {subject.name}, {method}, seed {subject.seed}")
    started, resumed = time.monotonic(), _state_file(subject, method).exists()
    found: dict[str, Any] = {"key": subject.key(method), **record.when_and_where()}
    found |= {"subject": subject.name, "method": method, "seed": subject.seed}
    found |= _measure(subject, method)
    found["seconds"] = None if resumed else round(time.monotonic() - started, 1)
    folder().mkdir(parents=True, exist_ok=True)
    atomic_write_text(_row_file(subject, method), json.dumps(found, indent=1) + "\n")
    return found


def _measure(subject: Subject, method: str) -> dict[str, Any]:
    trainable = Trainable.open(subject.model())
    teacher = skeleton.build(trainable.source)
    skeleton.materialize(teacher, "", trainable.source)
    task, example, judge = subject.prepare(teacher, subject.quick)
    rests = {w.name for w in trainable.model_map.weights if w.component in subject.frozen}
    for name, parameter in trainable.model.named_parameters():
        if name in rests:
            parameter.requires_grad_(False)
    decided = decisions(subject.decided(trainable.model_map.weights), space_of(subject.space))
    layers = Layers(trainable.model, Space(decided))
    products = layers.count_products(lambda: example(trainable.model))
    costs = bops(layers.space, products)
    judges = judge_of(trainable.model, task, subject.training)
    learner = _learner(subject, method, layers, costs, judges)
    if method != UNDRAWN:
        about = {"model": source_hash(trainable.source), "subject": subject.name}
        file = _state_file(subject, method)
        Loop(trainable.model, task, learner, subject.training, file, about, _show).run()
    choice = learner.final() if isinstance(learner, Fliqs) else learner.choice
    assert choice is not None  # nothing here stays in full precision
    layers.choose(choice)
    picked = zip(layers.space.numbers, choice)
    return {
        "bits_product": costs.of(choice) / sum(products.values()),
        "schemes": {d.name: d.options[i].name for d, i in picked},
        **judge(trainable.model.eval()),
    }


def _learner(
    subject: Subject, method: str, layers: Layers, costs: Costs, judge: Judge
) -> Fixed | Fliqs:
    """How formats are chosen, at the cost of the uniform one."""
    uniform, training = layers.space.uniform(subject.uniform), subject.training
    target = costs.of(uniform)
    if method == "fliqs":
        search = subject.search(target)
        return Fliqs(layers, costs, search, training.steps, training.seed, judge)
    if method == "exact":
        lost = losses(layers, judge, MEASURED_BATCHES)
        return Fixed(layers, least_lost(lost, costs, target))
    return Fixed(layers, uniform)


def _show(step: int, figures: Mapping[str, float]) -> None:
    """Says now and then how far it is."""
    if step % 20 == 0:
        told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        console.print(f"  {step}  {told}", style="dim", markup=False)


if __name__ == "__main__":
    typer.run(main)
