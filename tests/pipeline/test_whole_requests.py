"""Requests for models of several parts that cannot be met, and runs that are continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from quantlib.errors import DataError, ModelError, UsageError
from quantlib.pipeline.compress import open_run, recipe_for
from quantlib.pipeline.opening import load_inputs
from quantlib.pipeline.parts import calibrate_whole, parts_there, summary
from quantlib.pipeline.plan import Budget
from quantlib.pipeline.shares import load_shares
from quantlib.recipe import Recipe

from ..models import stacked_models
from . import whole_models

FEW: dict[str, Any] = {"windows": 3, "probe_windows": 1, "probes": 0, "expert_tokens": 4}


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Janus. Not to be changed."""
    return whole_models.save("janus", tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its records."""
    return whole_models.records("janus", tmp_path_factory.mktemp("data"))


def recipe(data: Path, **changes: Any) -> Recipe:
    return recipe_for(Budget(), data=str(data), **(FEW | changes))


def inputs(model: Path, data: Path, **changes: Any) -> Any:
    return load_inputs(model, recipe(data, **changes))


def test_a_stream_without_a_record_is_named_with_what_it_leaves_unknown(
    janus: Path, tmp_path: Path
) -> None:
    some = whole_models.records("janus", tmp_path, kinds=("text", "question"))
    sentence = (
        r"no record for the stream image \(records with prompt, target\): nothing would be known "
        r"of generation_embeddings, generation_projector, generation_head\. .*"
        "--keep generation_embeddings --keep generation_projector --keep generation_head"
    )
    # pictures of questions are enough for the image encoder and decoder
    with pytest.raises(DataError, match=sentence):
        inputs(janus, some)


def test_what_is_kept_needs_no_records(janus: Path, tmp_path: Path) -> None:
    some = whole_models.records("janus", tmp_path, kinds=("text", "question"))
    found = inputs(janus, some, keep=("generation_*",))
    assert found.workload is not None
    assert found.workload.tasks == ("text", "answer", "decoder", "codes")
    kept = {row.component for row in found.model_map.kept if row.reason == "kept by request"}
    assert kept == {"generation_embeddings", "generation_projector", "generation_head"}


def test_kept_patterns_that_match_nothing_list_the_components(janus: Path, data: Path) -> None:
    with pytest.raises(UsageError, match=r"--keep vision matches no weight .* vision_tower"):
        inputs(janus, data, keep=("vision",))
    with pytest.raises(UsageError, match="leaves nothing to quantize"):
        inputs(janus, data, keep=("*",))


def test_plain_text_reaches_only_a_language_model(janus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(whole_models.words(n, 40) for n in range(8)))
    with pytest.raises(DataError, match=r"no record for any of the streams answer .*, image \(rec"):
        inputs(janus, text)
    others = ("vision_tower", "projector", "generation_*", "image_*")
    found = inputs(janus, text, keep=others, seqlen=16)
    assert found.workload is None
    assert found.windows.shape == (4, 16)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("processor_config.json", r"\(there is no processor_config.json or preprocessor_config"),
        ("tokenizer.json", "has no usable tokenizer"),
    ],
)
def test_a_model_of_pictures_needs_its_processor(
    file: str, sentence: str, data: Path, tmp_path: Path
) -> None:
    model = whole_models.save("janus", tmp_path / "model")
    (model / file).unlink()
    with pytest.raises(DataError, match=sentence):
        inputs(model, data)


def test_a_processor_that_disagrees_with_the_config_is_found(data: Path, tmp_path: Path) -> None:
    model = whole_models.save("janus", tmp_path / "model")
    words = whole_models.tokenizer()
    plain = whole_models.PLAIN

    def replaced(side: int, tokens: int) -> Path:
        size = {"height": side, "width": side}
        pixels = transformers.JanusImageProcessorPil(size=size, min_size=1, **plain)
        transformers.JanusProcessor(pixels, words, num_image_tokens=tokens).save_pretrained(model)
        return model

    with pytest.raises(DataError, match=r"pictures of 16 x 16 pixels, and config.json says 8 x 8"):
        inputs(replaced(16, 16), data)
    with pytest.raises(DataError, match=r"puts 9 tokens in the place of a picture .* it has 16"):
        inputs(replaced(8, 9), data)


WORDS, PLAIN = whole_models.tokenizer(), whole_models.PLAIN


def _clip_pictures(side: int) -> Any:
    square = {"height": side, "width": side}
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=square, **PLAIN
    )


def _llava(side: int, patch: int) -> Any:
    return transformers.LlavaProcessor(
        _clip_pictures(side), WORDS, patch, "default", num_additional_image_tokens=1
    )


def _siglip_pictures(side: int) -> Any:
    return transformers.SiglipImageProcessorPil(size={"height": side, "width": side}, **PLAIN)


def _gemma(tokens: int) -> Any:
    pixels = transformers.Gemma3ImageProcessorPil(
        size={"height": 28, "width": 28}, do_pan_and_scan=False, **PLAIN
    )
    return transformers.Gemma3Processor(pixels, WORDS, image_seq_length=tokens)


def _idefics(tokens: int) -> Any:
    edge = {"longest_edge": 28}
    pixels = transformers.Idefics3ImageProcessorPil(
        size=edge, max_image_size=edge, do_image_splitting=False
    )
    return transformers.Idefics3Processor(pixels, WORDS, image_seq_len=tokens)


def _qwen_pictures(patch: int) -> Any:
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": 256, "longest_edge": 256}
    )


def _chameleon(tokens: int) -> Any:
    square = {"height": 8, "width": 8}
    pixels = transformers.ChameleonImageProcessorPil(
        size={"shortest_edge": 8}, crop_size=square, **PLAIN
    )
    return transformers.ChameleonProcessor(pixels, WORDS, image_seq_length=tokens)


def _sounds(bins: int) -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=bins, chunk_length=1, hop_length=500)


OTHERS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "llava, patches": (
        *("llava_dinov2", lambda: _llava(28, 7)),
        r"puts 16 tokens in the place of a picture .* it has 4",
    ),
    "llava, pixels": (
        *("llava", lambda: _llava(56, 14)),
        "pictures of 56 x 56 pixels, and config.json says 28 x 28",
    ),
    "gemma": ("gemma3", lambda: _gemma(9), r"puts 9 tokens .* it has 4"),
    "idefics": ("idefics3", lambda: _idefics(4), r"puts 4 tokens .* it has 1"),
    "qwen, patches": (
        *("qwen2_5_vl", lambda: _qwen_pictures(8)),
        "has a patch_size of 8, and config.json a patch_size of 4",
    ),
    "qwen, another's": (
        *("qwen2_5_vl", lambda: _clip_pictures(28)),
        "is a CLIPImageProcessorPil, which does not cut pictures into patches",
    ),
    "chameleon": ("chameleon", lambda: _chameleon(9), r"puts 9 tokens .* it has 16"),
    "clip": ("clip", lambda: _clip_pictures(56), "56 x 56 pixels, and config.json says 28 x 28"),
    "siglip": (
        *("siglip", lambda: _siglip_pictures(56)),
        "56 x 56 pixels, and config.json says 28 x 28",
    ),
    "clip tower": (
        *("clip_vision", lambda: _clip_pictures(56)),
        "56 x 56 pixels, and config.json says 28 x 28",
    ),
    "whisper": ("whisper", lambda: _sounds(16), "makes 16 bins of 32 frames, and by config.json"),
}
"""What is wrong -> the model, the processor that is put beside it, and the sentence."""


@pytest.mark.parametrize("wrong", OTHERS)
def test_every_family_finds_a_processor_that_disagrees(wrong: str, tmp_path: Path) -> None:
    """Before any work, and with both numbers: transformers would fail in the middle, or not at
    all."""
    case, processor, sentence = OTHERS[wrong]
    model = whole_models.save(case, tmp_path / "model")
    data = whole_models.records(case, tmp_path)
    inputs(model, data)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink(missing_ok=True)
    processor().save_pretrained(model)
    with pytest.raises(DataError, match=sentence):
        inputs(model, data)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"feature_size": 16}, "makes 16 bins of a sound, and by config.json there are 8"),
        ({"merge_size": 1}, "has a merge_size of 1, and config.json a spatial_merge_size of 2"),
    ],
)
def test_omni_finds_a_processor_that_disagrees(
    setting: dict[str, int], sentence: str, tmp_path: Path
) -> None:
    """Its pictures and sounds are prepared by what one file says."""
    model = whole_models.save("qwen2_5_omni", tmp_path / "model")
    data = whole_models.records("qwen2_5_omni", tmp_path)
    file = model / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(DataError, match=sentence):
        inputs(model, data)


def test_emu3_finds_an_image_encoder_that_disagrees(tmp_path: Path) -> None:
    """Its processor halves pictures three times, whatever the config says."""
    model = whole_models.save("emu3", tmp_path / "model")
    data = whole_models.records("emu3", tmp_path)
    stacked_models.save(stacked_models.build("emu3"), model)  # which halves them once
    with pytest.raises(DataError, match=r"puts 6 tokens in the place of a picture .* it has 72"):
        inputs(model, data)


def test_media_of_the_wrong_kind_are_found_before_any_work(janus: Path, tmp_path: Path) -> None:
    path = whole_models.records("janus", tmp_path)
    (tmp_path / "3.png").write_text("no picture")
    with pytest.raises(DataError, match=r"3\.png is not a picture"):
        inputs(janus, path)


def test_a_picture_of_a_size_that_the_processor_refuses(tmp_path: Path) -> None:
    """Qwen's takes none that is more than 200 times as long as wide."""
    model = whole_models.save("qwen2_5_vl", tmp_path / "model")
    path = whole_models.records("qwen2_5_vl", tmp_path)
    Image.new("RGB", (1, 300)).save(tmp_path / "3.png")
    with pytest.raises(
        DataError, match=r"line 10: .* refuses .*3\.png, a picture of 1 x 300 pixels"
    ):
        inputs(model, path)


def test_records_that_a_model_has_no_use_for_are_named(janus: Path, tmp_path: Path) -> None:
    path = whole_models.records("janus", tmp_path, kinds=("text", "speech"))
    with pytest.raises(DataError, match=r"line 7: a record of kind speech, .* reads .*question"):
        inputs(janus, path)


def test_sounds_that_do_not_fit_whisper(tmp_path: Path) -> None:
    model = whole_models.save("whisper", tmp_path / "model")
    path = whole_models.records("whisper", tmp_path)
    whole_models.write_sound(tmp_path / "2.wav", 0, samples=20000)
    with pytest.raises(DataError, match=r"2\.wav is 1\.2 s long, and the model hears 1\.0 s"):
        inputs(model, path)
    whole_models.write_sound(tmp_path / "2.wav", 0, rate=8000)
    with pytest.raises(DataError, match="has 8,000 samples a second, and the model was made for"):
        inputs(model, path)


def test_options_that_only_language_models_have_are_refused(janus: Path, data: Path) -> None:
    swaps = {"swaps": 2, "probe_windows": 2}
    for option in ({"rotation": "pca"}, swaps, {"gradients": False}):
        with pytest.raises(UsageError, match="is for models that are a language model and nothing"):
            inputs(janus, data, **option)


def test_a_language_model_has_no_use_for_pictures(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    data = whole_models.records("janus", tmp_path)
    with pytest.raises(ModelError, match=r"does not know how records run through .* 'llama'"):
        inputs(tiny_llama(tmp_path / "model"), data)


def test_every_stream_is_calibrated_once(janus: Path, data: Path, tmp_path: Path) -> None:
    """A run that was killed in one stream has those before it; another weighting has none."""

    class Killed(Exception):
        pass

    class Progress:
        def __init__(self, ticks: int) -> None:
            self.left, self.said = ticks, []

        def start(self, stage: str, total: int) -> None: ...

        def tick(self, message: str = "") -> None:
            self.left -= 1
            if not self.left:
                raise Killed

        def finish(self) -> None: ...

        def say(self, message: str) -> None:
            self.said.append(message)

    settings = recipe(data)
    with (
        pytest.raises(Killed),
        open_run(janus, tmp_path / "work", settings, progress=Progress(8)) as run,
    ):
        calibrate_whole(run)
    again = Progress(1000)
    with open_run(janus, tmp_path / "work", settings, progress=again) as run:
        assert parts_there(run) == (2, 5)
        calibrate_whole(run)
        assert again.left == 1000 - 3 * 3
        assert parts_there(run) == (5, 5)
        assert summary(run, "image").terms == 3 * 16
    shares = load_shares(tmp_path / "work")
    language = shares["language_model"]
    assert set(language.streams) == {"text", "answer", "image"}
    assert set(language.modalities) == {"text", "image", "image token"}
    for found in (language.streams, language.modalities):
        assert sum(share.tokens for share in found.values()) == pytest.approx(1)
        assert sum(share.weight for share in found.values()) == pytest.approx(1)
    tower = shares["vision_tower"]
    assert set(tower.streams) == {"answer"}
    assert not tower.modalities
    assert any(line.startswith("language_model is rounded for ") for line in again.said)
    with open_run(janus, tmp_path / "work", recipe(data, weighting="none")) as run:
        assert parts_there(run) == (0, 5)


def test_experts_that_saw_too_little_are_given_further_records(tmp_path: Path) -> None:
    model = whole_models.save("janus_mixture", tmp_path / "model")
    data = whole_models.records("janus_mixture", tmp_path, count=14)
    others = ("image_*", "vision_tower", "projector")
    settings = recipe(data, windows=2, expert_tokens=16, keep=others)
    with open_run(model, tmp_path / "work", settings) as run:
        calibrate_whole(run)
        seen = [summary(run, task) for task in run.tasks]
    experts = [name for name, matrices in seen[0].groups.items() if len(matrices) > 1]
    assert experts
    for name in experts:
        for expert in range(len(seen[0].groups[name])):
            assert sum(one.groups[name][expert][0] for one in seen) >= 16, (name, expert)
    assert any(one.samples > 2 for one in seen)
    greedy = recipe(data, windows=2, expert_tokens=10_000, keep=others)
    with (
        open_run(model, tmp_path / "work", greedy) as run,
        pytest.raises(DataError, match=r"of 10000 tokens, fewer reached .*expert"),
    ):
        calibrate_whole(run)
