"""The native engine writes what transformers writes, for every family it knows."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import quantlib
from quantlib.checkpoint.tensorfile import atomic_save_tensors, read_tensors
from quantlib.errors import CheckpointError, DataError, QuantlibError, UsageError
from quantlib.kernels.cpu import library as cpu
from quantlib.runtime.engine import Engine, pieces
from quantlib.runtime.generate import Sampling, TransformersTexts, new_tokens
from quantlib.runtime.load import QuantizedModel

from .engine_models import MODELS, WINDOW, build, write

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")

VOCABULARY = 384
PROMPTS = [
    torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (21, 3, 40)
]
GREEDY = Sampling()


def same_logits(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums: a few dozen of them, each good to 1e-7 of its size,
    lie behind a logit, and 1e-6 of the largest logit is what they are found to differ by."""
    assert found.shape == expected.shape
    assert not (found - expected).abs().max() > 1e-5 * expected.abs().max()


def greedy(texts: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    rounds = list(new_tokens(texts, prompts, count, GREEDY))
    return [[chosen[text] for chosen in rounds] for text in range(len(prompts))]


def whole_logits(model: Any, ids: list[int]) -> Tensor:
    """Of a transformers model: float32 [tokens, vocabulary]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    """Weights of all kinds, in exact mode."""
    folder = write(build("llama"), tmp_path_factory.mktemp("engine") / "llama")
    return quantlib.load(folder, mode="exact")


@pytest.mark.parametrize("name", MODELS)
def test_exact_greedy_tokens_and_logits_are_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """64 tokens for each of three prompts, which are longer and shorter than sliding windows."""
    loaded = quantlib.load(write(build(name), tmp_path / "out"), mode="exact", engine="native")
    texts = greedy(loaded.make_engine(len(PROMPTS), 128), PROMPTS, 64)
    assert texts == greedy(TransformersTexts(loaded.model), PROMPTS, 64)
    assert all(len(set(text)) > 1 for text in texts), "repeating a token would prove little"
    whole = PROMPTS[2] + texts[0]
    engine = loaded.make_engine(capacity=len(whole))
    found = [engine.prefill(whole[: WINDOW + 1])]
    found += [engine.prefill([token]) for token in whole[WINDOW + 1 :]]
    same_logits(torch.stack(found), whole_logits(loaded.model, whole)[WINDOW:])


ROWS = {
    "embed_tokens.weight": "w8g16@1/8+w6g16@3/8+w6g32",
    "k_proj.weight": "w6g32",
    "up_proj.weight": "w8@1/8+fp6g32@1/4+w6g16z@1/2+w5g16z",
    "": "w8g16@1/4+w6g32z@1/3+w5g16z",
}
FLOATS = {
    "embed_tokens.weight": "fp7e2m4g16",
    "q_proj.weight": "fp5e3m1g16",
    "k_proj.weight": "fp6e4m1",
    "v_proj.weight": "fp7e4m2g32h8/4",
    "up_proj.weight": "fp8e2m5@1/2+fp7e3m3g32",
    "gate_proj.weight": "fp8e3m4g64s6",
    "down_proj.weight": "fp7e5m1",
    "": "fp5e2m2g32",
}


IN_ROWS = ("llama", "llama-biases", "qwen3", "phi3", "gemma2")


@pytest.mark.parametrize(
    ("name", "schemes"),
    [*((name, ROWS) for name in IN_ROWS), ("llama", FLOATS)],
    ids=[*IN_ROWS, "floats"],
)
def test_rows_in_blocks_and_all_floats_give_the_tokens_of_transformers(
    name: str, schemes: dict[str, str], tmp_path: Path
) -> None:
    """Embedding and head, fused inputs, biases, norms behind linears; several texts at once."""
    loaded = quantlib.load(write(build(name), tmp_path / "out", schemes), mode="exact")
    assert loaded.engine == "native"
    texts = greedy(loaded.make_engine(len(PROMPTS), 128), PROMPTS, 32)
    assert texts == greedy(TransformersTexts(loaded.model), PROMPTS, 32)
    assert all(len(set(text)) > 1 for text in texts), "repeating a token would prove little"
    whole = PROMPTS[2] + texts[2]
    expected = whole_logits(loaded.model, whole)
    exact = loaded.make_engine().score(whole)
    # Gemma 2's soft caps differ by 1.4e-5 where matrices are whole, too
    assert not (exact - expected).abs().max() > 3e-5 * expected.abs().max()
    for mode in ("int8", "int8g128"):
        found = Engine(loaded.decoder, mode=mode).score(whole)
        # 8 bits per token: half a step is 1/254 of a token's largest value, in each of two layers
        assert 0 < (found - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("scheme", ["bf16", "f16", "f32"])
def test_weights_that_are_kept_run_too(scheme: str, tmp_path: Path) -> None:
    """All of them, and those of one kind among packed ones: a fused input has both then."""
    for number, schemes in enumerate(({"": scheme}, {"k_proj.weight": scheme, "": "w4g32"})):
        folder = write(build("llama-biases"), tmp_path / str(number), schemes)
        loaded = quantlib.load(folder, mode="exact")
        found = loaded.make_engine().prefill(PROMPTS[0])
        wanted = whole_logits(loaded.model, PROMPTS[0])[-1]
        same_logits(found, wanted)
        assert found.argmax() == wanted.argmax()


def test_a_text_does_not_depend_on_its_neighbours_nor_on_how_it_came(llama: Any) -> None:
    """To the last bit: together, alone, in parts, after a text that was taken back."""
    together = llama.make_engine(3, 64)
    logits = together.extend(dict(enumerate(PROMPTS)))
    alone, parts = llama.make_engine(), llama.make_engine()
    for row, prompt in zip(logits, PROMPTS):
        alone.reset()
        assert torch.equal(alone.prefill(prompt), row)
        parts.prefill([*prompt[:-1], 7, 8, 9])
        parts.truncate(0, len(prompt) - 1)
        assert torch.equal(parts.decode(prompt[-1:])[0], row)
        parts.reset()
    assert together.lengths == [21, 3, 40]
    assert torch.equal(together.decode([5, 6], [2, 0])[1], _after(llama, PROMPTS[0] + [6]))


def _after(loaded: QuantizedModel, ids: list[int]) -> Tensor:
    return loaded.make_engine().prefill(ids)


def test_prompts_longer_than_a_step_are_cut(llama: Any) -> None:
    """Two prompts, 1400 tokens together, in steps of 512; the plain model takes each at once."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, VOCABULARY, (2, 700), generator=generator)
    found = llama.make_engine(2, 700).extend({0: prompts[0], 1: prompts[1]})
    for row, prompt in zip(found, prompts.tolist()):
        wanted = whole_logits(llama.model, prompt)[-1]
        same_logits(row, wanted)
        assert row.argmax() == wanted.argmax()


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), chunk=st.integers(1, 50))
def test_pieces_are_all_tokens_once_in_order(lengths: list[int], chunk: int) -> None:
    texts = dict(enumerate(lengths))
    steps = list(pieces(texts, chunk))
    sizes = [sum(part.stop - part.start for part in step) for step in steps]
    assert all(size == chunk for size in sizes[:-1])
    assert 0 < sizes[-1] <= chunk
    reached = dict.fromkeys(texts, 0)
    for step in steps:
        assert len({part.sequence for part in step}) == len(step)
        for part in step:
            assert part.start == reached[part.sequence] < part.stop
            reached[part.sequence] = part.stop
    assert reached == texts


def test_the_likeliest_token_is_that_of_the_logits(llama: Any) -> None:
    engine, other = llama.make_engine(2), llama.make_engine(2)
    prompts = {0: PROMPTS[0], 1: PROMPTS[1]}
    assert torch.equal(engine.extend_best(prompts), other.extend(prompts).argmax(dim=-1))
    best = engine.decode_best([4, 5])
    assert best.dtype == torch.int32
    assert torch.equal(best.to(torch.int64), other.decode([4, 5]).argmax(dim=-1))


def test_a_copied_text_goes_on_like_the_first(llama: Any) -> None:
    engine = llama.make_engine(2, 64)
    engine.prefill(PROMPTS[0])
    engine.copy(0, 1)
    logits = engine.decode([9, 9])
    assert torch.equal(logits[0], logits[1])
    assert engine.lengths == [22, 22]


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_threads_change_no_bit(llama: Any, mode: str) -> None:
    engines = (Engine(llama.decoder, mode=mode, threads=threads) for threads in (1, 2, 3))
    one, two, three = (
        torch.stack([engine.prefill(PROMPTS[2]), *engine.decode([9])]) for engine in engines
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_rounded_activations_change_the_logits_a_little(tmp_path: Path) -> None:
    """Finer groups less: the rows of this model's MLP are longer than two of them."""
    folder = write(build("llama", intermediate_size=320), tmp_path / "out", {"": "w8"})
    decoder = quantlib.load(folder).decoder
    exact, token, group = (
        Engine(decoder, mode=mode).score(PROMPTS[2]) for mode in ("exact", "int8", "int8g128")
    )
    # 8 bits per token: half a step is 1/254 of a token's largest value, in each of a dozen layers.
    assert 0 < (exact - group).norm() < (exact - token).norm() <= 0.1 * exact.norm()


def test_scores_are_the_logits_after_every_token(llama: Any) -> None:
    engine, other = llama.make_engine(capacity=800), llama.make_engine(capacity=800)
    ids = torch.randint(2, VOCABULARY, (700,), generator=torch.Generator().manual_seed(1))
    scores = engine.score(ids)
    assert engine.lengths == [700]
    same_logits(scores, whole_logits(llama.model, ids.tolist()))
    other.prefill(ids[:600])
    assert torch.equal(other.decode(ids[600:601])[0], scores[600])


def test_modes_are_the_schemes_own_or_the_callers(tmp_path: Path) -> None:
    folder = write(build("llama"), tmp_path / "out", {"up_proj.weight": "w8a8", "": "w8"})
    own = quantlib.load(folder)
    found = {
        mode: Engine(own.decoder, mode=mode).prefill(PROMPTS[0]) for mode in (None, "exact", "int8")
    }
    assert not torch.equal(found[None], found["exact"])
    assert not torch.equal(found[None], found["int8"])
    assert torch.equal(
        quantlib.load(folder, "int8").make_engine().prefill(PROMPTS[0]), found["int8"]
    )
    own.set_mode("exact")
    assert torch.equal(own.make_engine().prefill(PROMPTS[0]), found["exact"])


def test_packed_keys_and_values_cost_little_accuracy_and_less_memory(llama: Any) -> None:
    exact = llama.make_engine().prefill(PROMPTS[2])

    def error(kv: str) -> float:
        found = Engine(llama.decoder, mode="exact", kv=kv).prefill(PROMPTS[2])
        return float((found - exact).norm() / exact.norm())

    # A step of 1/255, of 1/15 of a head's range in the keys and values of every layer.
    assert 0 < error("int8") <= 0.02
    assert error("int8") < error("int8/int4") < error("int4") <= 0.3
    full, packed = (Engine(llama.decoder, capacity=8192, kv=kv) for kv in ("f32", "int4"))
    assert packed.memory < full.memory / 3


BAD = [
    ({"kv": "int3"}, UsageError, "'int3' is not a format of a KV cache"),
    ({"mode": "quick"}, UsageError, "'quick' is not a mode"),
    ({"capacity": 0}, UsageError, "holds nothing"),
    ({"isa": "sse9"}, UsageError, "sse9"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_what_cannot_be_made_is_a_sentence(
    llama: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Engine(llama.decoder, **options)


def test_a_step_that_fails_changes_no_text(llama: Any) -> None:
    engine = llama.make_engine(2, 600)
    engine.prefill(PROMPTS[1])
    with pytest.raises(DataError, match=r"outside 0\.\.383"):
        engine.extend({1: [5] * 599, 0: [VOCABULARY]})
    assert engine.lengths == [3, 0]
    with pytest.raises(UsageError, match="longer than the 600 tokens"):
        engine.extend({0: [5] * 598})
    assert engine.lengths == [3, 0]
    with pytest.raises(UsageError, match=r"sequences 0\.\.1"):
        engine.decode([5], [2])
    for bad in (2**32 + 5, -(2**40), torch.tensor([2**32 + 5])):
        with pytest.raises(DataError, match=r"outside 0\.\.383"):
            engine.prefill(bad if isinstance(bad, Tensor) else [bad])
    for nothing in ({}, {0: []}, {0: [], 1: [5]}):
        with pytest.raises(UsageError, match="needs"):
            engine.extend(nothing)
    assert engine.lengths == [3, 0]
    with pytest.raises(UsageError, match="2 tokens for 1 texts"):
        engine.decode([5, 6], [0])
    assert torch.equal(engine.decode([5])[0], _after(llama, [*PROMPTS[1], 5]))


def test_a_refusal_of_the_library_is_reported(llama: Any) -> None:
    wrong = dataclasses.replace(llama.decoder, kv_heads=3)
    with pytest.raises(QuantlibError, match=r"refuses this model \(.*engine='plain'"):
        Engine(wrong)


def test_other_families_are_written_by_transformers(
    write_packed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_packed("qwen3-moe").folder
    with caplog.at_level(logging.INFO, "quantlib.runtime.load"):
        loaded = quantlib.load(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} runs through transformers: {loaded.plain_reason}"
    ]
    assert loaded.engine == "plain"
    assert "qwen3_moe is not one of its families" in loaded.plain_reason
    for options in ({"engine": "native"}, {"kv": "int8"}):
        with pytest.raises(UsageError, match="qwen3_moe is not one of its families"):
            quantlib.load(folder, **options)
    with pytest.raises(UsageError, match="does not run this model: qwen3_moe"):
        loaded.make_engine()


def test_without_kernels_text_is_written_by_transformers(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "load", lambda: None)
    loaded = quantlib.load(llama.checkpoint.path)
    assert loaded.plain_reason == "there are no compiled kernels on this machine"
    with pytest.raises(UsageError, match="no compiled kernels"):
        Engine(llama.decoder)


def changed(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a checkpoint; `__` in a name stands for a dot, None removes one."""
    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / FILE).items()}
    for name, tensor in changes.items():
        tensors[name.replace("__", ".")] = tensor
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    atomic_save_tensors(folder / FILE, left, {"format": "pt"})


FILE = "model.safetensors"


def test_a_missing_or_misshapen_parameter_is_a_sentence(tmp_path: Path) -> None:
    folder = write(build("qwen2"), tmp_path / "out", {"": "w4"})
    changed(folder, model__norm__weight=torch.ones(48))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[48\] .* \[64\] by its"):
        quantlib.load(folder)
    changed(folder, model__norm__weight=torch.ones(64))
    changed(folder, **{"model__layers__1__self_attn__k_proj__bias": None})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.self_attn\.k_proj\.bias"):
        quantlib.load(folder)


def test_damaged_blocks_of_rows_are_a_sentence(tmp_path: Path) -> None:
    folder = write(build("llama"), tmp_path / "out", {"down_proj.weight": "w6@1/4+w4", "": "w4"})
    stored = read_tensors(folder / FILE)["model.layers.0.mlp.down_proj.weight_block"]
    changed(folder, model__layers__0__mlp__down_proj__weight_block=torch.zeros_like(stored))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight in .* rows, expected .* again"):
        quantlib.load(folder, engine="native")


def test_weights_of_other_names_go_the_plain_way(tmp_path: Path) -> None:
    """As in checkpoints of a model without its head: transformers has rules for those."""
    folder = write(build("llama"), tmp_path / "out", {"": "w4"})
    tensors = read_tensors(folder / FILE)
    renamed = {name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items()}
    atomic_save_tensors(folder / FILE, renamed, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for table in ("schemes", "shapes"):
        entries = config["quantization_config"][table]
        config["quantization_config"][table] = {
            name.removeprefix("model."): entry for name, entry in entries.items()
        }
    (folder / "config.json").write_text(json.dumps(config))
    loaded = quantlib.load(folder)
    assert loaded.plain_reason == "its weights go by names it does not know"
    assert len(greedy(TransformersTexts(loaded.model), PROMPTS[:1], 2)[0]) == 2
