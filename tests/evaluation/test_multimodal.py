"""Both directions by one call: which figures there are, and that they say what is the case."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from quantlib.errors import DataError, UsageError
from quantlib.evaluation.compare import compare
from quantlib.evaluation.figures import Figure
from quantlib.evaluation.judge import save_judge
from quantlib.evaluation.multimodal import Baseline, Given, evaluate_suite, open_model
from quantlib.evaluation.passes import Options
from quantlib.evaluation.suite import SuiteResult
from quantlib.models.skeleton import model_class

from ..models import stacked_models
from ..runtime import media_folders

JANUS_KINDS = ("text", "question", "generation")
OPTIONS = Options(max_new_tokens=4)


def figures(found: SuiteResult) -> dict[tuple[str, str], Figure]:
    return {(figure.task, figure.name): figure for figure in found.figures}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suite")


@pytest.fixture(scope="module")
def janus(folder: Path) -> Path:
    return media_folders.janus(folder / "janus")


@pytest.fixture(scope="module")
def disturbed(folder: Path) -> Path:
    model = media_folders.disturbed(stacked_models.build("janus"), 0.3)
    return media_folders.janus(folder / "disturbed", model)


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return media_folders.records(folder / "data", JANUS_KINDS)


@pytest.fixture(scope="module")
def judge(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "see.weight": torch.randn(4, 192, generator=generator),
        "digit.weight": torch.randn(3, 4, generator=generator),
    }
    palette = {"red": [1, 0, 0], "blue": [0, 0, 1]}
    spec = {
        "size": [8, 8],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "layers": [{"kind": "linear", "name": "see"}, {"kind": "relu"}],
        "heads": {"digit": {"name": "digit", "classes": ["one", "two", "three"]}},
        "rules": {"color": {"of": "foreground", "palette": palette}},
    }
    save_judge(folder / "judge.safetensors", tensors, spec)
    return folder / "judge.safetensors"


@pytest.fixture(scope="module")
def compared(janus: Path, disturbed: Path, data: Path, judge: Path) -> SuiteResult:
    return evaluate_suite(disturbed, janus, data, judge=judge, options=OPTIONS)


def test_a_model_against_itself_changes_nothing(janus: Path, data: Path, judge: Path) -> None:
    found = evaluate_suite(janus, janus, data, judge=judge, options=OPTIONS)
    assert found.skipped == []
    for figure in found.figures:
        if figure.change is not None:
            assert figure.change.value == 0, figure
        elif figure.name.startswith(("KL", "Frechet")):
            # twice the same forward; eigenvalues of a covariance to float64's rounding
            assert abs(figure.model.value) <= 1e-6, figure
        elif "same" in figure.name:
            assert figure.model.value == 1, figure
    assert [pair.before for pair in found.images] == [pair.after for pair in found.images]


def test_several_models_are_measured_beside_one_baseline(
    janus: Path, disturbed: Path, data: Path, compared: SuiteResult, judge: Path
) -> None:
    """The reference runs once, and the figures are those of an evaluation of its own."""
    opened: list[Path] = []

    def load(folder: Path) -> object:
        opened.append(folder)
        return open_model(folder)

    given = Given(data, judge, options=OPTIONS, load=load)
    with Baseline(janus, given) as baseline:
        assert baseline.evaluate(disturbed).figures == compared.figures
        itself = figures(baseline.evaluate(janus))
    assert itself["text", "KL per token (nats)"].model.value <= 1e-9
    assert opened == [janus, disturbed, janus]


def test_every_direction_of_janus_is_measured(compared: SuiteResult) -> None:
    assert {figure.task for figure in compared.figures} == {
        *("text", "answer", "image", "image under guidance", "pictures drawn"),
        *("decoder", "codes"),
    }
    rows = figures(compared)
    for key in (
        ("text", "KL per token (nats)"),
        ("answer", "answers right"),
        ("answer", "answers flipped"),
        ("image", "NLL per image code (nats)"),
        ("image under guidance", "same likeliest image code"),
        ("decoder", "PSNR to true pictures (dB)"),
        ("decoder", "digit right"),
        ("pictures drawn", "color right"),
        ("pictures drawn", "Frechet distance to the reference's"),
        ("codes", "same likeliest image code"),
    ):
        assert key in rows, key
    assert compared.records == {"text": 3, "question": 3, "generation": 3}


def test_another_model_is_told_apart(compared: SuiteResult) -> None:
    rows = figures(compared)
    assert rows["text", "KL per token (nats)"].model.value > 1e-3
    assert rows["image", "KL per image code (nats)"].model.value > 1e-3
    assert rows["image", "NLL per image code (nats)"].change.value != 0
    assert rows["decoder", "PSNR to the reference's pictures (dB)"].model.value < 60
    assert rows["pictures drawn", "Frechet distance to the reference's"].model.value > 0
    assert all(figure.model.samples == 3 for key, figure in rows.items() if key[0] == "text")


def test_the_likelihood_of_answers_is_that_of_a_plain_forward(
    compared: SuiteResult, janus: Path, data: Path
) -> None:
    """The reference's figure, by hand: the processor's inputs, the answer's words and its end."""
    from transformers import AutoProcessor

    model = model_class("janus").from_pretrained(janus, dtype=torch.float32).eval()
    processor, total, terms = AutoProcessor.from_pretrained(janus), 0.0, 0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        if "question" not in row:
            continue
        image = Image.open(data.parent / row["image"]).convert("RGB")
        text = f"<image>{row['question']} {row['answer']} <eos>"
        inputs = processor(text=[text], images=image, return_tensors="pt")
        with torch.no_grad():
            logprobs = model(**inputs).logits[0].float().log_softmax(-1)
        for place in (-3, -2):
            total -= logprobs[place, inputs["input_ids"][0, place + 1]].item()
            terms += 1
    found = figures(compared)["answer", "NLL per token (nats)"].reference.value
    assert found == pytest.approx(total / terms, rel=1e-4)


def test_without_a_reference_there_is_what_one_model_can_say(janus: Path, data: Path) -> None:
    found = evaluate_suite(janus, None, data, options=OPTIONS)
    assert found.against is None
    assert all(figure.reference is figure.change is None for figure in found.figures)
    assert not any("KL" in figure.name for figure in found.figures)
    assert [pair.before for pair in found.images] == [None] * 3
    assert any("codes has no truth" in sentence for sentence in found.skipped)
    assert any("give --judge" in sentence for sentence in found.skipped)


def test_the_json_holds_the_pictures_side_by_side(compared: SuiteResult, data: Path) -> None:
    stored = json.loads(json.dumps(compared.to_json()))
    assert stored["suite"] == "multimodal"
    prompts = [json.loads(line).get("prompt") for line in data.read_text().splitlines()]
    assert [pair["prompt"] for pair in stored["images"]] == [p for p in prompts if p]
    for pair in stored["images"]:
        sizes = {
            Image.open(io.BytesIO(base64.b64decode(pair[side]))).size
            for side in ("before", "after")
        }
        assert sizes == {(8, 8)}
    assert stored["figures"][0]["model"]["value"] == compared.figures[0].model.value


def test_every_row_of_the_table_has_all_columns(compared: SuiteResult) -> None:
    rows = compared.rows()
    assert len(rows) == 1 + len(compared.figures)
    assert {len(row) for row in rows} == {len(compared.columns())}
    assert "3 of kind question" in compared.footing()


def test_a_packed_checkpoint_is_measured_as_its_folder_says(
    janus: Path, data: Path, folder: Path
) -> None:
    out = media_folders.packed(janus, folder / "packed")
    found = evaluate_suite(out, janus, data, options=OPTIONS)
    rows = figures(found)
    assert found.model_bytes < found.against_bytes
    assert 0 < rows["text", "KL per token (nats)"].model.value < 1
    assert rows["codes", "same likeliest image code"].model.value == 1, "the encoder was kept"


def test_the_continuous_form_is_measured_by_vectors_and_pixels(folder: Path, judge: Path) -> None:
    model = media_folders.disturbed(media_folders.random_pisces(), 0.3)
    before = media_folders.pisces(folder / "pisces")
    after = media_folders.pisces(folder / "pisces-disturbed", model)
    data = media_folders.records(folder / "pisces-data", ("generation",))
    found = evaluate_suite(after, before, data, judge=judge, options=OPTIONS)
    rows = figures(found)
    true = rows["image", "relative error to true vectors"]
    assert true.model.value != true.reference.value
    assert 0 < rows["image", "relative error to the reference's vectors"].model.value < 4
    assert rows["image under guidance", "cosine to the reference's vectors"].model.value < 1
    assert ("image under guidance", "cosine to true vectors") not in rows
    assert rows["decoder", "PSNR to the reference's pictures (dB)"].model.value < 60
    assert rows["decoder", "digit right"].model.samples == 3
    assert ("pictures drawn", "color right") in rows
    same = figures(evaluate_suite(before, before, data, judge=judge, options=OPTIONS))
    assert same["decoder", "PSNR to the reference's pictures (dB)"].model.value == 100
    assert same["image", "relative error to the reference's vectors"].model.value == 0


def test_answers_about_pictures_and_sounds_have_figures_of_their_own(folder: Path) -> None:
    for name, make, kinds in (
        ("llava", media_folders.llava, ("text", "question")),
        ("whisper", media_folders.whisper, ("speech",)),
    ):
        model = media_folders.disturbed(stacked_models.build(name), 0.3)
        before, after = make(folder / name), make(folder / f"{name}-disturbed", model)
        data = media_folders.records(folder / f"{name}-data", kinds)
        rows = figures(evaluate_suite(after, before, data, options=OPTIONS))
        task = "speech" if name == "whisper" else "answer"
        wanted = "word error rate" if name == "whisper" else "answers flipped"
        assert (task, wanted) in rows
        assert rows[task, "KL per token (nats)"].model.value > 1e-3


def test_what_cannot_be_evaluated_is_said(janus: Path, data: Path, folder: Path) -> None:
    words = media_folders.records(folder / "words", ("text",))
    found = evaluate_suite(janus, None, words, options=OPTIONS)
    assert {figure.task for figure in found.figures} == {"text"}
    assert sum("is not evaluated: the data has no record" in line for line in found.skipped) == 4
    sounds = media_folders.records(folder / "sounds", ("speech",))
    with pytest.raises(UsageError, match="nothing can be evaluated"):
        evaluate_suite(janus, None, sounds, options=OPTIONS)
    both = media_folders.records(folder / "both", ("text", "speech"))
    skipped = evaluate_suite(janus, None, both, options=OPTIONS).skipped
    assert "records of kind speech are left out: the model reads no such" in skipped
    with pytest.raises(UsageError, match="limit is 0"):
        evaluate_suite(janus, None, data, limit=0)


def test_what_would_fill_the_disk_is_left_out_and_said(
    janus: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlib.evaluation.observe.KEPT_BYTES", 1)
    found = evaluate_suite(janus, janus, data, options=OPTIONS)
    rows = figures(found)
    assert rows["text", "NLL per token (nats)"].model.samples == 1
    assert rows["text", "NLL per token (nats)"].reference.samples == 1
    assert rows["answer", "answers right"].model.samples == 3, "answers take no room"
    assert sum("1 of 3 records are compared" in sentence for sentence in found.skipped) == 4


def test_windows_of_text_are_for_models_that_continue_one(folder: Path, data: Path) -> None:
    whisper = media_folders.whisper(folder / "listener")
    with pytest.raises(UsageError, match="--suite multimodal"):
        compare(whisper, None, data)
    janus = media_folders.janus(folder / "speaker")
    text = folder / "text.txt"
    text.write_text("a red one on a black picture here is a blue two ? " * 20)
    found = compare(janus, janus, text, seqlen=16, windows=2)
    assert abs(found.result.kl.value) <= 1e-6  # float32 rounding of recomputed logits


def test_two_models_of_different_type_are_not_compared(janus: Path, folder: Path) -> None:
    words = media_folders.records(folder / "words2", ("text",))
    other = media_folders.llava(folder / "other")
    with pytest.raises(UsageError, match="cannot be compared"):
        evaluate_suite(other, janus, words)


def test_damaged_pictures_are_found_before_anything_is_run(
    janus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = media_folders.records(folder / "damaged", ("question",))
    (data.parent / "2.png").write_text("no picture")
    monkeypatch.setattr("quantlib.evaluation.multimodal.run", pytest.fail)
    with pytest.raises(DataError, match=r"2\.png is not a picture"):
        evaluate_suite(janus, None, data)
