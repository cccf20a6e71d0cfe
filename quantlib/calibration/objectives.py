"""What a sample's output is asked: which of its numbers count, and what the truth is.

One objective serves all stages. Called with a generator it is a `streams.Loss`, of labels sampled
from the model itself, whose gradients say what an error costs (`losses.py`). `truth` is the loss on
the labels that the data has: a task's full-precision value. `divergence` is what calibration
predicts, measured: of what one model says from what the other says, KL for distributions, half the
squared error over the mean square for vectors; both in the units of the sampled loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from quantlib.calibration.losses import LossSum, sampled_tokens, sampled_vectors
from quantlib.errors import ModelError

Read = Callable[[Any], Tensor]
"""Of an output, the tensor that counts."""


class Objective(Protocol):
    """Of one sample; outputs are those of the sample's run."""

    def __call__(self, output: Any, generator: torch.Generator) -> LossSum: ...

    def said(self, output: Any) -> Tensor:
        """What counts of an output, float32 [terms, size]: all that `divergence` needs of it."""
        ...

    def truth(self, output: Any) -> LossSum:
        """The loss on what is true, where the data says what that is."""
        ...

    def divergence(self, reference: Tensor, mine: Tensor) -> LossSum:
        """Of `said` from the reference's, summed over terms."""
        ...


@dataclass(frozen=True)
class TokenObjective:
    """Predictions of tokens (words, image codes).

    where:  bool [positions], of the flattened logits: those that count; None: all.
    labels: int64 [terms], the true tokens there; None where the data has none: then the model's own
            likeliest ones, so that the loss is how unsure it is.
    read:   logits [..., V] of an output.
    """

    where: Tensor | None = None
    labels: Tensor | None = None
    read: Read = attrgetter("logits")

    def __call__(self, output: Any, generator: torch.Generator) -> LossSum:
        """Negative log-likelihood of sampled tokens (`losses.sampled_tokens`)."""
        return sampled_tokens(self.read(output), generator, self.where)

    def said(self, output: Any) -> Tensor:
        """Logits [terms, V]. Raises ModelError when they are inf or nan."""
        logits = self.read(output)
        chosen = logits.reshape(-1, logits.shape[-1])
        return _finite(chosen if self.where is None else chosen[self.where.reshape(-1)])

    def truth(self, output: Any) -> LossSum:
        """Negative log-likelihood of the labels, nats."""
        said = self.said(output)
        labels = said.argmax(-1) if self.labels is None else self.labels
        value = torch.nn.functional.cross_entropy(said, labels, reduction="sum")
        return LossSum(value, len(said))

    def divergence(self, reference: Tensor, mine: Tensor) -> LossSum:
        """KL(reference || mine), nats."""
        theirs, ours = reference.log_softmax(-1), mine.log_softmax(-1)
        p = theirs.exp()
        terms = (p * (theirs - ours)).masked_fill_(p == 0, 0.0)
        return LossSum(terms.sum(dtype=torch.float64), len(mine))


@dataclass(frozen=True)
class VectorObjective:
    """Numbers: vectors of an encoder, pixels of a decoder.

    read:   [..., size] of an output. target: what they should be, of the same shape; None where
            nobody knows: then the loss is that of saying zero, the unit of relative errors.
    """

    read: Read
    target: Tensor | None = None

    def __call__(self, output: Any, generator: torch.Generator) -> LossSum:
        """Of vectors sampled around the model's own (`losses.sampled_vectors`)."""
        return sampled_vectors(self.read(output), generator)

    def said(self, output: Any) -> Tensor:
        """The vectors [terms, size]. Raises ModelError when they are inf or nan."""
        vectors = self.read(output)
        return _finite(vectors.reshape(-1, vectors.shape[-1]))

    def truth(self, output: Any) -> LossSum:
        """Half the squared error over the mean square of what was said."""
        said = self.said(output)
        target = torch.zeros_like(said) if self.target is None else self.target
        return self.divergence(said, target.reshape(said.shape).float())

    def divergence(self, reference: Tensor, mine: Tensor) -> LossSum:
        """Half the squared error over the mean square of the reference."""
        scale = float(reference.detach().square().mean(dtype=torch.float64)) or 1.0
        error = (reference - mine).square().sum(dtype=torch.float64)
        return LossSum(0.5 * error / scale, len(mine))


def _finite(values: Tensor) -> Tensor:
    values = values.float()
    if not bool(torch.isfinite(values).all()):
        raise ModelError("the model's output is inf or nan on a sample")
    return values
