"""Models that are calibrated as a whole: which they are, what of them is kept, and their records.

A language model is taken apart and fed windows of text. A model of several parts, or one that
writes no text, is run as it is, on records of all that it does (`calibration.paths`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from quantlib.calibration.data import load_text
from quantlib.calibration.paths import find, known
from quantlib.calibration.paths.route import Routes
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.paths.workload import (
    Workload,
    divide,
    keep_options,
    require_reached,
    text_records,
)
from quantlib.calibration.records import TEXT, is_records, read_records
from quantlib.errors import ModelError, UsageError
from quantlib.formats.scheme import KEPT as KEPT_FORMATS
from quantlib.models.families import EMBEDDINGS, HEAD
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.recipe import Recipe
from quantlib.transforms.tables import crosses

KEPT = "kept by request"


def mapped(source: Source, recipe: Recipe) -> ModelMap:
    """The map of a source, with everything kept that nothing reads, or that the recipe keeps.

    Raises ModelError as `ModelMap.from_source`, UsageError for a pattern that matches nothing.
    """
    model_map = ModelMap.from_source(source)
    routes = find(source.model_type)
    reasons = routes.unread(source.config, model_map) if routes is not None else {}
    for pattern, reason in reasons.items():
        names = [w.name for w in model_map.weights if fnmatchcase(w.name, pattern)]
        model_map = model_map.keeping_weights(names, reason)
    return _keeping(model_map, recipe.keep)


def _keeping(model_map: ModelMap, patterns: Sequence[str]) -> ModelMap:
    """With the weights kept whose name, or whose component's, matches a pattern."""
    chosen: dict[str, None] = {}
    for pattern in patterns:
        names = [
            weight.name
            for weight in model_map.weights
            if fnmatchcase(weight.component, pattern) or fnmatchcase(weight.name, pattern)
        ]
        if not names:
            components = dict.fromkeys(weight.component for weight in model_map.weights)
            raise UsageError(
                f"--keep {pattern} matches no weight and no component: the components are "
                f"{', '.join(components)}"
            )
        chosen |= dict.fromkeys(names)
    kept = model_map.keeping_weights(chosen, KEPT)
    if not kept.weights:
        raise UsageError(f"--keep {' --keep '.join(patterns)} leaves nothing to quantize")
    return kept


def unreached_by_text(model_map: ModelMap) -> list[str]:
    """Components with weights that text does not run through: towers, projectors, generation
    heads, of models that have more than a language model."""
    if not model_map.stacks:
        return []
    language = {row.component for name in model_map.blocks for row in model_map.weights_in(name)}
    reached = language | {EMBEDDINGS, HEAD}
    return list(dict.fromkeys(w.component for w in model_map.weights if w.component not in reached))


def is_whole(model_map: ModelMap, recipe: Recipe) -> bool:
    """Whether this model is calibrated as a whole: it continues no text, or has parts beside its
    language model that are to be quantized, or there are records of more than text."""
    routes = find(model_map.model_type)
    writes = routes is None or any(route.stream == TEXT for route in routes.routes)
    return not writes or is_records(recipe.data) or bool(unreached_by_text(model_map))


def check_blockwise(recipe: Recipe) -> None:
    """Raise UsageError for what is only done to models that are run as a whole."""
    if recipe.weighting not in (None, "token"):
        raise UsageError(
            f"weighting={recipe.weighting!r} is for models that are calibrated on records: of a "
            "language model every token counts by its own gradient"
        )
    if recipe.leaves_weights:
        named = ", ".join(name for name in recipe.schemes if name in KEPT_FORMATS)
        raise UsageError(
            f"{named} among the candidates is for models of several parts: of a language model, "
            "name what is to stay as it is with --keep"
        )


def check_whole(recipe: Recipe, model_type: str) -> None:
    """Raise UsageError for what is only done to language models; of a model that writes down what
    it hears, all residual streams are known, so it can be rotated, too."""
    asked = {
        "a rotation": recipe.rotation != "none" and not crosses(model_type),
        "swaps": recipe.swaps > 0,
        "scores without gradients": not recipe.gradients,
        "a KV cache of mean bits": recipe.kv_bits is not None,
        "mixing the rows of linears (rows)": recipe.rows,
    }
    wrong = [what for what, is_asked in asked.items() if is_asked]
    if wrong:
        raise UsageError(
            f"{wrong[0]} is for models that are a language model and nothing else: leave it out, "
            "or keep the other parts and calibrate on text"
        )
    if recipe.refine:
        check_refined_whole(recipe)


def check_refined_whole(recipe: Recipe) -> None:
    """Raise UsageError for what is not known while a model that is run as a whole is rounded
    again."""
    asked = {
        "learned rounding (learning)": recipe.learning > 0,
        "a KV cache by modality (kv)": bool(recipe.kv_modalities),
        "operators in integers (nonlinear)": recipe.nonlinear is not None,
    }
    wrong = [what for what, is_asked in asked.items() if is_asked]
    if wrong:
        raise UsageError(
            f"re-rounding (refine) of a model that is run as a whole knows nothing of {wrong[0]}: "
            "leave out one of the two"
        )


def routes_of(source: Source, model_map: ModelMap) -> Routes:
    """What this model does. Raises ModelError where nobody has said so."""
    routes = find(source.model_type)
    if routes is not None:
        return routes
    unreached = unreached_by_text(model_map)
    advice = ""
    if unreached:
        advice = (
            f", or keep its other parts with {keep_options(unreached)} and calibrate on plain text"
        )
    raise ModelError(
        f"quantlib does not know how records run through a model of type {source.model_type!r} "
        f"(it knows {', '.join(known())}): add its routes to quantlib/calibration/paths{advice}"
    )


def read_workload(source: Source, model_map: ModelMap, recipe: Recipe) -> Workload:
    """The records of a run, checked. Raises a QuantlibError for anything wrong with them, or with
    the files beside the model that turn them into inputs."""
    routes = routes_of(source, model_map)
    tools = Tools(source.path, source.config, recipe.seqlen)
    if is_records(recipe.data):
        records = read_records(recipe.data)
    else:
        records = text_records(load_text(recipe.data), recipe.seqlen)
    workload = divide(
        routes,
        tools,
        records,
        components={weight.component for weight in model_map.weights},
        samples=recipe.windows,
        held_back=recipe.probe_windows,
        seed=recipe.seed,
    )
    require_reached(model_map, routes, workload)
    workload.check()
    return workload
