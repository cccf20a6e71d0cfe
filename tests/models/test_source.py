"""A source opens without loading weights, reads tensors by name, and refuses what is damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantlib.errors import ModelError
from quantlib.models.folder import INDEX_FILE, SINGLE_FILE
from quantlib.models.source import Source

Saved = Callable[..., Path]
Edit = Callable[..., Path]


def edit_json(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_every_tensor_reads_as_safetensors_reads_it(saved: Saved, shard_size: str) -> None:
    folder = saved("llama", max_shard_size=shard_size)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "20KB")
    source = Source.open(folder)
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert source.headers.keys() == source.parameters.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(source.read(name), tensor, rtol=0, atol=0)
    assert source.total_bytes == sum(t.numel() * t.element_size() for t in expected.values())
    assert source.file_bytes == sum(file.stat().st_size for file in files)
    assert source.model_type == "llama"


def test_reading_gives_memory_of_its_own(saved: Saved) -> None:
    source = Source.open(saved("llama"))
    source.read("lm_head.weight").zero_()
    assert source.read("lm_head.weight").abs().sum() > 0


def test_bfloat16_and_scalars_keep_their_dtype_and_shape(saved: Saved, edit: Edit) -> None:
    folder = saved("llama")
    values = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    scalar = torch.tensor(3.0, dtype=torch.float16)
    edit(folder, lambda tensors: tensors.update(extra=values, scalar=scalar))
    source = Source.open(folder)
    torch.testing.assert_close(source.read("extra"), values, rtol=0, atol=0)
    assert source.read("scalar").item() == 3.0
    assert source.read("scalar").shape == ()


def test_the_fingerprint_follows_config_and_headers_not_the_folder(
    saved: Saved, edit: Edit, tmp_path: Path
) -> None:
    folder = saved("llama")
    fingerprint = Source.open(folder).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert Source.open(moved).fingerprint == fingerprint
    edit(moved, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with_extra = Source.open(moved).fingerprint
    assert with_extra != fingerprint
    edit_json(moved / "config.json", rms_norm_eps=1e-3)
    assert Source.open(moved).fingerprint not in (fingerprint, with_extra)


def test_values_that_are_not_finite_are_counted_and_refused(saved: Saved, edit: Edit) -> None:
    folder = saved("llama")
    norm = torch.ones(32)
    norm[3], norm[7] = float("nan"), float("-inf")
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": norm}))
    source = Source.open(folder)
    with pytest.raises(ModelError, match=r"model\.norm\.weight .* 2 values that are inf or nan"):
        source.read("model.norm.weight")
    assert source.read_raw("model.norm.weight").isnan().sum() == 1


def test_a_tensor_that_is_not_there_is_named(saved: Saved) -> None:
    with pytest.raises(ModelError, match=r"no tensor model\.nothing"):
        Source.open(saved("llama")).read("model.nothing")


def test_a_missing_folder_a_file_and_an_unknown_id_are_told_apart(
    saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        Source.open(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is a file: give the folder"):
        Source.open(saved("llama") / SINGLE_FILE)
    with pytest.raises(ModelError, match="allow downloads"):
        Source.open("quantlib-tests/no-such-model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no config\.json"),
        ("{", "not valid JSON"),
        ("[1]", "does not name a model_type"),
        ('{"hidden_size": 3}', "does not name a model_type"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
            "already quantized by gptq",
        ),
        ('{"model_type": "llama", "quantization_config": "yes"}', "already quantized"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(
    saved: Saved, content: str | None, message: str
) -> None:
    folder = saved("llama")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        Source.open(folder)


def test_pickle_files_are_refused_unread(saved: Saved) -> None:
    folder = saved("llama")
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(ModelError, match="has no safetensors files"):
        Source.open(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=r"only pickle files \(pytorch_model.bin\).*convert"):
        Source.open(folder)


def test_a_truncated_file_is_refused(saved: Saved) -> None:
    file = saved("llama") / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        Source.open(file.parent)


def test_a_file_that_shrinks_after_opening_is_noticed(saved: Saved) -> None:
    file = saved("llama") / SINGLE_FILE
    source = Source.open(file.parent)
    file.write_bytes(file.read_bytes()[:-100])
    last = max(source.headers, key=lambda name: source.headers[name].start)
    with pytest.raises(ModelError, match="shorter than when it was opened"):
        source.read(last)


def test_a_missing_shard_is_named(saved: Saved) -> None:
    folder = saved("llama", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of \d+ shards .*{shard.name}"):
        Source.open(folder)


def test_shards_without_their_index_are_refused(saved: Saved) -> None:
    folder = saved("llama", max_shard_size="20KB")
    (folder / INDEX_FILE).unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors\.index\.json"):
        Source.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("move", "disagree"),
        ("drop", "not listed"),
        ("escape", "not a file of its folder"),
        ("garble", "has no weight_map"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    saved: Saved, change: str, message: str
) -> None:
    folder = saved("llama", max_shard_size="20KB")
    index = folder / INDEX_FILE
    weight_map = json.loads(index.read_text())["weight_map"]
    if change == "move":
        shards = sorted(set(weight_map.values()))
        weight_map["model.norm.weight"] = next(
            shard for shard in shards if shard != weight_map["model.norm.weight"]
        )
    elif change == "drop":
        del weight_map["model.norm.weight"]
    elif change == "escape":
        weight_map["model.norm.weight"] = "../elsewhere.safetensors"
    edit_json(index, weight_map=7 if change == "garble" else weight_map)
    with pytest.raises(ModelError, match=message):
        Source.open(folder)


def test_same_data_compares_bytes(saved: Saved, edit: Edit) -> None:
    def add_copies(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["lm_head.weight"]
        changed = head.clone()
        changed[-1, -1] += 1
        tensors.update(copy=head.clone(), changed=changed, half=head.half())

    source = Source.open(edit(saved("llama"), add_copies))
    assert source.same_data("lm_head.weight", "copy")
    assert not source.same_data("lm_head.weight", "changed")
    assert not source.same_data("lm_head.weight", "half")
