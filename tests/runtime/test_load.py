"""`quantlib.load`: a folder in, text out, and a sentence when the folder is not right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import quantlib
from quantlib.checkpoint.tensorfile import atomic_save_tensors, read_tensors
from quantlib.errors import CheckpointError, UsageError
from quantlib.runtime.load import QuantizedModel
from quantlib.runtime.modules import QuantizedLinear, TiedHead, set_mode

PROMPT = "The lighthouse keeper counted"


@pytest.fixture
def folder(write_packed: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A packed tiny Llama with a tokenizer."""
    path: Path = write_packed("llama").folder
    tiny_tokenizer.save_pretrained(path)
    return path


def test_text_in_text_out(folder: Path, tiny_tokenizer: Any) -> None:
    model = quantlib.load(folder, mode="exact")
    text = model.generate(PROMPT, max_new_tokens=8, chat=False)
    ids = tiny_tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = AutoModelForCausalLM.from_pretrained(folder).generate(**ids, **options)
    expected = tiny_tokenizer.decode(
        plain[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert text == expected
    assert text == "".join(model.stream(PROMPT, 8, chat=False))


def test_the_two_engines_write_the_same(folder: Path) -> None:
    native, plain = (quantlib.load(folder, "exact", engine=e) for e in ("native", "plain"))
    assert (native.engine, plain.engine) == ("native", "plain")
    prompts = [PROMPT, "Bread", "Rivers carry stones to the sea"]
    texts = native.generate(prompts, 24, chat=False)
    assert texts == plain.generate(prompts, 24, chat=False)
    assert texts == [native.generate(prompt, 24, chat=False) for prompt in prompts]
    assert plain.generate([], 4) == []


def test_streams_do_not_disturb_each_other(folder: Path) -> None:
    """Each has keys and values of its own; weights they share."""
    model = quantlib.load(folder)
    streams = [model.stream(prompt, 8, chat=False) for prompt in (PROMPT, "Bread")]
    for _ in zip(*streams):
        pass
    finished = [stream.finish() for stream in streams]
    assert finished == model.generate([PROMPT, "Bread"], 8, chat=False)


def test_the_transformers_model_is_built_when_it_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantlib.load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert model.generate(PROMPT, 2)
    assert model.model is model.model
    assert isinstance(model.model.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_text_comes_from_where_the_model_was_moved(folder: Path) -> None:
    model = quantlib.load(folder)
    assert model.engine == "native"
    assert model.model is not None
    assert model.engine == "native"
    model.model.to("meta")  # a device that every machine has
    assert model.engine == "plain"


@pytest.mark.parametrize("engine", ["native", "plain"])
def test_a_text_ends_where_the_model_or_its_tokenizer_says(folder: Path, engine: str) -> None:
    model = quantlib.load(folder, engine=engine)
    free = model.stream(PROMPT, 12, chat=False)
    free.finish()
    stop = next(token for token in free.tokens[2:] if token not in free.tokens[:2])
    expected = free.tokens[: free.tokens.index(stop) + 1]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(stop)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop]}))
    for told in (model, quantlib.load(folder, engine=engine)):
        stream = told.stream(PROMPT, 12, chat=False)
        stream.finish()
        assert stream.tokens == expected


def test_a_chat_template_is_used_when_there_is_one(folder: Path, tiny_tokenizer: Any) -> None:
    model = quantlib.load(folder)
    templated = tiny_tokenizer.decode(model.encode(PROMPT)[0])
    assert templated == f"<s>user: {PROMPT}\nassistant: "
    assert tiny_tokenizer.decode(model.encode(PROMPT, chat=False)[0]) == PROMPT
    assert model.generate(PROMPT, 4) == model.generate(PROMPT, 4, chat=True)
    model.tokenizer.chat_template = None
    assert tiny_tokenizer.decode(model.encode(PROMPT)[0]) == PROMPT
    with pytest.raises(UsageError, match="no chat template: use chat=False"):
        model.encode(PROMPT, chat=True)


def test_sampling_is_repeatable(folder: Path) -> None:
    model = quantlib.load(folder)
    texts = [model.generate(PROMPT, 8, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_checkpoint_without_tokenizer_still_has_a_model(write_packed: Any, ids: Any) -> None:
    model = quantlib.load(write_packed("llama").folder)
    assert model.tokenizer is None
    assert model.model(ids).logits.shape == (2, 12, 384)
    with pytest.raises(UsageError, match="has no tokenizer"):
        model.generate(PROMPT)


def modes(model: QuantizedModel) -> set[str]:
    """Those of everything that multiplies: an embedding's own mode means nothing."""
    computing = (QuantizedLinear, TiedHead)
    return {module.mode for module in model.model.modules() if isinstance(module, computing)}


def test_modes_are_the_schemes_own_or_the_callers(write_packed: Callable[..., Any]) -> None:
    folder = write_packed("llama", {"": "w8a8", "model.embed_tokens.weight": "w4g32"}).folder
    own = quantlib.load(folder)
    up_proj, x = own.model.model.layers[0].mlp.up_proj, torch.randn(3, 48)
    assert modes(own) == {"scheme"}
    found = up_proj(x)
    for mode in ("exact", "int8", "int8g128"):
        loaded = quantlib.load(folder, mode=mode)
        assert modes(loaded) == {mode}
        same = torch.equal(loaded.model.model.layers[0].mlp.up_proj(x), found)
        assert same == (mode == "int8")
        loaded.set_mode("scheme")
        assert modes(loaded) == {"scheme"}
        assert torch.equal(loaded.model.model.layers[0].mlp.up_proj(x), found)
    with pytest.raises(UsageError, match="'quick' is not a mode"):
        quantlib.load(folder, mode="quick")


def test_the_native_engine_is_fast_unless_another_mode_is_asked_for(folder: Path) -> None:
    """And the transformers model is as its schemes say unless: it is what evaluations take."""
    default, named, plain = (
        quantlib.load(folder),
        quantlib.load(folder, "int8g128"),
        quantlib.load(folder, engine="plain"),
    )
    assert (default.mode, named.mode, plain.mode) == ("int8g128", "int8g128", "scheme")
    assert modes(default) == modes(plain) == {"scheme"}
    assert modes(named) == {"int8g128"}
    prompt = [5, 9, 300]
    logits = {mode: logits_in(default, mode, prompt) for mode in ("int8g128", "int8", "scheme")}
    assert torch.equal(logits["int8g128"], named.make_engine().prefill(prompt))
    assert not torch.equal(logits["int8g128"], logits["int8"])
    assert torch.equal(logits["scheme"], logits_in(named, "exact", prompt))
    assert modes(named) == {"exact"}


@pytest.mark.parametrize("mode", ["exact", "int8", "int8g128"])
def test_both_engines_round_activations_alike(
    write_packed: Callable[..., Any], mode: str, ids: Any
) -> None:
    model = quantlib.load(write_packed("llama-wide", {"": "w8"}).folder, mode)
    assert model.engine == "native"
    with torch.no_grad():
        expected = model.model(ids[:1]).logits[0, -1]
        set_mode(model.model, {"int8": "int8g128", "int8g128": "int8"}.get(mode, mode))
        other = model.model(ids[:1]).logits[0, -1]
    found = model.make_engine().prefill(ids[0])
    # Sums of float32 in another order move a code by one step at times; rounding in another way
    # moves a third of them.
    error, difference = ((x - expected).norm() / expected.norm() for x in (found, other))
    assert error <= 5e-4
    assert mode == "exact" or difference >= 4 * error


def logits_in(model: QuantizedModel, mode: str, ids: list[int]) -> torch.Tensor:
    """Of the native engine, after all tokens."""
    model.set_mode(mode)
    return model.make_engine().prefill(ids)


def test_int8_activations_change_the_logits_a_little(folder: Path, ids: Any) -> None:
    with torch.no_grad():
        exact, int8 = (quantlib.load(folder, mode).model(ids).logits for mode in ("exact", "int8"))
    error = (exact - int8).norm() / exact.norm()
    # 8 bits per token: half a step is 1/254 of a token's largest value, in each of a dozen layers.
    assert 0 < error <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bfloat16"])
def test_the_dtype_is_the_callers(folder: Path, dtype: Any, ids: Any) -> None:
    model = quantlib.load(folder, dtype=dtype).model
    expected = torch.float32 if dtype == torch.float32 else torch.bfloat16
    assert model.dtype == model(ids).logits.dtype == expected


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor in memory (not on `meta`) that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("engine", ["native", "plain"])
def test_loading_makes_no_dense_weight(
    engine: str, write_packed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a moment: the smallest dense matrix is larger than anything allocated."""
    folder = write_packed("llama", {"": "w2"}).folder
    smallest = min(48 * 32, 80 * 48, 384 * 48) * 4
    packed = max(tensor.nbytes for tensor in read_tensors(folder / "model.safetensors").values())
    assert packed < smallest
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the mode sees its own thread only
    with LargestAllocation() as largest:
        quantlib.load(folder, engine=engine)
    assert 0 < largest.nbytes < smallest


def test_packed_bytes_are_those_of_the_file(folder: Path) -> None:
    model = quantlib.load(folder)
    stored = read_tensors(folder / "model.safetensors")
    norms = sum(tensor.nbytes for name, tensor in stored.items() if "norm" in name)
    assert model.packed_bytes() + norms == sum(tensor.nbytes for tensor in stored.values())


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        quantlib.load(tmp_path / "nowhere")


def test_an_unquantized_model_is_a_sentence(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match="is not quantized: give a folder that quantlib wrote"
    ):
        quantlib.load(tiny_llama(tmp_path / "dense"))


def test_a_missing_kept_parameter_is_a_sentence(folder: Path) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    left = {name: tensor.clone() for name, tensor in tensors.items() if name != "model.norm.weight"}
    atomic_save_tensors(folder / "model.safetensors", left, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        quantlib.load(folder)


def test_an_unknown_architecture_is_a_sentence(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "quux", "architectures": ["QuuxForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        quantlib.load(folder)


def test_a_damaged_tokenizer_is_a_sentence(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        quantlib.load(folder)
