"""A model that writes down what it hears, end to end in a rotated basis: inputs of linears, keys
and values rounded too, in the model that plans are measured on and in the packed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantlib
from quantlib.calibration.paths.route import objective
from quantlib.checkpoint.reader import read_layout
from quantlib.errors import UsageError
from quantlib.formats.scheme import Scheme
from quantlib.pipeline.compress import Result, compress, recipe_for
from quantlib.pipeline.dense import DensePlan
from quantlib.pipeline.inputs import round_cache
from quantlib.pipeline.opening import load_inputs, reopen_run
from quantlib.pipeline.plan import Budget
from quantlib.pipeline.task_trials import TaskTrials
from quantlib.runtime.hearing_cache import HearingCache
from quantlib.runtime.media import prompt_of
from quantlib.search.activations import mean_bits
from quantlib.transforms.apply import RotatedSource
from quantlib.transforms.attention import ATTRIBUTE
from quantlib.transforms.online import attached

from . import whole_models

TOLERANCE = 1e-3
"""Relative to the largest number, as in test_whole_models: sums in another order."""
SMALL: dict[str, Any] = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 0,
    "passes": 0,
    "report": False,
    "schemes": ("w4g32zs4a4zh8/8", "w6g32zs6a6zh8/8", "w8g32zs6a8", "w6g32zs6"),
    "rotation": "gradients",
    "kv": "int4",
}


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """rotated(rotation=...): the tiny Whisper, each request compressed once."""
    root = tmp_path_factory.mktemp("whisper")
    model = whole_models.save("whisper", root / "model")
    data = whole_models.records("whisper", root)
    made: dict[str, Result] = {}

    def build(**fields: Any) -> Result:
        name = "-".join(f"{key}={value}" for key, value in fields.items()) or "plain"
        if name not in made:
            asked = SMALL | {"size": "105kB"} | fields
            made[name] = compress(model, out=root / name, data=data, **asked)
        return made[name]

    return build


def said(run: Any, model: Any) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for sample in run.streams.judging("answer", model):
            output = run.streams.route("answer").run(model, **sample.inputs)
            found.append(objective(sample).said(output).flatten())
    return torch.cat(found)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "rotation", ["gradients", pytest.param("weights", marks=pytest.mark.slow), "pca"]
)
def test_the_checkpoint_says_what_was_measured(
    rotation: str, rotated: Callable[..., Result]
) -> None:
    result = rotated(rotation=rotation)
    packed = quantlib.load(result.path, engine="plain").model
    with reopen_run(result.work, with_data=True) as run:
        assert isinstance(run.source, RotatedSource)
        plan = DensePlan(run)
        exact = said(run, plan.model)
        plan.load(result.plan.schemes)
        round_cache(plan.model, run)
        expected = said(run, plan.model)
        assert distance(said(run, packed), expected) <= TOLERANCE
        assert distance(exact, expected) > 5 * TOLERANCE, "nothing was rounded"


def test_the_rotated_model_is_the_same_function(rotated: Callable[..., Result]) -> None:
    result = rotated(rotation="gradients")
    with reopen_run(result.work, with_data=True) as run:
        assert isinstance(run.source, RotatedSource)
        found = said(run, DensePlan(run).model)
        original = RotatedSource.of(run.source.original, type(run.source.rotation)())
        run.source = original
        assert distance(found, said(run, DensePlan(run).model)) <= TOLERANCE


def test_greedy_text_is_that_of_the_model_that_was_measured(
    rotated: Callable[..., Result],
) -> None:
    result = rotated(rotation="gradients")
    loaded = quantlib.load(result.path, engine="plain")
    with reopen_run(result.work, with_data=True) as run, torch.no_grad():
        plan = DensePlan(run)
        plan.load(result.plan.schemes)
        round_cache(plan.model, run)
        for sample in run.streams.judging("answer", plan.model):
            inputs = prompt_of(sample) | {"max_length": 12, "do_sample": False, "num_beams": 1}
            expected = plan.model.generate(**inputs).tolist()
            assert loaded.model.generate(**inputs).tolist() == expected
    sound = result.path.parent / "0.wav"
    assert isinstance(loaded.generate(audio=sound, max_new_tokens=6), str)


def test_bases_of_both_streams_and_the_decoders_caches_are_in_the_checkpoint(
    rotated: Callable[..., Result],
) -> None:
    result = rotated(rotation="gradients")
    checkpoint = read_layout(result.path)
    assert set(checkpoint.around.caches) == {
        f"model.decoder.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn", "encoder_attn")
    }
    model = quantlib.load(result.path, engine="plain").model
    rotation = attached(model)
    assert rotation is not None
    assert rotation.residual is not None
    assert rotation.encoder is not None
    encoder = model.get_submodule("model.encoder.layers.0.self_attn").__dict__.get(ATTRIBUTE)
    assert encoder is None or encoder.kv is None


def test_mean_bits_of_inputs_are_a_limit(rotated: Callable[..., Result]) -> None:
    free, limited = rotated(rotation="gradients"), rotated(activations=6.0, size="112kB")
    assert input_bits(limited) <= 6.0 < input_bits(free)


def input_bits(result: Result) -> float:
    """Mean bits of the inputs of a plan's linears, each counted for every weight that it meets."""
    with reopen_run(result.work) as run:
        linears = [w for w in run.model_map.weights if w.kind == "linear"]
        total = sum(w.parameters for w in linears)
        return (
            sum(
                mean_bits(Scheme.parse(result.plan.schemes[w.name]), w.in_features) * w.parameters
                for w in linears
            )
            / total
        )


def test_what_is_said_and_heard_is_kept_packed(rotated: Callable[..., Result]) -> None:
    """Token by token, with a cache of a few bits: the logits of the pass without one."""
    result = rotated(rotation="gradients")
    model = quantlib.load(result.path, engine="plain").model
    with reopen_run(result.work, with_data=True) as run, torch.no_grad():
        (sample, *_) = run.streams.judging("answer", model)
        ids, sound = (sample.inputs[n] for n in ("decoder_input_ids", "input_features"))
        expected = model(**sample.inputs).logits
        heard, cache, found = model.get_encoder()(sound), None, []
        for piece in (ids[:, :2], *ids[:, 2:].split(1, dim=1)):
            output = model(
                encoder_outputs=heard,
                decoder_input_ids=piece,
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            found.append(output.logits)
    assert isinstance(cache, HearingCache)
    assert cache.get_seq_length() == ids.shape[1]
    for layer, kept in zip(cache.self_attention_cache.packed, cache.cross_attention_cache.packed):
        assert str(layer.cache.form) == str(kept.cache.form) == "int4"
        assert kept.get_seq_length() == heard.last_hidden_state.shape[1]
        assert kept.keys.untyped_storage().nbytes() == 4, "keys are kept in floats, too"
    assert distance(torch.cat(found, 1), expected) <= TOLERANCE
    cache.reset()
    again = model(
        encoder_outputs=heard, decoder_input_ids=ids, past_key_values=cache, use_cache=True
    )
    assert again.past_key_values is cache
    assert distance(again.logits, expected) <= TOLERANCE


def test_trials_round_keys_and_values(rotated: Callable[..., Result]) -> None:
    result = rotated(rotation="gradients")
    with reopen_run(result.work, with_data=True) as run:
        fine = dict.fromkeys(result.plan.schemes, "w6g32zs6") | {
            name: "w8g32zs6a8" for name in result.plan.schemes if ".layers." in name
        }
        trials = TaskTrials(run)
        coarse = trials.measure(fine)["answer"].value
        run.recipe = run.recipe.model_copy(update={"kv": "f32"})
        assert TaskTrials(run).measure(fine)["answer"].value < coarse


def test_a_run_goes_on_where_it_was(rotated: Callable[..., Result], tmp_path: Path) -> None:
    result = rotated(rotation="gradients")
    model = result.path.parent / "model"
    data = result.path.parent / "data.jsonl"
    asked = SMALL | {"size": "105kB"}
    again = compress(model, out=tmp_path / "out", data=data, work=result.work, **asked)
    assert again.plan.schemes == result.plan.schemes
    assert "calibrate" not in again.seconds
    assert "rotate" not in again.seconds


def test_what_an_encoder_decoder_cannot_have_is_refused_before_work_starts(tmp_path: Path) -> None:
    model = whole_models.save("whisper", tmp_path / "model")
    data = whole_models.records("whisper", tmp_path)
    for fields, what in (
        ({"keep": ("audio_tower",)}, "is kept as it is, and bases are found"),
        ({"kv": "int4g16h16"}, "head"),
    ):
        asked = {name: given for name, given in SMALL.items() if name != "report"}
        recipe = recipe_for(Budget(), data=str(data), **(asked | fields))
        with pytest.raises((UsageError, quantlib.errors.FormatError), match=what):
            load_inputs(model, recipe)
