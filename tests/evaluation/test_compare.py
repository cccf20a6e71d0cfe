"""Two folders side by side: dense against dense, and a packed checkpoint against its source."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlib.checkpoint.writer import source_files, write_checkpoint
from quantlib.errors import CheckpointError, DataError, ModelError
from quantlib.evaluation import compare, evaluate_language
from quantlib.evaluation.compare import load_folder
from quantlib.formats import Scheme, dequantize, pack, quantize_rtn

OPTIONS = {"seqlen": 32, "windows": 5, "seed": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama):
    return tiny_llama(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, sample_text):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(sample_text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dense(source):
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def packed(tmp_path_factory, source, dense):
    """Every matrix rounded to w3g32z: the folder, and a dense model with the same values."""
    scheme = Scheme.parse("w3g32z")
    rounded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors, shapes = {}, {}
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.ndim == 1:
                tensors[name] = weight.clone()
                continue
            shapes[name] = tuple(weight.shape)
            quantized = quantize_rtn(weight.clone(), scheme.segments(weight.shape[1]))
            tensors |= {name + suffix: tensor for suffix, tensor in pack(quantized).items()}
            weight.copy_(dequantize(quantized))
    out = tmp_path_factory.mktemp("packed") / "out"
    config = json.loads((source / "config.json").read_text())
    schemes = dict.fromkeys(shapes, "w3g32z")
    write_checkpoint(out, tensors, config, schemes, shapes, files=source_files(source))
    return out, rounded


def test_a_packed_checkpoint_scores_as_its_dense_values_do(source, dense, packed, text_file):
    folder, rounded = packed
    found = compare(folder, source, text_file, **OPTIONS)
    tokenizer = load_folder(source)[1]
    from quantlib.calibration.data import load_windows

    windows = load_windows(text_file, tokenizer, 32, 5, seed=1)
    expected = evaluate_language(rounded, windows, dense)
    # The kernel sums in another order than torch: float32 rounding of logits of a few units.
    torch.testing.assert_close(
        found.result.per_window["kl"], expected.per_window["kl"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found.result.per_window["nll"], expected.per_window["nll"], rtol=1e-4, atol=1e-5
    )
    assert found.result.kl.value > 0.001
    assert found.model_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found.against_bytes == (source / "model.safetensors").stat().st_size


def test_a_model_against_itself_loses_nothing(source, text_file):
    found = compare(source, source, text_file, **OPTIONS)
    assert abs(found.result.kl.value) <= 1e-6  # float32 rounding of recomputed logits
    assert found.result.same_top.value == 1.0


def test_the_second_comparison_reads_the_reference_from_its_cache(
    source, packed, text_file, tmp_path
):
    cache = tmp_path / "reference.safetensors"
    stages = []
    arguments = {**OPTIONS, "cache": cache, "progress": lambda stage, *_: stages.append(stage)}
    first = compare(packed[0], source, text_file, **arguments)
    assert stages == ["reference"] * 5 + ["model"] * 5
    stages.clear()
    second = compare(packed[0], source, text_file, **arguments)
    assert stages == ["model"] * 5
    assert second.result == first.result
    other = compare(packed[0], source, text_file, **{**OPTIONS, "cache": cache, "seed": 2})
    assert other.result.windows_sha256 != first.result.windows_sha256


def test_the_table_and_the_json_say_the_same(source, packed, text_file):
    found = compare(packed[0], source, text_file, **OPTIONS)
    table, data = found.table(), json.loads(json.dumps(found.to_json()))
    assert str(found.result.kl) in table
    assert data["result"]["kl"]["value"] == found.result.kl.value
    assert data["data_sha256"] == found.data_sha256
    assert len({len(line) for line in table.splitlines()[:-1]}) == 1, "columns are aligned"


def test_without_a_reference_there_is_perplexity_alone(source, text_file):
    found = compare(source, None, text_file, **OPTIONS)
    assert found.result.kl is None
    assert "KL" not in found.table()
    assert found.to_json()["against"] is None


def test_a_folder_without_a_model_is_a_sentence(tmp_path, source, text_file):
    with pytest.raises(ModelError, match=r"no config\.json"):
        compare(tmp_path, source, text_file, **OPTIONS)
    with pytest.raises(ModelError, match=r"no config\.json"):
        compare(source, tmp_path / "missing", text_file, **OPTIONS)


def test_damaged_weights_are_a_sentence(tmp_path, source, text_file):
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="could not be opened"):
        compare(tmp_path, source, text_file, **OPTIONS)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises((CheckpointError, ModelError)):
        compare(tmp_path, source, text_file, **OPTIONS)


def test_no_tokenizer_anywhere_is_a_sentence(tmp_path, source, text_file):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    with pytest.raises(DataError, match="no tokenizer"):
        compare(tmp_path, None, text_file, **OPTIONS)
    found = compare(source, tmp_path, text_file, **OPTIONS)
    assert abs(found.result.kl.value) <= 1e-6, "the other folder's tokenizer is used"
