"""Perplexity and KL against a direct float64 computation, and what the references promise."""

import math

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from quantlib.errors import DataError, ModelError
from quantlib.evaluation import language, reference
from quantlib.evaluation.estimate import Estimate
from quantlib.evaluation.language import LanguageResult, evaluate_language
from quantlib.evaluation.reference import HiddenReference, LogitReference, reference_logprobs

VOCABULARY, WINDOWS, SEQLEN = 200, 6, 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that predictions are far from uniform
}


def build(model_class, config, seed):
    """A model with random weights, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return model_class(config).eval()


def llama(seed=0, **changes):
    options = {**SIZES, "tie_word_embeddings": True, **changes}
    return build(LlamaForCausalLM, LlamaConfig(**options), seed)


def noisy(model, scale, seed=1):
    """A copy, every weight disturbed by `scale` of its own spread: stands in for quantization."""
    generator = torch.Generator().manual_seed(seed)
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += scale * parameter.std() * noise
    return copy


@pytest.fixture(scope="module")
def windows():
    return torch.randint(VOCABULARY, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def damaged(model):
    return noisy(model, 0.1)


def direct(model, other, windows, first):
    """Per-window nll, kl and same-top of `other` against `model`, in float64 from full logits."""
    rows = {"nll": [], "reference_nll": [], "kl": [], "same_top": []}
    for window in windows:
        with torch.no_grad():
            logits = [m(window[None]).logits[0, first:-1].double() for m in (model, other)]
        p, q = (torch.log_softmax(x, -1) for x in logits)
        labels = window[first + 1 :, None]
        rows["nll"].append(-q.gather(1, labels).mean().item())
        rows["reference_nll"].append(-p.gather(1, labels).mean().item())
        rows["kl"].append((p.exp() * (p - q)).sum(-1).mean().item())
        rows["same_top"].append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    return rows


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_half", [True, False])
def test_every_metric_equals_the_direct_float64_computation(model, damaged, windows, second_half):
    result = evaluate_language(damaged, windows, model, second_half=second_half)
    expected = direct(model, damaged, windows, SEQLEN // 2 if second_half else 0)
    assert result.per_window.keys() == expected.keys()
    for name, values in expected.items():
        # One float32 log-softmax of logits up to 20 rounds by 2e-6; means over tokens average it.
        torch.testing.assert_close(result.per_window[name], values, rtol=2e-6, atol=2e-6)
    assert result.kl.value > 0.01
    assert result.tokens_per_window == (SEQLEN - 1 - SEQLEN // 2 if second_half else SEQLEN - 1)
    assert result.perplexity.value == pytest.approx(math.exp(result.nll.value), rel=1e-12)


def test_chunks_do_not_change_the_numbers(model, damaged, windows, monkeypatch):
    whole = evaluate_language(damaged, windows, model)
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    pieces = evaluate_language(damaged, windows, model)
    for name, values in whole.per_window.items():
        torch.testing.assert_close(pieces.per_window[name], values, rtol=1e-6, atol=1e-7)


def test_kl_to_itself_is_zero_and_to_anything_else_is_not(model, windows):
    itself = evaluate_language(model, windows, model)
    assert itself.kl.value == 0.0, "the same logits twice: not even rounding differs"
    assert itself.same_top.value == 1.0
    assert itself.perplexity_ratio.value == 1.0
    kept = evaluate_language(model, windows, reference_logprobs(model, windows))
    assert abs(kept.kl.value) <= 1e-6, "recomputed logits differ by float32 rounding only"
    values = [evaluate_language(noisy(model, s), windows, model).kl.value for s in (0.01, 0.1, 0.4)]
    assert 1e-6 < values[0] < values[1] < values[2]


def test_without_a_reference_only_perplexity_is_reported(model, windows):
    result = evaluate_language(model, windows)
    assert result.kl is None
    assert result.perplexity_ratio is None
    assert set(result.per_window) == {"nll"}
    assert "kl" not in result.to_json()


def test_forbidden_words_do_not_make_kl_nan(model, windows):
    class Masked(torch.nn.Module):
        """Gives -inf to the second half of the vocabulary, as padded vocabularies do."""

        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, ids, use_cache=False):
            output = self.inner(ids)
            output.logits[..., VOCABULARY // 2 :] = -math.inf
            return output

    result = evaluate_language(Masked(), windows % (VOCABULARY // 2), Masked())
    assert result.kl.value == 0.0
    assert math.isfinite(result.nll.value)


# -- standard errors -----------------------------------------------------------------------------


def test_standard_errors_agree_with_the_bootstrap():
    generator = torch.Generator().manual_seed(0)
    per_window = {
        "nll": (2.6 + 0.3 * torch.randn(40, generator=generator)).tolist(),
        "kl": (0.08 * torch.rand(40, generator=generator)).tolist(),
        "same_top": (0.8 + 0.1 * torch.rand(40, generator=generator)).tolist(),
    }
    per_window["reference_nll"] = [
        value - kl for value, kl in zip(per_window["nll"], per_window["kl"], strict=True)
    ]
    result = LanguageResult.from_windows(per_window, 100, "")
    draws = [
        LanguageResult.from_windows(
            {name: [values[i] for i in chosen] for name, values in per_window.items()}, 100, ""
        )
        for chosen in torch.randint(40, (2000, 40), generator=generator).tolist()
    ]
    for name in ("nll", "perplexity", "perplexity_ratio", "kl", "same_top"):
        spread = torch.tensor([getattr(draw, name).value for draw in draws]).std().item()
        # The bootstrap knows n, not n-1 (1.3 % at 40), and 2000 draws know a spread to 1.6 %.
        assert getattr(result, name).standard_error == pytest.approx(spread, rel=0.07)


def test_paired_errors_are_smaller_than_unpaired(model, windows):
    result = evaluate_language(noisy(model, 0.03), windows, model)
    relative = result.perplexity.standard_error / result.perplexity.value
    assert result.perplexity_ratio.standard_error < relative / 3


def test_one_window_has_no_standard_error(model, windows):
    result = evaluate_language(model, windows[:1])
    assert result.nll.standard_error is None
    assert result.nll.interval() is None
    assert "±" not in str(result.perplexity)


def test_a_confidence_interval_uses_students_t():
    low, high = Estimate(1.0, 0.1, 12).interval()
    assert high - 1.0 == pytest.approx(0.1 * 2.200985, rel=1e-6)  # t(0.975, 11), from tables
    assert 1.0 - low == pytest.approx(high - 1.0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn((2000, 8), generator=generator, dtype=torch.float64) + 5
    hits = 0
    for row in samples.tolist():
        low, high = Estimate.mean(row).interval()
        hits += low <= 5 <= high
    assert abs(hits / 2000 - 0.95) <= 0.015  # three binomial standard errors


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.08491, 0.00312, 12), "0.0849 ± 0.0031"),
        (Estimate(13.461, 0.9, 12), "13.46 ± 0.90"),
        (Estimate(1234.5, 120.0, 12), "1234 ± 120"),
        (Estimate(0.5, None, 1), "0.5"),
        (Estimate(0.0, 0.0, 3), "0"),
    ],
)
def test_estimates_show_as_many_digits_as_they_know(estimate, text):
    assert str(estimate) == text


def test_results_survive_json(model, damaged, windows):
    result = evaluate_language(damaged, windows, model)
    assert LanguageResult.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    "damage", [{"per_window": {}}, {"per_window": 3}, {"windows_sha256": None}]
)
def test_a_damaged_result_is_a_sentence(model, windows, damage):
    data = {**evaluate_language(model, windows[:2]).to_json(), **damage}
    if data["windows_sha256"] is None:
        del data["windows_sha256"]
    with pytest.raises(DataError, match="evaluate again"):
        LanguageResult.from_json(data)


# -- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_give_the_same_answer_as_the_model_beside(windows, tied):
    model = llama(seed=2, tie_word_embeddings=tied)
    other = noisy(model, 0.1)
    kept = reference_logprobs(model, windows)
    assert isinstance(kept, HiddenReference)
    assert kept.hidden.shape == (WINDOWS, SEQLEN - 1 - SEQLEN // 2, 32)
    beside = evaluate_language(other, windows, model)
    result = evaluate_language(other, windows, kept)
    for name, values in beside.per_window.items():
        torch.testing.assert_close(result.per_window[name], values, rtol=1e-6, atol=1e-6)


def test_a_reference_does_not_move_when_its_model_is_changed_in_place(windows):
    model = llama(seed=3)
    kept = reference_logprobs(model, windows)
    before = kept.logits(0, 0, 4).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(kept.logits(0, 0, 4), before)


def gemma2():
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, sliding_window=64)
    return build(Gemma2ForCausalLM, config, 4)


def granite():
    return build(GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=3.0), 4)


@pytest.mark.parametrize(
    ("build_model", "name"),
    [(gemma2, "final_logit_softcapping"), (granite, "logits_scaling")],
)
def test_what_a_model_does_after_its_head_is_replayed(build_model, name, windows):
    model = build_model()
    kept = reference_logprobs(model, windows)
    assert isinstance(kept, HiddenReference)
    assert kept.afterthought[0] == name
    assert abs(evaluate_language(model, windows, kept).kl.value) <= 1e-6


class Unusual(torch.nn.Module):
    """A model that does something unknown to its logits and has no `logits_to_keep`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, ids, use_cache=False):
        output = self.inner(ids)
        output.logits = output.logits + 0.1 * output.logits.roll(1, -1)
        return output


def test_an_unknown_afterthought_falls_back_to_stored_logits(model, damaged, windows):
    kept = reference_logprobs(Unusual(model), windows)
    assert isinstance(kept, LogitReference)
    result = evaluate_language(damaged, windows, kept)
    expected = direct(Unusual(model), damaged, windows, SEQLEN // 2)
    torch.testing.assert_close(result.per_window["kl"], expected["kl"], rtol=2e-6, atol=2e-6)


def test_stored_logits_have_a_limit(model, windows, monkeypatch):
    monkeypatch.setattr(reference, "MAX_LOGIT_BYTES", 3 * VOCABULARY * (SEQLEN // 2) * 4)
    with pytest.raises(DataError, match="use at most 3 windows"):
        reference_logprobs(Unusual(model), windows)


@pytest.mark.parametrize("wrap", [lambda m: m, Unusual], ids=["hidden", "logits"])
def test_a_cached_reference_is_read_back_exactly(model, windows, tmp_path, wrap, monkeypatch):
    path = tmp_path / "deep" / "reference.safetensors"
    kept = reference_logprobs(wrap(model), windows, cache=path, identity="a")
    monkeypatch.setattr(reference, "window_logits", None)  # a second run of the model would fail
    again = reference_logprobs(wrap(model), windows, cache=path, identity="a")
    assert type(again) is type(kept)
    for index in range(WINDOWS):
        assert torch.equal(kept.logits(index, 0, 11), again.logits(index, 0, 11))


def test_a_cache_of_something_else_is_not_used(model, damaged, windows, tmp_path):
    path = tmp_path / "reference.safetensors"
    reference_logprobs(model, windows, cache=path, identity="a")
    for change in (
        {"identity": "b"},
        {"second_half": False, "identity": "a"},
        {"windows": windows.flip(0), "identity": "a"},
    ):
        arguments = {"windows": windows, "identity": "a", **change}
        kept = reference_logprobs(damaged, arguments.pop("windows"), cache=path, **arguments)
        fresh = reference_logprobs(damaged, **{"windows": windows, **change})
        assert torch.equal(kept.hidden, fresh.hidden)
        reference_logprobs(model, windows, cache=path, identity="a")
    path.write_bytes(path.read_bytes()[:100])
    kept = reference_logprobs(model, windows, cache=path, identity="a")
    assert torch.equal(kept.hidden, reference_logprobs(model, windows).hidden)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no partial files"


# -- refusals ------------------------------------------------------------------------------------


def test_a_reference_of_other_windows_is_refused(model, windows):
    kept = reference_logprobs(model, windows)
    for other in (windows.flip(0), windows[:, :-2]):
        with pytest.raises(DataError, match="other windows"):
            evaluate_language(model, other, kept)
    with pytest.raises(DataError, match="other windows"):
        evaluate_language(model, windows, kept, second_half=False)


def test_nan_weights_are_a_sentence_not_a_number(windows):
    model = llama(seed=5)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = math.nan
    with pytest.raises(ModelError, match="nan"):
        evaluate_language(model, windows)
    with pytest.raises(ModelError, match="nan"):
        reference_logprobs(model, windows)


def test_another_vocabulary_is_refused(model, windows):
    with pytest.raises(ModelError, match="vocabulary is 200, the reference's 210"):
        evaluate_language(model, windows, llama(vocab_size=210))
    with pytest.raises(DataError, match=r"token id 200 .*vocabulary of 200"):
        evaluate_language(model, torch.full((1, 8), 200))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 2)])
def test_windows_with_nothing_to_score_are_refused(model, shape):
    with pytest.raises(DataError):
        evaluate_language(model, torch.zeros(shape, dtype=torch.int64))


def test_progress_counts_windows(model, windows):
    seen = []
    evaluate_language(model, windows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(index + 1, WINDOWS) for index in range(WINDOWS)]
