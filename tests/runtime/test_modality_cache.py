"""Words, images read and images written each keep their keys and values in their own format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import quantlib  # noqa: F401  (teaches transformers the format)
from quantlib.calibration.forwards import janus_image_logits
from quantlib.checkpoint.cache_formats import CacheFormats, tensor_name
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.surroundings import CacheSettings, entries, read
from quantlib.checkpoint.writer import write_checkpoint
from quantlib.errors import CheckpointError, DataError, ModelError, UsageError
from quantlib.formats import Scheme, pack, quantize_rtn
from quantlib.kernels.kv_format import KvFormat
from quantlib.models.modality import IMAGE_INPUT, IMAGE_OUTPUT, TEXT, Modality, known_modalities
from quantlib.runtime.modality_cache import ModalityCache
from quantlib.runtime.modality_hooks import (
    attach_caches,
    attached_caches,
    detach_caches,
    image_token_of,
)
from quantlib.runtime.static_scales import static_scales
from quantlib.transforms.attention import round_kv

from ..models.stacked_models import IMAGE, build
from ..pipeline import whole_models

PATCHES = 16
"""Tokens of an image of the tiny Janus."""
MIXED: dict[Modality, KvFormat] = {
    "text": KvFormat.parse("int8"),
    "image_input": KvFormat.parse("int4g16"),
    "image_output": KvFormat.parse("int4/int8"),
}
EXACT: dict[Modality, KvFormat] = {"text": KvFormat.parse("f32")}


def janus() -> Any:
    model: Any = build("janus")
    model.generation_config.generation_kwargs = {"boi_token_id": 5}
    model.generation_config.pad_token_id, model.generation_config.bos_token_id = 0, 1
    return model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def question() -> dict[str, Tensor]:
    ids = torch.cat(
        [torch.tensor([[1, 7, 8]]), torch.full((1, PATCHES), IMAGE), torch.tensor([[9, 11]])], 1
    )
    return {
        "input_ids": ids,
        "pixel_values": random(1, 3, 8, 8),
        "attention_mask": torch.ones_like(ids),
    }


def paint(model: Any, prompt: Tensor | None = None) -> Any:
    prompt = torch.tensor([[1, 7, 8, 5]]) if prompt is None else prompt
    return model.generate(
        inputs=prompt,
        attention_mask=torch.ones_like(prompt),
        generation_mode="image",
        guidance_scale=3.0,
        do_sample=False,
        return_dict_in_generate=True,
    )


def answer(model: Any, **options: Any) -> Any:
    return model.generate(
        **question(), generation_mode="text", max_new_tokens=6, min_new_tokens=6, **options
    )


def test_a_cache_of_exact_numbers_changes_nothing_that_a_model_says_or_paints() -> None:
    model = janus()
    said, painted = answer(model, do_sample=False), paint(model).sequences
    by_beams = answer(model, num_beams=3, do_sample=False)
    attach_caches(model, EXACT, image_token_of(model.config))
    assert torch.equal(answer(model, do_sample=False), said)
    assert torch.equal(paint(model).sequences, painted)
    assert torch.equal(answer(model, num_beams=3, do_sample=False), by_beams)


@pytest.mark.parametrize("case", ["llava", "gemma3", "qwen2_5_vl", "idefics3"])
def test_other_families_run_with_it(case: str) -> None:
    model: Any = build(case)
    ids = torch.tensor([[1, 7, 8, 9, 12, 13, 14]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    said = model.generate(input_ids=ids, **options)
    assert image_token_of(model.config) == IMAGE
    attach_caches(model, EXACT, IMAGE)
    assert torch.equal(model.generate(input_ids=ids, **options), said)


def test_of_a_model_that_speaks_it_is_what_reads_that_has_it() -> None:
    model: Any = whole_models.build("qwen2_5_omni")
    ids = torch.tensor([[1, 7, 8, 9, 12]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    said = model.thinker.generate(input_ids=ids, **options)
    assert image_token_of(model.config) == IMAGE
    caches = attach_caches(model, EXACT, IMAGE)
    caches.begun = []
    assert torch.equal(model.thinker.generate(input_ids=ids, **options), said)
    (cache,) = caches.begun
    assert cache.get_seq_length() == 5 + 4


def test_ids_and_the_way_of_generating_tell_what_tokens_are() -> None:
    model = janus()
    caches = attach_caches(model, MIXED, IMAGE)
    caches.begun = []
    answer(model, do_sample=False)
    paint(model)
    read, painted = (cache.kinds for cache in caches.begun)
    row = [TEXT] * 3 + [IMAGE_INPUT] * PATCHES + [TEXT] * 2 + [TEXT] * 5
    assert read.tolist() == [row]
    # The row of guidance is one more sequence; the last code is not read any more.
    row = [TEXT] * 4 + [IMAGE_OUTPUT] * (PATCHES - 1)
    assert painted.tolist() == [row, row]


def test_attention_reads_what_the_formats_give_back() -> None:
    kinds = torch.tensor([[TEXT] * 3 + [IMAGE_INPUT] * 5 + [TEXT] * 2 + [IMAGE_OUTPUT] * 6])
    keys, values = random(1, 2, 16, 32), random(1, 2, 16, 32, seed=1)
    cache = ModalityCache(2, MIXED)
    # A prompt at once, then token by token, in both layers.
    for part in (slice(0, 9), *(slice(at, at + 1) for at in range(9, 16))):
        cache.expect(kinds[:, part])
        found = [cache.update(keys[:, :, part], values[:, :, part], layer) for layer in (0, 1)]
    for kept in found:
        for at, kind in enumerate(kinds[0].tolist()):
            form = list(MIXED.values())[kind]
            for side, x, y in zip((form.key, form.value), (keys, values), kept, strict=True):
                assert torch.equal(y[:, :, at], round_kv(x[:, :, at], side))


def test_bytes_are_those_of_each_kind() -> None:
    model = janus()
    caches = attach_caches(model, MIXED, IMAGE)
    caches.begun = []
    with torch.no_grad():
        model(**question())
    paint(model)
    heads, head_dim, layers = 2, 8, 2
    each = [form.bytes_per_position(head_dim) for form in MIXED.values()]
    read, painted = caches.begun
    assert read.nbytes == layers * heads * (5 * each[0] + PATCHES * each[1])
    assert painted.nbytes == layers * heads * 2 * (4 * each[0] + (PATCHES - 1) * each[2])
    painted.reset()
    assert painted.nbytes == painted.get_seq_length() == 0


def test_first_positions_may_be_kept_in_float32() -> None:
    model = janus()
    caches = attach_caches(model, {"text": KvFormat.parse("int4k4")}, IMAGE)
    caches.begun = []
    with torch.no_grad():
        model(**question())
    exact = attach_caches(model, EXACT, IMAGE)
    exact.begun = []
    with torch.no_grad():
        model(**question())
    found, true = (
        c.begun[0].layers[0].sides[0].read(c.begun[0]._index, torch.float32)
        for c in (caches, exact)
    )
    assert torch.equal(found[:, :, :4], true[:, :, :4])
    assert not torch.equal(found[:, :, 4:], true[:, :, 4:])


def test_a_picture_given_code_by_code_is_one_that_is_written() -> None:
    model = janus()
    prompt, codes = torch.tensor([[1, 7, 8, 5]]), torch.arange(PATCHES)[None] % 20
    with torch.no_grad():
        plain = janus_image_logits(model, prompt, codes)
        caches = attach_caches(model, EXACT, IMAGE)
        caches.begun = []
        exact = janus_image_logits(model, prompt, codes)
        (cache,) = caches.begun
        attach_caches(model, {**EXACT, "image_output": KvFormat.parse("int4")}, IMAGE)
        rounded = janus_image_logits(model, prompt, codes)
    assert cache.kinds.tolist() == [[TEXT] * 4 + [IMAGE_OUTPUT] * (PATCHES - 1)]
    torch.testing.assert_close(exact, plain, rtol=1e-5, atol=1e-5)
    # The first code is predicted from words alone.
    torch.testing.assert_close(rounded[:, 0], plain[:, 0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rounded[:, -1], plain[:, -1], rtol=1e-3, atol=1e-3)


def test_kinds_that_do_not_fit_are_refused() -> None:
    model = janus()
    attach_caches(model, MIXED, IMAGE)
    decoder = model.model.language_model
    wrong = torch.zeros(1, 3, dtype=torch.int64)
    with known_modalities(decoder, wrong), pytest.raises(DataError, match="kinds"):
        decoder(inputs_embeds=random(1, 4, 32))
    # What was said for one call is not said for the next.
    decoder(inputs_embeds=random(1, 4, 32))


def test_a_cache_that_holds_something_already_cannot_be_taken_over() -> None:
    model = janus()
    cache = DynamicCache()
    with torch.no_grad():
        model.model.language_model(inputs_embeds=random(1, 4, 32), past_key_values=cache)
    attach_caches(model, MIXED, IMAGE)
    with pytest.raises(UsageError, match="holds 4 positions"):
        model.model.language_model(inputs_embeds=random(1, 1, 32), past_key_values=cache)


def test_what_is_attached_is_taken_away() -> None:
    model = janus()
    attach_caches(model, MIXED, IMAGE)
    attach_caches(model, EXACT, IMAGE)
    found = attached_caches(model)
    assert found is not None
    assert found.formats == EXACT
    detach_caches(model)
    assert attached_caches(model) is None
    with torch.no_grad():
        output = model(**question(), use_cache=True)
    assert type(output.past_key_values) is DynamicCache


def test_unknown_modalities_and_models_without_a_decoder_are_refused() -> None:
    with pytest.raises(UsageError, match="video"):
        attach_caches(janus(), {"video": MIXED["text"]})  # type: ignore[dict-item]
    with pytest.raises(ModelError, match="no decoder"):
        attach_caches(build("siglip_vision"), MIXED)
    with pytest.raises(ModelError, match="no decoder"):
        attach_caches(build("whisper"), MIXED)


# -- scales known beforehand -----------------------------------------------------------------------


def forced(model: Any, seed: int) -> Any:
    codes = torch.randint(0, 20, (1, PATCHES), generator=torch.Generator().manual_seed(seed))
    return lambda: janus_image_logits(model, torch.tensor([[1, 7, 8, 5]]), codes)


def first_layer(cache: ModalityCache) -> list[Tensor]:
    """Keys and values of the first layer, as attention reads them. What other layers read depends
    on it, so ranges that were found with exact numbers need not be theirs."""
    kinds = range(len(MIXED))
    return [cache.tokens(0, side, kind)[0] for side in ("key", "value") for kind in kinds]


def test_static_scales_of_the_very_image_change_only_the_bytes() -> None:
    model = janus()
    formats: dict[Modality, KvFormat] = {**EXACT, "image_output": KvFormat.parse("int8/int4")}
    run = forced(model, 0)
    static = static_scales(model, [run], formats, "image_output", PATCHES)
    assert attached_caches(model) is None
    assert {tuple(meta.shape) for meta in static.values()} == {(PATCHES, 2, 1)}
    found = []
    for scales in ({}, static):
        caches = attach_caches(model, formats, IMAGE, scales)
        caches.begun = []
        with torch.no_grad():
            run()
        found += caches.begun
    dynamic, fixed = found
    for one, other in zip(first_layer(dynamic), first_layer(fixed), strict=True):
        assert torch.equal(one, other)
    # layers, heads, sides, tokens (the last code is not read again), a meta word each
    assert dynamic.nbytes - fixed.nbytes == 2 * 2 * 2 * (PATCHES - 1) * 4
    for meta in static.values():
        assert torch.equal(meta[-1], meta[-2])


def test_static_scales_of_other_images_serve_an_image_that_is_painted() -> None:
    model = janus()
    formats: dict[Modality, KvFormat] = {**EXACT, "image_output": KvFormat.parse("int8")}
    runs = [forced(model, seed) for seed in range(6)]
    static = static_scales(model, runs, formats, "image_output", PATCHES)
    attach_caches(model, formats, IMAGE, static)
    painted = paint(model).sequences
    assert painted.shape == (1, PATCHES)


def test_images_that_are_read_have_places_too() -> None:
    model = janus()
    formats: dict[Modality, KvFormat] = {**EXACT, "image_input": KvFormat.parse("int8")}
    static = static_scales(
        model, [lambda: model(**question())], formats, "image_input", PATCHES, IMAGE
    )
    found = []
    for scales in ({}, static):
        caches = attach_caches(model, formats, IMAGE, scales)
        caches.begun = []
        with torch.no_grad():
            model(**question())
        found += caches.begun
    for one, other in zip(*map(first_layer, found), strict=True):
        assert torch.equal(one, other)
    assert found[0].nbytes > found[1].nbytes


def test_places_without_calibration_data_are_reported() -> None:
    model = janus()
    formats: dict[Modality, KvFormat] = {**EXACT, "image_output": KvFormat.parse("int8")}
    with pytest.raises(DataError, match=f"place {PATCHES - 1} of an image"):
        static_scales(model, [forced(model, 0)], formats, "image_output", PATCHES + 4)
    with pytest.raises(DataError, match="place 0"):
        static_scales(model, [lambda: model(**question())], formats, "image_output", 4, IMAGE)
    with pytest.raises(DataError, match="no decoder"):
        static_scales(model, [lambda: None], formats, "image_output", PATCHES)
    with pytest.raises(UsageError, match="f32"):
        static_scales(model, [forced(model, 0)], EXACT, "image_output", PATCHES)


# -- checkpoints -----------------------------------------------------------------------------------


def write(model: PreTrainedModel, folder: Path, kv: CacheFormats, static: Any = None) -> Path:
    """A checkpoint of the model with one packed weight."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if name != "lm_head.weight"}
    tensors |= {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    weight = tensors.pop(name)
    packed = pack(quantize_rtn(weight, Scheme.parse("w8g32").segments(weight.shape[1])))
    tensors |= {name + suffix: tensor for suffix, tensor in packed.items()}
    tensors |= {tensor_name(place): meta for place, meta in (static or {}).items()}
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    write_checkpoint(folder, tensors, config, {name: "w8g32"}, {name: tuple(weight.shape)}, kv=kv)
    return folder


@pytest.mark.parametrize("is_static", [False, True])
def test_a_checkpoint_brings_its_caches_with_it(is_static: bool, tmp_path: Path) -> None:
    model = janus()
    static = {}
    if is_static:
        static = static_scales(model, [forced(model, 0)], MIXED, "image_output", PATCHES)
    kv = CacheFormats(MIXED, IMAGE, frozenset(tensor_name(place) for place in static))
    folder = write(model, tmp_path / "out", kv, static)
    checkpoint = read_layout(folder)
    assert checkpoint.around.kv == kv
    assert not [name for name in checkpoint.kept_names if name.startswith("quantlib")]
    kind = type(model)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again_at = tmp_path / "again"
    loaded.save_pretrained(again_at)
    for one in (loaded, kind.from_pretrained(again_at)):
        found = attached_caches(one)
        assert found is not None
        assert (found.formats, found.image_token) == (MIXED, IMAGE)
        assert found.static.keys() == static.keys()
        assert all(torch.equal(found.static[place], meta) for place, meta in static.items())
        found.begun = []
        with torch.no_grad():
            one(**question())
        assert found.begun[0].kinds[0, 3] == IMAGE_INPUT


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([1], "kv_modalities"),
        ({"formats": {}, "image_token": None, "static": []}, "kv_modalities"),
        ({"formats": {"text": "int9"}, "image_token": None, "static": []}, "int9"),
        ({"formats": {"video": "int8"}, "image_token": None, "static": []}, "kv_modalities"),
        ({"formats": {"text": "int8"}, "image_token": "x", "static": []}, "image token"),
        ({"formats": {"text": "int8"}, "image_token": 1, "static": ["a"]}, "no scales"),
    ],
)
def test_damaged_entries_are_reported(given: object, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        read({"kv_modalities": given}, {}, {})


def test_caches_by_module_and_by_modality_exclude_each_other() -> None:
    caches = {"layers.0.attn": CacheSettings(KvFormat.parse("int8"))}
    with pytest.raises(CheckpointError, match="by modality"):
        read(entries({}, (), None, caches, kv=CacheFormats(MIXED)), {}, {})
    assert read(entries({}, (), None, {}, kv=CacheFormats(MIXED)), {}, {}).kv == CacheFormats(MIXED)
