"""FLIQS: one training run that finds formats and weights together (arXiv 2308.03290).

Every decision (a layer, a linear group, a block) has a categorical policy over its formats. Each
step draws formats, trains the shared weights in them, and rewards the policy for what came of it:

    first `delay` steps     formats are drawn uniformly, the policy rests
    until `settle`          formats are drawn from the policy, which learns by REINFORCE:
                            reward      R = quality - beta |1 - cost / target|      (TuNAS' absolute
                                        reward; one-sided: only what is too dear counts)
                            advantage   a = R - moving average of R
                            loss        - a mean_l log pi_l(f_l) + h(t) mean_l entropy(pi_l)
                            with h rising along a cosine: ever more is paid for being undecided
    last `settle` steps     formats are fixed, and weights train on in them

A batch says little about a choice, and a short run has few batches. So a step may judge several
further choices, `draws` of them, without gradients and on one batch that is not trained on (TuNAS
keeps the two apart, too): each is rewarded beside the mean of the others, which have seen the same
pictures, and what makes a batch hard drops out. The paper has one draw, the one that was trained.

A policy begins undecided, as the paper has it, or with logits that it is given (`start`): what was
measured of every option alone (`trained.measured.first_logits`). Where options are many and steps
are few, rewards alone do not find what measuring does.

When they are fixed, the likeliest choice is taken that costs what it may and little less, exactly
(a knapsack over log-probabilities): the paper takes each decision's maximum, which may miss the
target, and does where a short search has not decided. One-sided rewards let it cost less.
Widths of hidden channels are decisions like any other: the paper's search of formats and
architecture at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.errors import SearchError
from quantlib.search.trained.costs import Costs
from quantlib.search.trained.layers import Choice, Layers
from quantlib.search.trained.loop import Judge, step_generator

SMALLEST_PROBABILITY = 1e-8
_CHOICES, _JUDGED_CHOICES = 1, 3
"""The streams of a step's generator that choices are drawn from, those to train in and those that
are only judged: batches have the others."""


@dataclass(frozen=True)
class Settings:
    """Of the search; defaults are the authors'.

    target:      the cost to end at, in the unit of the costs.
    delay:       steps of uniform drawing. settle: steps with the final choice, at the end.
    rate:        of Adam on the logits. momentum: of the reward's moving average.
    beta:        weight of the cost in the reward; one_sided: cheap choices are not punished.
    entropy:     the highest weight of the policy's entropy. temperature: of the policy.
    draws:       choices that are judged in a step beside the one that is trained; 0: that one.
    """

    target: float
    delay: int
    settle: int = 0
    rate: float = 0.05
    momentum: float = 0.99
    beta: float = 1.0
    one_sided: bool = False
    entropy: float = 0.1
    temperature: float = 1.0
    draws: int = 0

    @staticmethod
    def short(target: float, delay: int, settle: int, draws: int = 4) -> Settings:
        """For runs of hundreds of steps, where the authors' have tens of thousands: the policy
        learns faster, from several choices a step, and an entropy's weight of 0.1 would decide
        before the rewards can."""
        return Settings(target, delay, settle, rate=0.1, beta=0.3, entropy=0.03, draws=draws)

    def check(self, steps: int) -> None:
        """Raise SearchError unless a run of so many steps has room for a search."""
        if min(self.delay, self.settle) < 0 or self.delay + self.settle >= steps:
            raise SearchError(
                f"{self.delay} steps before and {self.settle} after the search leave none of "
                f"{steps} for it: train longer, or shorten them"
            )
        if not (self.temperature > 0 and 0 <= self.momentum < 1 and self.rate > 0):
            raise SearchError(
                f"a policy needs a temperature above 0 ({self.temperature}), a rate above 0 "
                f"({self.rate}) and a momentum in [0, 1) ({self.momentum})"
            )
        if self.draws < 0 or self.draws == 1:
            raise SearchError(
                f"{self.draws} draws cannot be compared with each other: judge two or more in a "
                "step, or 0 for the one that is trained"
            )


def reward(quality: float, cost: float, settings: Settings) -> float:
    """What a choice is worth."""
    excess = cost / settings.target - 1
    return quality - settings.beta * (max(0.0, excess) if settings.one_sided else abs(excess))


def entropy_weight(done: float, highest: float) -> float:
    """The weight of the entropy when this share of the search is done: a rising cosine."""
    return highest * (1 - math.cos(math.pi * min(1.0, max(0.0, done)))) / 2


class Policy:
    """Independent categorical distributions over the options of every decision."""

    def __init__(
        self,
        sizes: Sequence[int],
        settings: Settings,
        start: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """start: the first logits of every decision's options; None: all alike."""
        self.sizes, self._settings = tuple(sizes), settings
        rows = [[0.5] * size for size in sizes] if start is None else start
        if tuple(map(len, rows)) != self.sizes:
            raise SearchError(f"first logits for {[*map(len, rows)]} options, not {[*sizes]}")
        self.logits = [torch.tensor(row, requires_grad=True) for row in rows]
        self._optimizer = torch.optim.Adam(self.logits, lr=settings.rate)
        self.baseline: float | None = None

    def probabilities(self) -> list[Tensor]:
        """One vector for each decision; none is smaller than SMALLEST_PROBABILITY."""
        soft = [torch.softmax(row / self._settings.temperature, 0) for row in self.logits]
        return [row.clamp(min=SMALLEST_PROBABILITY) for row in soft]

    @torch.no_grad()
    def draw(self, generator: torch.Generator, uniform: bool, count: int = 1) -> list[Choice]:
        """Random choices."""
        rows = [torch.ones(n) for n in self.sizes] if uniform else self.probabilities()
        drawn = [torch.multinomial(row, count, True, generator=generator).tolist() for row in rows]
        return list(zip(*drawn, strict=True))

    def learn(self, choice: Choice, value: float, entropy: float) -> None:
        """One step of REINFORCE on the reward `value` of a choice, beside the moving average.
        entropy: its weight."""
        self._learn([choice], [value - self._averaged(value)], entropy)

    def learn_together(
        self, choices: Sequence[Choice], values: Sequence[float], entropy: float
    ) -> None:
        """One step on the rewards of two or more choices, each beside the mean of the others."""
        mean, others = math.fsum(values) / len(values), len(values) - 1
        self._averaged(mean)
        self._learn(choices, [(v - mean) * len(values) / others for v in values], entropy)

    def _averaged(self, value: float) -> float:
        """The moving average of rewards, with this one in it."""
        keep = self._settings.momentum
        before = value if self.baseline is None else self.baseline
        self.baseline = keep * before + (1 - keep) * value
        return self.baseline

    def _learn(
        self, choices: Sequence[Choice], advantages: Sequence[float], entropy: float
    ) -> None:
        rows = self.probabilities()
        logs = [row.log() for row in rows]
        gained = [
            advantage * torch.stack([log[i] for log, i in zip(logs, choice, strict=True)]).mean()
            for choice, advantage in zip(choices, advantages, strict=True)
        ]
        undecided = torch.stack([-(row * log).sum() for row, log in zip(rows, logs)]).mean()
        loss = -torch.stack(gained).mean() + entropy * undecided
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    @torch.no_grad()
    def scores(self) -> list[list[float]]:
        """Log-probabilities of every decision's options."""
        return [row.log().tolist() for row in self.probabilities()]

    @property
    def entropy(self) -> float:
        """Mean over the decisions, of what uniform ones would have: 1 at first, 0 when decided."""
        with torch.no_grad():
            rows = [row for row in self.probabilities() if len(row) > 1]
            shares = [float(-(row * row.log()).sum()) / math.log(len(row)) for row in rows]
        return sum(shares) / max(1, len(shares))

    def state(self) -> dict[str, Tensor]:
        """Logits and their moments."""
        tensors = {}
        for index, row in enumerate(self.logits):
            tensors[f"logits.{index}"] = row.detach()
            for name, value in self._optimizer.state.get(row, {}).items():
                tensors[f"{name}.{index}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for index, row in enumerate(self.logits):
            with torch.no_grad():
                row.copy_(tensors[f"logits.{index}"])
            names = ("step", "exp_avg", "exp_avg_sq")
            if f"step.{index}" in tensors:
                self._optimizer.state[row] = {n: tensors[f"{n}.{index}"].clone() for n in names}


class Fliqs:
    """The method, as the training loop takes it (`loop.Method`)."""

    def __init__(
        self,
        layers: Layers,
        costs: Costs,
        search: Settings,
        steps: int,
        seed: int,
        judge: Judge | None = None,
        start: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """steps, seed: of the whole run. judge: of the draws of a step, where there are any. start:
        the policy's first logits. Raises SearchError for a target out of reach."""
        search.check(steps)
        costs.check_target(search.target)
        if search.draws and judge is None:
            raise SearchError(f"nobody judges the {search.draws} draws of a step: pass a judge")
        self._judge = judge
        self._layers, self._costs, self._search = layers, costs, search
        self._steps, self._seed = steps, seed
        self._start = None if start is None else [[*row] for row in start]
        self.policy = Policy(layers.space.sizes, search, start)
        self.choice: Choice | None = None
        self._fixed: Choice | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values on which the result depends."""
        space = self._layers.space
        options = {d.name: [o.name for o in d.options] for d in space.numbers}
        widths = {w.name: list(w.options) for w in space.widths}
        own = {f"search_{name}": value for name, value in asdict(self._search).items()}
        start = {} if self._start is None else {"start": self._start}
        return {"method": "fliqs", "options": options, "widths": widths, **own, **start}

    @property
    def _settles_at(self) -> int:
        return self._steps - self._search.settle

    def before(self, step: int) -> None:
        """Draw the step's formats, or take the final ones."""
        if step >= self._settles_at:
            self.choice = self.final()
        else:
            generator = step_generator(self._seed, step, _CHOICES)
            (self.choice,) = self.policy.draw(generator, uniform=step < self._search.delay)
        self._layers.choose(self.choice)

    def penalty(self) -> None:
        """Nothing: formats are not differentiated."""

    def after(self, step: int, quality: float) -> None:
        """Reward the policy, while it learns. Raises FloatingPointError for a reward that is not
        finite, before the policy has seen it."""
        if not self._search.delay <= step < self._settles_at or self.choice is None:
            return
        share = (step - self._search.delay) / (self._settles_at - self._search.delay)
        weight = entropy_weight(share, self._search.entropy)
        if self._judge is None or not self._search.draws:
            self.policy.learn(self.choice, self._reward(self.choice, quality), weight)
            return
        generator = step_generator(self._seed, step, _JUDGED_CHOICES)
        drawn = self.policy.draw(generator, uniform=False, count=self._search.draws)
        values = [self._reward(choice, self._judged(choice, step)) for choice in drawn]
        self.policy.learn_together(drawn, values, weight)

    def _reward(self, choice: Choice, quality: float) -> float:
        value = reward(quality, self._costs.of(choice), self._search)
        if not math.isfinite(value):
            raise FloatingPointError(f"the reward of a choice is {value}")
        return value

    def _judged(self, choice: Choice, step: int) -> float:
        assert self._judge is not None  # there are draws
        self._layers.choose(choice)
        return self._judge(step)

    def final(self) -> Choice:
        """The likeliest choice at the target; it stays once it was asked for."""
        if self._fixed is None:
            spend = not self._search.one_sided
            self._fixed = self._costs.likeliest(self.policy.scores(), self._search.target, spend)
        return self._fixed

    def figures(self) -> dict[str, float]:
        """Cost of the step's formats, entropy left, and the moving reward."""
        cost = self._costs.of(self.choice) if self.choice is not None else math.nan
        return {
            "cost": cost,
            "entropy": self.policy.entropy,
            "reward": math.nan if self.policy.baseline is None else self.policy.baseline,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of the policy."""
        return self.policy.state(), {"baseline": self.policy.baseline, "fixed": self._fixed}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.policy.restore(tensors)
        self.policy.baseline = numbers["baseline"]
        self._fixed = None if numbers["fixed"] is None else tuple(map(int, numbers["fixed"]))


class Fixed:
    """No search: one choice from step `start` on, full precision before. What FLIQS has to beat,
    and with None full precision itself."""

    def __init__(self, layers: Layers, choice: Choice | None, start: int = 0) -> None:
        self._layers, self.choice, self._start = layers, choice, start

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values on which the result depends."""
        chosen = None
        if self.choice is not None:
            named = self._layers.space.candidates(self.choice)
            chosen = {name: candidate.name for name, candidate in named.items()}
        return {"method": "fixed", "choice": chosen, "start": self._start}

    def before(self, step: int) -> None:
        """Round, once it is time."""
        self._layers.choose(self.choice if step >= self._start else None)

    def penalty(self) -> None:
        """Nothing."""

    def after(self, step: int, quality: float) -> None:
        """Nothing is learned."""

    def figures(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing to keep."""
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Nothing to restore."""
