"""Every stream reaches the modules of its own path, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantlib.calibration import forwards
from quantlib.calibration.losses import LossSum, sampled_tokens, sampled_vectors
from quantlib.calibration.stream import BlockStream
from quantlib.calibration.streams import Sample, Stream
from quantlib.calibration.whole import calibrate, collect
from quantlib.errors import DataError
from quantlib.models.source import Source

from ..models.stacked_models import IMAGE, save
from .tiny_streams import (
    ANSWER,
    IMAGE_TOKENS,
    PROMPT,
    Mapped,
    answer,
    next_word,
    questions,
    random,
    seen_in,
    speech_sample,
    text,
    unseen_in,
    words,
)


def test_speech_reaches_encoder_and_decoder_of_whisper(mapped: Mapped) -> None:
    model, model_map = mapped("whisper")
    stream = Stream("speech", [speech_sample(n) for n in range(2)])
    found = calibrate(model, model_map, [stream])
    assert found.total.unseen() == []
    tokens = {name: group.tokens for name, group in found.total.groups.items()}
    assert tokens["model.encoder.conv1"] == 2 * 32  # frames, before the stride of conv2
    assert tokens["model.encoder.layers.0.self_attn.qkv"] == 2 * 16
    assert tokens["model.decoder.layers.0.encoder_attn.q_proj"] == 2 * 6
    assert tokens["model.decoder.layers.0.encoder_attn.kv"] == 2 * 16
    head = found.total.embeddings["model.decoder.embed_tokens"]
    assert float(head.frequency.sum()) == float(head.tokens) == 2 * 6


def test_text_alone_leaves_the_tower_of_llava_unseen_and_says_so(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    with pytest.raises(DataError, match=r"11 parts .* no calibration stream runs .*vision_tower"):
        calibrate(model, model_map, [text()])
    allowed = ["model.vision_tower.*", "model.multi_modal_projector.*"]
    found = calibrate(model, model_map, [text()], allow_unseen=allowed)
    assert unseen_in(found.total, model_map) == {"vision_tower", "projector"}


def test_questions_reach_all_of_llava_and_only_answers_count_at_the_head(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    stream = questions(lambda n: random(1, 3, 28, 28, seed=n), IMAGE_TOKENS)
    found = calibrate(model, model_map, [text(), stream])
    assert found.total.unseen() == []
    asked, read = found.streams["questions"], found.streams["text"]
    assert (asked.terms, read.terms) == (2 * ANSWER, 2 * 12)
    assert len(asked.embeddings["lm_head"].sample_h) == 2 * ANSWER
    # images replace their placeholders, whose embedding nothing depends on
    assert float(asked.embeddings["model.language_model.embed_tokens"].frequency[IMAGE]) == 0
    name = "model.vision_tower.embeddings.patch_embedding"
    assert asked.groups[name].tokens == 2 * 4
    assert read.groups[name].tokens == 0


def test_a_last_block_that_the_projector_does_not_read_saw_no_data(mapped: Mapped) -> None:
    model, model_map = mapped("llava")
    stream = questions(lambda n: random(1, 3, 28, 28, seed=n), IMAGE_TOKENS)
    model.config.vision_feature_layer = -2
    model.model.config.vision_feature_layer = -2
    try:
        with pytest.raises(DataError, match=r"no loss .* depends on .*encoder\.layers\.1\.self"):
            calibrate(model, model_map, [stream])
    finally:
        model.config.vision_feature_layer = -1
        model.model.config.vision_feature_layer = -1


def janus_streams(model: PreTrainedModel, guidance: float = 1.0) -> dict[str, Stream]:
    """Text, questions, images from text, pixels from codes, codes from pixels."""
    pixels = [random(1, 3, 8, 8, seed=n) for n in range(2)]
    codes = [torch.randint(20, (1, 16), generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    side = {"image_codes": codes[0], "guidance": guidance}

    def write(n: int) -> dict[str, Any]:
        unconditional = {"unconditional_ids": torch.zeros(1, 6, dtype=torch.long)}
        return {"input_ids": words(6, n), **side} | (unconditional if guidance != 1 else {})

    tokens, vectors = sampled_tokens, sampled_vectors
    return {
        "text": text(),
        "questions": questions(lambda n: pixels[n], 16),
        "writing": Stream(
            "writing", [Sample(write(n), tokens) for n in (1, 2)], forwards.janus_image_logits
        ),
        "pixels": Stream(
            "pixels", [Sample({"image_codes": c}, vectors) for c in codes], forwards.decoded_image
        ),
        "codes": Stream(
            "codes", [Sample({"pixel_values": p}, tokens) for p in pixels], forwards.code_logits
        ),
    }


GENERATION = {"generation_embeddings", "generation_projector", "generation_head"}
READING = {"vision_tower", "projector"}
TEXT = {"language_model", "embeddings"}


@pytest.mark.parametrize(
    ("stream", "components"),
    [
        ("text", TEXT),
        ("questions", TEXT | READING),
        ("writing", TEXT | GENERATION),
        ("pixels", {"image_decoder"}),
        ("codes", {"image_encoder"}),
    ],
)
def test_every_stream_of_janus_reaches_its_own_modules_and_no_others(
    mapped: Mapped, stream: str, components: set[str]
) -> None:
    model, model_map = mapped("janus")
    found = collect(model, model_map, janus_streams(model)[stream])
    assert seen_in(found, model_map) == components
    everything = {group.component for group in model_map.groups}
    assert unseen_in(found, model_map) >= everything - components


def test_all_streams_together_reach_all_of_janus(mapped: Mapped) -> None:
    model, model_map = mapped("janus")
    found = calibrate(model, model_map, list(janus_streams(model).values()))
    assert found.total.unseen() == []
    head = found.total.groups["model.generation_head.vision_head"]
    assert head.tokens == found.streams["writing"].terms == 2 * 16
    language = found.total.groups["model.language_model.layers.0.self_attn.qkv"]
    parts = [found.streams[name].groups[language.name] for name in found.streams]
    assert language.tokens == sum(part.tokens for part in parts)


def test_without_the_writing_stream_janus_has_unseen_generation_modules(mapped: Mapped) -> None:
    """The model's own forward never runs them: only an explicit pass does."""
    model, model_map = mapped("janus")
    streams = janus_streams(model)
    del streams["writing"]
    with pytest.raises(DataError, match=r"no calibration stream runs model\.generation_"):
        calibrate(model, model_map, list(streams.values()))


def test_teacher_forced_codes_are_predicted_as_in_the_generation_loop(mapped: Mapped) -> None:
    model, _ = mapped("janus")
    ids, codes = words(6), torch.randint(20, (1, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = forwards.janus_image_logits(model, ids, codes)
        states = model.get_input_embeddings()(ids)
        for place in range(16):
            out = model.model.language_model(inputs_embeds=states, use_cache=False)
            logits = model.model.generation_head(out.last_hidden_state[:, -1])
            torch.testing.assert_close(together[:, place], logits, rtol=1e-4, atol=1e-4)
            code = model.prepare_embeddings_for_image_generation(codes[:, place : place + 1])
            states = torch.cat([states, code], 1)


def test_guidance_runs_the_unconditional_row_too(mapped: Mapped) -> None:
    model, model_map = mapped("janus")
    guided = collect(model, model_map, janus_streams(model, guidance=3.0)["writing"])
    plain = collect(model, model_map, janus_streams(model)["writing"])
    name = "model.language_model.layers.0.self_attn.qkv"
    assert guided.groups[name].tokens == 2 * plain.groups[name].tokens
    assert guided.terms == plain.terms
    rows = {"input_ids": words(6), "image_codes": torch.zeros(1, 16, dtype=torch.long)}
    other = torch.zeros(1, 6, dtype=torch.long)
    with torch.no_grad():
        c = forwards.janus_image_logits(model, **rows)
        u = forwards.janus_image_logits(model, **{**rows, "input_ids": other})
        both = forwards.janus_image_logits(model, **rows, unconditional_ids=other, guidance=3.0)
    torch.testing.assert_close(both, u + 3.0 * (c - u), rtol=1e-4, atol=1e-4)


# -- the other families ----------------------------------------------------------------------------


def tower_inputs(n: int) -> dict[str, Any]:
    return {"pixel_values": random(1, 3, 28, 28, seed=n)}


def similarity(output: Any, generator: torch.Generator) -> LossSum:
    """An image and a text are compared: what counts are their two vectors."""
    both = torch.cat([output.image_embeds, output.text_embeds])
    return sampled_vectors(both, generator)


def states(output: Any, generator: torch.Generator) -> LossSum:
    return sampled_vectors(output.last_hidden_state, generator)


def pooled(output: Any, generator: torch.Generator) -> LossSum:
    vectors = torch.cat([output.last_hidden_state, output.pooler_output[:, None]], 1)
    return sampled_vectors(vectors, generator)


def pair_inputs(n: int) -> dict[str, Any]:
    return {"input_ids": words(8, n), **tower_inputs(n)}


def qwen_inputs(n: int) -> dict[str, Any]:
    """An image of 4 x 4 patches, merged 2 x 2: four vectors."""
    vision = torch.full((1, 4), IMAGE)
    return {
        "input_ids": torch.cat([words(PROMPT, n), vision, words(ANSWER + 2, n)], 1),
        "pixel_values": random(16, 3 * 2 * 4 * 4, seed=n),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "use_cache": False,
    }


def idefics_inputs(n: int) -> dict[str, Any]:
    """Four patches, shuffled into one vector."""
    ids = torch.cat([words(PROMPT, n), torch.full((1, 1), IMAGE), words(ANSWER + 2, n)], 1)
    pixels = random(1, 1, 3, 28, 28, seed=n)
    return {"input_ids": ids, "pixel_values": pixels, "use_cache": False}


def image_question(n: int) -> dict[str, Any]:
    ids = torch.cat([words(PROMPT, n), torch.full((1, 4), IMAGE), words(ANSWER + 2, n)], 1)
    return {"input_ids": ids, "use_cache": False, **tower_inputs(n)}


UNREAD_HEAD = {f"model.vision_tower.head.mlp.{name}" for name in ("fc1", "fc2")}
"""A tower in a larger model has no use for its own pooling."""


@pytest.mark.parametrize(
    ("case", "inputs", "loss", "unseen"),
    [
        ("qwen2_5_vl", qwen_inputs, answer, set()),
        ("idefics3", idefics_inputs, answer, set()),
        ("smolvlm", idefics_inputs, answer, set()),
        ("gemma3", image_question, answer, UNREAD_HEAD),
        ("llava_dinov2", image_question, answer, set()),
        ("llava_siglip", image_question, answer, UNREAD_HEAD),
        ("clip", pair_inputs, similarity, set()),
        ("siglip", pair_inputs, similarity, set()),
        ("clip_vision", tower_inputs, states, set()),
        ("siglip_vision", tower_inputs, pooled, set()),
        ("dinov2", tower_inputs, states, set()),
        ("bert", lambda n: {"input_ids": words(8, n)}, pooled, set()),
    ],
)
def test_one_stream_reaches_every_group_of_models_that_read(
    mapped: Mapped, case: str, inputs: Any, loss: Any, unseen: set[str]
) -> None:
    model, model_map = mapped(case)
    samples = [Sample(inputs(n), loss) for n in range(2)]
    found = collect(model, model_map, Stream("all", samples))
    assert set(found.unseen()) == unseen
    for name, group in found.groups.items():
        assert name in unseen or group.matrices[0].hessian.isfinite().all(), name


def emu3_streams() -> list[Stream]:
    """One vocabulary: words and image codes are predicted alike, by `forward`."""
    ids = torch.cat([words(6), torch.randint(50, 70, (1, 16))], 1)
    codes = torch.randint(20, (1, 4, 4), generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[8, 8]])
    pixels = {"pixel_values": random(1, 3, 8, 8), "image_sizes": sizes}
    return [
        Stream("writing", [Sample({"input_ids": ids, "use_cache": False}, next_word)]),
        Stream(
            "pixels",
            [Sample({"image_codes": codes}, sampled_vectors)],
            forwards.decoded_image,
        ),
        Stream("codes", [Sample(pixels, sampled_tokens)], forwards.code_logits),
    ]


def test_three_streams_reach_all_of_emu3(mapped: Mapped) -> None:
    """Convolutions over time too."""
    model, model_map = mapped("emu3")
    found = calibrate(model, model_map, emu3_streams())
    assert found.total.unseen() == []
    decoder = {"image_decoder"}
    assert seen_in(found.streams["pixels"], model_map) == decoder
    assert seen_in(found.streams["codes"], model_map) == {"image_encoder"}


def test_the_decoder_side_of_chameleon_has_no_stream_that_reaches_it(mapped: Mapped) -> None:
    """transformers' Chameleon has no image decoder; the convolution before it is never run."""
    model, model_map = mapped("chameleon")
    codes = Stream(
        "codes",
        [Sample({"pixel_values": random(1, 3, 8, 8)}, sampled_tokens)],
        forwards.code_logits,
    )
    found = calibrate(
        model, model_map, [text(), codes], allow_unseen=["model.vqmodel.post_quant_conv"]
    )
    assert found.total.unseen() == ["model.vqmodel.post_quant_conv"]


@pytest.mark.parametrize("case", ["llava", "janus", "qwen2_5_vl", "idefics3", "gemma3", "emu3"])
def test_text_streams_through_the_language_model_alone(
    case: str, tmp_path: Path, mapped: Mapped
) -> None:
    """`blocks` are the language model's: it can still be run with one of them in memory."""
    model, model_map = mapped(case)
    stream = BlockStream(Source.open(save(model, tmp_path)), model_map)
    ids = words(12)[0]
    with torch.no_grad():
        hidden = stream.embed(ids)
        for index in range(len(stream.block_names)):
            with stream.block(index) as block:
                hidden = stream.run(index, block, hidden)
        found = stream.logits(hidden, ids)
        expected = model(input_ids=ids[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
