"""Weights, activations and KV cache near 4 bits: quantlib beside what is published, at true bits.

    python -P -m quantlib.bench.quality_w4a4          everything that is not measured yet
    python -P -m quantlib.bench.quality_w4a4 --model aligned --method resq --seeds 1
    python -P -m quantlib.bench.quality_w4a4 --plug quantlib=my.module:function

Models: SmolLM2-135M-Instruct (permuted; `bench.assets`), the same with aligned and with rotated
outliers (`bench.outliers`), Whisper tiny.en (`bench.speech`). Methods: `bench.w4a4.methods`,
quantlib's own pipeline (`bench.w4a4.ours`), and what `--plug` brings: a function (subject, seed) ->
`Quantized`, of any module that can be imported.

Calibration is the same for all: 24 windows of 512 tokens of the calibration text, or 24 clips of
spoken prompts, 7 to 28 seconds long, with full precision's own transcripts. Language models are
measured on 12 held-out windows (KL from full precision and perplexity over second halves), Whisper
on ten utterances (KL along the full-precision transcripts, word error rate of greedy transcripts).
Methods with random rotations are run with every seed, the others once; a row has a seed's figures,
the summary a method's mean and its 95 % interval over seeds (three; of Whisper five, as they differ
more there). Each row is written when it is done, and rows that are there are not measured again
(`--again` does, and `--fresh` forgets all). What the table is held against (`bench.w4a4.claims`) is
printed below it.

GPTQ's Hessians are the full-precision model's, collected once and turned into each method's and
seed's basis. `--hessians prefix` sums them behind what was rounded already, activations unrounded,
as ResQ's code does: another forward pass of all calibration data for every row, which more than
doubles the time.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantlib.bench import assets, outliers, record, speech
from quantlib.bench.w4a4 import ours
from quantlib.bench.w4a4.claims import claims, told
from quantlib.bench.w4a4.methods import ABLATIONS, METHODS, Method, Quantized, quantize
from quantlib.bench.w4a4.subjects import Language, Speech, Subject
from quantlib.calibration.data import load_windows
from quantlib.errors import UsageError
from quantlib.evaluation.compare import load_tokenizer
from quantlib.evaluation.estimate import Estimate

NAME = "quality_w4a4"
SEQLEN, CALIBRATION, HELD_OUT, CLIPS = 512, 24, 12, 24
WHISPER = "whisper"
SEEDS, WHISPER_SEEDS = 3, 5
LENGTHS = (7, 14, 21, 28)
"""Seconds of calibration clips, in turn. Whisper pads all it hears to 30 seconds, and utterances
leave most of them empty: what the model makes of silence must be rounded well, too."""
MODELS = (*outliers.KINDS, WHISPER)
ABLATED = ("aligned", "rotated")
"""Models that ResQ's ablation is measured on."""
HESSIANS = ("shared", "prefix")

Run = Callable[[Subject, int], Quantized]
Row = dict[str, Any]

OURS: dict[str, Run] = {
    "quantlib": ours.quantlib,
    "quantlib_refined": ours.quantlib_refined,
    "quantlib_strict": ours.quantlib_strict,
    "quantlib_codes": ours.quantlib_codes,
    "quantlib_floats": ours.quantlib_floats,
}
"""`bench.w4a4.ours`."""


def open_subject(model: str, windows: int, held_out: int) -> Subject:
    """A model of `MODELS` with its data."""
    if model == WHISPER:
        return open_whisper(windows)
    folder = outliers.variant_folder(next(kind for kind in outliers.KINDS if kind == model))
    tokenizer = load_tokenizer(folder)
    calibration = str(assets.wikipedia_text("calibration"))
    test = str(assets.wikipedia_text("held_out"))
    return Language.open(
        model,
        folder,
        load_windows(calibration, tokenizer, SEQLEN, windows, seed=0),
        load_windows(test, tokenizer, SEQLEN, held_out, seed=0),
    )


def open_whisper(clips: int) -> Speech:
    """Whisper tiny.en, calibrated on prompts, measured on utterances."""
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    folder = speech.fetch_whisper()
    spoken = speech.utterances(speech.fetch_recordings(speech.UTTERANCES))
    prompts = speech.calibration_clips(speech.fetch_recordings(speech.PROMPTS), clips)
    lengths = [LENGTHS[index % len(LENGTHS)] * speech.RATE for index in range(clips)]
    return Speech(
        WHISPER,
        WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32),
        PreTrainedTokenizerFast.from_pretrained(folder),
        WhisperFeatureExtractor.from_pretrained(folder),
        [clip[:length] for clip, length in zip(prompts, lengths, strict=True)],
        [(one.audio, one.text) for one in spoken],
    )


def full_precision(subject: Subject) -> Row:
    """The figures of the model as it is, and how far its channels differ."""
    row: Row = {"figures": subject.figures(subject.original)}
    print(f"{subject.name} in full precision: {row['figures']}")
    if isinstance(subject, Language):
        row["channels"] = outliers.channel_statistics(subject.original, subject.calibration[:2])
        print(outliers.describe(row["channels"]), flush=True)
    return row


def measure(subject: Subject, name: str, seed: int, run: Run) -> Row:
    """One row: what a method made of a model, and what that took."""
    started = time.monotonic()
    quantized = run(subject, seed)
    seconds = time.monotonic() - started
    row: Row = {"model": subject.name, "method": name, "seed": seed}
    row |= {"bits": quantized.bits.to_json(), **subject.figures(quantized.model)}
    if quantized.notes:
        row["notes"] = dict(quantized.notes)
    row["seconds"] = {
        "quantize": round(seconds, 1),
        "evaluate": round(time.monotonic() - started - seconds, 1),
    }
    return row


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Per model and method: bits, every figure's mean with its 95 % interval over seeds, and the
    KL as a share of ResQ's on the same model."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), []).append(row)
    summary = []
    for (model, method), found in groups.items():
        line: Row = {"model": model, "method": method, "seeds": len(found)}
        line["bits"] = {
            each: sum(row["bits"][each] for row in found) / len(found) for each in found[0]["bits"]
        }
        for name in ("kl", "perplexity", "same_top", "word_error_rate"):
            if name in found[0]:
                estimate = Estimate.mean([row[name] for row in found])
                line[name] = {"mean": estimate.value, "interval": estimate.interval()}
        summary.append(line)
    resq = {line["model"]: line["kl"]["mean"] for line in summary if line["method"] == "resq"}
    for line in summary:
        if line["model"] in resq:
            line["kl_of_resq"] = line["kl"]["mean"] / resq[line["model"]]
    return summary


def table(summary: Sequence[Row]) -> str:
    """The summary in lines of text."""
    lines = [
        "model    method          seeds  W bits  A bits KV bits  KL                        "
        "ppl/WER   of ResQ's KL"
    ]
    for line in summary:
        bits, kl = line["bits"], line["kl"]
        text = f"{line['model']:8} {line['method']:15} {line['seeds']:5}"
        text += "".join(f"{bits[each]:8.3f}" for each in ("weight_codes", "activation_codes", "kv"))
        text += f"  {kl['mean']:.4f}"
        if kl["interval"]:
            text += " ({:.4f} .. {:.4f})".format(*kl["interval"])
        quality = line["perplexity" if "perplexity" in line else "word_error_rate"]
        text = f"{text:74}  {quality['mean']:<9.4g}"
        if "kl_of_resq" in line:
            text += f"  {line['kl_of_resq']:.2f}"
        lines.append(text)
    return "\n".join(lines)


class Results:
    """The result file: every row as soon as it is there."""

    def __init__(self, name: str, settings: Row, fresh: bool) -> None:
        self.name = name
        self.settings = settings
        self.path = record.RESULTS / f"{name}.json"
        self.rows: list[Row] = []
        self.models: Row = {}
        self.fresh = fresh
        self.stale: set[tuple[str, str, int]] = set()
        if not fresh:
            self.read()

    def read(self) -> None:
        """Take the file's rows, where there is one: those of a process beside this one, too."""
        if not self.path.is_file():
            return
        found = json.loads(self.path.read_text(encoding="utf-8"))
        if found["settings"] != self.settings:
            raise SystemExit(
                f"{self.path.name} was measured with {found['settings']}, and these are "
                f"{self.settings}: name another file with --out, or forget that one with --fresh"
            )
        self.rows = list(found["rows"])
        self.models = {**found["models"], **self.models}

    def has(self, model: str, method: str, seed: int) -> bool:
        """Whether the row is there."""
        key = (model, method, seed)
        return key not in self.stale and any(_key(row) == key for row in self.rows)

    def forget(self, model: str, methods: Container[str]) -> None:
        """Leave a model's rows of these methods to be measured again; the file keeps them until
        one of them is."""
        self.stale |= {
            _key(row) for row in self.rows if row["model"] == model and row["method"] in methods
        }

    def add(self, row: Row) -> None:
        """Keep a row beside those that are there by now, and write the file."""
        self.path.parent.mkdir(exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not self.fresh:
                self.read()
            self.fresh = False
            self.stale.discard(_key(row))
            self.rows = [*(old for old in self.rows if _key(old) != _key(row)), row]
            self.write()
        finally:
            os.close(folder)

    def write(self) -> Path:
        """The file as it stands."""
        summary = summarise(self.rows)
        return record.write(
            self.name,
            {
                "settings": self.settings,
                "models": self.models,
                "summary": summary,
                "claims": [claim.to_json() for claim in claims(summary)],
                "rows": self.rows,
            },
        )


def _key(row: Row) -> tuple[str, str, int]:
    return row["model"], row["method"], row["seed"]


def runs(
    model: str, names: Sequence[str], plugs: dict[str, Run], seeds: int, prefix: bool
) -> Iterator[tuple[str, int, Run]]:
    """(name, seed, function) of everything to do on a model."""
    known: dict[str, Method] = dict(METHODS)
    if model in ABLATED or names:
        known |= ABLATIONS
    plugs = OURS | plugs
    chosen = names or [*known, *plugs]
    for name in (name for name in chosen if name in known and name not in plugs):
        method = known[name]
        run = partial(_quantize, method, prefix)
        yield from ((name, seed, run) for seed in range(seeds if method.random else 1))
    for seed in range(seeds):  # of one seed, runs share what they measured
        yield from ((name, seed, plugs[name]) for name in chosen if name in plugs)


def tidy(results: Results, model: str, seeds: int) -> None:
    """Remove what quantlib measured of a model, once all rows that share it are there."""
    for folder in set(ours.FOLDERS.values()):
        rows = [name for name, own in ours.FOLDERS.items() if own == folder]
        if all(results.has(model, name, seed) for name in rows for seed in range(seeds)):
            ours.forget(model, folder)


def _quantize(method: Method, prefix: bool, subject: Subject, seed: int) -> Quantized:
    return quantize(method, subject, seed, prefix)


def plug(text: str) -> tuple[str, Run]:
    """`NAME=MODULE:FUNCTION`, imported. Raises UsageError when it is not that, or not there."""
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    try:
        return name, getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--plug {text}: write NAME=MODULE:FUNCTION with a function that can be imported "
            f"({error})"
        ) from error


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--method", action="append", default=[], help="a method's or plug's name")
    parser.add_argument("--plug", type=plug, action="append", default=[])
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}, Whisper {WHISPER_SEEDS}")
    parser.add_argument("--hessians", choices=HESSIANS, default=HESSIANS[0])
    parser.add_argument("--windows", type=int, default=CALIBRATION, help="of calibration")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="windows to measure on")
    parser.add_argument("--out", default=NAME, help="name of the result file")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of the result file")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    return parser.parse_args()


def main() -> None:
    """Measure what is asked for and not there yet."""
    options = arguments()
    plugs = dict(options.plug)
    unknown = set(options.method) - set(METHODS) - set(ABLATIONS) - set(OURS) - set(plugs)
    if unknown:
        known = ", ".join([*METHODS, *ABLATIONS, *OURS, *plugs])
        raise SystemExit(f"there is no method {', '.join(sorted(unknown))}: use {known}")
    settings = {
        "seqlen": SEQLEN,
        "calibration": options.windows,
        "held_out": options.held_out,
        "hessians": options.hessians,
    }
    results = Results(options.out, settings, options.fresh)
    prefix = options.hessians == "prefix"
    for model in options.model or MODELS:
        seeds = options.seeds or (WHISPER_SEEDS if model == WHISPER else SEEDS)
        if options.again:
            results.forget(
                model, {name for name, *_ in runs(model, options.method, plugs, 1, False)}
            )
        todo = [
            run
            for run in runs(model, options.method, plugs, seeds, prefix)
            if not results.has(model, run[0], run[1])
        ]
        if not todo:
            continue
        try:
            subject = open_subject(model, options.windows, options.held_out)
        except assets.AssetUnavailable as error:
            print(f"{model} is left out: {error}")
            continue
        if model not in results.models:
            results.models[model] = full_precision(subject)
        for name, seed, run in todo:
            if not results.fresh:
                results.read()
            if results.has(model, name, seed):  # by a process beside this one
                continue
            row = measure(subject, name, seed, run)
            results.add(row)
            tidy(results, model, seeds)
            print(f"{model} {name} seed {seed}: KL {row['kl']:.4f}  {row['seconds']}", flush=True)
    summary = summarise(results.rows)
    print(table(summary))
    print(told(claims(summary)))


if __name__ == "__main__":
    main()
