"""Files of records: kinds by keys, paths beside the file, and mistakes named by their line."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from quantlib.calibration.media import read_audio, read_image
from quantlib.calibration.records import KINDS, is_records, of_kind, read_records
from quantlib.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a picture and a sound of 100 samples."""
    Image.new("L", (4, 6), 255).save(tmp_path / "a.png")
    write_sound(tmp_path / "a.wav", np.linspace(-1, 1, 100))
    return tmp_path


def write_sound(path: Path, values: Any, rate: int = 16000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((np.asarray(values) * 32767).astype("<i2").tobytes())
    return path


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


ROWS: dict[str, dict[str, str]] = {
    "text": {"text": "words"},
    "question": {"image": "a.png", "question": "what?", "answer": "this"},
    "speech": {"audio": "a.wav", "answer": "said"},
    "generation": {"prompt": "a red three", "target": "a.png"},
    "picture": {"image": "a.png"},
    "pair": {"image": "a.png", "text": "a picture"},
}


def test_the_kind_of_a_record_follows_from_its_keys(folder: Path) -> None:
    records = read_records(write(folder, *ROWS.values()))
    assert [record.kind for record in records] == list(ROWS)
    assert set(ROWS) == set(KINDS)
    question, speech, picture = records[1], records[2], records[3]
    assert (question.text, question.answer, question.file) == ("what?", "this", folder / "a.png")
    assert (speech.text, speech.answer, speech.file) == ("", "said", folder / "a.wav")
    assert (picture.text, picture.file) == ("a red three", folder / "a.png")
    assert of_kind(records, "speech", "text") == [records[0], speech]


def test_other_keys_are_handed_on(folder: Path) -> None:
    (record,) = read_records(write(folder, {**ROWS["question"], "digit": 3}))
    assert record.extra == {"digit": 3}


def test_a_file_with_a_picture_or_sound_in_it_is_records_and_text_is_not(folder: Path) -> None:
    assert is_records(write(folder, ROWS["text"], ROWS["speech"]))
    assert not is_records(write(folder, ROWS["text"]))
    plain = folder / "text.txt"
    plain.write_text("image")
    assert not is_records(plain)
    assert not is_records("hub:name")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([1], "line 2: not a JSON object"),
        ({"image": "a.png", "question": "?"}, "kind question also needs 'answer'"),
        ({"prompt": "a"}, "kind generation also needs 'target'"),
        ({"audio": "a.wav"}, "kind speech also needs 'answer'"),
        ({"picture": "a.png"}, "of no kind of record"),
        ({"image": "b.png", "question": "?", "answer": "!"}, "line 2: there is no file"),
        ({"text": "  "}, "'text' must be a text that is not empty"),
        ({"text": 3}, "'text' must be a text that is not empty"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(folder: Path, row: Any, sentence: str) -> None:
    path = write(folder, ROWS["text"], row)
    with pytest.raises(DataError, match=sentence):
        read_records(path)


def test_no_json_no_file_and_no_records_are_sentences(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text"')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_records(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no record"):
        read_records(path)
    with pytest.raises(DataError, match="there is no file of records"):
        read_records(folder / "other.jsonl")


def test_pictures_become_rgb_and_sounds_floats(folder: Path) -> None:
    picture = read_image(folder / "a.png")
    assert (picture.mode, picture.size) == ("RGB", (4, 6))
    sound = read_audio(folder / "a.wav", 16000)
    assert sound.dtype == np.float32
    # a step of 16 bits, and the writer's own rounding towards zero
    np.testing.assert_allclose(sound, np.linspace(-1, 1, 100), atol=2 / 32767)


def test_a_picture_of_16_bits_keeps_its_tones(folder: Path) -> None:
    grey = np.arange(0, 256, 5, dtype=np.uint16)[None] * 257
    Image.fromarray(grey).save(folder / "deep.png")
    seen = np.asarray(read_image(folder / "deep.png"))
    assert np.array_equal(seen, np.repeat((grey // 257).astype(np.uint8)[..., None], 3, 2))


def test_a_transparent_picture_lies_on_white(folder: Path) -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    clear.save(folder / "clear.png")
    seen = read_image(folder / "clear.png")
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 255))


def test_a_photograph_is_turned_as_its_camera_says(folder: Path) -> None:
    sideways = Image.new("RGB", (20, 10), "black")
    settings = sideways.getexif()
    settings[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    sideways.save(folder / "photo.jpg", exif=settings)
    assert read_image(folder / "photo.jpg").size == (10, 20)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_pictures_of_every_mode_are_read(folder: Path, mode: str) -> None:
    kind = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (3, 2), "white").convert(mode).save(folder / f"a.{kind}")
    seen = read_image(folder / f"a.{kind}")
    assert (seen.mode, seen.getpixel((1, 1))) == ("RGB", (255, 255, 255))


def test_a_picture_without_a_known_white_is_refused(folder: Path) -> None:
    Image.new("F", (3, 2), 0.5).save(folder / "a.tif")
    with pytest.raises(DataError, match="nothing says which is white"):
        read_image(folder / "a.tif")


def test_the_channels_of_a_sound_are_averaged(folder: Path) -> None:
    left_right = np.stack([np.full(50, 0.5), np.full(50, -0.25)], 1)
    sound = read_audio(write_sound(folder / "s.wav", left_right.ravel(), channels=2), 16000)
    np.testing.assert_allclose(sound, np.full(50, 0.125), atol=2 / 32767)


def test_media_of_another_kind_or_rate_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="is not a picture"):
        read_image(folder / "a.wav")
    with pytest.raises(DataError, match="cannot be read as sound"):
        read_audio(folder / "a.png", 16000)
    with pytest.raises(DataError, match=r"has 16,000 samples a second, .* made for 8,000"):
        read_audio(folder / "a.wav", 8000)
    with pytest.raises(DataError, match="holds no sound"):
        read_audio(write_sound(folder / "e.wav", []), 16000)
    cut = folder / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(DataError, match=r"picture .* cannot be read"):
        read_image(cut)
