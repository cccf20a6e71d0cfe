"""A checkpoint is complete or absent, and the same inputs give the same bytes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from quantlib.checkpoint import writer
from quantlib.checkpoint.provenance import file_sha256, versions
from quantlib.checkpoint.tensorfile import LazyTensor
from quantlib.checkpoint.writer import check_output, planned_bytes, shard_names, source_files
from quantlib.errors import CheckpointError


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name


def test_one_file_and_what_lies_beside_it(parts: Any) -> None:
    assert parts.write() == parts.out
    assert sorted(os.listdir(parts.out)) == [
        "config.json",
        "model.safetensors",
        "quantlib_plan.json",
        "quantlib_provenance.json",
        "tokenizer.json",
    ]
    assert_same(loaded(parts.out), parts.tensors)
    with safetensors.safe_open(parts.out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((parts.out / "config.json").read_text())
    assert config["hidden_size"] == 72
    described = config["quantization_config"]
    assert described["quant_method"] == "quantlib"
    assert described["version"] == 1
    assert described["schemes"] == parts.schemes
    assert described["shapes"]["layers.0.experts.up"] == [3, 7, 40]


def test_files_of_the_source_are_kept_byte_for_byte(parts: Any) -> None:
    parts.write()
    source = parts.files["tokenizer.json"]
    assert (parts.out / "tokenizer.json").read_bytes() == source.read_bytes()


def test_the_provenance_holds_versions_and_a_hash_of_every_file(parts: Any) -> None:
    parts.write(identity="request")
    provenance = json.loads((parts.out / "quantlib_provenance.json").read_text())
    assert provenance["source"] == "hash"
    assert provenance["identity"] == "request"
    assert provenance["versions"] == versions()
    names = set(os.listdir(parts.out)) - {"quantlib_provenance.json"}
    assert provenance["files"].keys() == names
    for name, record in provenance["files"].items():
        assert record["sha256"] == file_sha256(parts.out / name)
        assert record["nbytes"] == (parts.out / name).stat().st_size


@pytest.mark.parametrize("shard_bytes", [1, 1000, 3000])
def test_many_shards_hold_the_same_tensors(parts: Any, shard_bytes: int) -> None:
    parts.write(shard_bytes=shard_bytes)
    files = sorted(path.name for path in parts.out.glob("*.safetensors"))
    count = len(files)
    assert count == (len(parts.tensors) if shard_bytes == 1 else count) > 1
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert_same(loaded(parts.out), parts.tensors)
    index = json.loads((parts.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.tensors.values())
    for file in files:
        names = {name for name, where in index["weight_map"].items() if where == file}
        assert load_file(parts.out / file).keys() == names
        assert len(names) == 1 or sum(parts.tensors[n].nbytes for n in names) <= shard_bytes


@pytest.mark.parametrize("shard_bytes", [1, 1000, 10**9])
def test_the_planned_size_is_the_size(parts: Any, shard_bytes: int) -> None:
    parts.write(shard_bytes=shard_bytes)
    lazy = {name: LazyTensor.of(tensor) for name, tensor in parts.tensors.items()}
    sizes = [path.stat().st_size for path in parts.out.glob("*.safetensors")]
    assert planned_bytes(lazy, shard_bytes) == sum(sizes)


def test_shards_are_filled_in_order() -> None:
    sizes = {"a": 6, "b": 4, "c": 11, "d": 1, "e": 9, "f": 1}
    lazy = {
        n: LazyTensor(torch.uint8, (size,), lambda: torch.zeros(0)) for n, size in sizes.items()
    }
    assert list(shard_names(lazy, 10).values()) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert shard_names({}, 10) == {"model.safetensors": []}


@pytest.mark.parametrize("shard_bytes", [1000, 10**9])
def test_equal_inputs_give_equal_bytes(
    parts: Any, folder_contents: Callable, shard_bytes: int
) -> None:
    first = folder_contents(parts.write(shard_bytes=shard_bytes))
    parts.schemes = dict(reversed(parts.schemes.items()))
    parts.shapes = dict(reversed(parts.shapes.items()))
    second = folder_contents(parts.write(parts.out.with_name("again"), shard_bytes=shard_bytes))
    assert first == second
    text = b"".join(data for name, data in first.items() if name.endswith(".json"))
    assert str(parts.out).encode() not in text


def test_killed_before_any_disk_call_it_is_absent_and_then_complete(
    parts: Any, run_in_child: Callable[..., int | None], folder_contents: Callable
) -> None:
    """Killed at each call in turn, then run again: the same bytes, and nothing beside them."""
    expected = folder_contents(parts.write(parts.out.with_name("undisturbed")))
    killed, kill_at = True, 0
    while killed:
        out = parts.out.parent / str(kill_at) / "out"
        write = lambda out=out: parts.write(out, identity="request", shard_bytes=10**9)  # noqa: E731
        killed = run_in_child(write, kill_at) is None
        if out.exists():
            found = folder_contents(out)
            found.pop("lock", None)
            assert found.keys() == expected.keys(), "half a checkpoint has the final name"
        write()
        found = folder_contents(out)
        assert os.listdir(out.parent) == ["out"], kill_at
        found.pop("quantlib_provenance.json")
        assert found == {n: d for n, d in expected.items() if n != "quantlib_provenance.json"}
        kill_at += 1
    assert kill_at > 20


def test_overwriting_keeps_the_old_one_until_the_new_one_is_complete(
    parts: Any, run_in_child: Callable[..., int | None], folder_contents: Callable
) -> None:
    template = parts.write(parts.out.with_name("template"))
    old = folder_contents(template)
    parts.config["hidden_size"] = 73
    new = folder_contents(parts.write(parts.out.with_name("new")))
    killed, kill_at = True, 0
    while killed:
        out = parts.out.parent / str(kill_at) / "out"
        shutil.copytree(template, out)
        killed = run_in_child(lambda out=out: parts.write(out, overwrite=True), kill_at) is None
        if out.exists():
            found = folder_contents(out)
            found.pop("lock", None)
            assert found in (old, new), kill_at
        else:  # between the two renames: the old one is beside it
            assert any(folder_contents(p) == old for p in out.parent.glob("out.replaced-*"))
        parts.write(out, overwrite=True)
        assert folder_contents(out) == new
        assert os.listdir(out.parent) == ["out"]
        kill_at += 1
    assert kill_at > 20


def test_a_failing_tensor_leaves_nothing(parts: Any) -> None:
    def fail() -> torch.Tensor:
        raise ZeroDivisionError

    parts.tensors["last"] = LazyTensor(torch.bool, (1,), fail)
    with pytest.raises(ZeroDivisionError):
        parts.write()
    assert sorted(os.listdir(parts.out.parent)) == ["source"]


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    parts: Any, full_disk: Callable, folder_contents: Callable
) -> None:
    old = folder_contents(parts.write())
    parts.config["hidden_size"] = 73
    total = sum(len(data) for data in old.values())
    for room in range(0, total, total // 8):
        with full_disk(after=room), pytest.raises(CheckpointError, match="the disk is full"):
            parts.write(overwrite=True)
        assert folder_contents(parts.out) == old
        assert sorted(os.listdir(parts.out.parent)) == ["out", "source"]


def test_no_room_is_told_before_anything_is_written(
    parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(parts.out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"the checkpoint needs .* and 1\.0 kB is free there"):
        parts.write()
    assert sorted(os.listdir(parts.out.parent)) == ["source"]


def test_other_people_s_folders_are_refused(parts: Any) -> None:
    parts.out.mkdir()
    (parts.out / "config.json").write_text('{"model_type": "llama"}')
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is not empty and is not a checkpoint"):
            parts.write(overwrite=overwrite)
    (parts.out / "config.json").unlink()
    parts.write()  # an empty folder is welcome
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a file: choose a folder"):
        check_output(parts.out / "tokenizer.json")


def test_another_checkpoint_is_replaced_only_on_request(
    parts: Any, folder_contents: Callable
) -> None:
    old = folder_contents(parts.write())
    parts.config["hidden_size"] = 73
    with pytest.raises(CheckpointError, match="already holds another checkpoint"):
        parts.write()
    assert folder_contents(parts.out) == old
    parts.write(overwrite=True)
    assert json.loads((parts.out / "config.json").read_text())["hidden_size"] == 73


def test_the_same_request_again_leaves_a_complete_checkpoint_alone(parts: Any) -> None:
    parts.write(identity="request")
    before = (parts.out / "model.safetensors").stat().st_ino
    parts.write(identity="request")
    assert (parts.out / "model.safetensors").stat().st_ino == before
    check_output(parts.out, identity="request")
    with pytest.raises(CheckpointError, match="already holds another checkpoint"):
        check_output(parts.out, identity="another request")


def test_the_same_request_again_repairs_a_damaged_checkpoint(
    parts: Any, folder_contents: Callable
) -> None:
    whole = folder_contents(parts.write(identity="request"))
    path = parts.out / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    parts.write(identity="request")
    assert folder_contents(parts.out) == whole


def test_two_processes_do_not_write_one_checkpoint(
    parts: Any, run_in_child: Callable[..., int | None]
) -> None:
    def load() -> torch.Tensor:  # called while the first process writes
        assert run_in_child(second) is not None
        return torch.zeros(1)

    def second() -> None:
        with pytest.raises(CheckpointError, match="in use by process"):
            parts.write()

    parts.tensors["probe"] = LazyTensor(torch.float32, (1,), load)
    parts.write()
    assert "probe" in loaded(parts.out)


def test_only_leftovers_of_this_name_are_removed(parts: Any) -> None:
    names = ["out.partial-0123456789ab", "out.partial-notes", "out2.partial-0123456789ab"]
    for name in names:
        (parts.out.parent / name).mkdir()
    parts.write()
    assert sorted(os.listdir(parts.out.parent)) == ["out", *names[1:], "source"]


def test_a_link_to_the_folder_stays_a_link(parts: Any) -> None:
    parts.out.mkdir()
    link = parts.out.with_name("link")
    link.symlink_to(parts.out)
    parts.write(link)
    assert link.is_symlink()
    assert (parts.out / "config.json").exists()


def test_a_mount_point_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writer.os.path, "ismount", lambda _: True)
    with pytest.raises(CheckpointError, match="is a mount point"):
        check_output(tmp_path)


def test_a_weight_without_a_shape_is_refused(parts: Any) -> None:
    del parts.shapes["embed.weight"]
    with pytest.raises(CheckpointError, match=r"embed\.weight has only one of them"):
        parts.write()


def test_which_files_of_a_source_are_kept(tmp_path: Path) -> None:
    kept = [
        "LICENSE",
        "LICENSE.txt",
        "Notice.md",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "preprocessor_config.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    dropped = [
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "onnx/config.json",
        "pytorch_model.bin",
        "quantlib_plan.json",
        "training_args.bin",
    ]
    for name in (*kept, *dropped):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = source_files(tmp_path)
    assert sorted(found) == kept
    assert found["additional_chat_templates/tool.jinja"].exists()
    with pytest.raises(CheckpointError, match="could not read"):
        source_files(tmp_path / "absent")
