"""The native engine on rotated checkpoints: what transformers computes with hooks and rounding."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.checkpoint.reader import read_layout
from quantlib.checkpoint.tensorfile import atomic_save_tensors, read_tensors
from quantlib.errors import CheckpointError
from quantlib.kernels.cpu import library as cpu
from quantlib.runtime.engine import Engine
from quantlib.runtime.engine_changes import unsupported_changes
from quantlib.runtime.generate import Sampling, TransformersTexts, new_tokens
from quantlib.transforms.rotation import MEAN

from .test_rotated_checkpoint import A_FEW_CODES, Made, difference, make

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")
__all__ = ["make"]  # a fixture

# family, embedding's scheme, hidden channels outside the Hadamard matrices of the second block
CASES = [
    ("llama", "f32", 24),
    ("llama", "w8g16", 0),
    ("llama-untied", "w8g16", 64),
    ("gemma2", "f32", 0),
]
PROMPT = torch.randint(2, 384, (90,), generator=torch.Generator().manual_seed(0)).tolist()


def plain_logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def change_config(made: Made, change: Callable[[dict[str, Any]], object]) -> None:
    path = made.folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(("family", "embedding", "high"), CASES)
def test_exact_logits_are_those_of_transformers(
    make: Callable[..., Made], family: str, embedding: str, high: int
) -> None:
    """With every basis and order, and nothing but the weights rounded: to float32's rounding."""
    made = make(family, embedding, high)
    change_config(made, lambda described: described.pop("caches"))
    loaded = quantlib.load(made.folder, mode="exact", engine="native")
    expected = plain_logits(loaded.model, PROMPT)
    found = loaded.make_engine().score(PROMPT)
    assert not (found - expected).abs().max() > 1e-5 * expected.abs().max()
    rows = [list(new_tokens(texts, [PROMPT[:9]], 64, Sampling())) for texts in _both(loaded)]
    assert rows[0] == rows[1]


def _both(loaded: Any) -> list[Any]:
    return [loaded.make_engine(1, 128), TransformersTexts(loaded.model)]


@pytest.mark.parametrize(("family", "embedding", "high"), CASES)
def test_rounded_logits_are_those_of_transformers(
    make: Callable[..., Made], family: str, embedding: str, high: int
) -> None:
    """Activations, queries, keys and values rounded as the checkpoint says. Float32 sums in another
    order move a code at times, whose token is off by some percent then; others agree to the last
    digits, or feel it a little through attention."""
    made = make(family, embedding, high)
    loaded = quantlib.load(made.folder, mode="scheme", engine="native")
    assert (loaded.engine, loaded.mode, loaded.kv) == ("native", "scheme", "int8/int4k2")
    expected = plain_logits(loaded.model, PROMPT)
    found = loaded.make_engine().score(PROMPT)
    assert difference(found, expected) <= 3 * A_FEW_CODES
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) <= A_FEW_CODES / 10
    exact = quantlib.load(made.folder, mode="exact").make_engine().score(PROMPT)
    assert difference(exact, expected) > 5 * A_FEW_CODES


def test_hidden_channels_that_stay_are_not_rotated(make: Callable[..., Made]) -> None:
    """The last 16 of 80: a checkpoint that says it rotates them too is another model."""
    made, logits = make("llama-untied", high=16), []
    for stored in (16, 0):
        change_hidden_high(made, stored)
        loaded = quantlib.load(made.folder, mode="exact", engine="native")
        logits.append(loaded.make_engine().score(PROMPT))
    assert difference(*logits) > 5 * A_FEW_CODES


@pytest.mark.parametrize("high", [70, 80, -16])
def test_hadamard_matrices_that_do_not_fit_are_a_sentence(
    make: Callable[..., Made], high: int
) -> None:
    made = make("llama-untied")
    change_hidden_high(made, high)
    with pytest.raises(CheckpointError, match=r"in blocks of 16, and there are 80.*again"):
        quantlib.load(made.folder, engine="native")


def change_hidden_high(made: Made, count: int) -> None:
    """Of the second block, as the checkpoint says it."""
    change_config(
        made,
        lambda described: described["transforms"]["rotation"].update(
            hidden_high={"model.layers.1": count}
        ),
    )


@pytest.mark.parametrize(("kv", "kept"), [("int4k3", 3), ("int4k1", 2), ("int4", 2)])
def test_as_many_first_positions_stay_exact_in_both_engines(
    make: Callable[..., Made], kv: str, kept: int
) -> None:
    """The cache's settings ask for 2, its format for more or less: the larger number counts."""
    made = make("llama-untied", kv=kv)
    loaded = quantlib.load(made.folder, mode="exact", engine="native")
    assert loaded.kv == f"int4k{kept}"
    unrounded = quantlib.load(made.folder, mode="exact", engine="native", kv="f32")
    expected = unrounded.make_engine().score(PROMPT)
    for found in (loaded.make_engine().score(PROMPT), plain_logits(loaded.model, PROMPT)):
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        # a query's code of 8 bits may fall to the other side, which is far below 4 bits of a value
        assert not errors[:kept].max() > A_FEW_CODES / 10
        assert errors[kept:].min() > A_FEW_CODES / 10


@pytest.mark.parametrize("mode", [None, "fast", "int8", "int8g128", "exact"])
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_a_prompt_in_parts_gives_the_same_bits(
    make: Callable[..., Made], family: str, mode: str | None
) -> None:
    decoder = quantlib.load(make(family).folder, engine="native").decoder
    whole = Engine(decoder, mode=mode, threads=1).score(PROMPT)
    parts = Engine(decoder, mode=mode, threads=2, sequences=2)
    found = [parts.prefill(PROMPT[:31], 1)]
    parts.copy(1, 0)
    found += [parts.decode([token])[0] for token in PROMPT[31:50]]
    found.append(parts.prefill(PROMPT[50:]))
    assert torch.equal(torch.stack(found[:20]), whole[30:50])
    assert torch.equal(found[20], whole[-1])


def test_text_comes_fast_and_nearly_as_it_was_measured(make: Callable[..., Made]) -> None:
    """Unless asked otherwise, the head's inputs have 8 bits and attention computes in integers."""
    made = make("llama", "w8g16")
    loaded = quantlib.load(made.folder)
    assert (loaded.engine, loaded.mode) == ("native", "fast")
    asked = quantlib.load(made.folder, mode="scheme")
    # of a short text: in a longer one, 16-bit queries move codes that float32's rounding does not
    found = [one.make_engine().score(PROMPT[:9]) for one in (loaded, asked)]
    assert 0 < difference(*found) <= A_FEW_CODES
    # the transformers model computes what was measured all the same
    assert torch.equal(*(plain_logits(one.model, PROMPT) for one in (loaded, asked)))


def test_a_cache_can_be_asked_for_all_the_same(make: Callable[..., Made]) -> None:
    folder = make().folder
    asked = quantlib.load(folder, mode="scheme", engine="native", kv="int4k8")
    assert asked.kv == "int4k8"
    other = quantlib.load(folder, mode="scheme")
    found = [loaded.make_engine().score(PROMPT) for loaded in (asked, other)]
    assert 0.5 > difference(*found) > A_FEW_CODES


def test_other_roundings_of_a_rotated_model(make: Callable[..., Made]) -> None:
    """8 bits instead of 4 stay close to exact activations; rotation and order are done as well."""
    folder = make("llama-untied").folder
    exact, *others = (
        quantlib.load(folder, mode=mode, kv="f32").make_engine().score(PROMPT)
        for mode in ("exact", "int8", "int8g128")
    )
    for found in others:
        assert difference(found, exact) <= 0.1


def test_a_basis_of_another_model_is_a_sentence(make: Callable[..., Made]) -> None:
    made = make()
    (file,) = made.folder.glob("*.safetensors")
    tensors = dict(read_tensors(file))
    (name, *_) = sorted(n for n in tensors if n.startswith("quantlib_rotation.key"))
    for spoiled in (tensors[name][:-1, :-1].contiguous(), tensors[name] * 1.1):
        atomic_save_tensors(file, tensors | {name: spoiled})
        with pytest.raises(CheckpointError, match=r"keys of layer 0.*make the checkpoint again"):
            quantlib.load(made.folder, engine="native")


def test_what_the_engine_does_not_do_runs_through_transformers(make: Callable[..., Made]) -> None:
    made = make()
    change_config(made, lambda described: described["caches"].update(other=_CACHE))
    assert unsupported_changes(read_layout(made.folder), _Spec()) == (
        "the keys and values of other are rounded"
    )


def test_the_engine_knows_no_means_that_are_subtracted(make: Callable[..., Made]) -> None:
    read = read_layout(make().folder)
    assert unsupported_changes(read, _Spec()) is None
    means = {**read.around.tensors, MEAN + "model.layers.0.mlp.down_proj.weight": "elsewhere"}
    shifted = replace(read, around=replace(read.around, tensors=means))
    assert unsupported_changes(shifted, _Spec()) == (
        "means are subtracted from the inputs of its linears"
    )


_CACHE = {"kv": "int4", "sinks": 0, "query_bits": 0}


class _Spec:
    layers = (0, 1)
