"""The native decoder engine against plain torch, and against itself in other orders of work."""

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlib.errors import DataError, QuantlibError, UsageError
from quantlib.kernels.cpu import library as cpu
from quantlib.kernels.cpu.engine_library import Decoder, Linear, NativeEngine, RowBlocks
from quantlib.kernels.cpu.engine_structs import Step
from quantlib.kernels.kv_format import KvFormat
from quantlib.kernels.layouts import tile

from .engine_reference import Sizes, all_in_blocks, forward, pack_weight, random_decoder

RAGGED = Sizes(hidden=33, intermediate=50, heads=6, kv_heads=1, head_dim=20)
CACHES = ["f32", "int8", "int4h16", "int4r/int8g16k4"]


def draw_tokens(count: int, vocabulary: int = 150, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (count,), generator=generator).to(torch.int32)


def make(
    library: cpu.Library, model: Decoder, kv: str | None = "f32", **kwargs: Any
) -> NativeEngine:
    form = None if kv is None else KvFormat.parse(kv)
    options = {"sequences": 3, "capacity": 700, "kv": form, **kwargs}
    return NativeEngine(library, model, **options)


def append(
    engine: NativeEngine, tokens: Tensor, sequences: Sequence[int] | int = 0, threads: int = 2
) -> Tensor:
    """Append tokens to a sequence (or one to each of several); the logits of all of them."""
    rows = torch.full((len(tokens),), sequences) if isinstance(sequences, int) else sequences
    logits = torch.full((len(tokens), engine.vocabulary), math.nan)
    engine.step(
        tokens,
        torch.as_tensor(rows, dtype=torch.int32),
        torch.arange(len(tokens)),
        threads,
        logits=logits,
    )
    return logits


def in_chunks(engine: NativeEngine, tokens: Tensor, size: int, sequence: int = 0) -> Tensor:
    return torch.cat([append(engine, chunk, sequence) for chunk in tokens.split(size)])


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_it_computes_what_plain_torch_does(library, seed, changed, blocks):
    """Also in other bases, with rotated and reordered inputs of linears, with blocks of rows."""
    sizes = (Sizes(), RAGGED)[seed % 2]
    model = random_decoder(seed, sizes=sizes, changed=changed, blocks=blocks)
    tokens = draw_tokens(90, seed=seed)
    engine = make(library, model)
    logits = torch.empty(90, 150)
    states = torch.empty(len(model.layers) + 1, 90, model.hidden)
    engine.step(
        tokens,
        torch.zeros(90, dtype=torch.int32),
        torch.arange(90),
        2,
        logits=logits,
        hidden_states=states,
    )
    expected, expected_states = forward(model, tokens.long())
    # Float32 sums of about a hundred terms, through two layers without exact cancellation.
    for found, wanted in ((logits, expected), (states, expected_states)):
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert error <= 2e-5


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_rounded_inputs_stay_close_to_exact_ones(library, seed, blocks):
    """Int8 activations move logits by some percent; a wrong scale or sum would by all of it."""
    model = random_decoder(seed, mode="int8", blocks=blocks)
    tokens = draw_tokens(40, seed=seed)
    found = append(make(library, model), tokens)
    expected, _ = forward(model, tokens.long())
    error = (found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()
    assert error <= 0.15
    assert not torch.equal(found, append(make(library, model, mode="exact"), tokens))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_prompt_gives_the_same_bits_whole_in_chunks_and_token_by_token(
    library, cache, mode, changed
):
    """In mode int8 attention is computed in integers too."""
    model = random_decoder(7, mode=mode, changed=changed)
    if mode == "int8":
        model = dataclasses.replace(
            model, layers=tuple(dataclasses.replace(x, query_bits=6) for x in model.layers)
        )
    tokens = draw_tokens(150)
    engine = make(library, model, cache, integer_attention=mode == "int8")
    whole = append(engine, tokens)
    assert torch.isfinite(whole).all()
    for sequence, size in ((1, 37), (2, 1)):
        assert torch.equal(in_chunks(engine, tokens, size, sequence), whole)


@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("seed", [2, 5])
def test_rows_in_blocks_change_no_bit(library, seed, changed, mode):
    """However the rows of matrices are divided, and on any number of threads: prompts so long that
    a block of rows is made in several pieces, single tokens, and tokens of several texts."""
    whole = random_decoder(seed, mode=mode, changed=changed)
    tokens = draw_tokens(304)

    def found(model: Decoder, threads: int) -> list[Tensor]:
        engine = make(library, model, "int8")
        prompt = append(engine, tokens[:300], threads=threads)
        single = [append(engine, token[None], threads=threads) for token in tokens[300:]]
        append(engine, tokens[:5], 1, threads)
        return [prompt, *single, append(engine, tokens[:2], [1, 0], threads)]

    expected = found(whole, 1)
    for threads in (1, 3):
        for one, other in zip(found(all_in_blocks(whole, seed), threads), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("cache", CACHES[:2])
def test_long_contexts_are_split_among_threads_with_the_same_bits(library, cache):
    """Decoding past 256 positions splits them and merges; a prompt's tokens do not."""
    model = random_decoder(3, sizes=Sizes(layers=1))
    tokens = draw_tokens(600)
    engine = make(library, model, cache)
    whole = append(engine, tokens)
    for threads in (1, 3):
        engine.truncate(0, 595)
        for row in range(595, 600):
            found = append(engine, tokens[row : row + 1], threads=threads)
            assert torch.equal(found[0], whole[row])


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_the_number_of_threads_changes_no_bit(library, mode, changed):
    model = random_decoder(5, mode=mode, changed=changed)
    tokens = draw_tokens(70)
    results = []
    for threads in (1, 2, 3):
        engine = make(library, model, "int8")
        prompt = append(engine, tokens[:64], threads=threads)
        rest = [append(engine, token[None], threads=threads) for token in tokens[64:]]
        results.append(torch.cat([prompt, *rest]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", cpu.ISAS[2:])
def test_linears_of_every_instruction_set_make_the_same_logits(library, name):
    if not library.supports(name):
        pytest.skip(f"this processor has no {name}")
    for mode, changed in (("exact", False), ("int8", False), ("int8", True)):
        model = random_decoder(11, mode=mode, changed=changed, blocks=changed)
        tokens = draw_tokens(33)
        found, expected = (
            append(make(library, model, "int8", isa=isa, integer_attention=changed), tokens)
            for isa in (name, "portable")
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_sequences_in_one_step_do_not_see_each_other(library, mode):
    model = random_decoder(8, mode=mode)
    texts = [draw_tokens(length, seed=length) for length in (66, 3, 300)]
    engine = make(library, model, "int8")
    alone = make(library, model, "int8", sequences=1)
    expected = []
    for sequence, text in enumerate(texts):
        append(engine, text, sequence)
        alone.truncate(0, 0)
        append(alone, text)
        following = [append(alone, draw_tokens(1, seed=step)) for step in range(4)]
        expected.append(torch.cat(following))
    for step in range(4):
        token = draw_tokens(1, seed=step).repeat(3)
        found = append(engine, token, [2, 0, 1])
        for row, sequence in enumerate([2, 0, 1]):
            assert torch.equal(found[row], expected[sequence][step])


def test_prompts_and_single_tokens_share_a_step(library):
    model = random_decoder(9)
    first, second, third = draw_tokens(40, seed=1), draw_tokens(17, seed=2), draw_tokens(5, seed=3)
    apart, together = (make(library, model) for _ in range(2))
    append(apart, first, 0)
    append(together, first, 0)
    expected = [append(apart, third[:1], 0), append(apart, second, 1), append(apart, third, 2)]
    sequences = [0] + [1] * 17 + [2] * 5
    found = append(together, torch.cat([third[:1], second, third]), sequences)
    assert torch.equal(found, torch.cat(expected))
    assert [together.length(sequence) for sequence in range(3)] == [41, 17, 5]


@pytest.mark.parametrize("blocks", [False, True])
def test_only_wanted_rows_are_computed_and_the_best_token_is_the_first_largest(library, blocks):
    model = random_decoder(4)
    model = all_in_blocks(model) if blocks else model
    tokens = draw_tokens(20)
    expected = append(make(library, model), tokens)
    wanted = torch.tensor([0, 7, 19])
    logits, best = torch.zeros(3, 150), torch.zeros(3, dtype=torch.int32)
    rows = torch.zeros(20, dtype=torch.int32)
    make(library, model).step(tokens, rows, wanted, 2, logits=logits, best=best)
    assert torch.equal(logits, expected[wanted])
    assert best.tolist() == expected[wanted].argmax(-1).tolist()
    alone = torch.zeros(3, dtype=torch.int32)
    make(library, model).step(tokens, rows, wanted, 2, best=alone)
    assert torch.equal(alone, best)


def test_equal_logits_go_to_the_first_token(library):
    model = random_decoder(4)
    head = dataclasses.replace(model.head, weight=torch.zeros(150, model.hidden), bias=None)
    best = torch.full((1,), -1, dtype=torch.int32)
    engine = make(library, dataclasses.replace(model, head=head))
    engine.step(draw_tokens(1), torch.zeros(1, dtype=torch.int32), torch.arange(1), 2, best=best)
    assert best.item() == 0


@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_equal_logits_go_to_the_first_token_whichever_block_it_is_in(library, cap):
    """Three tokens have the same row, larger than all others': the last of them is in the first
    block."""
    model = random_decoder(4)
    row = torch.randn(1, model.hidden, generator=torch.Generator().manual_seed(1))
    weight = torch.zeros(150, model.hidden)
    best = torch.zeros(1, dtype=torch.int32)
    rows = (torch.arange(90, 150), torch.arange(0, 90, 2), torch.arange(1, 90, 2))
    for sign in (1, -1):  # one of both makes the logits of these tokens positive
        weight[[17, 44, 101]] = sign * row
        packed = pack_weight(weight, "w8")
        parts = tuple(tile(packed.select_rows(own)) for own in rows)
        head = Linear(RowBlocks(parts, rows))
        found = dataclasses.replace(model, head=head, logit_scale=0.5, logit_softcap=cap)
        logits = torch.empty(1, 150)
        step = (draw_tokens(1), torch.zeros(1, dtype=torch.int32), torch.arange(1), 2)
        make(library, found).step(*step, logits=logits, best=best)
        assert logits[0, 17] == logits[0, 44] == logits[0, 101] != 0
        assert best.item() == (17 if logits[0, 17] > 0 else 0)


def test_a_truncated_sequence_goes_on_as_if_the_rest_had_never_been(library):
    model = random_decoder(6)
    engine = make(library, model, "int4")
    expected = append(engine, draw_tokens(50), 0)
    engine.truncate(0, 20)
    append(engine, draw_tokens(60, seed=5), 0)
    engine.truncate(0, 20)
    assert engine.length(0) == 20
    assert torch.equal(append(engine, draw_tokens(50)[20:], 0), expected[20:])


def test_a_copied_sequence_goes_on_by_itself(library):
    model = random_decoder(6)
    engine = make(library, model, "int8")
    expected = append(engine, draw_tokens(90), 0)
    engine.truncate(0, 70)
    engine.copy(0, 2)
    append(engine, draw_tokens(20, seed=9), 0)
    assert torch.equal(append(engine, draw_tokens(90)[70:], 2), expected[70:])


def test_a_value_that_is_not_finite_spoils_its_own_sequence_only(library):
    model = random_decoder(8)
    weight = torch.randn(150, model.hidden, generator=torch.Generator().manual_seed(0))
    weight[13, 3] = math.inf
    embedding = dataclasses.replace(model.embedding, weight=weight)
    engine = make(library, dataclasses.replace(model, embedding=embedding), "int8")
    tokens = torch.tensor([13, 14], dtype=torch.int32)
    found = append(engine, tokens, [0, 1])
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert torch.equal(found[1], append(engine, tokens[1:], 2)[0])


def test_mistakes_are_refused_and_append_nothing(library):
    engine = make(library, random_decoder(0), capacity=30)
    append(engine, draw_tokens(25))
    with pytest.raises(UsageError, match="30 tokens"):
        append(engine, draw_tokens(6))
    with pytest.raises(DataError, match="token id"):
        append(engine, torch.tensor([3, 150], dtype=torch.int32))
    with pytest.raises(UsageError, match="sequences"):
        append(engine, draw_tokens(1), 3)
    with pytest.raises(UsageError, match="side by side"):
        append(engine, draw_tokens(3), [1, 2, 1])
    with pytest.raises(UsageError, match="rows of its own"):
        engine.step(draw_tokens(2), torch.zeros(2, dtype=torch.int32), torch.tensor([1, 1]), 1)
    assert engine.length(0) == 25
    append(engine, draw_tokens(5))


def test_a_model_whose_parts_do_not_fit_is_refused_with_a_reason(library):
    model = random_decoder(0)
    broken = {
        "kv_heads": dataclasses.replace(model, kv_heads=3),
        "columns|shape": dataclasses.replace(model, head=model.layers[0].down),
        "add up": dataclasses.replace(
            model, layers=(dataclasses.replace(model.layers[0], intermediate=101),)
        ),
        "rope": dataclasses.replace(model, layers=(dataclasses.replace(model.layers[0], rope=2),)),
    }
    for reason, wrong in broken.items():
        with pytest.raises(QuantlibError, match=reason):
            make(library, wrong)


def test_rows_that_are_in_two_blocks_or_not_in_order_are_refused(library):
    model = random_decoder(0)
    packed = pack_weight(torch.ones(80, 100), "w4g64")
    first, second = torch.arange(0, 80, 2), torch.arange(1, 80, 2)
    for rows in ((first, first), (second, first.flip(0)), (first, second + 1), (first - 1, second)):
        parts = tuple(tile(packed.select_rows(own.clamp(0, 79))) for own in rows)
        layer = dataclasses.replace(model.layers[0], down=Linear(RowBlocks(parts, rows)))
        with pytest.raises(QuantlibError, match="ascending, or another row is there"):
            make(library, dataclasses.replace(model, layers=(layer, *model.layers[1:])))


def test_steps_from_several_threads_follow_one_another(library):
    model = random_decoder(2)
    engine = make(library, model)
    texts = [draw_tokens(40, seed=seed) for seed in range(3)]
    expected = [append(make(library, model), text) for text in texts]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda job: in_chunks(engine, job[1], 3, job[0]), enumerate(texts)))
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def test_embeddings_can_stand_in_for_tokens(library):
    """What a vision encoder makes enters where looked-up rows would."""
    model = random_decoder(1)
    engine = make(library, model)
    rows, wanted = torch.zeros(12, dtype=torch.int32), torch.arange(12)
    states = torch.empty(len(model.layers) + 1, 12, model.hidden)
    expected, found = torch.empty(2, 12, 150)
    engine.step(draw_tokens(12), rows, wanted, 2, logits=expected, hidden_states=states)
    engine.truncate(0, 0)
    step = Step(
        embeddings=states.data_ptr(),
        sequences=rows.data_ptr(),
        wanted=wanted.data_ptr(),
        logits=found.data_ptr(),
        count=12,
        wanted_count=12,
        threads=2,
    )
    assert library.functions.ql_engine_step(engine._handle, ctypes.byref(step)) == 0
    assert torch.equal(found, expected)


def test_queries_are_rounded_and_keys_turned_into_their_basis(library):
    """What is stored are keys in their basis: attention does not change by it, rounding does."""
    model = random_decoder(2, dense=False, changed=True, sizes=Sizes(layers=1))
    tokens, bases = draw_tokens(40), [layer.key_basis for layer in model.layers]

    def changed(**changes: Any) -> Tensor:
        layers = tuple(dataclasses.replace(layer, **changes) for layer in model.layers)
        return append(make(library, dataclasses.replace(model, layers=layers), kv=None), tokens)

    plain, turned, rounded = changed(key_basis=None), changed(), changed(query_bits=3)
    assert bases[0] is not None
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(turned, plain)
    error = (rounded - plain).norm() / plain.norm()
    assert 1e-4 < error <= 0.5


def test_every_layer_keeps_its_cache_in_its_own_way(library):
    model = random_decoder(3)
    forms = [KvFormat.parse(name) for name in ("int4k4", "f32")]
    layers = [dataclasses.replace(x, cache=f) for x, f in zip(model.layers, forms)]
    mixed = dataclasses.replace(model, layers=tuple(layers))
    tokens = draw_tokens(80)
    own, int4, exact = (
        append(make(library, mixed, kv=kv), tokens) for kv in (None, "int4k4", "f32")
    )
    assert torch.equal(exact, append(make(library, model), tokens))
    assert torch.equal(own[:4], exact[:4])  # so many first positions are exact
    assert not torch.equal(own[4:], exact[4:])
    assert not torch.equal(own[4:], int4[4:])
    # Half of the codes, and a thousand floats for first positions, in place of floats.
    engines = [make(library, mixed, kv=kv) for kv in (None, "int4k4", "f32")]
    assert engines[1].memory < engines[0].memory < engines[2].memory


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_bits": 1}, "2 to 8 bits"),
        ({"query_bits": 9}, "2 to 8 bits"),
        ({"cache": KvFormat(KvFormat.parse("int4").key, KvFormat.parse("int4").key, 65)}, "first"),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused(library, changes, reason):
    model = random_decoder(0)
    layers = (dataclasses.replace(model.layers[0], **changes), *model.layers[1:])
    with pytest.raises(QuantlibError, match=reason):
        make(library, dataclasses.replace(model, layers=layers), kv=None)
