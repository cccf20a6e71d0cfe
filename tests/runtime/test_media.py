"""Pictures and sounds in, text out; text in, pictures out: as transformers' own loops have it."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from quantlib.calibration.paths.one_vocabulary import emu3_prompt
from quantlib.errors import DataError, UsageError
from quantlib.evaluation.multimodal import open_model
from quantlib.kernels.kv_format import KvFormat
from quantlib.models.modality import MODALITIES
from quantlib.models.skeleton import model_class
from quantlib.runtime.generate import Sampling
from quantlib.runtime.media import Media
from quantlib.runtime.media_images import (
    Drawing,
    Prompts,
    drawn,
    emu3_codes,
    janus_codes,
    noise,
    to_pictures,
    uniforms,
)
from quantlib.runtime.modality_hooks import attach_caches

from ..models import stacked_models
from ..pipeline import whole_models
from . import media_folders

FOLDERS = {
    "janus": media_folders.janus,
    "llava": media_folders.llava,
    "whisper": media_folders.whisper,
    "quantlib_pisces": media_folders.pisces,
}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Media]:
    found = {}
    for name, make in FOLDERS.items():
        folder = make(tmp_path_factory.mktemp("media") / name)
        model = model_class(name).from_pretrained(folder, dtype=torch.float32).eval()
        found[name] = Media.of(model, folder)
    return found


@pytest.fixture
def emu3(tmp_path: Path) -> Media:
    folder = whole_models.save("emu3", tmp_path / "emu3")
    return Media.of(open_model(folder), folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return media_folders.picture(tmp_path / "photo.png", 5)


def test_a_limit_of_the_generation_config_is_no_reason_to_warn(
    media: dict[str, Media],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whisper's has one, and the text ends where it was told all the same."""
    heard, sound = media["whisper"], media_folders.sound(tmp_path / "a.wav", 3)
    monkeypatch.setattr(heard.model.generation_config, "max_length", 20)
    known = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    try:
        counts = [len(heard.answer("", audio=sound, max_new_tokens=n).tokens) for n in (2, 5)]
    finally:
        transformers.utils.logging.set_verbosity(known)
    assert "max_length" not in caplog.text
    assert counts[0] <= 2
    assert counts[0] <= counts[1] <= 5


# -- drawing ---------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1e9]).expand(4000, 4)
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = drawn(logits, numbers, 1.0).bincount(minlength=4) / 4000
    # Numbers spread evenly: each code gets its probability to one number in 4000.
    torch.testing.assert_close(counts, logits[0].softmax(-1), rtol=0, atol=1e-3)
    assert drawn(logits, numbers, 0.0).unique().tolist() == [2]
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert drawn(logits[:1], last, 1.0).item() == 2, "a code of probability 0 is never drawn"


def test_the_random_numbers_of_a_picture_do_not_depend_on_the_others() -> None:
    together = uniforms([0, 1, 2], 5, seed=3)
    assert torch.equal(together[1:2], uniforms([1], 5, seed=3))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, uniforms([0, 1, 2], 5, seed=4))


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_the_likeliest_codes_are_those_of_transformers_own_loop(
    media: dict[str, Media], guidance: float
) -> None:
    model = media_folders.restless(stacked_models.build("janus"))
    media_folders.generation(model, generation_kwargs={"boi_token_id": 4})
    ids = torch.tensor([[1, 7, 13, 16, 4], [1, 7, 14, 17, 4]])
    words = (ids != 1) & (ids != 4)
    wordless = ids.masked_fill(words, 0)
    expected = model.generate(
        inputs=ids,
        attention_mask=torch.ones_like(ids),
        generation_mode="image",
        guidance_scale=guidance,
        do_sample=False,
    )
    prompts, drawing = Prompts(ids, wordless, [0, 1]), Drawing(0, guidance, temperature=0.0)
    with torch.no_grad():
        found = janus_codes(model, prompts, drawing, torch.zeros(2, 16, dtype=torch.float64))
    assert torch.equal(found, expected)
    assert found.unique().numel() > 2, "a single code everywhere would show nothing"


@pytest.mark.parametrize("guidance", [1.0, 3.0, 6.0])
def test_emu3_takes_the_codes_that_its_own_generate_takes(emu3: Media, guidance: float) -> None:
    """There, words that are no codes are forbidden, and what guidance compares with is a prompt of
    its own, shorter, in a cache of its own."""
    model, known = emu3.model, emu3.model.vocabulary_mapping
    ids, wordless = emu3_prompt(emu3.tools, "w1 w2 w3", 2, 2)

    def allowed(_: int, said: torch.Tensor) -> list[int]:
        ends = (len(said) - ids.shape[1]) % 3 == 2
        return [known.eol_token_id] if ends else list(known.image_tokens)

    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        negative_prompt_ids=wordless,
        negative_prompt_attention_mask=torch.ones_like(wordless),
        guidance_scale=guidance,
        prefix_allowed_tokens_fn=allowed,
        do_sample=False,
        max_new_tokens=6,
    )[0, ids.shape[1] :]
    prompts, drawing = Prompts(ids, wordless, [0]), Drawing(0, guidance, temperature=0.0)
    found = emu3_codes(model, prompts, drawing, torch.zeros(1, 4, dtype=torch.float64), columns=2)
    assert known.convert_img2bpe(found.view(2, 2)).flatten().tolist() == expected.tolist()
    assert found.unique().numel() > 1, "a single code everywhere would show nothing"


def test_pictures_of_emu3_have_the_size_of_those_it_reads(emu3: Media) -> None:
    pixels = emu3.draw(["w1", "w2 w3", "w4"], seed=1)  # of two lengths
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels[:1], emu3.draw(["w1"], seed=1))
    assert not torch.equal(pixels, emu3.draw(["w1", "w2 w3", "w4"], seed=2))


def test_emu3_needs_its_own_processor(emu3: Media, tmp_path: Path) -> None:
    other = whole_models.save("llava", tmp_path / "llava")
    for file in ("processor_config.json", "preprocessor_config.json"):
        (emu3.tools.folder / file).unlink(missing_ok=True)
        if (other / file).exists():
            shutil.copy(other / file, emu3.tools.folder)
    with pytest.raises(DataError, match=r"is not Emu3's: fetch it again"):
        Media.of(emu3.model, emu3.tools.folder).draw(["w1"])


def test_a_picture_that_emu3_writes_is_cached_as_one(emu3: Media) -> None:
    caches = attach_caches(emu3.model, {"image_output": KvFormat.parse("int8")})
    caches.begun = []
    emu3.draw(["w1"], guidance=1)
    (cache,) = caches.begun
    prompt = ["text"] * 5
    assert [MODALITIES[int(kind)] for kind in cache.kinds[0]] == prompt + ["image_output"] * 4


def test_pictures_have_the_size_of_the_model_and_repeat_by_seed(media: dict[str, Media]) -> None:
    prompts = ["a red one", "a blue two on a black picture", "a red two"]  # of two lengths
    janus = media["janus"]
    pixels = janus.draw(prompts, seed=1)
    assert pixels.shape == (3, 3, 8, 8)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert torch.equal(pixels, janus.draw(prompts, seed=1))
    assert not torch.equal(pixels, janus.draw(prompts, seed=2))
    assert torch.equal(pixels[:1], janus.draw(prompts[:1], seed=1))
    assert [picture.size for picture in to_pictures(pixels)] == [(8, 8)] * 3


def test_the_continuous_form_draws_from_the_noise_of_the_seed(media: dict[str, Media]) -> None:
    pisces = media["quantlib_pisces"]
    pixels = pisces.draw(["a red one", "a blue two", "a red one ?"], seed=1)
    assert pixels.shape == (3, 3, 16, 16)
    assert torch.equal(pixels[:2], pisces.draw(["a red one", "a blue two"], seed=1))
    assert not torch.equal(pixels, pisces.draw(["a red one", "a blue two", "a red one ?"], seed=2))
    strong = pisces.draw(["a red one"], seed=1, guidance=9.0)
    assert not torch.equal(pixels[:1], strong)
    ids = torch.tensor([[1, 7, 13, 16, 4]])
    vectors = pisces.model.generate_vectors(ids, ids.where((ids == 1) | (ids == 4), 0), 2.0)
    expected = pisces.model.decode_vectors(vectors, noise([0], (3, 16, 16), 1))
    shown = (expected[0] * 0.5 + 0.5).clamp(0, 1)
    # batches of other sizes sum in another order; pixels are rounded to 8 bits
    torch.testing.assert_close(pixels[0], shown, rtol=0, atol=0.5 / 255 + 1e-4)


def test_a_picture_in_a_file_is_what_was_drawn(media: dict[str, Media], tmp_path: Path) -> None:
    pixels = media["janus"].draw(["a red one"])
    to_pictures(pixels)[0].save(tmp_path / "out.png")
    read = torch.tensor(list(Image.open(tmp_path / "out.png").get_flattened_data())).view(8, 8, 3)
    torch.testing.assert_close(read.movedim(-1, 0) / 255, pixels[0], rtol=0, atol=1e-6)


def test_guidance_and_temperature_out_of_range_are_sentences(media: dict[str, Media]) -> None:
    with pytest.raises(UsageError, match="guidance is 0"):
        media["janus"].draw(["a red one"], guidance=0.5)
    with pytest.raises(UsageError, match="temperature is -1"):
        media["janus"].draw(["a red one"], temperature=-1.0)
    with pytest.raises(UsageError, match="prompt is empty"):
        media["janus"].draw([" "])
    with pytest.raises(DataError, match="made for 128"):
        media["janus"].draw(["a " * 130])


def test_models_that_only_read_say_so(media: dict[str, Media]) -> None:
    with pytest.raises(UsageError, match="'llava' are not drawn with"):
        media["llava"].draw(["a red one"])


# -- answering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["janus", "llava"])
def test_answers_are_those_of_the_processor_and_generate(
    media: dict[str, Media], name: str, photo: Path
) -> None:
    asked = media[name]
    inputs = asked.tools.processor(
        text=["<image>what digit ?"], images=Image.open(photo).convert("RGB"), return_tensors="pt"
    )
    expected = asked.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    written = asked.answer("what digit ?", image=photo, max_new_tokens=6)
    assert written.tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert written.prompt_tokens == inputs["input_ids"].shape[1]
    assert asked.answer("what digit ?", image=Image.open(photo), max_new_tokens=6).tokens == (
        written.tokens
    )


def test_an_answer_depends_on_the_picture(media: dict[str, Media], tmp_path: Path) -> None:
    texts = {
        media["llava"]
        .answer(
            "what color ?", image=media_folders.picture(tmp_path / f"{n}.png", n), max_new_tokens=8
        )
        .text
        for n in range(4)
    }
    assert len(texts) > 1


def test_drawn_answers_repeat_by_seed(media: dict[str, Media], photo: Path) -> None:
    def say(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        return (
            media["llava"]
            .answer("what ?", image=photo, max_new_tokens=12, sampling=sampling)
            .tokens
        )

    assert say(1) == say(1)
    assert len({tuple(say(seed)) for seed in range(4)}) > 1


def test_sounds_are_written_down(media: dict[str, Media], tmp_path: Path) -> None:
    clip = media_folders.sound(tmp_path / "clip.wav", 1)
    heard = media["whisper"]
    written = heard.answer("", audio=clip, max_new_tokens=40)
    assert 1 <= len(written.tokens) <= heard.tools.longest
    other = heard.answer("", audio=media_folders.sound(tmp_path / "b.wav", 2), max_new_tokens=40)
    assert heard.answer("", audio=clip, max_new_tokens=40).tokens == written.tokens
    assert isinstance(other.text, str)


# -- what is refused -------------------------------------------------------------------------------


def test_the_wrong_kind_of_thing_is_a_sentence(
    media: dict[str, Media], photo: Path, tmp_path: Path
) -> None:
    clip = media_folders.sound(tmp_path / "clip.wav", 1)
    slow = media_folders.sound(tmp_path / "slow.wav", 1, rate=8000)
    long = media_folders.sound(tmp_path / "long.wav", 1, seconds=1.5)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cases = [
        ("llava", {"audio": clip}, UsageError, "do not answer about sounds"),
        ("whisper", {"image": photo}, UsageError, "do not answer about pictures"),
        ("llava", {"image": text}, DataError, "is not a picture"),
        ("llava", {"image": tmp_path / "none.png"}, DataError, "no file"),
        ("whisper", {"audio": photo}, DataError, "cannot be read as sound"),
        ("whisper", {"audio": slow}, DataError, "8,000 samples a second"),
        ("whisper", {"audio": long}, DataError, r"hears 1(\.0)? s at once"),
        ("llava", {}, UsageError, "one of them"),
        ("llava", {"image": photo, "audio": clip}, UsageError, "one of them"),
    ]
    for name, given, kind, said in cases:
        question = "" if "audio" in given else "what ?"
        with pytest.raises(kind, match=said):
            media[name].answer(question, **given)
    with pytest.raises(UsageError, match="no question"):
        media["llava"].answer(" ", image=photo)
    with pytest.raises(UsageError, match="leave it out"):
        media["whisper"].answer("what is said ?", audio=clip)


def test_a_folder_without_a_processor_is_a_sentence(
    media: dict[str, Media], photo: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    media["llava"].model.save_pretrained(bare)
    model = AutoModelForImageTextToText.from_pretrained(bare, dtype=torch.float32)
    with pytest.raises(DataError, match="no usable tokenizer"):
        Media.of(model, bare).answer("what ?", image=photo)
    for file in media["llava"].tools.folder.glob("tokenizer*.json"):
        shutil.copy(file, bare)
    with pytest.raises(DataError, match=r"no usable .*processor"):
        Media.of(model, bare).answer("what ?", image=photo)


def test_a_language_model_has_no_pictures(tiny_llama: object, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "llama")  # type: ignore[operator]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(UsageError, match="nothing is known of pictures"):
        Media.of(model, folder)
