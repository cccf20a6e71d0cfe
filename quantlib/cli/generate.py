"""`quantlib generate`: text from a packed checkpoint, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantlib.cli.console import notes, print_json
from quantlib.cli.options import Checkpoint, Debug, Json
from quantlib.cli.request import quiet_transformers
from quantlib.errors import UsageError

TEXT = "Text"
MODES = ("exact", "int8")


def generate(
    out: Checkpoint,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to answer.", show_default=False)
    ],
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens to write.", rich_help_panel=TEXT)
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T",
            help="0 takes the likeliest token each time; above, tokens are drawn.",
            rich_help_panel=TEXT,
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Draw from the likeliest tokens that make up this probability.",
            rich_help_panel=TEXT,
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the draws.", rich_help_panel=TEXT)
    ] = 0,
    no_chat: Annotated[
        bool,
        typer.Option(
            "--no-chat",
            help="Continue the prompt as it is: no chat template around it.",
            rich_help_panel=TEXT,
        ),
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="exact|int8",
            help="Activations as they are, or rounded to 8 bits; the scheme decides unless said.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write text with a packed checkpoint, on quantlib's own kernels.

    The text goes to stdout as it comes, the speed to stderr.

    Examples:
        quantlib generate OUT "What is the capital of France?"
        quantlib generate OUT "Once upon a time" --no-chat --temperature 0.8 --seed 3
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
    speed = stream.speed
    rate = speed.tokens_per_second if speed else 0.0
    if json:
        counts = {
            "prompt_tokens": speed.prompt_tokens if speed else 0,
            "new_tokens": len(stream.tokens),
        }
        print_json({"text": stream.text, **counts, "tokens_per_second": rate})
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    if speed:
        notes().print(
            f"{speed.new_tokens} tokens, {rate:.1f} tokens/s (prompt of {speed.prompt_tokens} in "
            f"{speed.prompt_seconds:.2f} s)",
            style="dim",
        )
