"""The bed `speech`: sounds are written as they are, and the folder knows how Whisper is asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlib.bench.beds import speech
from quantlib.bench.beds.folders import write_records
from quantlib.bench.packages import AssetUnavailable
from quantlib.bench.speech import RATE
from quantlib.calibration.media import read_audio
from quantlib.calibration.paths.speech import transcript
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import SPEECH, read_records
from quantlib.models.source import Source

SETTINGS = {"suppress_ids": [5, 6], "suppress_ids_begin": [7]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `bench.speech.fetch_whisper` leaves, of a tiny random Whisper."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    folder = tmp_path_factory.mktemp("whisper")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["one two three of clubs"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    config = WhisperConfig(
        vocab_size=bpe.get_vocab_size(),
        num_mel_bins=80,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForConditionalGeneration(config).half().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bed") / "model"
    speech.save_model(weights, SETTINGS, folder)
    return folder


def test_sounds_are_read_as_they_were_written(tmp_path: Path) -> None:
    samples = torch.linspace(-1, 1, 4001)
    row = speech.sound_row(tmp_path / "sounds" / "a.wav", samples, "one two")
    write_records(tmp_path / "test.jsonl", [row])
    [record] = read_records(tmp_path / "test.jsonl")
    assert (record.kind, record.answer) == (SPEECH, "one two")
    heard = read_audio(record.file, RATE)
    # Half a step of 16 bits, and a whole one where 1.0 is cut to 32767.
    assert np.abs(heard - samples.numpy()).max() <= 1 / 32768


def test_the_folder_says_how_whisper_is_asked(model: Path) -> None:
    """The decoder begins with its start and 'no timestamps', as the route of calibration has it."""
    source = Source.open(model)
    tools = Tools(source.path, source.config, 512)
    ids, skipped = transcript(tools, "two of clubs")
    assert (ids[:2], skipped, ids[-1]) == ([1, 2], 2, 0)
    assert tools.generation["suppress_tokens"] == [5, 6]
    assert tools.generation["begin_suppress_tokens"] == [7]


def test_the_processor_and_the_model_transcribe(model: Path) -> None:
    opened, processor = speech.open_model(model)
    assert type(processor).__name__ == "WhisperProcessor"
    opened.generation_config.max_length = 32  # random weights do not stop by themselves
    silence: Any = torch.zeros(RATE)
    said = speech.transcribe(opened, processor, silence)
    assert isinstance(said, str)
    assert "<|" not in said


@pytest.mark.assets
@pytest.mark.slow
def test_calibration_and_test_share_no_sound() -> None:
    try:
        folder = speech.bed()
    except AssetUnavailable as error:
        pytest.skip(str(error))
    calibration = read_records(folder / "calibration.jsonl")
    test = read_records(folder / "test.jsonl")
    assert len(calibration) == speech.CLIPS
    assert len(test) == 10
    sounds = [record.file.read_bytes() for record in (*calibration, *test)]
    assert len(set(sounds)) == len(sounds)
    assert all(record.answer.strip() for record in calibration)
