"""What a run decides around the weights of a model that reads or writes images: formats of its KV
cache by modality, scales of it that are known beforehand, and layers that compute in integers.

All of it is found by running the full-precision model on calibration records, once per work
directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from quantlib.calibration.paths import find
from quantlib.calibration.records import QUESTION
from quantlib.checkpoint.cache_formats import CacheFormats, Place, place_of, tensor_name
from quantlib.checkpoint.provenance import digest
from quantlib.checkpoint.tensorfile import read_tensors, tensor_content
from quantlib.errors import UsageError
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.nonlinear import Operator
from quantlib.kernels.nonlinear.operators import describe
from quantlib.kernels.nonlinear.rule import Rule
from quantlib.models import skeleton
from quantlib.models.modality import MODALITIES, Modality
from quantlib.models.source import Source
from quantlib.pipeline.parts import whole_model
from quantlib.pipeline.run import Run
from quantlib.recipe import Recipe
from quantlib.runtime.modality_hooks import decoder_of, image_token_of
from quantlib.runtime.nonlinear_fit import nonlinear_operators
from quantlib.runtime.static_scales import static_scales
from quantlib.transforms.tables import crosses

OPERATORS, SCALES = "nonlinear", "scales"
VERSION = 1
"""Raise when operators or scales come out differently: they are then found again."""
SAMPLES = 16
"""Of each stream, that the model is run on."""
_STREAMS = {"image_input": ("answer",), "image_output": ("image",)}
"""Those in which images are read, and written."""


def integer_operators(run: Run) -> dict[str, Operator]:
    """Layer -> what it computes in integers, as the recipe's `nonlinear` asks for.

    Raises UsageError for a model whose records run through no encoder, DataError when none does.
    """
    if run.recipe.nonlinear is None:
        return {}
    rule = Rule.parse(run.recipe.nonlinear)
    key = _key(run, OPERATORS, [str(rule)])
    if not run.work.has(key):
        found = _operators(run, rule)
        described = {name: operator.to_json() for name, operator in found.items()}
        run.work.commit(key, OPERATORS, {}, {"operators": described})
    values = run.work.unit(key).values["operators"]
    operators = {name: Operator.parse(given) for name, given in values.items()}
    counts = ", ".join(f"{count} {name}" for name, count in describe(operators).items())
    run.progress.say(f"in integers: {counts or 'nothing is good enough'}")
    return operators


def _operators(run: Run, rule: Rule) -> dict[str, Operator]:
    if run.workload is None:
        raise UsageError(
            "nonlinear is for encoders of images and sound, and this run has only text: give "
            "records with images or sound, or leave it out"
        )
    with run.stage("integers", 1) as progress:
        model: Any = whole_model(run)
        found = nonlinear_operators(model, _runs(run, model, run.tasks), rule)
        progress.tick(str(rule))
    return found


def check_caches(source: Source, recipe: Recipe) -> None:
    """Raise for a KV cache that this model cannot have, before anything is run: ModelError where it
    caches nothing of this kind, UsageError for kinds of tokens that it does not have or that have
    no fixed places, FormatError for formats that its heads do not fit."""
    named = _formats(recipe)
    if not named:
        return
    model: Any = skeleton.build(source)
    config: Any = decoder_of(model).config
    have = _kinds(source.model_type)
    for modality, form in named.items():
        if modality not in have:
            raise UsageError(
                f"--kv {modality}={form}: a model of type {source.model_type} has no such tokens; "
                f"its cache holds {', '.join(have)}"
            )
        heads = int(getattr(config, "head_dim", 0) or 0)
        heads = heads or int(config.hidden_size) // int(config.num_attention_heads)
        form.key.check(heads)
        form.value.check(heads)
    if recipe.kv_static:
        _image_tokens(model.config)


def _kinds(model_type: str) -> list[Modality]:
    """What the tokens of such a model can be."""
    routes = find(model_type)
    streams = {route.stream: route.kinds for route in routes.routes} if routes is not None else {}
    found: list[Modality] = ["text"]
    if QUESTION in streams.get("answer", ()):
        found.append("image_input")
    if "image" in streams:
        found.append("image_output")
    return found


def _formats(recipe: Recipe) -> dict[Modality, KvFormat]:
    """By modality, in their order; one format of a model of several parts is that of text, which
    the others then share."""
    named = recipe.kv_modalities or ({"text": recipe.kv} if recipe.kv != "f32" else {})
    return {m: KvFormat.parse(named[m]) for m in MODALITIES if m in named}


def cache_formats(run: Run) -> CacheFormats | None:
    """Formats of the KV cache by modality, where the recipe has such, or has one format for a model
    of several parts; scales are named if they are known beforehand (`cache_scales`).

    Raises ModelError for a model without such a cache.
    """
    whole = run.workload is not None and not crosses(run.source.model_type)
    if not whole and not run.recipe.kv_modalities:
        return None
    formats = _formats(run.recipe)
    if not formats:
        return None
    model: Any = skeleton.build(run.source)
    decoder_of(model)
    return CacheFormats(formats, image_token_of(model.config), frozenset(cache_scales(run)))


def cache_scales(run: Run) -> dict[str, Tensor]:
    """Tensors of scales that are known beforehand, as the recipe's `kv_static` asks for, by their
    names in a checkpoint. Raises UsageError for models whose images have no fixed places."""
    if not run.recipe.kv_static:
        return {}
    wanted = [run.recipe.kv_modalities, list(run.recipe.kv_static)]
    key = _key(run, SCALES, wanted)
    if not run.work.has(key):
        found = {tensor_name(place): meta for place, meta in _scales(run).items()}
        file = f"{SCALES}/{key[:12]}.safetensors"
        run.work.commit(key, SCALES, {file: tensor_content(found)}, {})
    tensors = read_tensors(run.work.file(key))
    for name in tensors:
        place_of(name)
    return tensors


def _scales(run: Run) -> dict[Place, Tensor]:
    if run.workload is None:
        raise UsageError(
            "kv_static is for tokens of images, and this run has only text: give records with "
            "images, or leave it out"
        )
    formats = _formats(run.recipe)
    found: dict[Place, Tensor] = {}
    with run.stage("scales", len(run.recipe.kv_static)) as progress:
        model: Any = whole_model(run)
        places, token = _image_tokens(model.config), image_token_of(model.config)
        for modality in run.recipe.kv_static:
            streams = [task for task in run.tasks if task in _STREAMS[modality]]
            runs = _runs(run, model, streams)
            found |= static_scales(model, runs, formats, modality, places, token)
            progress.tick(modality)
    return found


def _image_tokens(config: Any) -> int:
    """How many tokens every image has. Raises UsageError where that depends on the image."""
    for owner, name in (("vision_config", "num_image_tokens"), ("", "mm_tokens_per_image")):
        found = getattr(getattr(config, owner, None) if owner else config, name, None)
        if isinstance(found, int):
            return found
    raise UsageError(
        f"images of a model of type {config.model_type!r} have no fixed number of tokens, and "
        "kv_static needs a scale for each: leave it out"
    )


def _runs(run: Run, model: Any, tasks: Sequence[str]) -> list[Callable[[], Any]]:
    """What runs the model on calibration records of these streams."""
    return [
        partial(run.streams.route(task).run, model, **sample.inputs)
        for task in tasks
        for sample in islice(iter(run.streams.stream(task, model).samples), SAMPLES)
    ]


def _key(run: Run, kind: str, wanted: Sequence[Any]) -> str:
    return run.work.key(kind, inputs=digest([run.source_hash, run.data_hash, *wanted, VERSION]))
