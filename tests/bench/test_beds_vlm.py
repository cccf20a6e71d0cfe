"""The bed `vlm`: the connector is trained on exactly what the joined model computes, and the folder
is what calibration and evaluation read."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from quantlib.bench.beds import vlm
from quantlib.bench.beds.dinov2 import PIXELS
from quantlib.bench.beds.fashion import KINDS
from quantlib.bench.beds.folders import passages, picture, write_records
from quantlib.bench.beds.training import Schedule
from quantlib.bench.beds.vlm_connector import (
    Connector,
    answer_loss,
    pointing_loss,
    train,
    vision_features,
)
from quantlib.calibration.media import read_image
from quantlib.calibration.paths import reading
from quantlib.calibration.paths.tools import Tools
from quantlib.calibration.records import QUESTION, TEXT, read_records
from quantlib.errors import DataError
from quantlib.models.modelmap import ModelMap
from quantlib.models.source import Source

VISION_WIDTH, TEXT_WIDTH = 16, 64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_vision() -> Any:
    """A DINOv2 of the bed's picture size, with weights wide enough that pictures differ."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=14,
        use_mask_token=False,
    )
    model = Dinov2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def language(
    tiny_llama: Callable[..., Path], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny Llama whose tokenizer has the token that stands for pictures."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [vlm.UNUSED]})
    folder = tiny_llama(tmp_path_factory.mktemp("language"), vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def connector() -> Connector:
    made = Connector(drawn(VISION_WIDTH), drawn(VISION_WIDTH, seed=1).abs() + 0.5, TEXT_WIDTH)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return made


@pytest.fixture(scope="module")
def bed(language: Path, connector: Connector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bed of tiny random models."""
    folder = tmp_path_factory.mktemp("bed")
    vlm.assemble(tiny_vision(), language, connector.folded(), folder / "model")
    images = torch.randint(256, (12, 28, 28), generator=torch.Generator().manual_seed(3))
    rows = vlm.questions(images.to(torch.uint8), torch.arange(12) % 10, 12, folder / "calibration")
    write_records(folder / "calibration.jsonl", [*rows, {"text": "ships in the night"}])
    return folder


def test_the_folded_connector_is_the_same_function(connector: Connector) -> None:
    features = drawn(3, 5, VISION_WIDTH, seed=4)
    folded = connector.folded()
    hidden = F.gelu(F.linear(features, folded["linear_1.weight"], folded["linear_1.bias"]))
    found = F.linear(hidden, folded["linear_2.weight"], folded["linear_2.bias"])
    expected = connector(features)
    # Two float32 sums in another order.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_training_sees_the_loss_of_the_joined_model(bed: Path, connector: Connector) -> None:
    """Answers of different lengths: what is trained on equals cross-entropy along the ids that the
    processor makes, through transformers' own LLaVA."""
    model = LlavaForConditionalGeneration.from_pretrained(bed / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(bed / "model")
    prompt = vlm.training_prompt(processor)
    records = read_records(bed / "calibration.jsonl")[:4]
    images = [read_image(record.file) for record in records]
    labels = torch.tensor([KINDS.index(record.answer) for record in records])
    losses = []
    for record, image in zip(records, images, strict=True):
        text = vlm.prompt_text(processor) + record.answer + processor.tokenizer.eos_token
        inputs = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        terms = len(prompt.answers[KINDS.index(record.answer)])
        ids = inputs["input_ids"][0, -terms:]
        losses.append(F.cross_entropy(logits[-terms - 1 : -1], ids, reduction="sum"))
    counts = sum(len(prompt.answers[label]) for label in labels.tolist())
    expected = torch.stack(losses).sum() / counts

    tower = model.model.vision_tower
    pixels = processor.image_processor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        found = answer_loss(
            _language(model), connector(vision_features(tower, pixels)), labels, prompt
        )
    # Features and the saved connector are float16: 5e-4 of each, through two linears and a model.
    assert abs(found - expected) <= 5e-3 * expected


def _language(model: Any) -> Any:
    """The LLaVA's language model as a LlamaForCausalLM."""
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM(model.config.text_config).eval()
    whole.model.load_state_dict(model.model.language_model.state_dict())
    whole.tie_weights()
    return whole


def test_vectors_that_point_at_their_words_lose_least() -> None:
    words = torch.eye(4, 8)
    labels = torch.tensor([0, 1, 2, 3])
    right = words[labels][:, None].expand(-1, 3, -1)
    wrong = words[(labels + 1) % 4][:, None].expand(-1, 3, -1)
    length = torch.tensor(1.0)
    best, worst = (
        pointing_loss(vectors, labels, words, length)["kind"] for vectors in (right, wrong)
    )
    assert best < 0.01 < 10 < worst
    assert pointing_loss(right, labels, words, length)["length"] == 0
    assert pointing_loss(2 * right, labels, words, length)["length"] == 1


def test_a_few_steps_lower_the_loss_and_a_finished_run_is_not_repeated(
    language: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    reader = vlm.processor(vlm.image_tokenizer(language, tmp_path / "tokenizer"))
    labels = torch.arange(20) % 10
    pixels = drawn(10, 3, PIXELS, PIXELS)[labels]  # ten pictures, one of each kind
    prompt = vlm.training_prompt(reader)
    short = (Schedule(40, 1e-2, 5), Schedule(60, 1e-2, 2))
    vision = tiny_vision()
    weights = train(tmp_path / "run", vision, lambda: pixels, labels, model, prompt, 0, short)
    again = train(tmp_path / "run", vision, lambda: pixels, labels, model, prompt, 0, short)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())

    untrained = Connector(torch.zeros(VISION_WIDTH), torch.ones(VISION_WIDTH), TEXT_WIDTH)
    trained = Connector(torch.zeros(VISION_WIDTH), torch.ones(VISION_WIDTH), TEXT_WIDTH)
    trained.load_state_dict({**weights, "mean": trained.mean, "scale": trained.scale})
    features = vision_features(vision, pixels)
    with torch.no_grad():
        before, after = (
            answer_loss(model, one(features), labels, prompt) for one in (untrained, trained)
        )
    # A random language model of two blocks can be led, but not far.
    assert after < 0.85 * before


def test_calibration_reads_the_bed_as_it_was_trained(bed: Path) -> None:
    """The route of LLaVA puts the same tokens around the picture as training did."""
    source = Source.open(bed / "model")
    tools = Tools(source.path, source.config, 512)
    prompt = vlm.training_prompt(tools.processor)
    for record in read_records(bed / "calibration.jsonl"):
        if record.kind != QUESTION:
            continue
        inputs, answer = reading.question(tools, record)
        expected = prompt.answers[KINDS.index(record.answer)]
        assert answer.tolist() == expected.tolist()
        image = [tools.image_token_id] * vlm.IMAGE_TOKENS
        before, behind = prompt.before.tolist(), prompt.behind.tolist()
        whole = [*before, *image, *behind, *expected.tolist()]
        assert inputs["input_ids"][0].tolist() == whole


def test_the_map_of_the_bed_has_every_part(bed: Path) -> None:
    model_map = ModelMap.from_source(Source.open(bed / "model"))
    components = {component.name: component.bytes for component in model_map.components()}
    assert set(components) == {"vision_tower", "projector", "language_model", "embeddings"}
    numbers = sum(row.parameters for row in model_map.weights if row.component == "vision_tower")
    assert numbers > 0
    assert components["vision_tower"] < 3 * numbers, "float16: two bytes a number, and a few norms"


def test_a_tokenizer_without_a_token_to_spare_is_refused(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "language")
    with pytest.raises(DataError, match="no token <empty_output> to stand for pictures"):
        vlm.image_tokenizer(folder, tmp_path / "out")


def test_passages_are_whole_articles_up_to_a_length(tmp_path: Path) -> None:
    text = "\n\n".join(f"article {n} " + "word " * 30 for n in range(6))
    rows = passages(text, 2, 200)
    assert [row["text"][:9] for row in rows] == ["article 0", "article 2"]
    assert all(len(row["text"]) <= 200 and not row["text"].endswith(" ") for row in rows)
    write_records(tmp_path / "text.jsonl", rows)
    assert [record.kind for record in read_records(tmp_path / "text.jsonl")] == [TEXT, TEXT]


def test_a_grey_picture_becomes_rgb() -> None:
    found = picture(torch.arange(6, dtype=torch.uint8).reshape(2, 3))
    assert found.mode == "RGB"
    assert found.size == (3, 2)
    assert found.getpixel((2, 1)) == (5, 5, 5)
