"""What one model says about samples whose truth is given: run once, one entry a sample.

The reference is observed first and leaves log-probabilities behind (`Spool`); the model is then
observed on the same samples, prepared once, and compared on the way. Both are never in memory
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.objectives import TokenObjective, VectorObjective
from quantlib.calibration.paths.route import Route, objective
from quantlib.calibration.streams import Sample
from quantlib.errors import ModelError
from quantlib.evaluation.figures import TokenScores
from quantlib.evaluation.spool import Spool
from quantlib.evaluation.tokens import kl_sum, nll_sum, same_top_sum

KEPT_BYTES = 4 << 30
"""Of log-probabilities that are kept of one route: what comes after is not compared."""
POSITIONS_AT_ONCE = 256
"""Of log-probabilities that are worked on: bounds what a large vocabulary takes."""

Tick = Callable[[], None]
"""Called after every sample."""


@dataclass
class Observed:
    """One model on all samples of one route.

    scores:  of what is predicted as tokens. said: its log-probabilities, if they were to be kept.
    vectors: of what is predicted as numbers, as the route reads them, one tensor a sample.
    """

    scores: TokenScores = field(default_factory=TokenScores)
    said: Spool | None = None
    vectors: list[Tensor] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Samples that were observed."""
        return len(self.scores.terms) or len(self.vectors)


@torch.no_grad()
def observe(
    model: Any,
    route: Route,
    samples: Sequence[Sample],
    reference: Observed | None = None,
    keep: bool = False,
    tick: Tick = lambda: None,
) -> Observed:
    """Run `samples` of `route`.

    reference: what another model said of the same samples: adds KL and agreement.
    keep:      keep log-probabilities, because this is the reference; it ends with the sample that
               fills `KEPT_BYTES`.
    Raises ModelError for logits or vectors that are inf or nan, or of another size.
    """
    found = Observed(said=Spool() if keep else None)
    for index, sample in enumerate(samples):
        asked = objective(sample)
        output = route.run(model, **sample.inputs)
        if isinstance(asked, VectorObjective):
            found.vectors.append(_finite(asked.read(output).float().cpu(), route.stream, index))
        elif isinstance(asked, TokenObjective):
            said = _finite(asked.said(output), route.stream, index).float().cpu()
            theirs = None if reference is None else reference.said
            logprobs = said.log_softmax(-1)
            _score(found.scores, logprobs, asked.labels, None if theirs is None else theirs[index])
            if found.said is not None:
                found.said.add(logprobs)
        tick()
        if found.said is not None and found.said.nbytes >= KEPT_BYTES:
            break
    return found


def _score(
    scores: TokenScores, logprobs: Tensor, labels: Tensor | None, reference: Tensor | None
) -> None:
    """Append one sample's sums. Without labels the likelihood is that of the reference's (or its
    own) likeliest tokens: how sure the model is of them."""
    if reference is not None and reference.shape != logprobs.shape:
        raise ModelError(
            f"the model says {tuple(logprobs.shape)} numbers where the reference says "
            f"{tuple(reference.shape)}: they cannot be compared; give the model it was made from"
        )
    if labels is None:
        labels = (logprobs if reference is None else reference).argmax(-1)
    labels = labels.reshape(-1).cpu()
    scores.terms.append(float(len(logprobs)))
    scores.nll.append(nll_sum(logprobs, labels))
    scores.hits.append(float((logprobs.argmax(-1) == labels).sum()))
    if reference is None:
        return
    parts = list(zip(reference.split(POSITIONS_AT_ONCE), logprobs.split(POSITIONS_AT_ONCE)))
    scores.kl.append(sum(kl_sum(theirs, ours) for theirs, ours in parts))
    scores.same_top.append(float(sum(same_top_sum(theirs, ours) for theirs, ours in parts)))


def _finite(values: Tensor, stream: str, index: int) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"what the model says of sample {index} of stream {stream} is inf or nan: its weights "
            "or its precision are broken"
        )
    return values
