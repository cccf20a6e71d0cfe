"""Text from a causal language model, token by token.

A loop of our own instead of `model.generate` with a streamer thread: sampling takes a generator of
its own and not torch's global one, an error surfaces where the text is read, and the clock can tell
the prompt (one large pass) from the tokens after it (many small ones), which have nothing in common
in speed. Greedy output equals `model.generate(do_sample=False)`, token for token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, otherwise drawn.

    temperature: logits are divided by it.
    top_p:       drawn from the smallest set of tokens whose probabilities reach this sum.
    seed:        of the draws; equal seeds give equal text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"temperature is {self.temperature}: use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}: use a number above 0, up to 1")


@dataclass(frozen=True)
class Speed:
    """What a generation took. The first new token is part of the prompt's pass."""

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first: 0 when there is none."""
        decoded, decoding = self.new_tokens - 1, self.seconds - self.prompt_seconds
        return decoded / decoding if decoded > 0 and decoding > 0 else 0.0


class TextStream:
    """Pieces of generated text, in order: `for piece in stream: ...`. It can be read once.

    `text` and `tokens` grow as it is read; `speed` is there from the first piece on.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        """`ids`: the prompt, int64 [1, tokens]."""
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
        if ids.numel() == 0:
            raise UsageError("the prompt is empty: write at least one word")
        self.text = ""
        self.tokens: list[int] = []
        self.speed: Speed | None = None
        self._prompt_tokens = ids.shape[-1]
        self._ids = new_tokens(model, ids, max_new_tokens, sampling or Sampling())
        self._stops = stop_tokens(model, tokenizer)
        self._pieces = self._read(Detokenizer(tokenizer))

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def finish(self) -> str:
        """Read to the end; the whole text."""
        for _ in self:
            pass
        return self.text

    def _read(self, detokenizer: Detokenizer) -> Iterator[str]:
        start, prompt_seconds = time.perf_counter(), 0.0
        for token in self._ids:
            seconds = time.perf_counter() - start
            prompt_seconds = prompt_seconds or seconds
            self.tokens.append(token)
            self.speed = Speed(self._prompt_tokens, len(self.tokens), prompt_seconds, seconds)
            if token in self._stops:
                break
            if piece := detokenizer.feed(token):
                self.text += piece
                yield piece
        if piece := detokenizer.flush():
            self.text += piece
            yield piece


def new_tokens(model: Any, ids: Tensor, count: int, sampling: Sampling) -> Iterator[int]:
    """`count` tokens that follow `ids` (int64 [1, tokens]), stop tokens included and not obeyed."""
    generator = torch.Generator(device=ids.device).manual_seed(sampling.seed)
    cache = None
    for _ in range(count):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = choose(output.logits[:, -1].float(), sampling, generator)
        yield int(ids)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token, int64 [1, 1], from logits float32 [1, vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(dim=-1, descending=True)
    # What comes before a token must not reach top_p yet: the likeliest one always stays.
    ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= sampling.top_p, 0.0)
    return order.gather(-1, torch.multinomial(ordered, 1, generator=generator))


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a text: those of the generation config and the tokenizer's."""
    named = (getattr(model, "generation_config", None), tokenizer)
    stops: set[int] = set()
    for source in named:
        token = getattr(source, "eos_token_id", None)
        stops.update(token if isinstance(token, Sequence) else () if token is None else (token,))
    return stops


class Detokenizer:
    """Tokens one by one -> text, piece by piece.

    One token is not one piece of text: a character can take several tokens, and some tokenizers
    write a token differently at the start of a text. So each new token is decoded after those of
    the last piece, and held back while its text ends in the mark of an unfinished character.
    """

    _UNFINISHED = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """The text that this token completes, maybe none."""
        self._waiting.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(self._UNFINISHED):
            return ""
        self._context, self._waiting = self._waiting, []
        return piece

    def flush(self) -> str:
        """The text of what was held back."""
        piece = self._new_text() if self._waiting else ""
        self._waiting = []
        return piece

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._waiting])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
