"""`quantlib generate`: text from a packed checkpoint, as it comes; and pictures, and answers about
pictures and sounds (`generate_media.py`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import notes, print_json
from quantlib.cli.generate_media import MediaRequest, run_media
from quantlib.cli.options import Checkpoint, Debug, Json
from quantlib.cli.request import quiet_transformers
from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.runtime.generate import Generation
    from quantlib.runtime.load import QuantizedModel

TEXT = "Text"
MEDIA = "Pictures and sounds"
COMPUTING = "Computing"
ENGINES = ("auto", "native", "plain")
MODES = ("exact", "int8", "int8g128", "scheme", "fast")


Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to answer or to continue. Several prompts at once take less time.",
        show_default=False,
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--file", metavar="FILE", help="More prompts, one a line; - is stdin.", rich_help_panel=TEXT
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(metavar="N", help="Most tokens to write.", rich_help_panel=TEXT)
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        help="0 takes the likeliest token each time; above, tokens are drawn. 0 for text and 1 for "
        "pictures unless said.",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P",
        help="Draw from the likeliest tokens that make up this probability.",
        rich_help_panel=TEXT,
    ),
]
DrawSeed = Annotated[
    int, typer.Option(metavar="N", help="Seed of the draws.", rich_help_panel=TEXT)
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Answer the prompt as a message, in the model's chat template; or continue it as it "
        "is. Unless said, a message where the model has a template.",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
PictureOut = Annotated[
    Path | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Draw a picture of the prompt, and write it here (.png).",
        rich_help_panel=MEDIA,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="G",
        help="How strongly a drawn picture follows its prompt: 1 is not at all; the model's own "
        "unless said.",
        rich_help_panel=MEDIA,
        show_default=False,
    ),
]
PictureIn = Annotated[
    Path | None,
    typer.Option(
        "--image-input",
        metavar="FILE",
        help="A picture that the prompt asks about.",
        rich_help_panel=MEDIA,
    ),
]
SoundIn = Annotated[
    Path | None,
    typer.Option(
        "--audio",
        metavar="FILE",
        help="A sound (.wav) whose words are written down.",
        rich_help_panel=MEDIA,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="auto|native|plain",
        help="native: quantlib's own decode loop. plain: through transformers. auto: native where "
        "it knows the model.",
        rich_help_panel=COMPUTING,
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        metavar="|".join(MODES),
        help="Activations as they are; rounded to 8 bits per token; per token and 128 columns (the "
        "native engine's way unless said, much faster than exact); as each scheme says; or fast, "
        "its way where schemes round activations: as they say, attention in 16-bit integers and "
        "the head as in int8g128.",
        rich_help_panel=COMPUTING,
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="How the native engine keeps keys and values: f32, int8, int4, int4g32r (4 bits, a "
        "scale per 32 columns, rotated), int8/int4rk4 (keys and values apart, the first 4 tokens "
        "in float32); as the checkpoint says unless said.",
        rich_help_panel=COMPUTING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Threads; torch's number unless said.", rich_help_panel=COMPUTING
    ),
]


def generate(
    out: Checkpoint,
    prompts: Prompts = None,
    file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    seed: DrawSeed = 0,
    chat: Chat = None,
    image: PictureOut = None,
    guidance: Guidance = None,
    image_input: PictureIn = None,
    audio: SoundIn = None,
    engine: Engine = "auto",
    mode: Mode = None,
    kv: Kv = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write text with a packed checkpoint, on quantlib's own kernels; or draw, look, and listen.

    A model with a chat template answers the prompt, any other one continues it. The text goes to
    stdout as it comes (of several prompts, each text when all are done), the speed to stderr. With
    --image a picture of the prompt is drawn; with --image-input or --audio the text is about them.

    Examples:
        quantlib generate OUT "What is the capital of France?"
        quantlib generate OUT "The capital of France is" --no-chat
        quantlib generate OUT "Once upon a time" --no-chat --temperature 0.8
        quantlib generate OUT "Name a colour." "Name a fruit." --mode exact --kv int8
        quantlib generate OUT --file prompts.txt --max-new-tokens 64 --json
        quantlib generate OUT "a red three" --image out.png --seed 1
        quantlib generate OUT "what digit?" --image-input photo.png
        quantlib generate OUT --audio clip.wav
    """
    _check(engine=(engine, ENGINES), mode=(mode, (None, *MODES)))
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: use 1 or more")
    asked = [*(prompts or []), *(_lines(file) if file else [])]
    if not asked and audio is None:
        raise UsageError("there is no prompt: write one after the folder, or give --file FILE")
    given = MediaRequest(image, guidance, image_input, audio)
    drawn = {"--top-p": image is not None and top_p != 1, "--chat": chat is not None}
    given.check(asked, {"--engine": engine != "auto", "--kv": kv is not None, **drawn})
    import torch

    from quantlib.runtime.load import load

    quiet_transformers()
    if threads is not None:
        torch.set_num_threads(threads)
    if given:
        model = load(out, mode, engine="plain")
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        run_media(model, "".join(asked), given, max_new_tokens, sampling, json)
        return
    model = load(out, mode, engine=engine, kv=kv)
    generation = model.generation(
        asked,
        max_new_tokens,
        chat=chat,
        temperature=temperature or 0.0,
        top_p=top_p,
        seed=seed,
    )
    if json:
        generation.finish()
        print_json(_described(model, generation))
        return
    _write(asked, generation)
    _report(model, generation, model.chats if chat is None else chat)


def _check(**options: tuple[str | None, Sequence[str | None]]) -> None:
    for name, (given, known) in options.items():
        if given not in known:
            names = ", ".join(filter(None, known))
            raise UsageError(f"unknown --{name} {given}: use one of {names}")


def _lines(file: Path) -> list[str]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file {file} cannot be read: {error}") from error
    return [line for line in text.splitlines() if line.strip()]


def _write(prompts: Sequence[str], generation: Generation) -> None:
    """One text as it comes; several ones, each under its prompt."""
    if len(prompts) == 1:
        for _, piece in generation:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        for prompt, text in zip(prompts, generation.finish()):
            sys.stdout.write(f"> {prompt}\n{text}\n\n")
    sys.stdout.flush()


def _report(model: QuantizedModel, generation: Generation, chat: bool) -> None:
    """How fast it was, what computed it, and what the prompt was taken for."""
    speed, console = generation.speed, notes()
    if model.plain_reason is not None:
        console.print(f"through transformers: {model.plain_reason}", style="dim")
    if speed is None:
        return
    made_by = _computing(model)
    template = " with its chat template" if chat else ""
    console.print(
        f"{speed.new_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s; prompt of "
        f"{speed.prompt_tokens}{template}, {speed.prompt_tokens_per_second:.1f} tokens/s "
        f"({made_by['engine']} engine, {made_by['isa']}, {made_by['mode']}, kv {made_by['kv']})",
        style="dim",
    )


def _described(model: QuantizedModel, generation: Generation) -> dict[str, Any]:
    """The answer as JSON."""
    speed, texts = generation.speed, generation.texts
    return {
        "text": texts[0] if len(texts) == 1 else None,
        "texts": texts,
        "prompt_tokens": speed.prompt_tokens if speed else 0,
        "new_tokens": sum(map(len, generation.tokens)),
        "tokens_per_second": speed.tokens_per_second if speed else 0.0,
        "prompt_tokens_per_second": speed.prompt_tokens_per_second if speed else 0.0,
        "plain_reason": model.plain_reason,
        **_computing(model),
    }


def _computing(model: QuantizedModel) -> dict[str, Any]:
    import torch

    from quantlib.kernels.ops import backend

    return {
        "engine": model.engine,
        "isa": backend(),
        "mode": model.mode,
        "kv": model.kv,
        "threads": torch.get_num_threads(),
    }
