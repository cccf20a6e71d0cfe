"""Text from a causal language model, token by token, for one prompt or several at once.

A loop of our own instead of `model.generate` with a streamer thread: sampling takes generators of
its own and not torch's global one, an error surfaces where the text is read, and the clock can tell
the prompt (one large pass) from the tokens after it (many small ones), which have nothing in common
in speed. Whoever computes is behind `Texts`: the native engine (`engine.py`) or a transformers
model (`TransformersTexts`). Greedy output of the latter equals `model.generate(do_sample=False)`,
token for token.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantlib.errors import UsageError


class Texts(Protocol):
    """Texts that grow, each known by a number, and the model that says how they may go on."""

    def extend(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """Append tokens to each: float32 [texts, vocabulary], the logits of its next token."""

    def extend_best(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """Append tokens to each: integers [texts], its likeliest next token."""


class TransformersTexts:
    """The plain way: a transformers model, and a cache of its own for every text, packed where
    `packed_cache` makes one."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[int, Any] = {}

    def extend(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """See `Texts`. The logits are on the CPU, wherever the model is."""
        return torch.stack([self._extend(text, tokens) for text, tokens in texts.items()])

    def extend_best(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """See `Texts`."""
        return self.extend(texts).argmax(dim=-1)

    def _extend(self, text: int, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)], dtype=torch.int64, device=self._model.device)
        if text not in self._caches:
            from quantlib.runtime.packed_cache import packed_cache  # imports transformers

            self._caches[text] = packed_cache(self._model)
        options = {"past_key_values": self._caches[text], "use_cache": True}
        with torch.no_grad():
            output = self._model(input_ids=ids, logits_to_keep=1, **options)
        self._caches[text] = output.past_key_values
        logits: Tensor = output.logits[0, -1].float().cpu()
        return logits


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
    """What a generation took, of all its texts together.

    Seconds are those of the model and of choosing tokens, not of whoever reads the text. The first
    new token of every text is part of the prompt's pass.
    """

    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float
    texts: int = 1

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of the prompts' pass."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first of each text: 0 when there is none."""
        decoded, decoding = self.new_tokens - self.texts, self.seconds - self.prompt_seconds
        return decoded / decoding if decoded > 0 and decoding > 0 else 0.0


class Generation:
    """Texts that follow several prompts, all written at once. It can be read once.

    Iterating gives pieces of text as they come, each with the number of its prompt. `texts` and
    `tokens` grow with it; `speed` is there from the first piece on.
    """

    def __init__(
        self,
        model: Texts,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stops: Collection[int] = (),
    ) -> None:
        """
        prompts: token ids; each text is the one that its prompt would get alone.
        stops:   tokens that end a text (`stop_tokens`).
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
        if not prompts or not all(map(len, prompts)):
            raise UsageError("the prompt is empty: write at least one word")
        self.texts = [""] * len(prompts)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.speed: Speed | None = None
        self._prompt_tokens, self._stops = sum(map(len, prompts)), frozenset(stops)
        rounds = new_tokens(model, prompts, max_new_tokens, sampling or Sampling(), self._stops)
        self._pieces = self._read(rounds, [Detokenizer(tokenizer) for _ in prompts])

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._pieces

    def finish(self) -> list[str]:
        """Read to the end; all texts."""
        for _ in self:
            pass
        return self.texts

    def _read(
        self, rounds: Iterator[dict[int, int]], detokenizers: list[Detokenizer]
    ) -> Iterator[tuple[int, str]]:
        prompt_seconds, seconds, new_count = 0.0, 0.0, 0
        while True:
            began = time.perf_counter()
            chosen = next(rounds, None)
            if chosen is None:
                break
            seconds += time.perf_counter() - began
            prompt_seconds, new_count = prompt_seconds or seconds, new_count + len(chosen)
            self.speed = Speed(
                self._prompt_tokens, new_count, prompt_seconds, seconds, len(self.texts)
            )
            for text, token in chosen.items():
                self.tokens[text].append(token)
                if token not in self._stops:
                    yield from self._grow(text, detokenizers[text].feed(token))
        for text, detokenizer in enumerate(detokenizers):
            yield from self._grow(text, detokenizer.flush())

    def _grow(self, text: int, piece: str) -> Iterator[tuple[int, str]]:
        if piece:
            self.texts[text] += piece
            yield text, piece


class TextStream:
    """Pieces of one generated text, in order: `for piece in stream: ...`. It can be read once."""

    def __init__(self, generation: Generation) -> None:
        """Of a generation with one prompt."""
        self._generation = generation

    def __iter__(self) -> Iterator[str]:
        return (piece for _, piece in self._generation)

    def finish(self) -> str:
        """Read to the end; the whole text."""
        return self._generation.finish()[0]

    @property
    def text(self) -> str:
        """What was read so far."""
        return self._generation.texts[0]

    @property
    def tokens(self) -> list[int]:
        """Its tokens, a stop token included."""
        return self._generation.tokens[0]

    @property
    def speed(self) -> Speed | None:
        """How fast it came; None before the first piece."""
        return self._generation.speed


def new_tokens(
    model: Texts,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling,
    stops: Collection[int] = (),
) -> Iterator[dict[int, int]]:
    """At most `count` rounds: the next token of every text that has not met one of `stops` yet.

    Every text draws from a generator of its own, so that what it becomes does not depend on the
    others. A stop token is part of its text's last round.
    """
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    growing: dict[int, Sequence[int]] = dict(enumerate(prompts))
    for _ in range(count):
        if sampling.temperature == 0:
            best = model.extend_best(growing).tolist()
        else:
            logits = model.extend(growing)
            drawn = [choose(row, sampling, generators[text]) for text, row in zip(growing, logits)]
            best = [int(token) for token in drawn]
        chosen = dict(zip(growing, best))
        yield chosen
        growing = {text: [token] for text, token in chosen.items() if token not in stops}
        if not growing:
            return


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token, an int64 scalar, from logits float32 [vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax()
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_p == 1:
        return torch.multinomial(probabilities, 1, generator=generator)[0]
    ordered, order = probabilities.sort(descending=True)
    # What comes before a token must not reach top_p yet: the likeliest one always stays.
    ordered = ordered.masked_fill(ordered.cumsum(dim=0) - ordered >= sampling.top_p, 0.0)
    return order[torch.multinomial(ordered, 1, generator=generator)[0]]


def stop_tokens(named: int | Sequence[int] | None) -> set[int]:
    """Tokens that end a text, from an `eos_token_id`: one, several or none."""
    if named is None:
        return set()
    return {named} if isinstance(named, int) else set(named)


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
