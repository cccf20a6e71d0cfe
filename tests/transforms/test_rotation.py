"""A rotation is checked against the model it is for, and comes back from its file as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.checkpoint import surroundings
from quantlib.errors import TransformError
from quantlib.transforms.apply import rotate_module
from quantlib.transforms.binding import wire
from quantlib.transforms.rotation import Rotation

from .families import logits, make, orthogonal, random_rotation

BLOCK = "model.layers.0"
PARTS = ("norms", "residual", "value", "key", "hidden", "order")


def whole(case: str = "llama") -> Rotation:
    return random_rotation(make(case), *PARTS)


def equal(left: Rotation, right: Rotation) -> bool:
    (a, b), (c, d) = left.to_tensors(), right.to_tensors()
    return b == d and a.keys() == c.keys() and all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("case", ["llama", "whisper", "gemma2"])
def test_it_comes_back_from_its_file_as_it_was(case: str, tmp_path: Path) -> None:
    rotation = whole(case)
    rotation.save(tmp_path / "rotation.safetensors")
    again = Rotation.load(tmp_path / "rotation.safetensors")
    assert equal(again, rotation)
    assert again.content_hash == rotation.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["rotation.safetensors"]
    again.check(wire(make(case)))


@pytest.mark.parametrize(
    "change",
    [
        {"residual": orthogonal(32, 32, seed=9)},
        {"residual": None},
        {"value": {}},
        {"value": {BLOCK: orthogonal(2, 8, 8, seed=9)}},
        {"key": {}},
        {"hidden": {BLOCK: 4}},
        {"hidden_order": {}},
        {"hidden_order": {BLOCK: torch.arange(48)}},
        {"hidden_high": {BLOCK: 4}},
        {"fold_norms": False},
        {"encoder": orthogonal(32, 32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_its_hash_covers_every_part(change: dict[str, Any]) -> None:
    rotation = whole()
    assert rotation.content_hash == whole().content_hash
    assert replace(rotation, **change).content_hash != rotation.content_hash


def test_a_basis_is_no_other_part_s_with_the_same_numbers() -> None:
    basis = orthogonal(2, 8, 8)
    value, key = Rotation(value={BLOCK: basis}), Rotation(key={BLOCK: basis})
    assert value.content_hash != key.content_hash


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (Rotation(residual=orthogonal(16, 16)), r"residual basis is \[16, 16\].* \[32, 32\]"),
        (Rotation(encoder=orthogonal(32, 32)), "this llama has no encoder"),
        (Rotation(value={BLOCK: orthogonal(4, 8, 8)}), r"value basis of model\.layers\.0 is \[4,"),
        (Rotation(value={BLOCK: orthogonal(8, 8)}), r"is \[8, 8\], this model needs \[2, 8, 8\]"),
        (Rotation(value={"model.layers.7": orthogonal(2, 8, 8)}), "no such attention"),
        (Rotation(key={BLOCK: orthogonal(6, 6)}), r"key basis of model\.layers\.0 is \[6, 6\]"),
        (Rotation(key={"other": orthogonal(8, 8)}), "no such attention"),
        (Rotation(hidden={"model.layers.7": 4}), "no such block"),
        (Rotation(hidden={BLOCK: 5}), "blocks of 5 do not divide the 48 columns.*use 48"),
        (Rotation(hidden={BLOCK: 0}), "blocks of 0 do not divide"),
        (Rotation(hidden={BLOCK: 6}), "no construction gives a Hadamard matrix of order 6"),
        (Rotation(hidden={BLOCK: 48}, hidden_high={BLOCK: 8}), "first 40 of 48 columns.*use 40"),
        (Rotation(hidden_high={BLOCK: 48}), "48 of the 48 columns.*cannot be left out"),
        (Rotation(hidden_high={BLOCK: -4}), "-4 of the 48 columns"),
        (Rotation(hidden_high={"model.layers.7": 4}), "no such block"),
        (Rotation(hidden_order={"model.layers.7": torch.arange(48)}), "no such block"),
        (Rotation(hidden_order={BLOCK: torch.arange(40)}), r"\[40\], does not name each of 48"),
        (Rotation(hidden_order={BLOCK: torch.arange(48) % 47}), "each of 48 channels once"),
        (Rotation(hidden_order={BLOCK: torch.arange(48).float()}), r"float32 \[48\], does not"),
        (Rotation(residual=torch.ones(32, 32).double()), "not orthogonal"),
        (Rotation(residual=1.0001 * orthogonal(32, 32)), "not orthogonal.*differs.*2.0e-04"),
        (Rotation(residual=torch.full((32, 32), torch.nan).double()), "not orthogonal"),
        (Rotation(key={BLOCK: torch.zeros(2, 8, 8).double()}), "not orthogonal"),
    ],
)
def test_what_does_not_belong_is_refused_in_a_sentence(rotation: Rotation, message: str) -> None:
    with pytest.raises(TransformError, match=message):
        rotation.check(wire(make("llama")))


def test_a_reflection_is_as_good_as_a_rotation() -> None:
    flipped = torch.diag(torch.tensor([-1.0] + [1.0] * 31).double())
    model = make("llama")
    before = logits(model)
    rotate_module(model, wire(model), Rotation(residual=flipped))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(TransformError, match="cannot be read"):
        Rotation.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(TransformError, match="holds no rotation"):
        Rotation.load(path)
    save_file({"residual": torch.eye(4)}, path)
    with pytest.raises(TransformError, match="holds no rotation"):
        Rotation.load(path)


def test_settings_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rotation.safetensors"
    whole().save(path)
    tensors = load_file(path)
    whole_but_one = {"version": 2, "hidden": {}, "fold_norms": False}
    for settings, message in (
        ({"version": 4}, "version 4"),
        ({"version": 1}, "damaged"),
        (whole_but_one, "damaged.*hidden_high"),
    ):
        with pytest.raises(TransformError, match=message):
            Rotation.from_tensors(tensors, settings)


def test_what_version_1_wrote_is_read() -> None:
    """It had no order of hidden channels."""
    tensors = {"residual": orthogonal(32, 32)}
    settings = {"version": 1, "hidden": {BLOCK: 12}, "fold_norms": True}
    found = Rotation.from_tensors(tensors, settings)
    assert (found.hidden, found.hidden_high, found.hidden_order) == ({BLOCK: 12}, {}, {})
    assert found.to_tensors()[1]["version"] == 2


def test_orders_come_back_from_tensors_of_another_dtype() -> None:
    """A checkpoint keeps tensors in float32, which has every channel number exactly."""
    rotation = Rotation(hidden_order={BLOCK: torch.randperm(20000)})
    tensors, settings = rotation.to_tensors()
    again = Rotation.from_tensors({n: t.float().double() for n, t in tensors.items()}, settings)
    assert equal(again, rotation)


def test_a_checkpoint_s_entries_say_how_many_channels_are_left_alone() -> None:
    """In float32 and JSON; the order is in the weights."""
    model = make("llama_tied")
    rotation = random_rotation(model, *PARTS)
    part = rotation.online(wire(model))
    described = surroundings.entries({}, [], part, {})["transforms"]["rotation"]
    settings = {key: value for key, value in described.items() if key != "tensors"}
    tensors = surroundings.rotation_tensors(part)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    names = {name.removeprefix(surroundings.PREFIX): tensor for name, tensor in tensors.items()}
    again = surroundings.make_rotation(names, json.loads(json.dumps(settings)))
    assert (again.hidden, again.hidden_high) == (rotation.hidden, rotation.hidden_high)
    assert not again.hidden_order
    again.check(wire(model))
    del settings["hidden_high"]
    settings["version"] = 1
    assert surroundings.make_rotation(names, settings).hidden_high == {}


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    (tmp_path / "rotation.safetensors").mkdir()
    with pytest.raises(OSError):
        whole().save(tmp_path / "rotation.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["rotation.safetensors"]
