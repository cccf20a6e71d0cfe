"""Models of which text reaches only a part: the rest is kept by request, and still works."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import quantlib
from quantlib.errors import DataError
from quantlib.pipeline.compress import compress
from quantlib.pipeline.opening import load_inputs
from quantlib.recipe import Recipe

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def llava(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A random LLaVA with a tokenizer."""
    text = {
        "model_type": "llama",
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config=text,
        image_token_index=3,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


TOWER = ("vision_tower", "projector")


def test_what_text_does_not_reach_has_to_be_kept_by_name(llava: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"no record for the stream answer .* vision_tower, proj"):
        load_inputs(llava, Recipe.create(data=text, seqlen=32, windows=4))
    found = load_inputs(llava, Recipe.create(data=text, seqlen=32, windows=4, keep=TOWER))
    assert {w.component for w in found.model_map.weights} == {
        "language_model",
        "embeddings",
        "head",
    }
    reasons = {row.component: row.reason for row in found.model_map.kept if "weight" in row.name}
    assert reasons["projector"] == "kept by request"
    assert found.workload is None


def test_the_language_model_of_a_larger_model_is_compressed_with_text(
    llava: Path, tmp_path: Path, text: str, small: dict[str, Any]
) -> None:
    call = {**small, "size": "45%", "keep": TOWER}
    result = compress(llava, out=tmp_path / "out", data=text, **call)
    assert all("language_model" in name or "lm_head" in name for name in result.plan.schemes)
    model = quantlib.load(result.path).model
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 25)[None]).logits
    assert torch.isfinite(logits).all()
