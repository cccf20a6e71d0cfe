"""`quantlib inspect`: what a model is made of, and what compressing it would take."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import answers, facts, print_json, table
from quantlib.cli.options import OTHER, Debug, Download, Json, Model, Preset

if TYPE_CHECKING:
    from quantlib.models.modelmap import ModelMap
    from quantlib.models.source import Source
    from quantlib.pipeline.estimate import Estimate


def inspect(
    model: Model,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage", help="List every parameter and what becomes of it.", rich_help_panel=OTHER
        ),
    ] = False,
    preset: Preset = None,
    download: Download = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's parts, what would be quantized, and the time, memory and disk it would take.

    Only the config and the headers of the weight files are read.

    Examples:
        quantlib inspect path/to/model
        quantlib inspect path/to/model --coverage
        quantlib inspect HuggingFaceTB/SmolLM2-135M-Instruct --download --json
    """
    from quantlib.models.modelmap import ModelMap
    from quantlib.models.source import Source
    from quantlib.pipeline.estimate import for_recipe
    from quantlib.pipeline.plan import Budget, sizes_only
    from quantlib.pipeline.run import candidates
    from quantlib.recipe import Recipe

    source = Source.open(model, allow_download=download)
    model_map = ModelMap.from_source(source)
    recipe = Recipe.create(data="any text", preset=preset)
    estimate = for_recipe(model_map, recipe)
    problem = sizes_only(model_map, candidates(model_map, recipe), Budget())
    smallest = problem.bytes(problem.smallest())
    largest = problem.fixed_bytes + sum(
        max(choice.bytes for choice in item.choices) for item in problem.items
    )
    if json:
        described = _described(source, model_map, estimate)
        described |= {"preset": recipe.preset, "smallest_bytes": smallest, "largest_bytes": largest}
        print_json(described)
        return
    _print(source, model_map, coverage)
    _print_outlook(model_map, estimate, recipe.preset, smallest, largest)


def _described(source: Source, model_map: ModelMap, estimate: Estimate) -> dict[str, Any]:
    """The answer as JSON."""
    return {
        "model": str(source.path),
        "model_type": model_map.model_type,
        "architecture": model_map.architecture,
        "generic": model_map.generic,
        "fingerprint": model_map.fingerprint,
        "parameters": model_map.parameters,
        "file_bytes": source.file_bytes,
        "blocks": len(model_map.blocks),
        "components": [asdict(row) for row in model_map.components()],
        "coverage": [asdict(row) for row in model_map.coverage()],
        "groups": [asdict(row) for row in model_map.groups],
        "estimate": {**asdict(estimate), "disk_bytes": estimate.disk_bytes},
    }


def _print(source: Source, model_map: ModelMap, coverage: bool) -> None:
    from quantlib.search.budget import format_size

    console = answers()
    known = "no table for this type: derived from its module" if model_map.generic else "known"
    console.print(
        facts(
            [
                ("model", str(source.path)),
                ("architecture", f"{model_map.architecture} ({model_map.model_type}, {known})"),
                ("parameters", f"{model_map.parameters:,}"),
                ("weight files", f"{source.file_bytes:,} bytes ({format_size(source.file_bytes)})"),
            ]
        )
    )
    console.print()
    components = [
        (row.name, f"{row.parameters:,}", format_size(row.bytes), f"{row.share:.1%}")
        for row in model_map.components()
    ]
    console.print(table("component", "parameters", "bytes", "share", rows=components))
    console.print()
    rows = model_map.coverage()
    if coverage:
        every = [
            (row.name, row.role, row.group, "×".join(map(str, row.shape)), format_size(row.bytes))
            for row in rows
        ]
        console.print(
            table("parameter", "what becomes of it", "group", "shape", "bytes", rows=every)
        )
    else:
        roles: dict[str, list[int]] = {}
        for row in rows:
            counts = roles.setdefault(row.role, [0, 0, 0])
            for index, value in enumerate((1, row.parameters, row.bytes)):
                counts[index] += value
        summary = [(role, f"{n:,}", f"{p:,}", format_size(b)) for role, (n, p, b) in roles.items()]
        console.print(table("what becomes of it", "tensors", "parameters", "bytes", rows=summary))
    console.print()


def _print_outlook(
    model_map: ModelMap, estimate: Estimate, preset: str, smallest: int, largest: int
) -> None:
    from quantlib.search.budget import format_size, true_bits

    def sized(nbytes: int) -> str:
        return f"{format_size(nbytes)} ({true_bits(nbytes, model_map.parameters):.2f} bits)"

    groups = f"{len(model_map.groups)} linear groups of {len(model_map.weights)} weights"
    answers().print(
        facts(
            [
                ("to quantize", f"{groups} in {len(model_map.blocks)} blocks and outside"),
                ("kept as they are", f"{len(model_map.kept)} tensors"),
                ("possible sizes", f"{sized(smallest)} to {sized(largest)}"),
                (f"preset {preset}", f"takes {estimate}"),
            ]
        )
    )
