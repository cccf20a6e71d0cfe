"""Requests for models of several parts that cannot be met, and runs that are continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from quantlib.errors import DataError, ModelError, UsageError
from quantlib.pipeline.compress import open_run, recipe_for
from quantlib.pipeline.opening import load_inputs
from quantlib.pipeline.parts import SHARES_FILE, calibrate_whole, parts_there, summary
from quantlib.pipeline.plan import Budget
from quantlib.recipe import Recipe

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


def test_media_of_the_wrong_kind_are_found_before_any_work(janus: Path, tmp_path: Path) -> None:
    path = whole_models.records("janus", tmp_path)
    (tmp_path / "3.png").write_text("no picture")
    with pytest.raises(DataError, match=r"3\.png is not a picture"):
        inputs(janus, path)


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
    for option in ({"rotation": "pca"}, {"refine": True}, swaps, {"gradients": False}):
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
    shares = json.loads((tmp_path / "work" / SHARES_FILE).read_text())
    language = shares["language_model"]
    assert set(language["streams"]) == {"text", "answer", "image"}
    assert set(language["modalities"]) == {"text", "image"}
    for kind in ("streams", "modalities"):
        assert sum(language[kind].values()) == pytest.approx(1)
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
