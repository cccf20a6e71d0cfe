"""llama.cpp's own programs: converting and quantizing a model, its speed, its KL divergence.

Every figure is the program's own, read from what it prints; each runs as a process of its own.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlib.bench.peers import llama_build
from quantlib.bench.peers.linear import PeerMissing

_KL_LINE = re.compile(r"Mean\s+KLD:\s+(-?[\d.]+)\s*±\s*([\d.]+)")
_PPL_LINE = re.compile(r"Mean PPL\(Q\)/PPL\(base\)\s*:\s+([\d.]+)\s*±\s*([\d.]+)")
_LOGITS_MAGIC = b"_logits_"
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a model, one value per repetition."""

    prefill: list[float]
    decode: list[float]


@dataclass(frozen=True)
class Divergence:
    """KL(base || model) in nats per token and perplexity relative to the base, with llama.cpp's
    standard errors over tokens."""

    kl: float
    kl_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float


def parse_speed(text: str) -> Speed:
    """What `llama-bench -o json` prints. Raises PeerMissing when it is something else."""
    try:
        tests = json.loads(text)
        prefill = [t["samples_ts"] for t in tests if t["n_prompt"] > 0 and t["n_gen"] == 0]
        decode = [t["samples_ts"] for t in tests if t["n_prompt"] == 0 and t["n_gen"] > 0]
        return Speed([float(x) for x in prefill[0]], [float(x) for x in decode[0]])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PeerMissing(f"llama-bench printed what cannot be read ({error!r})") from error


def parse_divergence(text: str) -> Divergence:
    """What `llama-perplexity --kl-divergence` prints. Raises PeerMissing when it is not that."""
    kl, ratio = _KL_LINE.search(text), _PPL_LINE.search(text)
    if kl is None or ratio is None:
        raise PeerMissing(f"llama-perplexity gave no KL divergence: {llama_build.reason(text)}")
    return Divergence(float(kl[1]), float(kl[2]), float(ratio[1]), float(ratio[2]))


def read_windows(path: Path) -> Tensor:
    """The token windows, int64 [windows, length], of a file that `LlamaCpp.save_base` wrote: those
    that llama.cpp scores, so that others can be scored on the same."""
    with path.open("rb") as file:
        head = file.read(20)
        if len(head) < 20 or not head.startswith(_LOGITS_MAGIC):
            raise PeerMissing(f"{path} is no file of llama-perplexity's logits")
        length, _, windows = struct.unpack("<Iii", head[8:])
        tokens = np.fromfile(file, "<i4", length * windows)
    return torch.from_numpy(tokens.astype(np.int64)).reshape(windows, length)


class LlamaCpp:
    """The installed programs, with `threads` threads each."""

    def __init__(self, threads: int, cache: Path | None = None) -> None:
        """Raises PeerMissing when `make peers` has not installed them."""
        if not llama_build.installed(cache):
            raise PeerMissing("llama.cpp is not installed: run `make peers`")
        self.folder = llama_build.folder(cache)
        self.threads = str(threads)

    def convert(self, model: Path, target: Path, dtype: str) -> None:
        """A Hugging Face folder -> a GGUF file. dtype: f32, f16 or bf16."""
        script = str(self.folder / "convert_hf_to_gguf.py")
        command = [sys.executable, script, str(model), "--outfile", str(target)]
        self._run([*command, "--outtype", dtype])

    def quantize(self, source: Path, target: Path, kind: str, imatrix: Path | None = None) -> None:
        """kind: Q4_0, Q4_K_M, ...; imatrix: what `importance` wrote."""
        weighted = ["--imatrix", str(imatrix)] if imatrix else []
        files = [str(source), str(target), kind, self.threads]
        self._run([self._program("llama-quantize"), *weighted, *files])

    def importance(self, model: Path, text: Path, target: Path, windows: int) -> None:
        """The importance matrix of a model on the first `windows` windows of 512 tokens."""
        command = [self._program("llama-imatrix"), "-m", str(model), "-f", str(text)]
        command += ["-o", str(target), "--chunks", str(windows), "-c", "512", "--no-ppl"]
        self._run([*command, "-t", self.threads])

    def speed(self, model: Path, prompt: int, new: int, repetitions: int) -> Speed:
        """Reading `prompt` tokens at once, and writing `new` tokens one by one."""
        command = [self._program("llama-bench"), "-m", str(model), "-t", self.threads]
        command += ["-p", str(prompt), "-n", str(new), "-r", str(repetitions), "-o", "json"]
        return parse_speed(self._run(command))

    def save_base(self, model: Path, text: Path, target: Path, windows: int) -> Tensor:
        """Keep the full-precision logits on the first `windows` windows of 512 tokens in `target`;
        returns those windows, int64 [windows, 512]."""
        command = [
            self._program("llama-perplexity"),
            "-m",
            str(model),
            "-f",
            str(text),
            "-c",
            "512",
        ]
        command += ["--chunks", str(windows), "-t", self.threads]
        self._run([*command, "--kl-divergence-base", str(target)])
        return read_windows(target)

    def divergence(self, model: Path, base: Path) -> Divergence:
        """KL divergence from the model that `save_base` kept, second halves of its windows."""
        command = [self._program("llama-perplexity"), "-m", str(model), "-c", "512"]
        command += ["-t", self.threads, "--kl-divergence-base", str(base), "--kl-divergence"]
        return parse_divergence(self._run(command))

    def _program(self, name: str) -> str:
        return str(self.folder / name)

    def _run(self, command: Sequence[str]) -> str:
        """Standard output. Raises PeerMissing when the program fails or does not end."""
        name = Path(command[1] if command[0] == sys.executable else command[0]).name
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
        try:
            done = subprocess.run(command, timeout=TIMEOUT_SECONDS, **options)
        except subprocess.TimeoutExpired as error:
            raise PeerMissing(f"{name} did not end within {TIMEOUT_SECONDS} s") from error
        except OSError as error:
            raise PeerMissing(f"{name} cannot be run ({error}): run `make peers` again") from error
        if done.returncode != 0:
            raise PeerMissing(f"{name} failed: {llama_build.reason(done.stderr + done.stdout)}")
        return str(done.stdout)
