"""`quantlib generate` and `quantlib eval` with pictures and sounds, on packed checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import quantlib
from quantlib.errors import UsageError
from quantlib.pipeline.compress import compress
from quantlib.pipeline.opening import reopen_run

from ..pipeline import whole_models
from ..runtime import media_folders
from .conftest import Run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed checkpoints by family, and their sources as `<family>-source`."""
    root, found = tmp_path_factory.mktemp("media"), {}
    for name in ("janus", "llava", "whisper"):
        source = getattr(media_folders, name)(root / f"{name}-source")
        found |= {
            f"{name}-source": source,
            name: media_folders.packed(source, root / name, "w8g16"),
        }
    return found


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return media_folders.picture(tmp_path / "photo.png", 3)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return media_folders.sound(tmp_path / "clip.wav", 3)


def test_a_prompt_becomes_a_picture_in_a_file(
    run: Run, out: dict[str, Path], tmp_path: Path
) -> None:
    file, again, other = (tmp_path / f"{n}.png" for n in range(3))
    command = ("generate", out["janus"], "a red one", "--image")
    answer = run(*command, file, "--seed", 1)
    assert answer.code == 0, answer
    assert answer.stdout == f"{file}\n"
    assert "8 x 8 pixels" in answer.stderr
    assert Image.open(file).size == (8, 8)
    found = run(*command, again, "--seed", 1, "--json").json
    assert (found["image"], found["width"], found["height"]) == (str(again), 8, 8)
    assert run(*command, other, "--seed", 2, "--guidance", 1).code == 0
    assert file.read_bytes() == again.read_bytes() != other.read_bytes()
    drawn = quantlib.load(out["janus"]).generate_image("a red one", seed=1)
    assert drawn.tobytes() == Image.open(file).tobytes()


def test_a_picture_and_a_sound_are_answered_about(
    run: Run, out: dict[str, Path], photo: Path, clip: Path
) -> None:
    model = quantlib.load(out["llava"])
    for name in ("llava", "janus"):
        answer = run(
            *("generate", out[name], "what digit ?", "--image-input", photo),
            *("--max-new-tokens", 5, "--json"),
        )
        assert answer.code == 0, answer
        assert 1 <= answer.json["new_tokens"] <= 5
        if name == "llava":
            said = model.generate("what digit ?", 5, image=Image.open(photo))
            assert answer.json["text"] == said
    heard = run("generate", out["whisper"], "--audio", clip, "--max-new-tokens", 5)
    assert heard.code == 0, heard
    assert (
        heard.stdout == quantlib.load(out["whisper"]).generate(audio=clip, max_new_tokens=5) + "\n"
    )
    assert "through transformers" in heard.stderr
    with pytest.raises(UsageError, match="not a list"):
        model.generate(["one ?", "two ?"], image=photo)


def test_what_cannot_be_done_is_a_sentence(
    fails: Callable[..., str], out: dict[str, Path], photo: Path, clip: Path, tmp_path: Path
) -> None:
    new, janus, llava = tmp_path / "new.png", out["janus"], out["llava"]
    asked = ("generate", janus, "a red one")
    assert "make one at a time" in fails(2, *asked, "--image", new, "--image-input", photo)
    assert "takes one prompt, and 2" in fails(2, *asked, "a blue two", "--image", new)
    assert "give --image FILE too" in fails(2, *asked, "--guidance", 3)
    assert "--kv is for text alone" in fails(2, *asked, "--image", new, "--kv", "int8")
    assert "--top-p is for text alone" in fails(2, *asked, "--image", new, "--top-p", 0.5)
    assert "not written as '.txt'" in fails(2, *asked, "--image", tmp_path / "new.txt")
    assert "there is no folder" in fails(2, *asked, "--image", tmp_path / "no" / "new.png")
    assert "guidance is 0.5" in fails(2, *asked, "--image", new, "--guidance", 0.5)
    assert "do not answer about sounds" in fails(2, "generate", llava, "--audio", clip)
    assert "are not drawn with" in fails(2, "generate", llava, "a red one", "--image", new)
    assert "give it what it listens to" in fails(2, "generate", out["whisper"], "a red one")
    look = ("generate", llava, "what ?", "--image-input")
    assert "is not a picture" in fails(1, *look, clip)
    assert "there is no file" in fails(1, *look, tmp_path / "none.png")
    assert "there is no prompt" in fails(2, "generate", llava, "--image-input", photo)
    (llava / "processor_config.json").rename(tmp_path / "processor_config.json")
    try:
        assert "processor" in fails(1, *look, photo)
    finally:
        (tmp_path / "processor_config.json").rename(llava / "processor_config.json")
    assert not new.exists()


def test_a_text_model_says_what_it_cannot_do(
    fails: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    out = media_folders.packed(model, tmp_path / "out", "w8g16")
    asked = ("generate", out, "a red one", "--image", tmp_path / "new.png")
    assert "nothing is known of pictures or sounds" in fails(2, *asked)


def test_eval_finds_the_suite_by_the_data(run: Run, out: dict[str, Path], tmp_path: Path) -> None:
    data = media_folders.records(tmp_path / "data", ("text", "question", "generation"))
    command = ("eval", out["janus"], "--against", out["janus-source"], "--data", data)
    found = run(*command, "--json", "--limit", 2)
    assert found.code == 0, found
    assert found.json["suite"] == "multimodal"
    assert {row["model"]["samples"] for row in found.json["figures"]} == {2}
    assert len(found.json["images"]) == 2
    for pair in found.json["images"]:
        assert set(pair) == {"prompt", "before", "after"}
    kl = next(
        row
        for row in found.json["figures"]
        if row["name"].startswith("KL") and row["task"] == "text"
    )
    assert 0 < kl["model"]["value"] < 0.1
    table = run(*command, "--limit", 1, "--suite", "multimodal").stdout
    assert "answers flipped" in table
    assert "same likeliest image code" in table
    assert json.dumps(found.json)


def test_without_data_eval_takes_what_calibration_held_back(
    run: Run, fails: Callable[..., str], tmp_path: Path
) -> None:
    """One record in five of each kind, which the work directory beside the checkpoint knows; it
    also knows whose data decided how a part was rounded."""
    model = whole_models.save("llava_dinov2", tmp_path / "model")
    data = whole_models.records("llava_dinov2", tmp_path, count=10)
    few = {"windows": 4, "probe_windows": 2, "probes": 0, "passes": 0, "schemes": ["w4g32zs4"]}
    out = compress(model, out=tmp_path / "out", data=data, bits=20.0, report=False, **few).path
    shares = {
        row["name"]: row["shares"] for row in run("inspect", out, "--json").json["components"]
    }
    words, image = (shares["language_model"]["modalities"][name] for name in ("text", "image"))
    for what in ("tokens", "weight"):
        assert words[what] + image[what] == pytest.approx(1)
    assert shares["vision_tower"]["streams"] == {"answer": {"tokens": 1.0, "weight": 1.0}}
    line = next(x for x in run("inspect", out).stdout.splitlines() if "modality  image" in x)
    assert line.split()[-4::2] == [f"{100 * image[what]:.1f}" for what in ("tokens", "weight")]
    command = ("eval", out, "--against", model, "--suite", "multimodal")
    answer = run(*command, "--json")
    assert answer.code == 0, answer
    found = answer.json
    assert found["held_back"]
    assert found["records"] == {"question": 2, "text": 2}
    assert "the 4 records of" in answer.stderr
    with reopen_run(tmp_path / "out.work", with_data=True) as opened:
        workload = opened.streams
        chosen = {r.where for records in workload.held_back.values() for r in records}
        seen = {r.where for records in workload.calibration.values() for r in records}
    assert not chosen & seen
    lines = data.read_text().split("\n")
    mine = [line for n, line in enumerate(lines, 1) if f"{data}, line {n}" in chosen]
    apart = tmp_path / "held_back.jsonl"
    apart.write_text("\n".join(mine))
    same = run(*command, "--data", apart, "--json").json
    assert not same["held_back"]
    assert same["figures"] == found["figures"]
    assert "that calibration held back" in run(*command).stdout
    assert "--data is missing: give a text" in fails(2, "eval", out, "--suite", "text")
    data.write_text("\n".join(lines[::-1]))
    assert "is not the one that was measured" in fails(2, *command)
    (tmp_path / "out.work").rename(tmp_path / "elsewhere")
    assert "give a .jsonl file of records with --data" in fails(2, *command)


def test_eval_says_what_does_not_fit(
    fails: Callable[..., str], out: dict[str, Path], text: Path, model: Path, tmp_path: Path
) -> None:
    data = media_folders.records(tmp_path / "data", ("text",))
    whisper = ("eval", out["whisper"], "--data", data)
    assert "nothing can be evaluated" in fails(2, *whisper, "--suite", "multimodal")
    assert "unknown --suite vision" in fails(2, *whisper, "--suite", "vision")
    assert "--judge looks at pictures" in fails(
        2, "eval", model, "--data", text, "--judge", tmp_path / "judge.safetensors"
    )
    pictures = media_folders.records(tmp_path / "pictures", ("question",))
    asked = ("eval", out["janus"], "--data", pictures, "--judge", tmp_path / "none.safetensors")
    assert "none.safetensors cannot be read" in fails(1, *asked)
