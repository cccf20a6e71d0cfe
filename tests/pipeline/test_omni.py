"""Qwen2.5-Omni's talker in one pass, its voices, and what it answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import quantlib
from quantlib.calibration.paths import find
from quantlib.calibration.paths.talker import code_logits
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.paths.voices import VOICES, read_voice
from quantlib.calibration.records import QUESTION, SPEECH, read_records
from quantlib.checkpoint.disk import read_json
from quantlib.errors import DataError, UsageError
from quantlib.pipeline.compress import compress, recipe_for
from quantlib.pipeline.opening import load_inputs
from quantlib.pipeline.plan import Budget
from quantlib.runtime.media import Media, prompt_of

from . import whole_models

CODES, WORDS = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-Omni. Not to be changed."""
    return whole_models.save("qwen2_5_omni", tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_models.records("qwen2_5_omni", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model() -> Any:
    return whole_models.build("qwen2_5_omni")


def tools_of(folder: Path) -> Tools:
    return Tools(folder, read_json(folder / "config.json"), 64)


@torch.no_grad()
def one_by_one(talker: Any, **given: Any) -> torch.Tensor:
    """The likeliest codes by the talker's own forward with its cache, behind `input_ids`.

    Its `generate` is not asked: transformers 5.23 drops a mask of ones there, and a talker without
    a mask begins without its first codes.
    """
    mask, codes = given["attention_mask"], []
    known = ("input_text_ids", "image_grid_thw", "audio_feature_lengths", "thinker_reply_part")
    inputs = {name: given[name] for name in known if name in given}
    found = talker(inputs_embeds=given["inputs_embeds"], attention_mask=mask, **inputs)
    for _ in range(CODES):
        logits = found.logits[:, -1]
        logits[:, talker.codec_bos_token] = -torch.inf
        codes.append(logits.argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(codes[-1])], 1)
        found = talker(
            input_ids=codes[-1],
            attention_mask=mask,
            past_key_values=found.past_key_values,
            thinker_reply_part=found.thinker_reply_part,
        )
    return torch.cat([given["input_ids"], *codes], 1)


@pytest.mark.parametrize(("kind", "stream"), [(QUESTION, "answer"), (SPEECH, "hearing")])
def test_one_pass_over_the_codes_says_what_was_said_code_by_code(
    kind: str, stream: str, folder: Path, data: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest codes that the talker takes one by one, of what the model's own `generate`
    hands it, are the likeliest here, with these codes given; and another first word of the voice
    changes what is likely."""
    tools, routes = tools_of(folder), find("qwen2_5_omni")
    assert routes is not None
    (route,) = [one for one in routes.routes if one.stream == stream]
    record = next(one for one in read_records(data) if one.kind == kind)
    asked = prompt_of(route.sample(tools, model, record))
    voice, heard = read_voice(tools), []

    def wave(codes: torch.Tensor, **_: Any) -> torch.Tensor:
        heard.append(codes)
        return torch.zeros(1)

    monkeypatch.setattr(model.token2wav, "forward", wave)
    monkeypatch.setattr(model.talker, "generate", partial(one_by_one, model.talker))
    model.speaker_map["w"] = {
        "bos_token": voice.start,
        "cond": voice.speaker,
        "ref_mel": voice.reference,
    }
    ids, _ = model.generate(
        **asked,
        speaker="w",
        thinker_max_new_tokens=WORDS,
        thinker_min_new_tokens=WORDS,
        thinker_do_sample=False,
    )
    (codes,) = heard
    thinking = {**asked, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompt = asked["input_ids"].shape[1]
    with torch.no_grad():
        said = code_logits(model, codes, prompt, voice.start, thinking)
        other = code_logits(model, codes, prompt, voice.start + 1, thinking)
    said[..., model.talker.codec_bos_token] = -torch.inf
    assert said.argmax(-1).tolist() == codes.tolist()
    assert not torch.allclose(said[0, 0], other[0, 0])


def test_a_model_that_speaks_needs_a_voice(data: Path, tmp_path: Path) -> None:
    """The sentence says how to make the file, and what to keep without one."""
    model = whole_models.save("qwen2_5_omni", tmp_path / "model")
    (model / VOICES).unlink()
    settings = {"windows": 3, "probe_windows": 1, "probes": 0, "expert_tokens": 4}
    with pytest.raises(DataError, match=r"spk_dict.pt.*--keep talker --keep token2wav"):
        load_inputs(model, recipe_for(Budget(), data=str(data), **settings))
    keep = ("talker", "token2wav")
    found = load_inputs(model, recipe_for(Budget(), data=str(data), keep=keep, **settings))
    assert found.workload is not None
    assert found.workload.tasks == ("text", "answer", "hearing")


def test_voices_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = whole_models.save("qwen2_5_omni", tmp_path / "model")
    whole_models.write_voice(model, size=13)
    with pytest.raises(DataError, match=r"voice 'w' .* has 13 and 8 numbers, .* has 12 and 8"):
        read_voice(tools_of(model))
    safetensors.torch.save_file({"w.cond": torch.zeros(1, 12)}, model / VOICES)
    with pytest.raises(DataError, match=r"does not have ref_mel, bos_token of the voice 'w'"):
        read_voice(tools_of(model))
    (model / VOICES).write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"speakers.safetensors cannot be read"):
        read_voice(tools_of(model))


def test_a_packed_checkpoint_speaks(folder: Path, data: Path, tmp_path: Path) -> None:
    """It has its voices, answers a prompt, and its own `generate` makes sound."""
    settings: dict[str, Any] = {"windows": 4, "probe_windows": 2, "probes": 0, "passes": 0}
    settings |= {"schemes": ["w8g32"], "report": False, "expert_tokens": 4}
    result = compress(folder, out=tmp_path / "out", data=data, bits=16, **settings)
    loaded = quantlib.load(result.path)
    dense, packed = whole_models.build("qwen2_5_omni"), loaded.model
    asked = loaded.encode("w1 w2 w3", chat=False)
    said = packed.thinker.generate(asked, max_new_tokens=4, do_sample=False)[0, asked.shape[1] :]
    told = loaded.tokenizer.decode(said, skip_special_tokens=True)
    assert loaded.generate("w1 w2 w3", max_new_tokens=4, chat=False) == told
    dense.speaker_map = packed.speaker_map
    ids = torch.tensor([[1, 5, 6, 7]])
    options = {"speaker": "w", "thinker_max_new_tokens": 3, "talker_max_new_tokens": 6}
    options |= {"thinker_min_new_tokens": 3, "talker_eos_token_id": [95]}
    options |= {"talker_do_sample": False, "attention_mask": torch.ones_like(ids)}
    for model in (dense, packed):
        text, sound = model.generate(ids, **options)
        assert text.shape == (1, 7)
        assert sound.ndim == 1
        assert len(sound) > 0
        assert torch.isfinite(sound).all()


def test_a_sound_that_is_too_short_to_be_heard(folder: Path, tmp_path: Path, model: Any) -> None:
    sound = whole_models.write_sound(tmp_path / "a.wav", 0, samples=700)
    with pytest.raises(DataError, match=r"a\.wav is too short to be heard: 0\.04 s"):
        Media.of(model, folder).answer("", audio=sound)


def test_it_answers_about_pictures_and_sounds(folder: Path, tmp_path: Path, model: Any) -> None:
    media = Media.of(model, folder)
    picture = whole_models.write_picture(tmp_path / "a.png", 0)
    sound = whole_models.write_sound(tmp_path / "a.wav", 0)
    assert 1 <= len(media.answer("w1 w2", image=picture, max_new_tokens=3).tokens) <= 3
    dictated = media.answer("", audio=sound, max_new_tokens=3)
    asked = media.answer("w1 w2 w3 w4 w5 w6 w7 w8 w9 w1", audio=sound, max_new_tokens=3)
    assert 1 <= len(dictated.tokens) <= 3
    assert asked.prompt_tokens != dictated.prompt_tokens, "the question is part of the prompt"
    with pytest.raises(UsageError, match="are not drawn with here"):
        media.draw(["w1"])
