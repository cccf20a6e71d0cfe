"""The four commands of a bed of coloured-digit scenes: build, gates, train, release.

Committed weights (`weights/NAME/`: the model in float16, and the judge) become the bed's folder in
the cache with the handwriting of MNIST; training makes those weights, once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quantlib.bench import artifacts, record
from quantlib.bench.beds import unified_folder
from quantlib.bench.beds.scenes import Handwriting, fetch_digits, handwriting
from quantlib.bench.beds.unified_gates import Share, as_json, passed
from quantlib.bench.packages import console
from quantlib.errors import DataError, QuantlibError
from quantlib.evaluation.judge import Judge, load_judge

WEIGHTS = Path(__file__).parent / "weights"
JUDGE = "judge.safetensors"

Seed = Annotated[int, typer.Option(help="Of weights, order and augmentation.")]
Shorter = Annotated[
    int, typer.Option(min=1, help="Take a fraction of all steps: to see that it runs.")
]
Into = Annotated[Path | None, typer.Option(help="Folder of the stages, not the cache's.")]


@dataclass(frozen=True)
class Bed:
    """One bed.

    empty:   the model without trained weights.
    train:   (folder of the stages, handwriting, seed, divisor of all steps) -> trained model; it
             leaves JUDGE in the folder.
    measure: every figure of a model.
    guidance: that pictures are drawn with, told beside the figures.
    """

    name: str
    empty: Callable[[], Any]
    train: Callable[[Path, Path, int, int], Any]
    measure: Callable[[Any, Judge, Handwriting], dict[str, Share]]
    guidance: float

    @property
    def weights(self) -> Path:
        """Where its weights are committed."""
        return WEIGHTS / self.name

    def fetch(self) -> Path:
        """The bed's folder (`unified_folder` says what is in it), built at the first call.

        Raises DataError without committed weights, AssetUnavailable without the handwriting.
        """
        digits = fetch_digits()
        return artifacts.kept(
            self.name,
            lambda made, _: unified_folder.write_folder(checked(self.weights), digits, made),
        )

    def load(self, weights: Path) -> Any:
        """The model of a folder of weights, in float32."""
        model = self.empty()
        found = type(model).from_pretrained(checked(weights) / "model", dtype="float32")
        return found.eval()

    def stages(self, into: Path | None) -> Path:
        """Where training keeps its files."""
        return into or artifacts.folder() / f"{self.name}-training"

    def write_weights(self, model: Any, judge: Path, target: Path) -> None:
        """Write what `write_folder` takes into the new folder `target`, whole or not at all: the
        model rounded to float16, its processor, and a judge."""
        if target.exists():
            raise DataError(f"{target} exists: remove it, so that nothing old is left in it")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
            made = Path(scratch, target.name)
            copy = self.empty()
            copy.load_state_dict(model.state_dict())
            copy.half().save_pretrained(made / "model")
            unified_folder.save_processor(made / "model")
            shutil.copyfile(judge, made / JUDGE)
            made.rename(target)


def checked(weights: Path) -> Path:
    """A folder of weights. Raises DataError where it has none."""
    if not (weights / "model").is_dir() or not (weights / JUDGE).is_file():
        raise DataError(
            f"{weights} has no model/ and {JUDGE}: run the commands train and release of this bed, "
            "or take the repository's"
        )
    return weights


def commands(bed: Bed, about: str) -> typer.Typer:
    """The command line of a bed; `about` is its help."""
    app = typer.Typer(help=about, rich_markup_mode=None, no_args_is_help=True)

    @app.command()
    def build() -> None:
        """Write the bed's folder into the cache once, and print where it is."""
        print(bed.fetch())

    @app.command()
    def gates(
        weights: Annotated[
            Path | None, typer.Option(help=f"Folder with model/ and {JUDGE}.")
        ] = None,
        keep: Annotated[
            bool, typer.Option("--keep", help="Also write them to bench/results/.")
        ] = False,
    ) -> None:
        """Print every gate with its limit as JSON; fails when one does not hold."""
        given = checked(weights or bed.weights)
        test = handwriting(fetch_digits(), "test")
        shares = bed.measure(bed.load(given), load_judge(given / JUDGE), test)
        told = {"guidance": bed.guidance, **as_json(shares)}
        print(json.dumps(told, indent=1))
        if keep:
            record.write(f"bed_{bed.name}", told)
        if not passed(shares):
            raise typer.Exit(1)

    @app.command()
    def train(seed: Seed = 0, steps_divided_by: Shorter = 1, into: Into = None) -> None:
        """Train all stages (an hour on one core), or go on with them."""
        bed.train(bed.stages(into), fetch_digits(), seed, steps_divided_by)

    @app.command()
    def release(
        seed: Seed = 0,
        steps_divided_by: Shorter = 1,
        into: Into = None,
        target: Annotated[Path | None, typer.Option(help="New folder for the weights.")] = None,
    ) -> None:
        """Write the trained model and judge as weights to commit; finishes training first."""
        stages = bed.stages(into)
        model = bed.train(stages, fetch_digits(), seed, steps_divided_by)
        bed.write_weights(model, stages / JUDGE, target or bed.weights)
        print(target or bed.weights)

    return app


def run(app: typer.Typer) -> None:
    """Run a command; what goes wrong is a sentence."""
    try:
        app()
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise SystemExit(error.exit_code) from error
