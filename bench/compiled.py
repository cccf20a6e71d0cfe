"""Why decoding is one native call: the same packed model, one token at a time, three ways.

    python -P -m quantlib.bench.compiled [--rounds N] [--layers FEW MANY]

The native engine (`runtime.engine`); torch.compile over the custom operators, with a static cache,
as one graph without a break; and the transformers model as it comes, with its dynamic cache. All
three multiply with the same kernels, in the same mode, on the same checkpoint; they take turns.

Compiling all 30 layers of SmolLM2 takes longer than everything else here, so two models of its
shape with random weights and few layers are timed, and the step of the whole model is read off the
line through both: every layer takes the same time. `full_ms` is that line's value, not a
measurement; the rows of the two models are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import record
from quantlib.bench.artifacts import SMOLLM2_QUICK
from quantlib.bench.checkpoints import SMOLLM2, pack_random
from quantlib.bench.engines import Quantlib, random_tokens
from quantlib.bench.timing import quartiles
from quantlib.cli.request import quiet_transformers
from quantlib.runtime.load import load

MODE = "int8"
NEW = 48
CAPACITY = 128
LAYERS = (2, 6)
NATIVE, COMPILED, PLAIN = "native engine", "torch.compile", "transformers"


class Modules:
    """The packed transformers model, called token by token.

    compiled: through torch.compile, with a static cache of CAPACITY positions, else with a dynamic
              one.
    """

    def __init__(self, checkpoint: Path, compiled: bool) -> None:
        loaded = load(checkpoint, MODE, engine="plain")
        loaded.set_mode(MODE)
        self.model: Any = loaded.model
        self.vocabulary = int(loaded.checkpoint.config["vocab_size"])
        self.forward: Callable[..., Any] = self.model
        self.compile_seconds = 0.0
        self._static: Any = None
        if compiled:
            from transformers import StaticCache

            # One for all texts: a graph is compiled for this very cache.
            self._static = StaticCache(config=self.model.config, max_cache_len=CAPACITY)
            torch.compiler.reset()  # else a second model counts as the first one, changed
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
            started = time.perf_counter()
            self.seconds(2)  # the first token finds an empty cache, the second one a filled one
            self.seconds(2)
            self.compile_seconds = time.perf_counter() - started

    @torch.no_grad()
    def seconds(self, new: int) -> float:
        """Of a token, the mean over `new` of them from an empty cache."""
        from transformers import DynamicCache

        cache = self._static
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        else:
            cache.reset()
        tokens = random_tokens(new, self.vocabulary)
        started = time.perf_counter()
        for position, token in enumerate(tokens):
            self._step(token, position, cache)
        return (time.perf_counter() - started) / new

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


def time_model(layers: int, folder: Path, rounds: int) -> tuple[list[dict[str, Any]], float]:
    """A row for every way of a model of so many layers, and the seconds that compiling took."""
    shape = replace(SMOLLM2, layers=layers)
    checkpoint = pack_random(shape, folder / str(layers), SMOLLM2_QUICK)
    native = Quantlib(checkpoint, MODE, CAPACITY, kv="f32")  # as the others keep them
    compiled, plain = Modules(checkpoint, compiled=True), Modules(checkpoint, compiled=False)
    ways: dict[str, Callable[[], float]] = {
        NATIVE: lambda: 1 / native.sample(1, NEW).decode,
        COMPILED: lambda: compiled.seconds(NEW),
        PLAIN: lambda: plain.seconds(NEW),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, sample in ways.items():
            samples[name].append(1e3 * sample())
    rows = []
    for name, values in samples.items():
        found = quartiles(values)
        spread = [found.low, found.high]
        rows.append({"way": name, "layers": layers, "ms": found.median, "quartiles": spread})
        print(f"{name}, {layers} layers: {found.median:.3f} ms a token", flush=True)
    return rows, compiled.compile_seconds


def whole_model(rows: Sequence[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Every way's step of a model of `layers` layers, from the line through its rows."""
    found: list[dict[str, Any]] = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        line = statistics.linear_regression(
            [row["layers"] for row in own], [row["ms"] for row in own]
        )
        full = line.intercept + line.slope * layers
        found.append({"way": way, "layer_ms": line.slope, "full_ms": full})
    native = found[0]["full_ms"]
    return [{**one, "of_native": one["full_ms"] / native} for one in found]


def measure(layers: Sequence[int], rounds: int) -> dict[str, Any]:
    """Both models, and what follows for the whole one."""
    rows: list[dict[str, Any]] = []
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="quantlib-bench-") as scratch:
        for count in layers:
            found, seconds[count] = time_model(count, Path(scratch), rounds)
            rows += found
    whole = whole_model(rows, SMOLLM2.layers)
    for one in whole:
        print(f"{one['way']}: {one['full_ms']:.2f} ms, {one['of_native']:.2f} times the native one")
    return {
        "shape": SMOLLM2.name,
        "weights": f"{SMOLLM2_QUICK.linear}, embedding {SMOLLM2_QUICK.embedding}",
        "mode": MODE,
        "threads": torch.get_num_threads(),
        "new_tokens": NEW,
        "compile_seconds": {str(count): round(found, 1) for count, found in seconds.items()},
        "rows": rows,
        "extrapolated_to_layers": SMOLLM2.layers,
        "extrapolated": whole,
    }


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, nargs=2, default=LAYERS, metavar=("FEW", "MANY"))
    options = parser.parse_args()
    quiet_transformers()
    print(record.write("compiled", measure(options.layers, options.rounds)))


if __name__ == "__main__":
    main()
