"""The training loop of all methods: AdamW under a cosine, resumable, and stopped by the first nan.

Everything a step draws comes from a generator seeded by (seed, step), and moments are kept: a run
that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.errors import FormatError, SearchError
from quantlib.search.trained.state import State, load_state

BETAS = (0.9, 0.95)
SECONDS_BETWEEN_FILES = 60.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_JUDGED = 2
"""The stream of a step's generator that batches for judging are drawn from; the first is that of
the batches that are trained on, the second that of a method's choices."""


@dataclass(frozen=True)
class Outcome:
    """What a batch gave: the loss to minimise, and how good that was, larger is better (a share of
    right answers, or the negative loss): what a search is rewarded for."""

    loss: Tensor
    quality: float

    @staticmethod
    def of_divergence(teacher: Tensor, logits: Tensor) -> Outcome:
        """KL(teacher || model) of logits [..., V], their mean in nats; its negative is the
        quality."""
        wanted, said = (F.log_softmax(one.float(), -1) for one in (teacher, logits))
        loss = F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1).mean()
        return Outcome(loss, -float(loss.detach()))


Task = Callable[[nn.Module, int, torch.Generator], Outcome]
"""(model, step, generator) -> outcome of the step's batch."""
Judge = Callable[[int], float]
"""step -> how good the model is as its layers are rounded now; larger is better."""
Report = Callable[[int, Mapping[str, float]], None]
"""(steps done, figures by name), now and then."""


@dataclass(frozen=True)
class Training:
    """How a model is trained, whatever the method.

    steps:    in all. rate: the highest learning rate. warmup: steps until it is reached; it then
              falls along a cosine to a twentieth. decay: of matrices, as AdamW has it.
    norm:     gradients are shortened to this length. seed: of batches and choices.
    autocast: products in bfloat16 (what is rounded, is rounded in float32).
    """

    steps: int
    rate: float
    warmup: int = 0
    decay: float = 0.02
    norm: float = 1.0
    seed: int = 0
    autocast: bool = False

    def __post_init__(self) -> None:
        is_rate = math.isfinite(self.rate) and self.rate > 0
        if self.steps < 1 or not is_rate or not 0 <= self.warmup <= self.steps:
            raise SearchError(
                f"{self.steps} steps at a rate of {self.rate} with a warm-up of {self.warmup}: give"
                " at least one step, a positive rate, and a warm-up no longer than all"
            )

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)


class Method(Protocol):
    """What makes one search another. The loop calls `before`, runs the batch, adds `penalty` to its
    loss, takes a step of the optimizer, and calls `after`."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values on which the result depends."""

    def before(self, step: int) -> None:
        """Prepare the model for a step."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""

    def after(self, step: int, quality: float) -> None:
        """Learn from a step. Raises FloatingPointError, which says what is no finite number."""

    def figures(self) -> dict[str, float]:
        """What is worth telling, by name."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values to go on from."""

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Inverse of `state`."""


def step_generator(seed: int, step: int, part: int = 0) -> torch.Generator:
    """What a step draws from: the same for a run that was resumed. `part`: another stream of the
    same step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 7 + part)


def judge_of(model: nn.Module, task: Task, training: Training) -> Judge:
    """Judges a model by the negative loss of a batch that the step does not train on, the same one
    for all that is asked of a step. Nothing is learned from it: no gradients, and batch norms go
    by the batch, as in training, and do not remember it."""

    @torch.no_grad()
    def judge(step: int) -> float:
        kept = [buffer.clone() for buffer in model.buffers()]
        with _precision(model, training):
            outcome = task(model, step, step_generator(training.seed, step, _JUDGED))
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
        return -float(outcome.loss)

    return judge


def _precision(model: nn.Module, training: Training) -> contextlib.AbstractContextManager[Any]:
    if not training.autocast:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


@dataclass
class Loop:
    """One run: `model`'s parameters that need gradients, by `method`, on `task`.

    file:   its state. about: settings beside those of training and method, such as the model's
            hash and the data's.
    """

    model: nn.Module
    task: Task
    method: Method
    training: Training
    file: Path
    about: Mapping[str, Any]
    report: Report | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All on which the result depends."""
        return {**asdict(self.training), **self.method.settings, **self.about}

    def run(self) -> None:
        """Train to the end, or go on from the file; the model is then in evaluation mode.

        Raises SearchError for a file of other settings, at the first loss, gradient or reward that
        is not finite, and at the first weight that no format holds: the file keeps the last state
        that was.
        """
        optimizer = self._optimizer()
        first = self._resume(optimizer)
        self.model.train()
        saved = time.monotonic()
        for step in range(first, self.training.steps):
            quality = self._step(optimizer, step)
            self._learn(step, quality)
            if time.monotonic() - saved > SECONDS_BETWEEN_FILES:
                self._save(step + 1, optimizer)
                saved = time.monotonic()
            if self.report is not None:
                self.report(step + 1, {"quality": quality, **self.method.figures()})
        self.model.eval()
        if first < self.training.steps:
            self._save(self.training.steps, None)

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = self.training.rate_at(step)
        self.method.before(step)
        try:
            with _precision(self.model, self.training):
                outcome = self.task(self.model, step, step_generator(self.training.seed, step))
                extra = self.method.penalty()
                loss = outcome.loss if extra is None else outcome.loss + extra
        except FormatError as error:
            raise SearchError(self._diverged(step, _unrounded(error))) from error
        if not bool(torch.isfinite(loss)):
            raise SearchError(self._diverged(step, f"the loss is {float(loss.detach())}"))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(list(self._trained().values()), self.training.norm)
        if not bool(torch.isfinite(norm)):
            raise SearchError(self._diverged(step, f"the gradient's length is {float(norm)}"))
        optimizer.step()
        return outcome.quality

    def _learn(self, step: int, quality: float) -> None:
        try:
            self.method.after(step, quality)
        except FloatingPointError as error:
            raise SearchError(self._diverged(step, str(error))) from error
        except FormatError as error:
            raise SearchError(self._diverged(step, _unrounded(error))) from error

    def _diverged(self, step: int, what: str) -> str:
        kept = "nothing had been kept yet"
        if self.file.exists():
            done = load_state(self.file, self.settings)
            kept = f"{self.file} keeps the state of step {done.done}" if done else kept
        return (
            f"training stops at step {step}, where {what}; {kept}. Begin again in another folder "
            "with a lower rate, or with fewer narrow formats"
        )

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _optimizer(self) -> torch.optim.AdamW:
        trained = self._trained().values()
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.training.decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.training.rate, betas=BETAS, fused=True)

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load what the file has, and return the number of steps that are done."""
        state = load_state(self.file, self.settings)
        if state is None:
            return 0
        weights = _under(state.tensors, "weights.")
        missing, unknown = self.model.load_state_dict(weights, strict=False)
        trained = self._trained()
        if unknown or set(missing) & set(trained):
            raise SearchError(f"{self.file} is of another model: delete it to train this one anew")
        if state.done < self.training.steps:
            for name, parameter in trained.items():
                if f"{_MOMENTS[0]}.{name}" in state.tensors:  # else no gradient has reached it yet
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(state.done)),
                        **{m: state.tensors[f"{m}.{name}"] for m in _MOMENTS},
                    }
        self.method.restore(_under(state.tensors, "method."), state.numbers)
        return state.done

    def _save(self, done: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Write weights, and moments where training is to go on."""
        trained = self._trained()
        kept = {*trained, *(name for name, _ in self.model.named_buffers())}
        tensors = {f"weights.{n}": t for n, t in self.model.state_dict().items() if n in kept}
        if optimizer is not None:
            for name, parameter in trained.items():
                for moment in _MOMENTS if parameter in optimizer.state else ():
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        learned, numbers = self.method.state()
        tensors |= {f"method.{name}": tensor for name, tensor in learned.items()}
        State(done, self.settings, tensors, numbers).save(self.file)


def _unrounded(error: FormatError) -> str:
    """What a step says of a number that its format cannot hold: weights that grew beyond it."""
    return f"something cannot be rounded any more: {error}"


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
