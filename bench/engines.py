"""Engines that run a whole model, each with one question: how many tokens per second does it read,
and how many does it write?

Reading: a prompt of random tokens in one go, from an empty cache. Writing: one token after the
other, also from an empty cache, none of them chosen by the model (as llama-bench does it), so that
no engine pays for sampling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from quantlib.bench.peers.llama_cpp import LlamaCpp


class Sample(NamedTuple):
    """Tokens per second, measured once."""

    prefill: float
    decode: float


class Engine(Protocol):
    """name: of the row; nbytes: of the weight file(s)."""

    name: str
    nbytes: int

    def sample(self, prompt: int, new: int) -> Sample:
        """Read `prompt` tokens and, from an empty cache, write `new` tokens."""


def random_tokens(count: int, vocabulary: int) -> list[int]:
    """The same ids at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


class Quantlib:
    """quantlib's native engine on a packed checkpoint.

    Keys and values have 8 bits unless asked otherwise, and attention on them runs in integers; what
    that loses is part of the KL that `bench.divergence` finds.
    """

    def __init__(
        self, checkpoint: Path, mode: str, capacity: int, label: str = "", kv: str = "int8"
    ) -> None:
        """mode, kv: of `runtime.engine.Engine`. capacity: most tokens of a text. Raises
        QuantlibError when the engine cannot run it."""
        from quantlib.runtime.load import load

        loaded = load(checkpoint, mode, engine="native", kv=kv)
        self.name = f"quantlib {mode}{label}, kv {kv}"
        self.nbytes = loaded.checkpoint.total_bytes
        self._engine = loaded.make_engine(sequences=1, capacity=capacity)
        self._vocabulary = int(loaded.checkpoint.config["vocab_size"])

    def logits(self, tokens: Tensor) -> Tensor:
        """After every token of a text [T], by the very engine that `sample` times: float32
        [T, V]."""
        self._engine.reset()
        return self._engine.score(tokens)

    def sample(self, prompt: int, new: int) -> Sample:
        """See `Engine`."""
        engine = self._engine
        engine.reset()
        tokens = random_tokens(max(prompt, new), self._vocabulary)
        engine.decode(tokens[:1])  # wakes the threads
        engine.reset()
        reading = _seconds(lambda: engine.prefill(tokens[:prompt]))
        engine.reset()
        writing = _seconds(lambda: [engine.decode([token]) for token in tokens[:new]])
        engine.reset()
        return Sample(prompt / reading, new / writing)


class LlamaBench:
    """llama.cpp on a GGUF file, a process for each sample."""

    def __init__(self, llama: LlamaCpp, model: Path, kind: str) -> None:
        self.name = f"llama.cpp {kind}"
        self.nbytes = model.stat().st_size
        self.model, self._llama = model, llama

    def sample(self, prompt: int, new: int) -> Sample:
        """See `Engine`. The program warms up by itself."""
        speed = self._llama.speed(self.model, prompt, new, repetitions=1)
        return Sample(speed.prefill[0], speed.decode[0])


class Eager:
    """transformers as it comes, with its dynamic cache."""

    MOST_NEW = 32
    """Tokens written at most: it is slow, and its time per token does not change over so few."""

    def __init__(self, source: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        kind: torch.dtype = getattr(torch, dtype)
        self.name = f"transformers eager {dtype}"
        self._model = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, local_files_only=True
        ).eval()
        parameters = {p.data_ptr(): p.nbytes for p in self._model.parameters()}
        self.nbytes = sum(parameters.values())
        self._vocabulary = int(self._model.config.vocab_size)

    def sample(self, prompt: int, new: int) -> Sample:
        """See `Engine`."""
        new = min(new, self.MOST_NEW)
        tokens = random_tokens(max(prompt, new), self._vocabulary)
        self._step(tokens[:1], None)
        reading = _seconds(lambda: self._step(tokens[:prompt], None))

        def write() -> None:
            cache = None
            for token in tokens[:new]:
                cache = self._step([token], cache)

        return Sample(prompt / reading, new / _seconds(write))

    @torch.no_grad()
    def _step(self, tokens: Sequence[int], cache: Any) -> Any:
        ids: Tensor = torch.tensor([list(tokens)])
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.past_key_values


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
