"""Routes: what becomes of a record on the way into a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantlib.calibration.data import TextSource
from quantlib.calibration.forwards import emu3_image_logits
from quantlib.calibration.paths import FAMILIES, find
from quantlib.calibration.paths.route import Route, objective
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.paths.workload import Workload, divide, text_records
from quantlib.calibration.records import Record, read_records
from quantlib.calibration.streams import Sample
from quantlib.errors import DataError
from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

from ..models.stacked_models import IMAGE
from ..pipeline import whole_models
from ..pipeline.whole_models import SPECIAL

Opened = tuple[PreTrainedModel, Tools, list[Record]]
BOS, EOS, BOI, EOI = (SPECIAL[name] for name in ("<bos>", "<eos>", "<boi>", "<eoi>"))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """opened("janus"): model, tools and records; made once."""
    made: dict[str, Opened] = {}

    def build(case: str) -> Opened:
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            source = Source.open(whole_models.save(case, root / "model"))
            model = skeleton.build(source)
            skeleton.materialize(model, "", source)
            records = read_records(whole_models.records(case, root, count=2))
            made[case] = model, Tools(source.path, source.config, 64), records
        return made[case]

    return build


def sample(opened: Opened, stream: str) -> tuple[Sample, Record]:
    """The first record of a stream as a sample."""
    model, tools, records = opened
    route = _route(tools, stream)
    record = next(record for record in records if record.kind in route.kinds)
    return route.sample(tools, model, record), record


def _route(tools: Tools, stream: str) -> Route:
    routes = find(tools.config["model_type"])
    assert routes is not None
    return next(route for route in routes.routes if route.stream == stream)


def ids_of(tools: Tools, text: str) -> list[int]:
    return list(tools.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("case", "pictured"),
    [("janus", 16), ("llava_dinov2", 4), ("idefics3", 1), ("gemma3", 4), ("qwen2_5_vl", 4)],
)
def test_of_an_answer_the_words_count_and_its_end(
    case: str, pictured: int, opened: Callable[[str], Opened]
) -> None:
    model, tools, _ = opened(case)
    made, record = sample(opened(case), "answer")
    ids = made.inputs["input_ids"][0].tolist()
    answer = [*ids_of(tools, record.answer), EOS]
    assert ids[-len(answer) :] == answer
    assert ids[-len(answer) - 3 : -len(answer)] == ids_of(tools, record.text)
    assert ids.count(IMAGE) == pictured
    assert made.modality is not None
    assert int(made.modality.sum()) == pictured
    with torch.no_grad():
        output = model(**made.inputs)
        labels = torch.full((1, len(ids)), -100)
        labels[0, -len(answer) :] = torch.tensor(answer)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
        found = objective(made).truth(output)
    assert found.terms == len(answer)
    torch.testing.assert_close(found.value / found.terms, expected, rtol=1e-5, atol=1e-5)


def test_a_chat_template_makes_the_question(opened: Callable[[str], Opened]) -> None:
    _, tools, _ = opened("llava_dinov2")
    own = Tools(tools.folder, tools.config, 64)
    own.tokenizer.chat_template = (
        "{{ messages[0]['content'] }} w1{% if add_generation_prompt %} w2 {% endif %}"
    )
    prompt, full = own.asked("w3", "w4", "<image>")
    assert prompt == "<image>\nw3 w1 w2 "
    assert full == prompt + "w4"
    own.tokenizer.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    )
    own.__dict__.pop("template")
    assert own.asked("w3", " w4", "<image>") == ("<image>w3", "<image>w3 w4")


def test_janus_writes_the_codes_of_the_target_under_guidance(
    opened: Callable[[str], Opened],
) -> None:
    model, tools, _ = opened("janus")
    made, record = sample(opened("janus"), "image")
    ids, wordless = made.inputs["input_ids"], made.inputs["unconditional_ids"]
    words = ids_of(tools, record.text)
    assert ids[0].tolist() == [BOS, *words, BOI]
    assert wordless[0].tolist() == [BOS, *[0] * len(words), BOI]
    assert made.inputs["guidance"] == 2.0
    pixels = tools.pictures(images=[_picture(record)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        codes = model.model.vqmodel.encode(pixels).image_tokens
    assert torch.equal(made.inputs["image_codes"].flatten(), codes.flatten())
    assert made.modality is not None
    assert len(made.modality) == 2 * (ids.shape[1] + 15)


def _picture(record: Record) -> Any:
    from quantlib.calibration.media import read_image

    return read_image(record.file)


def test_emu3_writes_codes_as_words(opened: Callable[[str], Opened]) -> None:
    """Two rows of two codes and an end of line, behind the size and the token that begins them."""
    model, tools, _ = opened("emu3")
    made, record = sample(opened("emu3"), "image")
    (written,) = made.inputs["image_words"]
    assert [int(i) for i in written[[2, 5]]] == [SPECIAL["<|extra_200|>"]] * 2
    assert all(50 <= int(i) < 70 for i in written[[0, 1, 3, 4]])
    begun = [BOI, SPECIAL["<unk>"], SPECIAL["<fake_token_around_image>"]]  # 2*2 is no word of it
    words = ids_of(tools, record.text)
    assert made.inputs["input_ids"].tolist() == [[BOS, *words, *begun]]
    assert made.inputs["unconditional_ids"].tolist() == [[BOS, *begun]]
    assert made.inputs["guidance"] == 3.0
    assert made.modality is not None
    assert len(made.modality) == 2 * (1 + len(words) + 3 + 5)
    plain = {**made.inputs, "unconditional_ids": None}
    with torch.no_grad():
        asked = emu3_image_logits(model, **plain)
        unasked = emu3_image_logits(
            model, **{**plain, "input_ids": made.inputs["unconditional_ids"]}
        )
        found = emu3_image_logits(model, **made.inputs)
    # the same sums behind padding, times three
    torch.testing.assert_close(found, unasked + 3 * (asked - unasked), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(asked, unasked, atol=0.1)


def test_whisper_hears_a_sound_and_reads_its_words(opened: Callable[[str], Opened]) -> None:
    _, tools, _ = opened("whisper")
    made, record = sample(opened("whisper"), "answer")
    ids = made.inputs["decoder_input_ids"][0].tolist()
    assert ids == [3, *ids_of(tools, record.answer), EOS]
    assert made.inputs["input_features"].shape == (1, 8, 32)
    asked = objective(made)
    logits = torch.zeros(1, len(ids), 96)
    with torch.no_grad():
        found = asked.truth(type("Output", (), {"logits": logits}))
    assert found.terms == len(ids) - 1


def test_routes_name_components_that_their_models_have(tmp_path: Path) -> None:
    """A component nobody has would never be missed."""
    for case in ("janus", "emu3", "llava", "whisper", "bert", "clip", "dinov2"):
        source = Source.open(whole_models.save(case, tmp_path / case))
        routes = find(source.model_type)
        assert routes is not None
        have = {component.name for component in ModelMap.from_source(source).components()}
        named = {name for route in routes.routes for name in route.reaches}
        assert named - have <= {"head"}, case  # tied to the embedding
    streams = [[route.stream for route in routes.routes] for routes in FAMILIES]
    assert all(len(set(names)) == len(names) for names in streams)


# -- the workload ----------------------------------------------------------------------------------


def texts(count: int) -> list[Record]:
    return [Record("text", f"line {n}", f"w{n}") for n in range(count)]


def workload(records: list[Record], **changes: Any) -> Workload:
    routes = find("janus")
    assert routes is not None
    settings = {"components": ["language_model"], "samples": 4, "held_back": 2, "seed": 0}
    tools = Tools(Path(), {"model_type": "janus"}, 64)
    return divide(routes, tools, records, **(settings | changes))


def test_what_is_held_back_is_calibrated_on_by_nobody() -> None:
    pictures = [Record("generation", f"line {n}", "w1", media=Path(f"{n}.png")) for n in range(20)]
    found = workload(texts(20) + pictures, components=["language_model", "image_decoder"])
    assert found.tasks == ("text", "image", "decoder")
    judged = {r.where for held in found.held_back.values() for r in held if r.media}
    for stream in found.tasks:
        seen = {r.where for r in (*found.calibration[stream], *found.reserve[stream]) if r.media}
        assert not judged & seen
        assert len(found.calibration[stream]) == 4
        assert len(found.held_back[stream]) == 2
    assert workload(texts(20)).calibration == workload(texts(20)).calibration
    assert workload(texts(20)).calibration != workload(texts(20), seed=1).calibration


def test_of_few_records_a_fifth_is_held_back_and_of_one_none_can_be() -> None:
    found = workload(texts(5), held_back=40, samples=40)
    assert (len(found.calibration["text"]), len(found.held_back["text"])) == (4, 1)
    with pytest.raises(DataError, match="line 0: the only record of kind text"):
        workload(texts(1))


def test_streams_that_run_nothing_to_quantize_are_left_out() -> None:
    pictures = [Record("generation", f"line {n}", "w1", media=Path(f"{n}.png")) for n in range(4)]
    assert workload(texts(4) + pictures).tasks == ("text", "image")


def test_plain_text_becomes_records_of_bounded_length() -> None:
    source = TextSource("book.txt", "one two\n\n" + "word " * 100)
    found = text_records(source, 16)
    assert found[0].text == "one two"
    assert " ".join(record.text for record in found[1:]) == ("word " * 100).strip()
    assert all(len(record.text) <= 64 for record in found)
    assert found[1].where == "book.txt, piece 2"
