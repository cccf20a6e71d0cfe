"""Training in stages that can be stopped and taken up again, without a trace in the result.

Everything a step draws comes from a generator seeded by (seed, step), and the optimizer's moments
are kept beside the weights: a run that was killed and resumed ends with the weights of one that was
not. A stage is one safetensors file; its metadata say how many steps are done.

Why bfloat16 matrices under float32 weights: on processors with AVX512-BF16 a step takes two thirds
of the time, and these models end as well.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantlib.checkpoint.disk import atomic_write
from quantlib.errors import DataError

BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
SECONDS_BETWEEN_FILES = 60.0
_MOMENTS = ("exp_avg", "exp_avg_sq")

console = Console(stderr=True)

Loss = Callable[[int, torch.Generator], dict[str, Tensor]]
"""(step, generator) -> parts of the loss by name; their sum is minimised."""


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine down to a twentieth of `rate`."""

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.02

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def step_generator(seed: int, step: int) -> torch.Generator:
    """What a step draws from: the same for a run that was resumed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew: convolutions uniform by fan-in (they learn slowly from 0.02), linears
    and embeddings normal with 0.02; norms and biases are left as they are made (one and zero)."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                bound = part.weight[0].numel() ** -0.5
                part.weight.uniform_(-bound, bound, generator=generator)
                if part.bias is not None:
                    part.bias.zero_()
            elif isinstance(part, nn.Linear | nn.Embedding):
                part.weight.normal_(0, 0.02, generator=generator)
                if isinstance(part, nn.Linear) and part.bias is not None:
                    part.bias.zero_()


@dataclass
class Stage:
    """One file's worth of training: `module`'s parameters that need gradients under `schedule`.

    After its last step the module is in evaluation mode, and the file holds the weights alone.
    """

    file: Path
    module: nn.Module
    schedule: Schedule
    seed: int

    def run(self, loss: Loss, before: Callable[[int], None] | None = None) -> None:
        """Train from where the file left off. `before(step)` is called before every step, for what
        changes on the way; it may write to parameters in place."""
        optimizer = self._optimizer()
        first = self._resume(optimizer)
        self.module.train()
        saved = shown = time.monotonic()
        sums: dict[str, float] = {}
        for step in range(first, self.schedule.steps):
            if before is not None:
                before(step)
            parts = self._step(optimizer, step, loss)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) * 0.98 + value * 0.02
            if time.monotonic() - saved > SECONDS_BETWEEN_FILES:
                self._save(step + 1, optimizer)
                saved = time.monotonic()
            if time.monotonic() - shown > SECONDS_BETWEEN_FILES / 4 or step == first:
                shown = time.monotonic()
                self._show(step, first, sums)
        self.module.eval()
        if first < self.schedule.steps:
            self._save(self.schedule.steps, None)

    def _step(self, optimizer: torch.optim.Optimizer, step: int, loss: Loss) -> Mapping[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate_at(step)
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss(step, step_generator(self.seed, step))
        total = torch.stack(list(parts.values())).sum()
        if not torch.isfinite(total):
            raise DataError(f"{self.file.stem}: the loss of step {step} is {total.item()}")
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self._trained().values(), MAX_GRADIENT_NORM)
        optimizer.step()
        return {name: part.item() for name, part in parts.items()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self._trained().values() if p.ndim > 1]
        others = [p for p in self._trained().values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.schedule.decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.schedule.rate, betas=BETAS, fused=True)

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Load what the file has, and return the number of steps that are done."""
        if not self.file.exists():
            return 0
        tensors, done = read_stage(self.file)
        self._fits(done)
        weights = {name[8:]: t for name, t in tensors.items() if name.startswith("weights.")}
        missing, unknown = self.module.load_state_dict(weights, strict=False)
        trained = self._trained()
        if unknown or set(missing) & set(trained):
            raise DataError(f"{self.file} is of another model; delete it to train this one anew")
        if done < self.schedule.steps:
            for name, parameter in trained.items():
                if f"{_MOMENTS[0]}.{name}" not in tensors:
                    continue  # no gradient has reached it yet
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(done)),
                    **{moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS},
                }
        return done

    def _fits(self, done: int) -> None:
        if done > self.schedule.steps:
            raise DataError(
                f"{self.file} is trained for {done} steps, more than the {self.schedule.steps} "
                "asked for; delete it to train anew"
            )

    def _save(self, done: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Write weights, and moments where training is to go on."""
        trained = self._trained()
        kept = {**trained, **dict(self.module.named_buffers())}
        state = {name: t for name, t in self.module.state_dict().items() if name in kept}
        tensors = {f"weights.{name}": t.contiguous() for name, t in state.items()}
        if optimizer is not None:
            for name, parameter in trained.items():
                for moment in _MOMENTS if parameter in optimizer.state else ():
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"steps": json.dumps(done)}
        atomic_write(self.file, safetensors.torch.save(tensors, metadata))

    def _show(self, step: int, first: int, sums: Mapping[str, float]) -> None:
        share = 1 - 0.98 ** (step + 1 - first)
        means = "  ".join(f"{name} {value / share:.4f}" for name, value in sums.items())
        console.print(f"{self.file.stem} {step + 1}/{self.schedule.steps}  {means}", style="dim")


def read_stage(file: Path) -> tuple[dict[str, Tensor], int]:
    """Tensors and number of steps of a stage's file. Raises DataError for a damaged one."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, int(json.loads((opened.metadata() or {})["steps"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{file} is not a stage of training: {error}; delete it") from error
