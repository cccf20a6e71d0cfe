"""Opening a run: everything that can be wrong with a request is found before a folder is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantlib.calibration.paths.workload import Workload
from quantlib.checkpoint.workdir import WorkDir
from quantlib.errors import CheckpointError, DataError, ModelError, UsageError
from quantlib.kernels.kv_format import KvFormat
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline import workfiles
from quantlib.pipeline.caches import check_bits
from quantlib.pipeline.inputs import check_inputs
from quantlib.pipeline.latency import costs_for
from quantlib.pipeline.modalities import check_caches
from quantlib.pipeline.plan import Budget, check_request
from quantlib.pipeline.rotate import check_rotatable, check_rounded, rotated
from quantlib.pipeline.run import Progress, Run, Silent, candidates, read_windows
from quantlib.pipeline.whole import check_blockwise, check_whole, is_whole, mapped, read_workload
from quantlib.recipe import Recipe
from quantlib.search.latency import LatencyCosts
from quantlib.transforms.binding import wire
from quantlib.transforms.tables import crosses, find


@dataclass(frozen=True)
class Inputs:
    """What a run is made from: the model, its map, the recipe (with all candidates), its tokenizer,
    the windows of text or the records of all streams, and what everything would cost in time, where
    a latency is limited."""

    source: Source
    model_map: ModelMap
    recipe: Recipe
    tokenizer: Any
    windows: Tensor | None
    workload: Workload | None
    costs: LatencyCosts | None


def load_inputs(
    model: str | Path,
    recipe: Recipe,
    *,
    budget: Budget | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Inputs:
    """Read what a run needs, without writing anything but timings into the user's cache.

    budget: checked to be possible. Raises a QuantlibError for anything wrong with the model, its
    tokenizer, the data, or the budget.
    """
    source = Source.open(model, allow_download=download)
    model_map = mapped(source, recipe)
    whole = is_whole(model_map, recipe)
    recipe = recipe.for_streams() if whole else recipe
    check_whole(recipe, source.model_type) if whole else check_blockwise(recipe)
    check_rotatable(source, recipe)
    if whole and recipe.rotation != "none":
        check_rounded(source, model_map)
    check_inputs(model_map, candidates(model_map, recipe))
    by_modality = whole and not crosses(source.model_type)
    if by_modality or recipe.kv_modalities:
        check_caches(source, recipe)
    else:
        _check_cache(source, recipe)
    costs = None
    if budget is not None:
        budget.rules(), budget.in_bytes(model_map)  # before anything is timed
        schemes = candidates(model_map, recipe)
        said = progress or Silent()
        costs = costs_for(model_map, source.path, schemes, budget.latency, said, recipe)
        check_request(model_map, schemes, budget, costs)
    if whole:
        workload = read_workload(source, model_map, recipe)
        return Inputs(source, model_map, recipe, None, None, workload, costs)
    tokenizer = load_tokenizer(source.path)
    _check_length(source, recipe)
    windows = read_windows(recipe, tokenizer)
    _check_vocabulary(source, model_map, windows)
    return Inputs(source, model_map, recipe, tokenizer, windows, None, costs)


def _check_cache(source: Source, recipe: Recipe) -> None:
    """Raise for a KV cache that this model cannot have: ModelError where quantlib does not know its
    attentions, UsageError for mean bits and FormatError for formats that its heads do not fit."""
    if recipe.kv == "f32":
        return
    if find(source.model_type) is None:
        raise ModelError(
            f"quantlib does not know the attentions of a model of type {source.model_type}, so it "
            "cannot round keys and values: leave out --kv, or add its wiring to "
            "quantlib/transforms/tables.py"
        )
    attentions = wire(skeleton.build(source)).attentions
    if recipe.kv_bits is not None:
        check_bits(attentions, recipe.kv_bits)
        return
    kv = KvFormat.parse(recipe.kv)
    for head_dim in sorted({attention.head_dim for attention in attentions}):
        kv.key.check(head_dim)
        kv.value.check(head_dim)


def _check_length(source: Source, recipe: Recipe) -> None:
    """Raise UsageError for windows that are longer than any text the model was made for."""
    config = source.config.get("text_config") or source.config
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and recipe.seqlen > longest:
        raise UsageError(
            f"windows of {recipe.seqlen} tokens do not fit {source.path}, whose longest text has "
            f"{longest}: use --seqlen {longest} or less"
        )


def _check_vocabulary(source: Source, model_map: ModelMap, windows: Tensor) -> None:
    """Raise DataError when the tokenizer makes tokens that the embedding does not have."""
    sizes = [w.out_features for w in model_map.weights if w.kind == "embedding"]
    largest = int(windows.max())
    if sizes and largest >= min(sizes):
        raise DataError(
            f"the tokenizer in {source.path} does not belong to its weights: it gives token "
            f"{largest}, and the embedding has {min(sizes)} rows; fetch both again"
        )


@contextmanager
def open_run(
    model: str | Path,
    work: str | Path,
    recipe: Recipe,
    *,
    budget: Budget | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """A run on a locked work directory.

    budget: checked to be possible. Raises a QuantlibError for anything wrong with the model, its
    tokenizer, the data or the budget before the folder is made, and then for the folder.
    """
    inputs = load_inputs(model, recipe, budget=budget, download=download, progress=progress)
    with WorkDir.open(work) as workdir:
        workfiles.claim_folder(workdir.path, inputs.source, inputs.model_map)
        said = progress or Silent()
        run = Run(inputs.source, inputs.model_map, workdir, inputs.recipe, inputs.tokenizer, said)
        run.workload, run.costs = inputs.workload, inputs.costs
        if inputs.windows is not None:
            run.all_windows = inputs.windows
        yield run


@contextmanager
def reopen_run(
    work: str | Path,
    *,
    model: str | Path | None = None,
    with_data: bool = False,
    reading: bool = False,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """The run that measured a work directory, from the files it left there.

    model:     where the model lies now; where it was measured, by default.
    with_data: read the calibration text too, and check that it is still the same.
    reading:   only read, beside the process that has the work directory open.
    """
    known, recipe = workfiles.load_model(work), workfiles.load_recipe(work)
    table = workfiles.load_table(work, known.model_map)
    source = Source.open(model or known.path)
    whole = is_whole(known.model_map, recipe)
    workload = None
    if whole and (with_data or _is_made_from_records(recipe)):
        workload = read_workload(source, known.model_map, recipe)
    tokenizer = None if whole else load_tokenizer(source.path)
    with WorkDir.view(work) if reading else WorkDir.open(work) as workdir:
        run = Run(source, known.model_map, workdir, recipe, tokenizer, progress or Silent())
        run.workload = workload
        run = rotated(run)
        made_from = table.provenance
        if run.source_hash != made_from.get("source"):
            raise CheckpointError(
                f"{source.path} is not the model that was measured in {work}: its files differ. "
                "Give that model with --model, or measure this one in another work directory"
            )
        if not with_data:
            run.rounding_hash = made_from.get("bank", "")
            run.statistics_hash = made_from.get("statistics", "")
        elif run.rounding_hash != made_from.get("bank"):
            raise CheckpointError(
                f"the calibration text {recipe.data} is not the one that was measured in {work}: "
                "restore it, or apply the plan without --refine"
            )
        yield run


def _is_made_from_records(recipe: Recipe) -> bool:
    """Whether a checkpoint has more from its records than rounded weights: bases, caches by what
    the records hold, scales, integer operators."""
    caches = recipe.kv != "f32" or bool(recipe.kv_modalities)
    return caches or recipe.rotation != "none" or recipe.nonlinear is not None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer beside a model. Raises DataError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many types here, for one reason
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} has no usable tokenizer ({reason}): put the model's tokenizer.json and "
            "tokenizer_config.json beside its weights"
        ) from error
