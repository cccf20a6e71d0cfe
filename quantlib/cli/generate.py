"""`quantlib generate`: text from a packed checkpoint, as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.console import notes, print_json
from quantlib.cli.options import Checkpoint, Debug, Json
from quantlib.cli.request import quiet_transformers
from quantlib.errors import UsageError

if TYPE_CHECKING:
    from quantlib.runtime.generate import TextStream

TEXT = "Text"
MODES = ("exact", "int8")


Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="What to answer.", show_default=False)
]
MaxNewTokens = Annotated[
    int, typer.Option(metavar="N", help="Most tokens to write.", rich_help_panel=TEXT)
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T",
        help="0 takes the likeliest token each time; above, tokens are drawn.",
        rich_help_panel=TEXT,
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
NoChat = Annotated[
    bool,
    typer.Option(
        "--no-chat",
        help="Continue the prompt as it is: no chat template around it.",
        rich_help_panel=TEXT,
    ),
]
Mode = Annotated[
    str | None,
    typer.Option(
        metavar="exact|int8",
        help="Activations as they are, or rounded to 8 bits; the scheme decides unless said.",
        rich_help_panel=TEXT,
    ),
]


def generate(
    out: Checkpoint,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: DrawSeed = 0,
    no_chat: NoChat = False,
    mode: Mode = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write text with a packed checkpoint, on quantlib's own kernels.

    The text goes to stdout as it comes, the speed to stderr.

    Examples:
        quantlib generate OUT "What is the capital of France?"
        quantlib generate OUT "Once upon a time" --no-chat --temperature 0.8
    """
    if mode not in (None, *MODES):
        raise UsageError(f"unknown --mode {mode}: use one of {', '.join(MODES)}")
    from quantlib.runtime.load import load

    quiet_transformers()
    model = load(out, mode)
    stream = model.stream(
        prompt,
        max_new_tokens,
        chat=False if no_chat else None,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    for piece in stream:
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if json:
        print_json(_described(stream))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    speed = stream.speed
    if speed is not None:
        notes().print(
            f"{speed.new_tokens} tokens, {speed.tokens_per_second:.1f} tokens/s (prompt of "
            f"{speed.prompt_tokens} in {speed.prompt_seconds:.2f} s)",
            style="dim",
        )


def _described(stream: TextStream) -> dict[str, Any]:
    """The answer as JSON."""
    speed = stream.speed
    return {
        "text": stream.text,
        "prompt_tokens": speed.prompt_tokens if speed else 0,
        "new_tokens": len(stream.tokens),
        "tokens_per_second": speed.tokens_per_second if speed else 0.0,
    }
