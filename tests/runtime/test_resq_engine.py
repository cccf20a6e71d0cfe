"""Models compressed with --scheme resq: what the native engine computes in integers from the packed
checkpoint is what the dense model computes with rounded numbers.

The dense model (`pipeline.dense`) is the one that plans are measured on: rotated weights taken from
the layer bank, inputs, keys and values rounded in float32. Both sum in float32 in another order,
so their numbers agree to float32's rounding, except where a number lies so near the middle between
two codes that rounding falls to the other side: then one code of some ten thousand differs by a
step, and its token, and those that attend to it, by up to a percent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.kernels.cpu import library as cpu
from quantlib.pipeline.compress import compress, reopen_run
from quantlib.pipeline.dense import DenseTrial
from quantlib.runtime.generate import Sampling, new_tokens
from quantlib.runtime.load import QuantizedModel

pytestmark = pytest.mark.skipif(cpu.load() is None, reason="no compiled kernels")

REQUEST: dict[str, Any] = {
    "seqlen": 64,
    "windows": 4,
    "probe_windows": 2,
    "probes": 0,
    "passes": 1,
    "report": False,
    "refine": False,
    "schemes": ["w4g32zs4a4zh8/8", "w8g32zs8"],
    "bits": 14.0,
}
"""Every linear rounds its inputs to 4 bits, but for an eighth at 8; the embedding stays at 8. The
budget is above both: most of a model this small is embedding and bases."""
NEW, PROMPTS = 64, 32
SAME = 1e-5
"""Relative, of a token's logits: float32's rounding after some hundred sums. Measured 4e-7."""
A_FEW_CODES = 0.02
"""Relative. Measured up to 0.012 where a code differs; an order left out changes logits by 1."""
SURE = 0.01
"""Distance of the two likeliest logits, in standard deviations, at every token of an answer: about
what a code changes at worst, and thousands of times float32's rounding."""
# rotation, KV cache, whether the head is the embedding
CASES = (
    ("pca", "int4", True),
    ("pca", "int4h16", False),
    ("gradients", "int4h16/int4", True),
    ("gradients", "int4h16rk4", False),
    ("weights", "int8/int4k2", True),
)


@dataclass
class Pair:
    """A packed checkpoint on the native engine, and the dense model it was measured as."""

    packed: QuantizedModel
    dense: Any

    def dense_logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.dense(ids[None]).logits[0]
        return logits

    def packed_logits(self, ids: Tensor) -> Tensor:
        return self.packed.make_engine(1, 128).score(ids)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_llama: Callable[..., Path],
    sample_text: str,
) -> Pair:
    rotation, kv, tied = request.param
    text = tmp_path / "text.txt"
    text.write_text(sample_text)
    model = tiny_llama(tmp_path / "model", head_dim=32, tie_word_embeddings=tied)
    asked = {"data": str(text), "rotation": rotation, "kv": kv}
    result = compress(model, out=tmp_path / "out", **REQUEST | asked)
    packed = quantlib.load(result.path, mode="scheme", engine="native")
    assert (packed.engine, packed.mode, packed.kv) == ("native", "scheme", kv)
    with reopen_run(result.work, with_data=True) as run:
        trial = DenseTrial(run)
        trial.load(result.plan.schemes)
    around = packed.checkpoint.around
    assert len(around.orders) == 2, "the output projections read their inputs in an order"
    stored = packed.checkpoint.rotation()
    assert stored is not None
    assert (stored.residual is not None) == tied
    assert set(stored.hidden_high.values()) == (set() if rotation == "pca" else {20})
    return Pair(packed, trial.model)


def test_the_native_engine_computes_what_was_measured(pair: Pair) -> None:
    """Tokens and logits, of answers and of many short texts."""
    prompt = surest_prompt(pair.dense)
    answer = greedy(pair.dense, prompt[None])[0]
    rounds = new_tokens(pair.packed.make_engine(1, 128), [prompt.tolist()], NEW, Sampling())
    assert [step[0] for step in rounds] == answer.tolist()
    errors = []
    for text in draw_texts(16, 8, seed=1):
        found, expected = pair.packed_logits(text), pair.dense_logits(text)
        errors.append(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    worst = torch.stack(errors)
    assert bool((worst <= A_FEW_CODES).all())
    # Of texts as short as these, few have a code on the other side.
    assert int((worst <= SAME).sum()) >= 10


def draw_texts(count: int, length: int, seed: int) -> Tensor:
    return torch.randint(2, 384, (count, length), generator=torch.Generator().manual_seed(seed))


def greedy(dense: Any, prompts: Tensor) -> Tensor:
    """The likeliest NEW tokens after each prompt, int64 [prompts, NEW]."""
    return torch.stack([step.argmax(-1) for step in _steps(dense, prompts)], 1)


def surest_prompt(dense: Any) -> Tensor:
    """The prompt whose answer the dense model hesitates least over: where it is nearly undecided,
    a single code would decide."""
    prompts = draw_texts(PROMPTS, 12, seed=0)
    distances = []
    for logits in _steps(dense, prompts):
        best = logits.topk(2).values
        distances.append((best[:, 0] - best[:, 1]) / logits.std(-1))
    least = torch.stack(distances).amin(0)
    assert float(least.max()) >= SURE
    return prompts[int(least.argmax())]


@torch.no_grad()
def _steps(dense: Any, prompts: Tensor) -> list[Tensor]:
    """The logits [prompts, V] that each of the NEW tokens is chosen from."""
    given, cache, steps = prompts, None, []
    for _ in range(NEW):
        output = dense(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        steps.append(output.logits[:, -1])
        given = steps[-1].argmax(-1, keepdim=True)
    return steps
