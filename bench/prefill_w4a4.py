"""What 4-bit activations cost a prompt: SmolLM2-135M's shape with inputs of 4 bits, in steps up to
all that ResQ does online, against the same weights with inputs of 8 bits.

    python -P -m quantlib.bench.prefill_w4a4 [--rounds N] [--work FOLDER]

Kernels multiply 4-bit activations as they do 8-bit ones, so nothing is won here: the question is
how much preparing a token costs: rotations, orders, ranges of two slices. Each step adds to the one
before it: rounding by slices; Hadamard matrices before down projections and the order of output
projections; bases of keys and of the residual stream; a KV cache of 4 bits. They run in the mode
that text is written in ("fast"), 8-bit activations in "int8". Weights are random. Models take
turns; a ratio is the median over rounds of what the model took against the first one in the same
round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.bench import record
from quantlib.bench.checkpoints import PLAIN, SMOLLM2, Around, LlamaShape, Schemes, pack_random
from quantlib.bench.engines import random_tokens
from quantlib.bench.targets import Target
from quantlib.bench.timing import quartiles
from quantlib.checkpoint.writer import CONFIG_FILE
from quantlib.cli.request import quiet_transformers
from quantlib.kernels.kv_format import KvFormat
from quantlib.runtime.engine import Engine
from quantlib.runtime.load import load
from quantlib.transforms import hadamard
from quantlib.transforms.rotation import Rotation

PROMPT = 512
WEIGHTS, EMBEDDING, HIGH = "w4g64z5s5", "w8g64zs6", 8
"""A weight's format, the embedding's, and which part of the columns is wide: 1/8, ResQ's."""
MOST = 1.15
"""Promised: all of it takes at most so many times what 8-bit activations take."""


@dataclass(frozen=True)
class Contender:
    """A checkpoint and how it runs; mode and kv as `runtime.load.load` takes them."""

    name: str
    linears: str
    around: Around = PLAIN
    mode: str | None = None
    kv: str | None = None


def contenders(shape: LlamaShape) -> list[Contender]:
    """8-bit activations first, then what adds up to W4A4KV4."""
    scheme = f"{WEIGHTS}a4zh8/{HIGH}"
    hidden = _hadamards(shape)
    orders = {
        f"model.layers.{layer}.self_attn.o_proj.weight": _order(shape)
        for layer in range(shape.layers)
    }
    everything = Rotation(
        residual=_orthogonal(shape.hidden), key=_keys(shape), hidden=hidden.hidden
    )
    return [
        Contender("W4A8", WEIGHTS, mode="int8", kv="int8"),
        Contender("W4A4, rounding alone", scheme, kv="int8"),
        Contender("+ Hadamard and order", scheme, Around(hidden, orders), kv="int8"),
        Contender("+ bases", scheme, Around(everything, orders), kv="int8"),
        Contender("+ KV4: all of it", scheme, Around(everything, orders, KvFormat.parse("int4"))),
    ]


def _hadamards(shape: LlamaShape) -> Rotation:
    size = hadamard.block_size(shape.intermediate)
    return Rotation(hidden={f"model.layers.{layer}": size for layer in range(shape.layers)})


def _keys(shape: LlamaShape) -> dict[str, Tensor]:
    basis = _orthogonal(shape.head_dim)
    return {f"model.layers.{layer}": basis for layer in range(shape.layers)}


def _orthogonal(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def _order(shape: LlamaShape) -> Tensor:
    """The low columns of all heads, then the high ones."""
    columns = torch.arange(shape.heads * shape.head_dim, dtype=torch.int32)
    heads = columns.reshape(shape.heads, shape.head_dim)
    low = shape.head_dim - shape.head_dim // HIGH
    return torch.cat([heads[:, :low].reshape(-1), heads[:, low:].reshape(-1)])


def make_engines(shape: LlamaShape, folder: Path, capacity: int) -> dict[str, Engine]:
    """Contender -> an engine on its checkpoint, which is written to `folder`, if it is not there,
    and read."""
    engines = {}
    for number, one in enumerate(contenders(shape)):
        path = folder / str(number)
        if not (path / CONFIG_FILE).is_file():
            pack_random(shape, path, Schemes(one.linears, EMBEDDING), one.around)
        loaded = load(path, one.mode, engine="native", kv=one.kv)
        engines[one.name] = loaded.make_engine(capacity=capacity)
    return engines


def race(engines: Mapping[str, Engine], prompt: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each engine for the prompt in each round, the engines taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            engine.reset()
            started = time.perf_counter()
            engine.prefill(prompt)
            if number:  # the first round wakes threads and touches memory
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rows_of(seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Milliseconds and ratios to the first engine, medians with quartiles."""
    first = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        ms = quartiles(times).scaled(1e3)
        ratio = quartiles([own / other for own, other in zip(times, first, strict=True)])
        rows.append(
            {
                "model": name,
                "ms": ms.median,
                "ms_quartiles": [ms.low, ms.high],
                "ratio": ratio.median,
                "ratio_quartiles": [ratio.low, ratio.high],
            }
        )
        print(f"{name}: {ms.median:.1f} ms, {ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})")
    return rows


def measure(
    shape: LlamaShape, prompt: int, rounds: int, work: Path | None = None
) -> dict[str, Any]:
    """All contenders on a prompt of so many tokens, and whether the promise is kept.

    work: where checkpoints are kept for the next time; nowhere by default.
    """
    tokens = torch.tensor(random_tokens(prompt, shape.vocabulary))
    with tempfile.TemporaryDirectory(prefix="quantlib-bench-") as scratch:
        engines = make_engines(shape, work or Path(scratch), prompt)
    rows = rows_of(race(engines, tokens, rounds))
    where, what = f"{shape.name}, prompt of {prompt}", "speed of W4A4KV4 against W4A8"
    return {
        "shape": shape.name,
        "prompt_tokens": prompt,
        "threads": torch.get_num_threads(),
        "isa": next(iter(engines.values())).isa,
        "rounds": rounds,
        "weights": f"{WEIGHTS}, embedding {EMBEDDING}",
        "rows": rows,
        "targets": [Target(where, what, 1 / rows[-1]["ratio"], 1 / MOST).to_json()],
    }


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--work", type=Path, help="keep the checkpoints here, and use those of the time before"
    )
    options = parser.parse_args()
    quiet_transformers()
    print(record.write("prefill_w4a4", measure(SMOLLM2, PROMPT, options.rounds, options.work)))


if __name__ == "__main__":
    main()
