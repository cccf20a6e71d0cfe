"""A recipe's formats of the KV cache by modality, scales known beforehand, and integer operators:
found from records, written, loaded, and within the budget."""

from pathlib import Path
from typing import Any

import pytest
import torch

import quantlib
from quantlib.checkpoint.contents import contents
from quantlib.checkpoint.reader import read_layout
from quantlib.cli import surroundings
from quantlib.errors import FormatError, ModelError, UsageError
from quantlib.kernels.kv_format import KvFormat
from quantlib.models.source import Source
from quantlib.pipeline.compress import apply_plan, compress
from quantlib.pipeline.modalities import check_caches, integer_operators
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.reporting import report_of
from quantlib.recipe import Recipe
from quantlib.runtime import nonlinear
from quantlib.runtime.modality_hooks import attached_caches

from . import whole_models

FORMATS = {"text": "int8", "image_input": "int4g16", "image_output": "int4/int8"}
SMALL: dict[str, Any] = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 0,
    "passes": 0,
    "size": "60%",
    "schemes": ["w3g32z4s4", "w6g64zs6"],
    "report": False,
}


@pytest.fixture(scope="module")
def janus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a tiny Janus, and records for it."""
    root = tmp_path_factory.mktemp("janus")
    return whole_models.save("janus", root / "model"), whole_models.records("janus", root)


def test_a_checkpoint_is_made_for_its_caches_and_its_integers(
    janus: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = janus
    result = compress(
        model,
        out=tmp_path / "out",
        data=data,
        kv_modalities=FORMATS,
        kv_static=["image_output"],
        nonlinear="sqnr=15",
        **SMALL,
    )
    checkpoint = read_layout(result.path)
    kv = checkpoint.around.kv
    assert kv is not None
    assert {name: str(form) for name, form in kv.formats.items()} == FORMATS
    assert kv.image_token == whole_models.IMAGE
    scales = checkpoint.static_scales()
    assert {modality for _, modality, _ in scales} == {"image_output"}
    assert {tuple(meta.shape) for meta in scales.values()} == {(16, 2, 1)}
    assert checkpoint.around.nonlinear
    # Bytes of the scales are part of the budget, and of what was predicted.
    assert result.file_bytes <= 0.6 * result.source_bytes
    assert result.plan.budget is not None
    assert result.file_bytes <= result.plan.budget
    beside = {row.name: row.bytes for row in contents(checkpoint).beside}
    assert sum(beside.values()) == sum(meta.nbytes for meta in scales.values())

    told = surroundings.described(checkpoint.around)
    assert told["kv"] == FORMATS
    assert told["kv_static"] == len(scales)
    assert sum(told["integers"].values()) == len(checkpoint.around.nonlinear)
    shown = dict(surroundings.rows(checkpoint.around))
    assert "scales of image_output known for every place" in shown["KV cache"]
    assert "image_output int4/int8" in shown["KV cache"]

    page = report_of(result.work).read_text()
    for words in (
        "image_output int4/int8 with static scales",
        "where sqnr=15 allows",
        "each by the root of its gradient energy",
        "image token",
    ):
        assert words in page

    packed = quantlib.load(result.path, engine="plain")
    loaded = packed.model
    assert nonlinear.attached(loaded) == dict(checkpoint.around.nonlinear)
    caches = attached_caches(loaded)
    assert caches is not None
    assert caches.formats["image_output"] == KvFormat.parse("int4/int8")
    caches.begun = []
    with reopen_run(result.work, with_data=True) as run, torch.no_grad():
        # A second look at what was found costs no run of the model.
        assert integer_operators(run) == dict(checkpoint.around.nonlinear)
        route = run.streams.route("image")
        sample = next(iter(run.streams.judging("image", loaded)))
        route.run(loaded, **sample.inputs)
    kinds = caches.begun[0].kinds
    assert sorted(set(kinds.flatten().tolist())) == [0, 2]
    caches.begun = []
    assert packed.generate_image("w1 w2", seed=1).size == (8, 8)
    assert any((cache.kinds == 2).any() for cache in caches.begun), "no code of the picture is kept"


def test_a_plan_is_applied_with_the_surroundings_of_its_recipe(
    janus: tuple[Path, Path], tmp_path: Path
) -> None:
    """`quantlib apply` of a measured work directory writes what `compress` wrote, one format of the
    cache for all parts and integer operators included."""
    model, data = janus
    asked = {"data": data, "kv": "int8", "nonlinear": "sqnr=15"}
    made = compress(model, out=tmp_path / "out", **asked, **SMALL)
    again = apply_plan(made.work / "plan.json", tmp_path / "again", made.work)
    around, other = (read_layout(path).around for path in (made.path, again.path))
    assert around.kv is not None
    assert other == around
    names = sorted(file.name for file in made.path.glob("*.safetensors"))
    assert [(again.path / name).read_bytes() for name in names] == [
        (made.path / name).read_bytes() for name in names
    ]


def test_text_alone_has_no_images_to_know_scales_of(squeeze: Any) -> None:
    for fields, what in (
        ({"nonlinear": "sqnr=20"}, "images or sound"),
        ({"kv_modalities": {"image_output": "int8"}}, "llama has no such tokens; .* holds text"),
    ):
        with pytest.raises(UsageError, match=what):
            squeeze(refine=False, **fields)


@pytest.mark.parametrize(
    ("case", "fields", "error", "what"),
    [
        ("llava", {"image_output": "int8"}, UsageError, "no such tokens; .*text, image_input$"),
        ("janus", {"image_input": "int4r"}, FormatError, "drop the r"),
        ("whisper", {"text": "int8"}, ModelError, "leave the format of the KV cache out"),
        ("dinov2", {"text": "int8"}, ModelError, "leave the format of the KV cache out"),
    ],
)
def test_a_cache_that_a_model_cannot_have_is_refused_before_it_is_run(
    case: str, fields: Any, error: type[Exception], what: str, tmp_path: Path
) -> None:
    source = Source.open(whole_models.save(case, tmp_path))
    with pytest.raises(error, match=what):
        check_caches(source, Recipe.create(data="a", kv_modalities=fields))


def test_scales_of_places_need_images_of_one_size(tmp_path: Path) -> None:
    source = Source.open(whole_models.save("emu3", tmp_path))
    fields = {"kv_modalities": {"image_output": "int8"}, "kv_static": ["image_output"]}
    with pytest.raises(UsageError, match="no fixed number of tokens"):
        check_caches(source, Recipe.create(data="a", **fields))
    check_caches(source, Recipe.create(data="a", kv_modalities=fields["kv_modalities"]))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"kv": "int8", "kv_modalities": FORMATS}, "give one"),
        ({"kv_modalities": {"video": "int8"}}, "kv_modalities"),
        ({"kv_modalities": {"text": "int9"}}, "int9"),
        ({"kv_static": ["image_output"]}, "kv_static"),
        ({"kv_static": ["text"], "kv_modalities": FORMATS}, "kv_static"),
        ({"nonlinear": "30"}, "sqnr=30"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(fields: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Recipe.create(data="text.txt", **fields)


def test_recipes_come_back_from_yaml(tmp_path: Path) -> None:
    recipe = Recipe.create(data="a", kv_modalities=FORMATS, kv_static=["image_input"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
