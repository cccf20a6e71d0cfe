"""Why decoding is one native call: the same packed model, one token at a time, three ways.

    python -P -m quantlib.bench.compiled [--checkpoint OUT] [--rounds N]

The native engine (`runtime.engine`); torch.compile over the custom operators, with a static cache,
as one graph without a break; and the transformers model as it comes, with its dynamic cache. All
three multiply with the same kernels, in the same mode, on the same checkpoint; they take turns, and
a figure is the median over rounds. Without --checkpoint it is an uncalibrated SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import artifacts, record
from quantlib.bench.engines import Quantlib, random_tokens
from quantlib.bench.timing import quartiles
from quantlib.cli.request import quiet_transformers
from quantlib.runtime.load import load

MODE = "int8"
NEW = 64
CAPACITY = 256


class Modules:
    """The packed transformers model, called token by token.

    compiled: through torch.compile, with a static cache of CAPACITY positions.
    """

    def __init__(self, checkpoint: Path, compiled: bool) -> None:
        loaded = load(checkpoint, MODE, engine="plain")
        loaded.set_mode(MODE)
        self.model: Any = loaded.model
        self.vocabulary = int(loaded.checkpoint.config["vocab_size"])
        self.compiled = compiled
        self.forward: Callable[..., Any] = self.model
        self.compile_seconds = 0.0
        if compiled:
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
            started = time.perf_counter()
            self.sample(2)
            self.compile_seconds = time.perf_counter() - started

    @torch.no_grad()
    def sample(self, new: int) -> float:
        """Tokens per second over `new` tokens from an empty cache."""
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        cache: Any = DynamicCache(config=config)
        if self.compiled:
            cache = StaticCache(config=config, max_cache_len=CAPACITY)
        tokens = random_tokens(new, self.vocabulary)
        started = time.perf_counter()
        for position, token in enumerate(tokens):
            self._step(token, position, cache)
        return new / (time.perf_counter() - started)

    def _step(self, token: int, position: int, cache: Any) -> Tensor:
        where = torch.tensor([position])
        output = self.forward(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            cache_position=where,
            position_ids=where[None],
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits


def measure(checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Medians and quartiles of tokens per second, the ways taking turns."""
    native = Quantlib(checkpoint, MODE, CAPACITY, kv="f32")  # as the others keep them
    compiled, plain = Modules(checkpoint, compiled=True), Modules(checkpoint, compiled=False)
    ways: dict[str, Callable[[], float]] = {
        "native engine": lambda: native.sample(1, NEW).decode,
        "torch.compile": lambda: compiled.sample(NEW),
        "transformers": lambda: plain.sample(NEW),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, sample in ways.items():
            samples[name].append(sample())
    rows = []
    for name, values in samples.items():
        found = quartiles(values)
        rows.append(
            {"way": name, "decode_tok_s": found.median, "quartiles": [found.low, found.high]}
        )
        print(f"{name}: {found.median:.1f} tokens/s")
    return {
        "model": "SmolLM2-135M",
        "bytes": native.nbytes,
        "mode": MODE,
        "threads": torch.get_num_threads(),
        "new_tokens": NEW,
        "compile_seconds": round(compiled.compile_seconds, 1),
        "rows": rows,
    }


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a packed checkpoint that the engine runs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    quiet_transformers()
    checkpoint = options.checkpoint or artifacts.smollm2_rounded()
    print(record.write("compiled", measure(checkpoint, options.rounds)))


if __name__ == "__main__":
    main()
