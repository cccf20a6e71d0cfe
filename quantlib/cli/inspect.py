"""`quantlib inspect`: what a model is made of, and what compressing it would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import answers, facts, notes, print_json, table
from quantlib.cli.options import OTHER, Debug, Download, Json, Model, Preset
from quantlib.errors import QuantlibError

if TYPE_CHECKING:
    from quantlib.models.components import Component, KeptTensors
    from quantlib.models.modelmap import ModelMap
    from quantlib.models.source import Source
    from quantlib.pipeline.estimate import Estimate
    from quantlib.pipeline.shares import Shares


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
    """Show what a model is made of: bytes, bits, and what is left as it is, part by part.

    Of a model to compress also what would be quantized, and the time, memory and disk it would
    take; of a checkpoint what each part is predicted to lose, and whose calibration data decided
    how it was rounded (shares of tokens, and of their weight), if its work directory (OUT.work) is
    still there. Only the config and the headers of the weight files are read.

    Examples:
        quantlib inspect path/to/model
        quantlib inspect path/to/model --coverage
        quantlib inspect OUT
        quantlib inspect HuggingFaceTB/SmolLM2-135M-Instruct --download --json
    """
    from quantlib.checkpoint.contents import is_packed

    if is_packed(model):
        _inspect_packed(model, coverage, json)
        return
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


def _inspect_packed(path: str, coverage: bool, json: bool) -> None:
    """The component table of a checkpoint of ours."""
    from quantlib.checkpoint.contents import contents
    from quantlib.checkpoint.reader import read_layout
    from quantlib.cli import surroundings
    from quantlib.pipeline.beside import component_decisions
    from quantlib.pipeline.shares import Shares
    from quantlib.search.budget import format_size

    checkpoint = read_layout(path)
    found = contents(checkpoint)
    model_map = found.model_map
    losses, why = _losses(path)
    decided = component_decisions(Path(path))
    if json:
        components = [
            {
                **asdict(row),
                "predicted_losses": losses.get(row.name, {}),
                "shares": asdict(decided.get(row.name, Shares())),
            }
            for row in found.components
        ]
        print_json(
            {
                "model": path,
                "model_type": model_map.model_type,
                "architecture": model_map.architecture,
                "packed": True,
                "parameters": model_map.parameters,
                "file_bytes": found.file_bytes,
                "header_bytes": found.header_bytes,
                "bits": found.bits,
                "components": components,
                "beside": [asdict(row) for row in found.beside],
                "schemes": {name: str(scheme) for name, scheme in checkpoint.schemes.items()},
                **surroundings.described(checkpoint.around),
            }
        )
        return
    console = answers()
    total = f"{found.file_bytes:,} bytes ({format_size(found.file_bytes)})"
    console.print(
        facts(
            [
                ("checkpoint", path),
                ("architecture", f"{model_map.architecture} ({model_map.model_type})"),
                ("parameters", f"{model_map.parameters:,}"),
                ("weight files", f"{total}, of which headers {format_size(found.header_bytes)}"),
                ("bits per parameter", f"{found.bits:.3f}, everything counted"),
                *surroundings.rows(checkpoint.around),
            ]
        )
    )
    console.print()
    print_components(found.components, found.beside)
    _print_losses(losses, why)
    _print_shares(decided)
    if coverage:
        rows = [
            (row.name, str(checkpoint.schemes[row.name]), "×".join(map(str, row.shape)))
            for row in model_map.weights
        ]
        console.print(table("weight", "scheme", "shape", rows=rows))
        console.print()


def _losses(path: str) -> tuple[dict[str, dict[str, float]], str]:
    """Component -> task -> what it is predicted to lose, of a checkpoint; where that is not known
    here, {} and the reason."""
    from quantlib.pipeline.beside import component_losses

    try:
        return component_losses(Path(path)), ""
    except QuantlibError as error:
        return {}, str(error)


def _print_losses(losses: Mapping[str, Mapping[str, float]], why: str) -> None:
    from quantlib.search.sensitivity import unit_of

    if not losses:
        notes().print(
            f"what each part is predicted to lose is not known here: {why}",
            style="dim",
            markup=False,
        )
        return
    tasks = list(next(iter(losses.values())))
    several = len(tasks) > 1
    total = {task: sum(row[task] for row in losses.values()) for task in tasks}
    rows = [
        (name, *(f"{100 * row[task]:.3g} %" if several else f"{row[task]:.3g}" for task in tasks))
        for name, row in {**losses, "all": total}.items()
    ]
    unit = "relative to full precision" if several else unit_of(tasks[0])
    console = answers()
    console.print(table(f"predicted to lose ({unit})", *tasks, rows=rows))
    console.print()


def _print_shares(decided: Mapping[str, Shares]) -> None:
    """Whose data decided, where several kinds of it did."""
    rows = [
        (component, by, name, f"{100 * share.tokens:.1f} %", f"{100 * share.weight:.1f} %")
        for component, shares in decided.items()
        for by, found in (("stream", shares.streams), ("modality", shares.modalities))
        if len(found) > 1
        for name, share in found.items()
    ]
    if rows:
        console = answers()
        columns = ("rounded for", "by", "whose data", "of the tokens", "of the weight")
        console.print(table(*columns, rows=rows, numbers_from=3))
        console.print()


def _described(source: Source, model_map: ModelMap, estimate: Estimate) -> dict[str, Any]:
    """The answer as JSON."""
    from quantlib.models.components import component_table

    return {
        "model": str(source.path),
        "model_type": model_map.model_type,
        "architecture": model_map.architecture,
        "packed": False,
        "generic": model_map.generic,
        "fingerprint": model_map.fingerprint,
        "parameters": model_map.parameters,
        "file_bytes": source.file_bytes,
        "blocks": len(model_map.blocks),
        "components": [asdict(row) for row in component_table(model_map)],
        "coverage": [asdict(row) for row in model_map.coverage()],
        "groups": [asdict(row) for row in model_map.groups],
        "estimate": {**asdict(estimate), "disk_bytes": estimate.disk_bytes},
    }


def print_components(components: Sequence[Component], beside: Sequence[KeptTensors] = ()) -> None:
    """The component table, and below it what is left as it is: reasons, bytes and names."""
    from quantlib.models.components import by_reason
    from quantlib.search.budget import format_size

    console = answers()
    packed = any(row.schemes for row in components)
    rows = []
    for row in components:
        sizes = [format_size(row.before)] if packed else []
        sizes.append(format_size(row.bytes))
        counted = f"{row.parameters:,}", *sizes, f"{row.share:.1%}", f"{row.bits:.2f}"
        to_quantize = f"{row.quantized / row.parameters:.1%}"
        what = _shares(row.schemes) if packed else to_quantize
        rows.append((row.name, *counted, format_size(row.kept_bytes), what))
    stored = ("before", "after") if packed else ("bytes",)
    last = "schemes, by parameters" if packed else "to quantize"
    columns = ("component", "parameters", *stored, "share", "bits", "kept as it is", last)
    console.print(table(*columns, rows=rows, numbers_to=len(columns) - packed))
    console.print()
    kept = [
        (name, row.reason, f"{row.count}", format_size(row.bytes), row.dtype, row.name)
        for name, group in [*((c.name, c.kept) for c in components), ("-", tuple(beside))]
        for row in by_reason(group)
    ]
    details = ("kept as it is", "why", "tensors", "bytes", "as", "names")
    console.print(table(*details, rows=kept, numbers_from=2, numbers_to=5))
    console.print()


def _shares(schemes: Mapping[str, int]) -> str:
    """`w4g64 71%, w8g64 29%`; the largest three, and how many more."""
    total = sum(schemes.values()) or 1
    shares = [f"{scheme} {count / total:.0%}" for scheme, count in schemes.items()]
    more = [f"{len(shares) - 3} more"] if len(shares) > 3 else []
    return ", ".join([*shares[:3], *more])


def _print(source: Source, model_map: ModelMap, coverage: bool) -> None:
    from quantlib.models.components import component_table
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
    print_components(component_table(model_map))
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
