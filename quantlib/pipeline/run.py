"""What every stage of a run shares: the source, its map, the work directory, the recipe, and where
progress goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quantlib.calibration.data import load_windows
from quantlib.checkpoint.bank import LayerBank
from quantlib.checkpoint.provenance import digest, source_hash
from quantlib.checkpoint.workdir import WorkDir
from quantlib.errors import UsageError
from quantlib.formats.composite import has_room
from quantlib.formats.scheme import KEPT, Scheme
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source
from quantlib.pipeline.plan import TASK
from quantlib.recipe import Recipe
from quantlib.search.latency import LatencyCosts

if TYPE_CHECKING:
    from quantlib.calibration.paths.workload import Workload


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, stage: str, total: int) -> None: ...

    def tick(self, message: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...


class Silent:
    """Progress for the Python API and tests: says nothing."""

    def start(self, stage: str, total: int) -> None: ...

    def tick(self, message: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...


@dataclass
class Run:
    """One model, one recipe, one work directory.

    costs:       what the candidates take on this machine, where the request limits a latency.
    orders:      weight -> the order int64 [K] in which it is packed, and reads its input; weights
                 that are left out keep their columns' order.
    extra_bytes: of what the checkpoint holds beside weights and kept parameters: bases, orders.
    workload:    records by stream, of a model that is calibrated as a whole (`whole.py`); None for
                 language models, which are calibrated block by block on windows of text.
    """

    source: Source
    model_map: ModelMap
    work: WorkDir
    recipe: Recipe
    tokenizer: Any
    progress: Progress = field(default_factory=Silent)
    seconds: dict[str, float] = field(default_factory=dict)
    costs: LatencyCosts | None = None
    orders: Mapping[str, Tensor] = field(default_factory=dict)
    extra_bytes: int = 0
    workload: Workload | None = None
    _stream_hashes: dict[tuple[str, bool], str] = field(default_factory=dict, repr=False)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What losses are predicted of: KL on text, or every stream's own loss."""
        return (TASK,) if self.workload is None else self.workload.tasks

    @property
    def streams(self) -> Workload:
        """The workload. Raises UsageError where there is none: an option that needs one."""
        if self.workload is None:
            raise UsageError("this run has windows of text and no streams of records")
        return self.workload

    @cached_property
    def bank(self) -> LayerBank:
        return LayerBank(self.work)

    @cached_property
    def source_hash(self) -> str:
        """Which model this is, weights included (`provenance.source_hash`)."""
        return source_hash(self.source)

    @cached_property
    def all_windows(self) -> Tensor:
        """Calibration and probe windows, int64 [windows + probe_windows, seqlen], all different."""
        return read_windows(self.recipe, self.tokenizer)

    @property
    def windows(self) -> Tensor:
        """The windows statistics are taken on; interleaved with the probes' so that both span the
        whole text."""
        return self.all_windows[self._is_calibration]

    @property
    def probe_windows(self) -> Tensor:
        """Windows held back from statistics, on which probes are measured."""
        return self.all_windows[~self._is_calibration]

    @cached_property
    def _is_calibration(self) -> Tensor:
        count, probes = len(self.all_windows), self.recipe.probe_windows
        held_back = torch.linspace(0, count - 1, probes).round().long()
        mask = torch.ones(count, dtype=torch.bool)
        mask[held_back] = False
        return mask

    @cached_property
    def data_hash(self) -> str:
        """Hash of the token ids that calibration sees; of records, those held back included: their
        losses weigh the streams."""
        if self.workload is not None:
            names = self.workload.tasks
            return digest([[self.stream_hash(n), self.stream_hash(n, True)] for n in names])
        return digest([list(self.windows.shape), self.windows.flatten().tolist()])

    @cached_property
    def candidates(self) -> dict[str, tuple[Scheme, ...]]:
        """Weight -> its candidate schemes."""
        return {
            name: tuple(map(Scheme.parse, schemes))
            for name, schemes in candidates(self.model_map, self.recipe).items()
        }

    def stream_hash(self, name: str, held_back: bool = False) -> str:
        """Everything the statistics of one stream depend on, or, of its held-back records, what is
        measured on them."""
        if (name, held_back) not in self._stream_hashes:  # every picture is read for it
            work, recipe = self.streams, self.recipe
            used = [work.held_back] if held_back else [work.calibration, work.reserve]
            described = [work.described(name, records[name]) for records in used]
            watched = [[group.name, *group.members] for group in self.model_map.groups]
            how = [recipe.seed, recipe.stream_weighting, recipe.expert_tokens, STATISTICS_VERSION]
            found = digest([self.source_hash, described, [] if held_back else [how, watched]])
            self._stream_hashes[name, held_back] = found
        return self._stream_hashes[name, held_back]

    @cached_property
    def statistics_hash(self) -> str:
        """Everything the statistics depend on."""
        recipe = self.recipe
        return digest(
            [self.source_hash, self.data_hash, recipe.seed, recipe.gradients, STATISTICS_VERSION]
        )

    @property
    def damping(self) -> float:
        """Of every Hessian, as a fraction of its mean diagonal."""
        return self.recipe.damping_of(streams=self.workload is not None)

    @cached_property
    def rounding_hash(self) -> str:
        """Everything a bank entry depends on, besides the weight and the scheme."""
        return digest([self.statistics_hash, self.damping, self.recipe.passes, ROUNDING_VERSION])

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Progress]:
        """Progress and timing of one stage."""
        started = time.monotonic()
        self.progress.start(name, total)
        try:
            yield self.progress
        finally:
            self.progress.finish()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def candidates(model_map: ModelMap, recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Weight -> names of its candidate schemes, as the recipe has them for its kind.

    Members of a group have the same; left out are those that have more factors, dimensions or
    blocks than one of them has room for, and to stay as they are in another type than theirs.
    """
    found = {}
    for group in model_map.groups:
        members = model_map.members(group)
        sizes = [(w.parameters // w.in_features, w.in_features) for w in members]
        windows = [w.tensor_shape[2:] for w in members]
        stored = {KEPT_AS.get(weight.dtype, "") for weight in members}
        for weight in members:
            found[weight.name] = tuple(
                name
                for name in recipe.candidates(weight.kind)
                if {name} == stored or name not in KEPT
                if all(map(has_room, repeat(Scheme.parse(name)), sizes, windows))
            )
            if not found[weight.name]:
                raise UsageError(
                    f"{weight.name} is too small for all of its candidates: name one without "
                    "factors and blocks of rows, such as w4g64"
                )
    return {weight.name: found[weight.name] for weight in model_map.weights}


def read_windows(recipe: Recipe, tokenizer: Any) -> Tensor:
    """All windows of a recipe. Raises DataError when the text is missing, empty or too short."""
    wanted = recipe.windows + recipe.probe_windows
    return load_windows(recipe.data, tokenizer, recipe.seqlen, wanted, recipe.seed)


KEPT_AS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}
"""Types of parameters in files -> the schemes that leave them so."""
STATISTICS_VERSION = 1
"""Raise when the meaning of the statistics changes: old work directories then calibrate again."""
ROUNDING_VERSION = 3
"""Raise when rounding changes: old banks are then rounded again."""
