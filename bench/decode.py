"""How fast a whole model runs: quantlib's native engine beside llama.cpp and transformers.

    quantlib bench decode [--quick] [--json]

SmolLM2-135M (real weights, with the KL divergence of every file) and a random model of
Llama-3.2-1B's shape; engines take turns, each round once through all of them, and a figure is the
median over rounds. A prompt of 512 tokens is read at once, 128 tokens are written one by one. Then
what loading costs (`bench.load` has a larger model).

All of it takes half an hour, most of which is compressing SmolLM2 for the first time; models are
kept in the user's cache folder (2.5 GB).
--quick takes a minute once its models are in the cache: SmolLM2 only, uncalibrated, without KL.
Peers that are not there (`make peers` installs them) are named with the reason.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from quantlib.bench import artifacts, assets, divergence, footprint, record, targets
from quantlib.bench.checkpoints import LLAMA_1B
from quantlib.bench.engines import Eager, Engine, LlamaBench, Quantlib
from quantlib.bench.peers.linear import PeerMissing
from quantlib.bench.peers.llama_cpp import LlamaCpp
from quantlib.bench.timing import quartiles
from quantlib.cli.console import answers, notes, print_json, table
from quantlib.cli.request import quiet_transformers

SMOLLM2 = "SmolLM2-135M"
KINDS = ("Q4_0", "Q4_K_M")
FASTEST = "llama.cpp Q4_0"
SIZES_MB = (69.6, 76.2, None)
"""Budgets of quantlib's checkpoints of SmolLM2; None: the bytes of llama.cpp's Q4_0 file."""
PROMPT, NEW = 512, 128
ROUNDS, QUICK_ROUNDS = 5, 2
MODELS = (SMOLLM2, LLAMA_1B.name)
DECODE_TARGETS = {SMOLLM2: 1.5, LLAMA_1B.name: 1.25}
MODE = "int8"


@dataclass
class Found:
    """What was measured so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    footprints: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, or None and a note of why the peer `name` is missing."""
        try:
            return make()
        except PeerMissing as error:
            self.missing[name] = str(error)
            return None


def run(
    quick: bool, work: Path | None = None, models: Sequence[str] | None = None
) -> dict[str, Any]:
    """Everything, or of some of MODELS alone.

    work: the work directory of the compression, kept in the cache by default.
    """
    found = Found()
    llama = found.attempt("llama.cpp", lambda: LlamaCpp(torch.get_num_threads()))
    if quick:
        _smollm2_quick(found, llama)
    else:
        wanted = models or MODELS
        if SMOLLM2 in wanted:
            _smollm2(found, llama, work or artifacts.folder() / "smollm2-work")
        if LLAMA_1B.name in wanted:
            _llama_1b(found, llama)
    judged = targets.of_models(found.rows, FASTEST, DECODE_TARGETS)
    judged += targets.of_footprints(found.footprints)
    return {
        "threads": torch.get_num_threads(),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "engines_missing": found.missing,
        "targets": [target.to_json() for target in judged],
        "rows": found.rows,
        "footprints": found.footprints,
    }


def _smollm2_quick(found: Found, llama: LlamaCpp | None) -> None:
    checkpoint = artifacts.smollm2_rounded()
    ours = Quantlib(checkpoint, MODE, PROMPT + NEW)
    theirs = [*_llama_engines(found, llama, weighted=False), *_eager_engines()]
    found.rows += race(SMOLLM2, [ours, *theirs], QUICK_ROUNDS, found)
    found.footprints.append({"model": SMOLLM2, **footprint.measure(checkpoint)})


def _smollm2(found: Found, llama: LlamaCpp | None, work: Path) -> None:
    """Calibrated checkpoints at several sizes, llama.cpp's files, and what each has lost."""
    theirs = _llama_engines(found, llama, weighted=True)
    most = min((engine.nbytes for engine in theirs), default=None)
    sizes = [mb or (most / 1e6 if most else None) for mb in SIZES_MB]
    with tempfile.TemporaryDirectory(prefix="quantlib-bench-") as scratch:
        checkpoints = {
            f" {mb:.1f} MB": _compressed(mb, Path(scratch), work) for mb in sizes if mb is not None
        }
        ours = [Quantlib(path, MODE, PROMPT + NEW, label) for label, path in checkpoints.items()]
        losses = _losses(found, llama, theirs, ours)
        found.rows += race(SMOLLM2, [*ours, *theirs, *_eager_engines()], ROUNDS, found, losses)
        for path in checkpoints.values():
            found.footprints.append({"model": SMOLLM2, **footprint.measure(path)})


def _compressed(megabytes: float, scratch: Path, work: Path) -> Path:
    from quantlib.pipeline.compress import compress

    notes().print(f"compressing {SMOLLM2} to {megabytes:.1f} MB in {work}", style="dim")
    return compress(
        assets.fetch_smollm2(),
        out=scratch / f"{megabytes:.1f}",
        work=work,
        data=assets.wikipedia_text("calibration"),
        size=str(int(megabytes * 1e6)),
        overwrite=True,
    ).path


def _losses(
    found: Found,
    llama: LlamaCpp | None,
    theirs: Sequence[LlamaBench],
    ours: Sequence[Quantlib],
) -> dict[str, divergence.Loss]:
    """Engine name -> KL; engines whose KL is not known are left out."""
    notes().print("measuring KL divergences", style="dim")
    files = {engine.name: engine.model for engine in theirs}
    measured = None
    if llama is not None and files:
        measured = found.attempt("llama.cpp KL", lambda: divergence.of_llama(llama, files))
    losses, windows = measured or ({}, divergence.own_windows())
    return losses | divergence.of_engines(ours, windows)


def _llama_engines(found: Found, llama: LlamaCpp | None, weighted: bool) -> list[LlamaBench]:
    engines: list[LlamaBench] = []
    if llama is None:
        return engines
    for kind in KINDS:
        make = partial(artifacts.smollm2_gguf, llama, kind, weighted)
        file = found.attempt(f"llama.cpp {kind}", make)
        if file is not None:
            engines.append(LlamaBench(llama, file, kind))
    return engines


def _eager_engines() -> list[Engine]:
    return [Eager(assets.fetch_smollm2(), dtype) for dtype in ("bfloat16", "float32")]


def _llama_1b(found: Found, llama: LlamaCpp | None) -> None:
    notes().print(f"making a random model of the {LLAMA_1B.name}", style="dim")
    made = found.attempt(f"llama.cpp, {LLAMA_1B.name}", lambda: artifacts.llama_1b(llama))
    packed, gguf = made or artifacts.llama_1b(None)
    engines: list[Engine] = [
        Quantlib(path, MODE, PROMPT + NEW, label) for label, path in packed.items()
    ]
    if llama is not None and gguf is not None:
        engines.append(LlamaBench(llama, gguf, "Q4_0"))
    found.rows += race(LLAMA_1B.name, engines, ROUNDS, found)
    for path in packed.values():
        found.footprints.append({"model": LLAMA_1B.name, **footprint.measure(path)})


def race(
    model: str,
    engines: Sequence[Engine],
    rounds: int,
    found: Found,
    losses: Mapping[str, divergence.Loss] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the engines, which take turns. One that fails as a peer is noted as missing."""
    samples: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
    for number in range(rounds):
        notes().print(f"{model}: round {number + 1} of {rounds}", style="dim")
        for engine in engines:
            if engine.name not in found.missing:
                sample = found.attempt(engine.name, partial(engine.sample, PROMPT, NEW))
                samples[engine.name] += [sample] if sample else []
    return [
        _row(model, engine, samples[engine.name], (losses or {}).get(engine.name))
        for engine in engines
        if engine.name not in found.missing
    ]


def _row(
    model: str, engine: Engine, samples: Sequence[tuple[float, float]], loss: Any
) -> dict[str, Any]:
    prefill, decode = (quartiles(column) for column in zip(*samples, strict=True))
    return {
        "model": model,
        "engine": engine.name,
        "bytes": engine.nbytes,
        "decode_tok_s": decode.median,
        "prefill_tok_s": prefill.median,
        "decode_quartiles": [decode.low, decode.high],
        "prefill_quartiles": [prefill.low, prefill.high],
        "threads": torch.get_num_threads(),
        "kl": loss.kl if loss else None,
        "kl_error": loss.error if loss else None,
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    """Tables for a person, then targets and who is missing."""
    console.print(
        f"{found['threads']} threads; prompt of {found['prompt_tokens']} tokens, "
        f"{found['new_tokens']} written; tokens per second, medians"
    )
    titles = ("model", "engine", "MB", "decode", "quartiles", "prefill", "quartiles", "KL")
    console.print(table(*titles, rows=map(_cells, found["rows"]), numbers_from=2))
    loads = ("loaded", "MB", "resident", "cold: read s", "load s", "warm: read s", "load s")
    console.print(table(*loads, rows=map(_footprint_cells, found["footprints"])))
    targets.show_targets(found["targets"], console)
    for name, reason in found["engines_missing"].items():
        console.print(f"not measured: {name}: {reason}", style="yellow", markup=False)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def spread(name: str) -> str:
        low, high = row[f"{name}_quartiles"]
        return f"{low:.1f}-{high:.1f}"

    kl = "" if row["kl"] is None else f"{row['kl']:.4f} ± {row['kl_error']:.4f}"
    return [
        row["model"],
        row["engine"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['decode_tok_s']:.1f}",
        spread("decode"),
        f"{row['prefill_tok_s']:.1f}",
        spread("prefill"),
        kl,
    ]


def _footprint_cells(row: Mapping[str, Any]) -> list[str]:
    sizes = (f"{row[name] / 1e6:.1f}" for name in ("bytes", "resident_bytes"))
    names = ("read_s_cold", "load_s_cold", "read_s_warm", "load_s_warm")
    return [row["model"], *sizes, *(f"{row[name]:.2f}" for name in names)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and (without --quick) keep the result."""
    parser = argparse.ArgumentParser(
        prog="quantlib bench decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="SmolLM2 alone; nothing is kept")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--work", type=Path, help="work directory of the compression to use")
    parser.add_argument(
        "--model", choices=MODELS, action="append", help="this one alone; kept under its own name"
    )
    options = parser.parse_args(arguments)
    quiet_transformers()
    found = run(options.quick, options.work, options.model)
    if options.json:
        print_json(found)
    else:
        show(found, answers())
    if not options.quick:
        names = ["decode", *(name.lower().replace(" ", "-") for name in options.model or ())]
        notes().print(str(record.write(record.of_kernels("_".join(names)), found)))


if __name__ == "__main__":
    main()
