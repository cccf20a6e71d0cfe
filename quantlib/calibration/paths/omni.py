"""Qwen2.5-Omni: a thinker that reads words, pictures and sounds and writes words, a talker that
speaks them in codes, and what turns codes into a spectrogram and that into sound.

The model has no `forward` of its own. Its parts are run one by one, as its `generate` does, with
the answer given: one pass of the thinker, and one of the talker over the codes that the
full-precision talker drew for it. What the last two parts are given follows from these codes and
from a voice (`voices.py`). A spectrogram is made in many steps from noise; samples stand at a few
of them, rows without conditions included, which guidance compares with.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quantlib.calibration.objectives import TokenObjective, VectorObjective
from quantlib.calibration.paths.reading import (
    TEXT_ROUTE,
    WORDS,
    answer_sample,
    answers,
    by_parts,
    parsed,
    patches_of,
    question,
    token_of,
    with_answer,
)
from quantlib.calibration.paths.route import HEARING, Route, Routes
from quantlib.calibration.paths.speech import sound_of
from quantlib.calibration.paths.talker import code_logits, drawn_codes
from quantlib.calibration.paths.tools import Tools, row
from quantlib.calibration.paths.voices import Voice, read_voice
from quantlib.calibration.records import QUESTION, SPEECH, Record
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models.families import AUDIO
from quantlib.models.tables.omni import TALKER, TOKEN2WAV

DICTATION = "Write down what is said."
"""What is asked about a sound, where a record asks nothing."""
CODES_PER_TOKEN, MOST_CODES = 16, 128
"""Codes that are spoken for a token of the answer: 50 are a second, and some three tokens are said
in it; and of a sample."""
STEPS, GUIDANCE = 10, 0.5
"""From noise to a spectrogram, and how strongly it follows its conditions: the model's own. Steps
are Euler's, which is less exact than the model's and enough to stand where it passes."""
TIMES = (0.0, 0.25, 0.5, 0.75)
"""How much of the spectrogram is in the noise of a sample's rows."""
LEAST_FRAMES = 4
"""Of a sound: fewer leave no token of it."""


def think(model: Any, **inputs: Any) -> Any:
    """The thinker's forward."""
    return model.thinker(**inputs)


# -- hearing ---------------------------------------------------------------------------------------


def _tower(tools: Tools) -> Any:
    return parsed(tools).thinker_config.vision_config


def _by_parts(tools: Tools, text: str, image: Any) -> dict[str, Any]:
    inputs = by_parts(tools, text, image)
    inputs.pop("mm_token_type_ids")  # this model finds pictures by their token
    return inputs


def _heard(tools: Tools, record: Record) -> tuple[dict[str, Any], Tensor]:
    """The thinker's inputs of a sound with its answer behind it, and the answer's tokens."""
    sound, rate = sound_of(tools, record), int(tools.sounds.sampling_rate)
    found = tools.sounds(
        sound,
        sampling_rate=rate,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    frames = int(found["attention_mask"].sum())
    if frames < LEAST_FRAMES:
        raise DataError(f"{record.file} is too short to be heard: {len(sound) / rate:.2f} s")
    tokens = ((frames - 1) // 2 - 1) // 2 + 1  # two convolutions and a mean of pairs
    placeholder = str(tools.tokenizer.convert_ids_to_tokens(tools.audio_token_id))

    def encode(text: str) -> dict[str, Any]:
        ids = row(tools.ids(text.replace(placeholder, placeholder * tokens)))
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": found["input_features"],
            "feature_attention_mask": found["attention_mask"],
        }

    asked = record.text or DICTATION
    texts = tools.asked(asked, record.answer, placeholder, "audio")
    return with_answer(tools, texts, encode, record.where)


def _hearing(tools: Tools, _: Any, record: Record) -> Sample:
    return answer_sample(*_heard(tools, record), tools.audio_token_id)


def _check_hearing(tools: Tools, record: Record) -> None:
    inputs, _ = _heard(tools, record)
    bins = inputs["input_features"].shape[1]
    wanted = int(parsed(tools).thinker_config.audio_config.num_mel_bins)
    if bins != wanted:
        raise DataError(
            f"the feature extractor in {tools.folder} makes {bins} bins of a sound, and by "
            f"config.json there are {wanted}: fetch both again"
        )


# -- speaking --------------------------------------------------------------------------------------


def _seed(record: Record) -> int:
    return zlib.crc32(record.file.name.encode())


def _spoken(tools: Tools, model: Any, record: Record) -> dict[str, Any]:
    """Arguments of `code_logits` for a record, its answer spoken."""
    inputs, answer = (
        _heard(tools, record)
        if record.kind == SPEECH
        else question(tools, record, _by_parts, token_of)
    )
    prompt: dict[str, Any] = {
        "prompt": inputs["input_ids"].shape[1] - len(answer),
        "start": read_voice(tools).start,
        "thinking": {**inputs, "use_cache": False},
    }
    count = min(MOST_CODES, CODES_PER_TOKEN * len(answer))
    return {"codes": drawn_codes(model, count, **prompt, seed=_seed(record)), **prompt}


def _itself(output: Tensor) -> Tensor:
    return output


def _speaking(tools: Tools, model: Any, record: Record) -> Sample:
    inputs = _spoken(tools, model, record)
    return Sample(inputs, TokenObjective(None, inputs["codes"][0], _itself))


# -- from codes to sound ---------------------------------------------------------------------------


def steps_of_spectrogram(
    model: Any, noisy: Tensor, time: Tensor, codes: Tensor, speaker: Tensor, reference: Tensor
) -> Tensor:
    """What the diffusion transformer says at some steps: [2 times, frames, bins], rows without
    conditions behind the others.

    noisy: [times, frames, bins]. time: [times]. codes: [1, n]. speaker: [1, size]; reference: [1,
    its frames, bins], of a voice.
    """
    rows, frames = noisy.shape[:2]
    found: Tensor = model.token2wav.code2wav_dit_model(
        hidden_states=noisy,
        condition_vector=reference.repeat(rows, 1, 1),
        speaker_embedding=speaker[:, None].repeat(rows, frames, 1),
        quantized_code=codes.repeat(rows, 1),
        time_step=time,
        apply_cfg=True,
    )
    return found


def sound_from(model: Any, spectrogram: Tensor) -> Tensor:
    """Samples [n, 1] of a spectrogram [1, bins, frames]."""
    found: Tensor = model.token2wav.code2wav_bigvgan_model(spectrogram)
    return found.reshape(-1, 1)


@torch.no_grad()
def _way(model: Any, codes: Tensor, voice: Voice, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, and the spectrogram that the model makes of it: [1, frames, bins] both."""
    dit, generator = model.token2wav.code2wav_dit_model, torch.Generator().manual_seed(seed)
    noise = torch.randn(1, codes.shape[1] * dit.repeats, dit.mel_dim, generator=generator)
    times = 1 - torch.cos(torch.pi / 2 * torch.linspace(0, 1, STEPS))  # small steps first
    state = noise
    for now, then in pairwise(times):
        found = steps_of_spectrogram(model, state, now[None], codes, voice.speaker, voice.reference)
        asked, unasked = found.chunk(2)
        state = state + (then - now) * (asked + GUIDANCE * (asked - unasked))
    return noise, state


def _diffusing(tools: Tools, model: Any, record: Record) -> Sample:
    voice, codes = read_voice(tools), _spoken(tools, model, record)["codes"]
    noise, target = _way(model, codes, voice, _seed(record))
    time = torch.tensor(TIMES)
    share = time[:, None, None]
    inputs = {
        "noisy": share * target + (1 - share) * noise,
        "time": time,
        "codes": codes,
        "speaker": voice.speaker,
        "reference": voice.reference,
    }
    return Sample(inputs, VectorObjective(_itself))


def _sounding(tools: Tools, model: Any, record: Record) -> Sample:
    voice, codes = read_voice(tools), _spoken(tools, model, record)["codes"]
    _, spectrogram = _way(model, codes, voice, _seed(record))
    return Sample({"spectrogram": spectrogram.mT}, VectorObjective(_itself))


def _check_spoken(tools: Tools, record: Record) -> None:
    if record.kind == SPEECH:
        _heard(tools, record)
    else:
        question(tools, record, _by_parts, token_of)
    read_voice(tools)


_ASKED = (SPEECH, QUESTION)

FAMILIES = (
    Routes(
        ("qwen2_5_omni",),
        (
            replace(TEXT_ROUTE, run=think),
            replace(
                answers(patches_of(_tower), encode=_by_parts, placeholder=token_of),
                run=think,
            ),
            Route(
                HEARING,
                (SPEECH,),
                (*WORDS, AUDIO),
                _hearing,
                _check_hearing,
                run=think,
                modalities=("text", "audio"),
            ),
            # The thinker runs, too: no reason to ask for a voice where the talker is kept.
            Route("codec", _ASKED, (TALKER,), _speaking, _check_spoken, run=code_logits),
            Route(
                "spectrogram",
                _ASKED,
                (TOKEN2WAV,),
                _diffusing,
                _check_spoken,
                run=steps_of_spectrogram,
            ),
            Route("sound", _ASKED, (TOKEN2WAV,), _sounding, _check_spoken, run=sound_from),
        ),
    ),
)
