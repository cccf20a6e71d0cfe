"""The beds `encoders`: vectors are judged by what is near, and DINOv2 leaves its ONNX file as it
was put in."""

import gzip
import json
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlib.bench import multimodal_encoders
from quantlib.bench.beds import dinov2, encoders, fashion
from quantlib.bench.beds.folders import write_records
from quantlib.errors import DataError, UsageError
from quantlib.pipeline.compress import compress

from ..pipeline import whole_models

QUICK: dict[str, Any] = {
    "windows": 4,
    "probe_windows": 2,
    "probes": 0,
    "passes": 0,
    "schemes": ("w4g32zs4", "w8g32zs6"),
}


def test_ranks_are_counted_from_the_nearest_article() -> None:
    """Query 0 finds its own first, query 1 its own second."""
    articles = torch.eye(2)
    asked = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    found = encoders.retrieval(asked, articles)
    assert found["recall_at_1"] == [1.0, 0.0]
    assert found["recall_at_5"] == [1.0, 1.0]
    assert found["reciprocal_rank"] == [1.0, 0.5]


def test_near_neighbours_outvote_many_far_ones() -> None:
    """One vector of kind 1 at cosine 1, nine of kind 0 at 0.7: exp(0.3 / 0.07) is 72 times."""
    known = torch.tensor([[1.0, 0.0]] + [[0.7, 0.51**0.5]] * 9)
    labels = torch.tensor([1] + [0] * 9)
    assert encoders.neighbours_say(torch.tensor([[1.0, 0.0]]), known, labels).tolist() == [1]


def test_padding_changes_no_sentence(tiny_tokenizer: Any) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertModel(config).eval()
    texts = ["bread", "rivers carry stones to the sea", "time"]
    together = encoders.sentence_vectors(model, tiny_tokenizer, texts)
    alone = torch.cat([encoders.sentence_vectors(model, tiny_tokenizer, [t]) for t in texts])
    assert (together - alone).abs().max() <= 1e-5, "float32 sums of unit vectors"
    assert torch.allclose(together.norm(dim=1), torch.ones(3))


def test_another_type_of_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a model"):
        encoders.open_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UsageError, match="of type 'llama': a BERT or a DINOv2"):
        encoders.open_encoder(tmp_path)


# -- Fashion-MNIST ---------------------------------------------------------------------------------


def write_idx(path: Path, values: np.ndarray, dtype: int = 8) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, dtype, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


def test_pictures_and_labels_are_read(tmp_path: Path) -> None:
    images = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([9, 0, 3]))
    found, labels = fashion.read_fashion(tmp_path, "train")
    assert np.array_equal(found.numpy(), images)
    assert labels.tolist() == [9, 0, 3]
    assert [fashion.KINDS[label] for label in labels] == ["an ankle boot", "a t-shirt", "a dress"]


def test_damaged_and_misfit_files_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((3, 28, 28)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([1, 2]))
    with pytest.raises(DataError, match="which do not fit"):
        fashion.read_fashion(tmp_path, "train")
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([1, 2, 3]), dtype=13)
    with pytest.raises(DataError, match="not an IDX file of bytes"):
        fashion.read_fashion(tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="could not be read"):
        fashion.read_fashion(tmp_path, "train")


# -- DINOv2 ----------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DINOv2 of 16 channels for pictures of 42 pixels: 9 patches."""
    sizes = {"WIDTH": 16, "BLOCKS": 2, "HEADS": 2, "FULL_SIZE": 42}
    for name, value in sizes.items():
        monkeypatch.setattr(dinov2, name, value)


def dino() -> Any:
    from transformers import Dinov2Model

    model = Dinov2Model(dinov2.configuration(dinov2.FULL_SIZE)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


def write_onnx(model: Any, path: Path) -> None:
    """The file of the package: linears transposed and anonymous, positions cut in two."""
    onnx = pytest.importorskip("onnx")
    old = {new: name for name, new in dinov2._RENAMED.items()}
    initialisers, nodes = [], []
    for name, value in model.state_dict().items():
        for new, was in old.items():
            name = name.replace(new, was)
        array = value.numpy()
        if name == "embeddings.position_embeddings":
            parts = {"onnx::Concat_1": array[:, :1], "onnx::Reshape_2": array[:, 1:]}
        elif name.endswith(".weight") and value.ndim == 2:
            place = name.removesuffix(".weight").replace("layer.", "layer·").replace(".", "/")
            place = place.replace("layer·", "layer.")
            parts = {f"onnx::MatMul_{len(nodes)}": np.ascontiguousarray(array.T)}
            [weight] = parts
            node = onnx.helper.make_node(
                "MatMul", ["x", weight], ["y"], f"/backbone/{place}/MatMul"
            )
            nodes.append(node)
        else:
            parts = {f"backbone.{name}": array}
        initialisers += [onnx.numpy_helper.from_array(a, n) for n, a in parts.items()]
    initialisers.append(onnx.numpy_helper.from_array(np.zeros((2, 3), np.float32), "decoder.conv"))
    graph = onnx.helper.make_graph(nodes, "graph", [], [], initialisers)
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def test_an_onnx_file_becomes_the_model_it_was_made_from(small: None, tmp_path: Path) -> None:
    from transformers import Dinov2Model

    model = dino()
    write_onnx(model, tmp_path / "model.onnx")
    dinov2.export_dinov2(tmp_path / "model.onnx", tmp_path / "out")
    loaded = Dinov2Model.from_pretrained(tmp_path / "out")
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_file_that_is_no_dinov2_is_refused(small: None, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(DataError, match="could not be read as an ONNX model"):
        dinov2.export_dinov2(tmp_path / "text.onnx", tmp_path / "out")
    model = dino()
    del model.encoder.layer[1]
    write_onnx(model, tmp_path / "short.onnx")
    with pytest.raises(DataError, match=r"does not fill a DINOv2-small: missing \['encoder\.layer"):
        dinov2.export_dinov2(tmp_path / "short.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_resized_model_computes_what_the_full_one_does(small: None, tmp_path: Path) -> None:
    dino().save_pretrained(tmp_path)
    from transformers import Dinov2Model

    full = Dinov2Model.from_pretrained(tmp_path).eval()
    resized = dinov2.open_resized(tmp_path, 28)
    assert resized.config.image_size == 28
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = resized(pixels).last_hidden_state
        expected = full(pixels).last_hidden_state
    assert torch.equal(found, expected), "the same interpolation, once instead of every time"


def test_vision_is_judged_on_pictures_that_are_not_known(small: None, tmp_path: Path) -> None:
    """Black and white pictures: a model that tells them apart is always right."""
    images = torch.zeros(12, 28, 28, dtype=torch.uint8)
    images[::2] = 255
    labels = torch.arange(12) % 2
    known = encoders.pictures(images, labels, tmp_path / "known", known=True)
    asked = encoders.pictures(images[:4], labels[:4], tmp_path / "asked", known=False)
    write_records(tmp_path / "test.jsonl", [*known, *asked])
    found = encoders.judge("dinov2", dino(), tmp_path)["nearest_neighbours"]
    assert found == [1.0] * 4
    swapped = encoders.pictures(images[:4], 1 - labels[:4], tmp_path / "asked", known=False)
    write_records(tmp_path / "test.jsonl", [*known, *swapped])
    assert encoders.judge("dinov2", dino(), tmp_path)["nearest_neighbours"] == [0.0] * 4


# -- the bench -------------------------------------------------------------------------------------


def _is_packed(model: Any) -> bool:
    return any(name.endswith("weight_packed") for name, _ in model.named_buffers())


def test_rows_of_an_encoder_are_within_their_budgets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the real pipeline, on a tiny DINOv2: a row for every budget and seed, beside the
    figures of full precision."""
    bed = tmp_path / "bed"
    bed.mkdir()
    whole_models.save("dinov2", bed / "model")
    whole_models.records("dinov2", bed).rename(bed / "calibration.jsonl")
    monkeypatch.setattr(multimodal_encoders, "compress", partial(compress, **QUICK))
    monkeypatch.setattr(
        multimodal_encoders,
        "judge",
        lambda kind, model, _: {"nearest": [float(_is_packed(model)), 0.0, 1.0]},
    )
    found = multimodal_encoders.measure(bed, tmp_path / "work", (12.0, 20.0), 2)
    assert found["full_precision"]["nearest"]["value"] == pytest.approx(1 / 3)
    assert [(row["bits"], row["seed"]) for row in found["rows"]] == [
        (12.0, 0),
        (20.0, 0),
        (12.0, 1),
        (20.0, 1),
    ]
    for row in found["rows"]:
        assert row["true_bits"] <= row["bits"]
        assert row["figures"]["nearest"]["value"] == pytest.approx(2 / 3)
        change = row["changes"]["nearest"]
        assert change["value"] == pytest.approx(1 / 3)
        assert change["standard_error"] == pytest.approx(1 / 3), "of one question in three"
