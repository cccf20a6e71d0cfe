"""Whisper: sound in, the words in it out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantlib.calibration.media import read_audio
from quantlib.calibration.objectives import TokenObjective
from quantlib.calibration.paths.reading import WORDS
from quantlib.calibration.paths.route import ANSWER, Route, Routes
from quantlib.calibration.paths.tools import Tools, row
from quantlib.calibration.records import SPEECH, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models.families import AUDIO


def transcript(tools: Tools, answer: str) -> tuple[list[int], int]:
    """Token ids of a transcript as the decoder reads it, its end included, and how many of the
    first are no words: where it starts, and that it has no times.

    Words begin with a space, as those that Whisper was trained on do.
    """
    start = tools.config.get("decoder_start_token_id", tools.generation.get("bos_token_id"))
    end = tools.token("eos")
    if start is None or end is None:
        raise DataError(
            f"the config.json in {tools.folder} does not name the decoder's first token"
        )
    prefix = [int(start)]
    timeless = tools.generation.get("no_timestamps_token_id")
    prefix += [] if timeless is None else [int(timeless)]
    words = tools.tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
    return [*prefix, *words, end], len(prefix)


def sound_of(tools: Tools, record: Record) -> NDArray[np.float32]:
    """The samples of a record's sound. Raises DataError for another rate than the model's, and for
    more than it hears at once."""
    rate = int(tools.sounds.sampling_rate)
    sound = read_audio(record.file, rate)
    longest = int(tools.sounds.n_samples)
    if len(sound) > longest:
        raise DataError(
            f"{record.file} is {len(sound) / rate:.1f} s long, and the model hears "
            f"{longest / rate:.1f} s at once: cut it into pieces, each with its words"
        )
    return sound


def spectrogram(tools: Tools, record: Record) -> Any:
    """float32 [1, bins, frames]. Raises DataError as `sound_of`."""
    sound, rate = sound_of(tools, record), int(tools.sounds.sampling_rate)
    return tools.sounds(sound, sampling_rate=rate, return_tensors="pt")["input_features"]


def _sample(tools: Tools, _: Any, record: Record) -> Sample:
    ids, skipped = transcript(tools, record.answer)
    tokens = row(ids)
    tools.fits(tokens, record.where)
    where = torch.zeros(len(ids), dtype=torch.bool)
    where[skipped - 1 : -1] = True
    inputs = {
        "input_features": spectrogram(tools, record),
        "decoder_input_ids": tokens,
        "use_cache": False,
    }
    return Sample(inputs, TokenObjective(where, tokens[0, skipped:]))


def _check(tools: Tools, record: Record) -> None:
    features = spectrogram(tools, record)
    transcript(tools, record.answer)
    bins, frames = tools.config.get("num_mel_bins"), tools.config.get("max_source_positions")
    wanted = (int(bins or features.shape[1]), 2 * int(frames or features.shape[2] // 2))
    if tuple(features.shape[1:]) != wanted:
        raise DataError(
            f"the feature extractor in {tools.folder} makes {features.shape[1]} bins of "
            f"{features.shape[2]} frames, and by config.json there are {wanted[0]} of {wanted[1]}: "
            "fetch both again"
        )


FAMILIES = (Routes(("whisper",), (Route(ANSWER, (SPEECH,), (*WORDS, AUDIO), _sample, _check),)),)
