"""A route: one way data goes through a family's models, as data.

A family has a route for everything its models do: continue a text, answer about a picture, write a
picture, decode one. A route names the stream (and the task) it makes, the kinds of records it
reads, and the components that run; what turns a record into a sample is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.calibration.objectives import Objective
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import Record
from quantlib.calibration.streams import Run, Sample, call
from quantlib.models.modelmap import ModelMap

ANSWER, HEARING = "answer", "hearing"
"""Streams whose samples end with words that the model writes: about a picture (of Whisper: about a
sound), and about a sound in models that do both."""
MakeSample = Callable[[Tools, Any, Record], Sample]
"""(tools, the full-precision model, record) -> sample, whose loss is an `Objective`. The model is
asked for what only it can tell: the codes of a picture. Raises DataError for unfit media."""
Check = Callable[[Tools, Record], None]
"""What can be known to be wrong with a record before there is a model. Raises DataError."""


def nothing(_: Tools, __: Record) -> None:
    """There is nothing to check."""


@dataclass(frozen=True)
class Route:
    """One stream of a family.

    stream:     its name, which is that of its task too.
    kinds:      of the records it reads.
    reaches:    components that run, and on which its loss depends.
    sample:     what makes a sample of a record. check: what is looked at before.
    run:        how a sample runs.
    modalities: what the language model's tokens are, if samples say so.
    """

    stream: str
    kinds: tuple[str, ...]
    reaches: tuple[str, ...]
    sample: MakeSample
    check: Check = nothing
    run: Run = call
    modalities: tuple[str, ...] = ()


Unread = Callable[[Mapping[str, Any], ModelMap], dict[str, str]]
"""(config, map) -> fnmatch pattern of weights -> why no loss can depend on them."""


def all_read(_: Mapping[str, Any], __: ModelMap) -> dict[str, str]:
    """Every weight is on some route."""
    return {}


@dataclass(frozen=True)
class Routes:
    """What models of these types do, and what of them never runs."""

    model_types: tuple[str, ...]
    routes: tuple[Route, ...]
    unread: Unread = all_read


def objective(sample: Sample) -> Objective:
    """The objective of a sample that a route made."""
    found: Any = sample.loss
    asked: Objective = found
    return asked
