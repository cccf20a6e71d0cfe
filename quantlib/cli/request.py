"""From options to what the pipeline takes: a budget, and the fields of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.pipeline.plan import Budget
    from quantlib.search.latency import LatencyBudget


def recipe_fields(
    file: Path | None,
    *,
    data: str | None,
    preset: str | None,
    fast: bool,
    schemes: list[str] | None,
    seqlen: int | None,
    windows: int | None,
    seed: int | None,
    refine: bool | None = None,
    learning: int | None = None,
    rows: bool | None = None,
    latency: list[str] | None = None,
    method: str | None = None,
    activations: float | None = None,
    kv: str | None = None,
    rotation: str | None = None,
    weighting: str | None = None,
    keep: list[str] | None = None,
    nonlinear: str | None = None,
) -> dict[str, Any]:
    """The fields that were given, those of the recipe file first; `data` is among them.

    A relative path to the data in a recipe file counts from the file's folder.
    """
    from quantlib.recipe import method_fields, read_fields

    if fast and preset not in (None, "fast"):
        raise UsageError(f"--fast and --preset {preset} contradict each other: give one of them")
    fields = read_fields(file) if file is not None else {}
    if file is not None and _is_relative_path(fields.get("data"), file):
        fields["data"] = str(file.parent / fields["data"])
    options = {
        "data": data,
        "preset": "fast" if fast else preset,
        "schemes": split_schemes(schemes),
        "seqlen": seqlen,
        "windows": windows,
        "seed": seed,
        "refine": refine,
        "learning": learning,
        "rows": rows,
        "latency": tuple(latency) if latency else None,
        "weighting": weighting,
        "keep": tuple(keep) if keep else None,
    }
    if method is not None:
        fields |= method_fields(method, activations)
    options |= {**kv_fields(kv), "rotation": rotation, "nonlinear": nonlinear}
    fields |= {name: value for name, value in options.items() if value is not None}
    if not isinstance(fields.get("data"), str):
        raise UsageError(
            "calibration needs data: add --data TEXT (a file, .jsonl, a folder of .txt files, or "
            "hub:name), or a .jsonl file of records for a model of several parts"
        )
    return fields


def kv_fields(kv: str | None) -> dict[str, Any]:
    """--kv as fields of a recipe: one format for all tokens, or one for each kind of them, with
    "+static" behind those whose scales are known beforehand. Raises UsageError when a kind is named
    twice, and for another word behind the plus."""
    from quantlib.recipe import kv_name

    if kv is None or "=" not in kv:
        return {"kv": kv_name(kv)}
    formats: dict[str, str | None] = {}
    static: list[str] = []
    for part in kv.split(","):
        kind, _, name = (text.strip() for text in part.partition("="))
        name, plus, how = (text.strip() for text in name.partition("+"))
        if kind in formats:
            raise UsageError(f"--kv {kv} gives two formats to one kind of token: give each one")
        if plus and how != "static":
            raise UsageError(
                f"--kv {kv}: what can stand behind the plus is static, a scale for every place in "
                f"an image that is known beforehand, not {how!r}"
            )
        formats[kind] = kv_name(name)
        static += [kind] if plus else []
    known = {"kv_static": tuple(static)} if static else {}
    return {"kv": "f32", "kv_modalities": formats, **known}


def _is_relative_path(data: Any, file: Path) -> bool:
    return isinstance(data, str) and (file.parent / data).exists()


def split_schemes(given: list[str] | None) -> tuple[str, ...] | None:
    """`--schemes a,b --schemes c` as (a, b, c); None when there is no such option."""
    if not given:
        return None
    return tuple(name.strip() for text in given for name in text.split(",") if name.strip())


def budget_of(
    size: str | None,
    bits: float | None,
    engine: str = "quantlib",
    floor: list[str] | None = None,
    ceiling: list[str] | None = None,
    pin: list[str] | None = None,
    latency: LatencyBudget | None = None,
    activations: float | None = None,
    component_size: list[str] | None = None,
    task_weights: list[str] | None = None,
    balance: str | None = None,
) -> Budget:
    """The budgets, the rules and the objective of a command line."""
    from quantlib.pipeline.plan import Budget
    from quantlib.search.latency import LatencyBudget
    from quantlib.search.tasks import Objective

    floors, ceilings, pins = (tuple(given or ()) for given in (floor, ceiling, pin))
    latency = latency or LatencyBudget()
    components = tuple(component_size or ())
    objective = Objective.parse(task_weights or (), balance)
    return Budget(
        size, bits, engine, floors, ceilings, pins, latency, activations, components, objective
    )


def latency_of(texts: Iterable[str] | None, threads: int | None, mode: str | None) -> LatencyBudget:
    """The latencies of a command line. Raises UsageError for one that is malformed, and for options
    that go with a latency where there is none."""
    from quantlib.search.latency import LatencyBudget

    latency = LatencyBudget(tuple(texts or ()), threads, mode)
    latency.parsed()
    if not latency and (threads is not None or mode is not None):
        option = "--threads" if threads is not None else "--mode"
        raise UsageError(f"{option} says what a latency is for: add --latency, such as 12ms")
    return latency


def quiet_transformers() -> None:
    """Keep transformers' own bars and notes out of ours; errors still come as exceptions."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
