"""What whole-model calibration is given, and what it leaves: streams, and statistics by stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.losses import LossSum
from quantlib.calibration.statistics import EmbeddingStatistics, GroupStatistics
from quantlib.errors import DataError
from quantlib.models.listing import some

Run = Callable[..., Any]
"""`run(model, **inputs)` -> output: one of the ways data goes through the model."""
Loss = Callable[[Any, torch.Generator], LossSum]
"""Of an output (see `losses`)."""


def call(model: nn.Module, **inputs: Any) -> Any:
    """The model's own forward."""
    return model(**inputs)


@dataclass(frozen=True)
class Sample:
    """One window, image, clip or batch of them: arguments of the stream's `run`, and the loss.

    modality: int64 [tokens], of every token that the language model reads (of all rows of a batch),
              its modality as an index into `Stream.modalities`.
    """

    inputs: Mapping[str, Any]
    loss: Loss
    modality: Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """Samples that go through the model in one way.

    weight:     what one term of its loss counts beside those of other streams.
    reserve:    further samples, run one by one while an expert of a mixture has seen too few
                tokens.
    modalities: names of what its samples mix (words and image vectors), if they say which is which.
    """

    name: str
    samples: Iterable[Sample]
    run: Run = call
    weight: float = 1.0
    modalities: tuple[str, ...] = ()
    reserve: Iterable[Sample] = ()


@dataclass
class StreamStatistics:
    """What one stream, or several summed, tell.

    terms, samples: of the loss (tokens, vectors, pixels), and of the stream. A group's loss per
                    term is its loss per token of its own, times its tokens / terms.
    groups:         of all linears, experts and convolutions; matrices without a token are empty.
    embeddings:     of embeddings and heads, by the name of their group; means are per term.
    ran:            groups that were called, whether or not the loss depends on them.
    modalities, modality: names, and int64 [tokens] of every token of the language model, in order.
    """

    name: str
    terms: int
    samples: int
    groups: dict[str, GroupStatistics]
    embeddings: dict[str, EmbeddingStatistics]
    ran: frozenset[str]
    modalities: tuple[str, ...] = ()
    modality: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def unseen(self, expert_tokens: int = 1) -> list[str]:
        """Groups, or experts of groups, that no loss depends on; experts of fewer tokens too."""
        found = []
        for name, group in self.groups.items():
            least = expert_tokens if len(group.matrices) > 1 else 1
            idle = [
                index
                for index, matrix in enumerate(group.matrices)
                if matrix.tokens < least or not matrix.weight_sum > 0
            ]
            if len(idle) == len(group.matrices):
                found.append(name)
            else:
                found += [f"{name} (expert {index})" for index in idle]
        for name, stats in self.embeddings.items():
            if not float(stats.frequency.sum() + stats.variance.sum()) > 0:
                found.append(name)
        return found

    def modality_shares(self) -> dict[str, dict[str, float]]:
        """Group -> modality -> its share of the token weights, for groups that read what the
        language model reads; {} for a stream that does not say what its tokens are."""
        found = {}
        for name, group in self.groups.items():
            weight = group.matrices[0].token_weight
            if len(group.matrices) > 1 or not 0 < len(weight) == len(self.modality):
                continue
            sums = torch.zeros(len(self.modalities)).index_add(0, self.modality, weight)
            shares = (sums / sums.sum()).tolist()
            found[name] = dict(zip(self.modalities, shares, strict=True))
        return found

    def modality_tokens(self) -> dict[str, int]:
        """Modality -> how many tokens of the language model are of it."""
        counts = self.modality.bincount(minlength=len(self.modalities)).tolist()
        return dict(zip(self.modalities, counts, strict=True))


def require_seen(
    statistics: StreamStatistics, allowed: Sequence[str] = (), expert_tokens: int = 1
) -> None:
    """Raise DataError naming the groups and experts that no stream told anything of.

    allowed:       fnmatch patterns of those that may stay unknown.
    expert_tokens: of experts that saw fewer, too little is known.
    """
    unseen = [
        name
        for name in statistics.unseen(expert_tokens)
        if not any(fnmatchcase(name, pattern) for pattern in allowed)
    ]
    if not unseen:
        return
    never = [name for name in unseen if name.partition(" (")[0] not in statistics.ran]
    if never:
        what = f"no calibration stream runs {some(never)}"
    elif set(unseen) & set(statistics.unseen()):
        what = f"no loss of a calibration stream depends on {some(unseen)}"
    else:
        what = f"of {expert_tokens} tokens, fewer reached {some(unseen)}"
    raise DataError(
        f"{len(unseen)} parts of the model saw no calibration data, or too little: {what}. Add a "
        "stream, or data, that exercises them, or allow them by name"
    )
