"""Generation: transformers' tokens, in pieces, reproducible, stopped where the model stops."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import UsageError
from quantlib.runtime.generate import (
    Detokenizer,
    Generation,
    Sampling,
    Speed,
    TextStream,
    TransformersTexts,
    choose,
    new_tokens,
    stop_tokens,
)

PROMPT = [5, 17, 300, 42, 9, 77, 123, 250, 11]
OTHERS = [[7, 8], [300, 11, 42, 5, 6, 99, 120, 4, 4, 17, 21, 33, 60]]
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model(build_tiny: Any) -> Any:
    return build_tiny("llama")


def take(model: Any, sampling: Sampling, count: int = 12) -> list[int]:
    return [chosen[0] for chosen in new_tokens(TransformersTexts(model), [PROMPT], count, sampling)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-moe"])
def test_greedy_tokens_are_those_of_transformers(family: str, build_tiny: Any) -> None:
    """Past Gemma's sliding window of 8, too."""
    model = build_tiny(family)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)[0, len(PROMPT) :]
    assert take(model, GREEDY) == expected.tolist()


def test_samples_depend_on_their_seed_and_on_nothing_else(model: Any) -> None:
    first = take(model, Sampling(1.0, seed=3))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert take(model, Sampling(1.0, seed=3)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert take(model, Sampling(1.0, seed=4)) != first


def test_cold_samples_are_greedy(model: Any) -> None:
    assert take(model, Sampling(1e-4)) == take(model, GREEDY)
    assert take(model, Sampling(5.0, top_p=1e-6)) == take(model, GREEDY)


def test_top_p_draws_only_from_the_likeliest() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    generator = torch.Generator().manual_seed(0)
    drawn = {int(choose(logits, Sampling(1.0, 0.65), generator)) for _ in range(200)}
    assert drawn == {1, 3}  # 0.4 + 0.3 reaches 0.65


@pytest.mark.parametrize("top_p", [1.0, 0.999999])
def test_draws_follow_the_probabilities(top_p: float) -> None:
    """Also on the way that sorts them first."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    generator = torch.Generator().manual_seed(0)
    logits, sampling = torch.log(probabilities), Sampling(1.0, top_p)
    draws = torch.stack([choose(logits, sampling, generator) for _ in range(2000)])
    found = torch.bincount(draws, minlength=4) / 2000
    # Four standard errors of a share of 0.4 among 2000.
    assert not ((found - probabilities).abs() > 4 * (0.24 / 2000) ** 0.5).any()


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9, seed=5)])
def test_every_prompt_gets_the_text_that_it_would_get_alone(
    model: Any, tiny_tokenizer: Any, sampling: Sampling
) -> None:
    """Of different lengths, ended by stop tokens at different times, drawn or not."""
    prompts = [PROMPT, *OTHERS]
    free = Generation(TransformersTexts(model), tiny_tokenizer, prompts, 12, sampling)
    free.finish()
    stops = {free.tokens[0][4], free.tokens[2][8]}
    together = Generation(TransformersTexts(model), tiny_tokenizer, prompts, 12, sampling, stops)
    pieces = list(together)
    assert len({len(tokens) for tokens in together.tokens}) > 1
    for number, prompt in enumerate(prompts):
        alone = Generation(TransformersTexts(model), tiny_tokenizer, [prompt], 12, sampling, stops)
        assert alone.finish() == [together.texts[number]]
        assert alone.tokens == [together.tokens[number]]
        mine = [piece for text, piece in pieces if text == number]
        assert "".join(mine) == together.texts[number]
    speed = together.speed
    assert speed is not None
    assert speed.prompt_tokens == sum(map(len, prompts))
    assert speed.new_tokens == sum(map(len, together.tokens))
    assert speed.texts == 3


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}])
def test_a_bad_temperature_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="temperature is"):
        Sampling(**bad)


@pytest.mark.parametrize("top_p", [0.0, 1.5, float("nan")])
def test_a_bad_top_p_is_refused(top_p: float) -> None:
    with pytest.raises(UsageError, match="top_p is"):
        Sampling(1.0, top_p)


def stream(
    model: Any, tokenizer: Any, count: int = 12, ids: Any = PROMPT, stops: Any = ()
) -> TextStream:
    texts, sampling = TransformersTexts(model), Sampling(1.0, seed=5)
    return TextStream(Generation(texts, tokenizer, [ids], count, sampling, stops))


def test_pieces_make_up_the_text(model: Any, tiny_tokenizer: Any) -> None:
    text = stream(model, tiny_tokenizer)
    pieces = list(text)
    assert len(pieces) > 1
    assert "".join(pieces) == text.text == tiny_tokenizer.decode(text.tokens)


def test_speed_counts_what_was_made_and_not_who_reads_it(model: Any, tiny_tokenizer: Any) -> None:
    text = stream(model, tiny_tokenizer)
    assert text.speed is None
    began = time.perf_counter()
    for _ in text:
        time.sleep(0.02)
    passed, speed = time.perf_counter() - began, text.speed
    assert speed is not None
    assert (speed.prompt_tokens, speed.new_tokens) == (len(PROMPT), len(text.tokens))
    assert 0 < speed.prompt_seconds <= speed.seconds < passed - 0.02
    expected = (len(text.tokens) - 1) / (speed.seconds - speed.prompt_seconds)
    assert speed.tokens_per_second == pytest.approx(expected)


def test_speed_of_several_texts_counts_what_each_has_after_its_first_token() -> None:
    speed = Speed(prompt_tokens=30, new_tokens=23, prompt_seconds=0.5, seconds=2.5, texts=3)
    assert speed.prompt_tokens_per_second == 60
    assert speed.tokens_per_second == 10


def test_the_speed_of_a_single_token_is_not_made_up() -> None:
    assert Speed(9, 1, 0.5, 0.5).tokens_per_second == 0


def test_text_ends_at_a_stop_token(model: Any, tiny_tokenizer: Any) -> None:
    tokens = take(model, Sampling(1.0, seed=5))
    place = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    text = stream(model, tiny_tokenizer, stops=[0, tokens[place]])
    text.finish()
    assert text.tokens == tokens[: place + 1]
    assert text.text == tiny_tokenizer.decode(tokens[:place])


def test_stop_tokens_are_one_several_or_none() -> None:
    assert stop_tokens(1) == {1}
    assert stop_tokens([0, 5]) == {0, 5}
    assert stop_tokens(None) == set()


def test_an_empty_prompt_is_refused(model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        stream(model, tiny_tokenizer, ids=[])


def test_no_tokens_are_refused(model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        stream(model, tiny_tokenizer, count=0)


@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20))
def test_detokenized_pieces_are_the_text(text: str, tiny_tokenizer: Any) -> None:
    """Also where a character is several tokens: no piece holds half of one."""
    detokenizer = Detokenizer(tiny_tokenizer)
    pieces = [detokenizer.feed(token) for token in tiny_tokenizer(text)["input_ids"]]
    joined = "".join(pieces) + detokenizer.flush()
    assert joined == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_unfinished_character_comes_out_at_the_end(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer("語")["input_ids"]
    assert len(tokens) > 1
    detokenizer = Detokenizer(tiny_tokenizer)
    assert [detokenizer.feed(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
