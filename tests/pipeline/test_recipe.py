"""Recipes: what was asked for, complete, checked, and readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.recipe import (
    FUSED_SCHEMES,
    NATIVE_SCHEMES,
    PRESETS,
    SIXTEEN_BITS,
    STREAM_EMBEDDINGS,
    Recipe,
    method_fields,
)
from quantlib.search.activations import mean_bits


@pytest.mark.parametrize("preset", PRESETS)
def test_yaml_reads_back(preset: str, tmp_path: Path) -> None:
    recipe = Recipe.create(data="text.txt", preset=preset, seed=7, damping=0.05, schemes=("w4",))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.load(file) == recipe


def test_a_preset_fills_what_was_not_given() -> None:
    fast = Recipe.create(data="text.txt", preset="fast", passes=None, windows=12)
    assert (fast.passes, fast.windows) == (PRESETS["fast"]["passes"], 12)
    assert Recipe.create(data="text.txt").schemes == NATIVE_SCHEMES


def test_schemes_are_kept_once_and_under_their_canonical_names() -> None:
    recipe = Recipe.create(data="text.txt", schemes=["w4g64z4", "w4g64z", "w8a16", "w8"])
    assert recipe.schemes == ("w4g64z", "w8")


def test_records_bring_further_candidates_unless_some_were_named() -> None:
    more = Recipe.create(data="x.jsonl").for_streams()
    assert more.schemes == (*NATIVE_SCHEMES, *STREAM_EMBEDDINGS, *SIXTEEN_BITS)
    assert more.for_streams() == more
    assert more.candidates("linear") == (*NATIVE_SCHEMES, *SIXTEEN_BITS)
    assert set(more.candidates("embedding")) == set(more.schemes)
    for given in ({"schemes": ("w4g64",)}, {"preset": "fast"}, {"latency": ("12ms",)}):
        recipe = Recipe.create(data="x.jsonl", **given)
        assert recipe.for_streams() == recipe


def test_weights_of_every_kind_may_stay_as_they_are() -> None:
    recipe = Recipe.create(data="x", schemes=("w4g64a8", "f16", "w8g32"))
    assert recipe.candidates("linear") == ("w4g64a8", "f16")
    assert recipe.candidates("embedding") == ("w8g32", "f16")
    assert recipe.leaves_weights


@pytest.mark.parametrize("schemes", [NATIVE_SCHEMES, FUSED_SCHEMES])
def test_our_own_candidates_are_valid_and_different(schemes: tuple[str, ...]) -> None:
    assert Recipe.create(data="text.txt", schemes=schemes).schemes == schemes


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"windows": 0}, r"not valid: windows: .*greater than or equal to 1"),
        ({"seqlen": "many"}, r"seqlen: .*integer"),
        ({"damping": 0.0}, r"damping: .*greater than 0"),
        ({"preset": "quick"}, r"unknown preset 'quick': use one of best, fast"),
        ({"preset": ["fast"]}, r"unknown preset"),
        ({"window": 4}, r"no field 'window'; the fields are data, preset, seqlen, windows"),
        ({"schemes": []}, r"schemes: name at least one candidate"),
        ({"schemes": ["w9"]}, r"schemes: 'w9' is not a scheme: write for example w4g64"),
        ({"schemes": ["bf16"]}, r"bf16 leaves a weight as it is: name a scheme that does not"),
        ({"schemes": ["w4g64a8z"]}, r"w4g64a8z: activations of 8 bits cannot be asymmetric"),
        ({"kv": "int3"}, r"kv: 'int3' is not a format of a KV cache"),
        ({"rotation": "random"}, r"rotation: .*'pca'"),
        ({"probes": 2}, r"probes must be 0, or at least 3"),
        ({"swaps": 5, "probe_windows": 1}, r"swaps need at least 2 probe_windows"),
        ({"windows": 0, "seqlen": 1}, r"seqlen: .*; windows: "),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_a_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        Recipe.create(**{"data": "text.txt", **fields})
    assert "pydantic" not in str(caught.value)
    assert "Value error" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"data: [unclosed", "is not YAML"),
        (b"- data", "must be a YAML mapping"),
        (b"1: 2", "must be a YAML mapping"),
        (b"\xff\xfe\x00", "is not YAML|cannot be read"),
        (b"seed: 3", "data: Field required"),
        (b"data: ''", "data: .*at least 1 character"),
        (b"data: !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        Recipe.load(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe\.yaml cannot be read: No such file"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_candidates_that_round_activations_are_for_linears_alone() -> None:
    recipe = Recipe.create(data="text", schemes=["w4g64a4zh8/8", "w8a8", "w4g32zs4"])
    assert recipe.candidates("linear") == ("w4g64a4zh8/8", "w8a8")
    assert recipe.candidates("embedding") == recipe.candidates("head") == ("w4g32zs4",)
    without = Recipe.create(data="text", schemes=["w4g64a4zh8/8", "w4g64a4z"])
    assert without.candidates("embedding") == ("w4g64",), "the format alone, once"
    plain = Recipe.create(data="text", schemes=["w4g64", "w8g64"])
    assert plain.candidates("linear") == plain.candidates("embedding") == ("w4g64", "w8g64")


@pytest.mark.parametrize("bits", [None, 3, 4.5, 8])
def test_the_candidates_of_resq_are_schemes_with_the_bits_that_were_asked_for(
    bits: float | None,
) -> None:
    recipe = Recipe.create(data="text", **method_fields("resq", bits))
    low = 4 if bits is None else int(bits)
    found = {Scheme.parse(name).activation.bits for name in recipe.candidates("linear")}
    assert {low, 8} <= found <= {low - 1, low, low + 1, 8}
    assert recipe.rotation == "gradients"
    assert all(Scheme.parse(s).high is None for s in recipe.candidates("embedding"))


def test_the_floating_point_method_has_candidates_below_its_budgets() -> None:
    recipe = Recipe.create(data="text", **method_fields("resq-fp"))
    linears = [Scheme.parse(name) for name in recipe.candidates("linear")]
    assert all(s.activation.element != "int" and s.weight is not None for s in linears)
    assert min(mean_bits(s, 1536) for s in linears) == pytest.approx(4.25)


def test_resq_with_bits_that_there_are_not_says_which_there_are() -> None:
    with pytest.raises(UsageError, match="2 to 8 bits, not 9"):
        method_fields("resq", 9)


def test_models_calibrated_on_records_are_damped_more_and_weighted_less() -> None:
    """Unless the user says otherwise: their Hessians are of fewer tokens."""
    recipe = Recipe.create(data="records.jsonl")
    assert recipe.damping_of(streams=True) > recipe.damping_of(streams=False) == 0.01
    assert recipe.stream_weighting == "root"
    said = Recipe.create(data="records.jsonl", damping=0.02, weighting="token")
    assert said.damping_of(streams=True) == said.damping_of(streams=False) == 0.02
    assert said.stream_weighting == "token"


def test_inputs_of_four_bits_and_no_more_may_have_one_scale_for_all_low_columns() -> None:
    """Scales of groups take 0.3 bits: with them, a mean of 4.0 would leave codes of 3."""
    strict, usual = (method_fields("resq", bits)["schemes"] for bits in (4.0, 4.5))
    coarse = [name for name in strict if name not in usual]
    assert coarse
    assert not set(usual) - set(strict)
    for name in coarse:
        scheme = Scheme.parse(name)
        assert not scheme.activation.group
        assert mean_bits(scheme, 1536) < 4.25


def test_pruned_candidates_are_for_linears_alone() -> None:
    """Embeddings and heads get the same format with all of its numbers."""
    recipe = Recipe.create(data="text.txt", schemes=["w4g128:2of4"])
    assert recipe.candidates("linear") == recipe.candidates("experts") == ("w4g128:2of4",)
    assert recipe.candidates("embedding") == recipe.candidates("head") == ("w4g128",)
    mixed = Recipe.create(data="text.txt", schemes=["w4g128:2of4", "w6g64"])
    assert mixed.candidates("linear") == ("w4g128:2of4", "w6g64")
    assert mixed.candidates("embedding") == ("w6g64",)


def test_what_was_pruned_is_not_learned_again() -> None:
    with pytest.raises(UsageError, match=r"w4:2of4 leaves out"):
        Recipe.create(data="text.txt", schemes=["w4:2of4"], learning=10)
