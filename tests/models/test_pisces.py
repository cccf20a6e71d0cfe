"""The form of Pisces: what it is written in, what it predicts, and that the product can read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, JanusVisionConfig, LlamaConfig

from quantlib.models import skeleton
from quantlib.models.modelmap import ModelMap
from quantlib.models.pisces import PiscesConfig, PiscesForConditionalGeneration
from quantlib.models.source import Source

IMAGE, BEGIN, PAD, BOS = 5, 3, 0, 1
PROMPT = torch.tensor([[BOS, 8, 9, BEGIN]])


def tower(layers: int) -> JanusVisionConfig:
    return JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        mlp_ratio=2.0,
        projection_dim=32,
        num_image_tokens=16,
    )


@pytest.fixture(scope="module")
def model() -> PiscesForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    config = PiscesConfig(
        text_config=text,
        vision_config=tower(1),
        image_encoder_config=tower(1),
        decoder_config=tower(2),
        pooling=2,
        vector_size=8,
        image_token_id=IMAGE,
        begin_image_token_id=BEGIN,
    )
    made = PiscesForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():  # transformers draws from a global seed
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    made.generation_config.pad_token_id = PAD
    made.generation_config.bos_token_id = BOS
    made.requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def folder(model: PiscesForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pisces")
    model.save_pretrained(path)
    return path


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_every_parameter_is_in_one_component(
    model: PiscesForConditionalGeneration, folder: Path
) -> None:
    found = ModelMap.from_source(Source.open(folder))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert {row.name for row in found.components()} == {
        "vision_tower",
        "projector",
        "image_encoder",
        "generation_projector",
        "generation_head",
        "image_decoder",
        "embeddings",
        "language_model",
    }
    stacks = {stack.component: len(stack.blocks) for stack in found.stacks}
    assert stacks == {"vision_tower": 1, "image_encoder": 1, "image_decoder": 2}


def test_the_product_builds_and_fills_the_same_model(
    model: PiscesForConditionalGeneration, folder: Path
) -> None:
    source = Source.open(folder)
    built = skeleton.build(source)
    skeleton.materialize(built, "", source)
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    expected = model.encode_image(pictures(2))
    for other in (built, loaded):
        assert isinstance(other, PiscesForConditionalGeneration)
        assert torch.equal(other.encode_image(pictures(2)), expected)


def test_vectors_are_a_pooled_grid_of_mean_square_one(
    model: PiscesForConditionalGeneration,
) -> None:
    vectors = model.encode_image(pictures(3))
    assert vectors.shape == (3, 4, 8)
    # layer_norm adds 1e-5 to a variance that is about one here
    assert (vectors.square().mean(-1) - 1).abs().max() < 1e-2
    assert vectors.mean(-1).abs().max() < 1e-5


def test_teacher_forcing_on_generated_vectors_predicts_them(
    model: PiscesForConditionalGeneration,
) -> None:
    written = model.generate_vectors(PROMPT)
    predicted = model.predicted_vectors(PROMPT, written)
    # The same float32 products, with and without a cache.
    assert (predicted - written).abs().max() < 1e-4


def test_guidance_moves_away_from_the_prompt_without_words(
    model: PiscesForConditionalGeneration,
) -> None:
    wordless = torch.tensor([[BOS, PAD, PAD, BEGIN]])
    plain = model.generate_vectors(PROMPT)
    assert (model.generate_vectors(PROMPT, wordless, 1.0) - plain).abs().max() < 1e-4
    guided = model.generate_vectors(PROMPT, wordless, 3.0)
    assert (guided - plain).abs().max() > 1e-2
    by_name = model.generate(PROMPT, generation_mode="image", guidance_scale=3.0)
    assert torch.equal(by_name, guided)


def test_words_are_generated_without_guidance(model: PiscesForConditionalGeneration) -> None:
    ids = torch.tensor([[BOS, BEGIN, *[IMAGE] * 16, 4, 9]])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures(1)}
    model.generation_config.guidance_scale = 3.0
    written = model.generate(**asked, do_sample=False, max_new_tokens=3)
    first = model(**asked).logits[0, -1].argmax()
    assert written.shape == (1, 23)
    assert written[0, 20] == first


def test_the_last_step_of_decoding_is_what_the_decoder_sees(
    model: PiscesForConditionalGeneration,
) -> None:
    vectors, noise = model.encode_image(pictures(2)), pictures(2)
    once = model.decode_vectors(vectors, noise, steps=1)
    seen = model.model.image_decoder(noise, torch.zeros(2), vectors)
    assert (once - seen).abs().max() < 1e-5  # noise is added and taken away
    # A decoder that always sees the same picture arrives there from any noise.
    decoder = model.model.image_decoder.pixels
    weight = decoder.weight.data.clone()
    decoder.weight.data.zero_()
    try:
        arrived = model.decode_vectors(vectors, noise, steps=5)
    finally:
        decoder.weight.data.copy_(weight)
    expected = model.model.image_decoder.pixels.bias.view(1, 3, 4, 4).repeat(1, 1, 4, 4)
    assert (arrived - expected).abs().max() < 1e-5


def test_a_patch_is_drawn_under_its_own_vector(model: PiscesForConditionalGeneration) -> None:
    """Without attention, changing the first vector changes the first cell and nothing else."""
    decoder = model.model.image_decoder
    silenced = [layer.self_attn.projection_layer for layer in decoder.tower.encoder.layers]
    weights = [module.weight.data.clone() for module in silenced]
    vectors, noise = model.encode_image(pictures(1)), pictures(1)
    other = vectors.clone()
    other[:, 0] = -other[:, 0]
    try:
        for module in silenced:
            module.weight.data.zero_()
        moved = [decoder(noise, torch.zeros(1), given) for given in (vectors, other)]
    finally:
        for module, weight in zip(silenced, weights):
            module.weight.data.copy_(weight)
    changed = (moved[0] - moved[1]).abs().amax((0, 1)) > 1e-6
    assert changed[:8, :8].all()
    assert not changed[8:].any()
    assert not changed[:, 8:].any()


def test_too_few_tokens_for_a_picture_are_refused(model: PiscesForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="15 tokens stand for pictures, which have 16"):
        model(input_ids=torch.tensor([[BOS, *[IMAGE] * 15]]), pixel_values=pictures(1))
