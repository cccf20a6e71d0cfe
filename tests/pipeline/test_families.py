"""From a model of a real class to a packed checkpoint that says the same as what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import quantlib
from quantlib.errors import DataError
from quantlib.pipeline.compress import Result, compress
from quantlib.pipeline.dense import DenseTrial
from quantlib.pipeline.opening import reopen_run
from quantlib.pipeline.reround import reround
from quantlib.recipe import NATIVE_SCHEMES

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 16}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 16}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
}
TOLERANCE = 1e-4
"""Of logits around 1: the same numbers added in another order, in float32."""


def save(folder: Path, tokenizer: Any, model_type: str, **settings: Any) -> Path:
    """A random model, its biases and norms random too, with the tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    shape = {**BASE, "vocab_size": len(tokenizer), "pad_token_id": 1, **special, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**shape))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def squeezed(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_tokenizer: Any,
    text: str,
    small: dict[str, Any],
) -> Result:
    """A compressed model of the family that is asked for."""
    model_type, settings = FAMILIES[request.param]
    model = save(tmp_path / "model", tiny_tokenizer, model_type, **settings)
    call = {**small, "schemes": NATIVE_SCHEMES[::3], "size": "24%"}
    return compress(model, out=tmp_path / "out", data=text, **call)


@pytest.mark.parametrize("squeezed", FAMILIES, indirect=True)
def test_the_checkpoint_is_what_was_measured(squeezed: Result, tiny_tokenizer: Any) -> None:
    assert squeezed.refinement is not None
    check(squeezed, tiny_tokenizer)


def check(result: Result, tokenizer: Any) -> None:
    """Logits of the dense model with the bank's weights, generation, and every parameter there."""
    ids = torch.randint(2, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(3))
    with reopen_run(result.work, with_data=True) as run:
        schemes = result.plan.schemes
        refined = result.refinement is not None and result.refinement.kept
        trial = DenseTrial(run)
        trial.load(schemes, reround(run, schemes) if refined else {})
        with torch.no_grad():
            expected = trial.model(ids).logits
        covered = {row.name for row in run.model_map.coverage()}
    assert expected.std() > 0.05, "a model that says nothing would pass"
    prompt = tokenizer("The lighthouse", return_tensors="pt")
    loaded = quantlib.load(result.path).model, AutoModelForCausalLM.from_pretrained(result.path)
    for model in loaded:
        with torch.no_grad():
            found = model(ids).logits.float()
        assert (found - expected).abs().max() <= TOLERANCE
        tokens = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert tokens.shape[1] == prompt["input_ids"].shape[1] + 4
    assert whole(result.path) == covered


def whole(checkpoint: Path) -> set[str]:
    """Parameters that a checkpoint holds, packed or as they are; packed ones have all parts."""
    config = json.loads((checkpoint / "config.json").read_text())
    packed = config["quantization_config"]["schemes"]
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = set(file.keys())
    for name in packed:
        parts = {part for part in names if part.startswith(name + "_")}
        assert {name + "_packed", name + "_scale"} <= parts
        names -= parts
    return names | set(packed)


@pytest.mark.parametrize("scheme", NATIVE_SCHEMES[:6])
def test_stacks_of_experts_in_every_low_scheme(
    tmp_path: Path, tiny_tokenizer: Any, text: str, small: dict[str, Any], scheme: str
) -> None:
    """Zero points are packed along the rows of all experts: one expert's may begin inside a word,
    and they may have more bits than the weights."""
    model = save(tmp_path / "model", tiny_tokenizer, "qwen3_moe", **EXPERTS)
    call = {**small, "schemes": [scheme], "size": "50%", "probes": 0, "refine": False}
    check(compress(model, out=tmp_path / "out", data=text, **call), tiny_tokenizer)


@pytest.mark.parametrize("squeezed", ["qwen2"], indirect=True)
def test_what_belongs_to_the_model_comes_along(squeezed: Result) -> None:
    tokenizer = AutoTokenizer.from_pretrained(squeezed.path)
    chat = [{"role": "user", "content": "Who decides?"}]
    assert "user: Who decides?" in tokenizer.apply_chat_template(chat, tokenize=False)
    assert (squeezed.path / "generation_config.json").exists()
    plan = json.loads((squeezed.path / "quantlib_plan.json").read_text())
    weights = plan["weights"]
    assert {name: row["scheme"] for name, row in weights.items()} == squeezed.plan.schemes


def test_every_kind_of_scheme_can_be_a_candidate(squeeze: Callable[..., Result]) -> None:
    """Pinned to one weight each: floats, microscaling, per tensor, per channel, zero points."""
    kinds = {
        "q_proj": "fp8",
        "k_proj": "mxfp4",
        "v_proj": "nvfp4",
        "o_proj": "w8t",
        "gate_proj": "w4g16z",
        "up_proj": "w6",
        "down_proj": "fp6g64",
    }
    result = squeeze(
        schemes=["w4g32zs4", *kinds.values()],
        pins=tuple(f"{module}={scheme}" for module, scheme in kinds.items()),
        size="40%",
        probes=0,
    )
    for name, scheme in result.plan.schemes.items():
        module = name.split(".")[-2]
        assert module not in kinds or scheme == kinds[module]
    logits = quantlib.load(result.path).model(torch.arange(2, 30)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_an_expert_that_saw_nothing_is_an_error(
    tmp_path: Path, tiny_tokenizer: Any, text: str, small: dict[str, Any]
) -> None:
    settings = {**EXPERTS, "num_experts": 64, "num_experts_per_tok": 1}
    model = save(tmp_path / "model", tiny_tokenizer, "qwen3_moe", **settings)
    call = {**small, "windows": 1, "seqlen": 16, "size": "30%"}
    with pytest.raises(DataError, match=r"experts.*of 64 matrices saw no calibration token.*use"):
        compress(model, out=tmp_path / "out", data=text, **call)
    assert not (tmp_path / "out").exists()
