"""The methods do what their papers say, and cost the bits they are booked with."""

import math
from collections.abc import Iterator

import pytest
import torch

from quantlib.bench.w4a4 import methods, rotations
from quantlib.bench.w4a4.fake import RoundInput
from quantlib.bench.w4a4.grids import Grid
from quantlib.bench.w4a4.heads import HeadPlan, rounded
from quantlib.bench.w4a4.sites import cached, head_order
from quantlib.bench.w4a4.subjects import Language, Speech

ALL = {**methods.METHODS, **methods.ABLATIONS}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prefix", [False, True], ids=["shared", "prefix"])
@pytest.mark.parametrize("name", [*ALL])
def test_every_method_runs_and_stays_near_the_original(
    language: Language, name: str, prefix: bool
) -> None:
    quantized = methods.quantize(ALL[name], language, 0, prefix)
    found = language.figures(quantized.model)
    # Random weights at 4 bits: far from zero, and far from the 3 nats of an unrelated model.
    assert 1e-4 < found["kl"] < 1.0
    assert found["perplexity"] > 1


@pytest.mark.parametrize("name", ["rtn", "smoothquant", "quik", "quarot", "resq", "coquant"])
def test_every_method_runs_on_whisper(whisper: Speech, name: str) -> None:
    quantized = methods.quantize(ALL[name], whisper, 0, prefix=True)
    found = whisper.figures(quantized.model)
    assert 1e-5 < found["kl"] < 1.0
    assert not math.isnan(found["word_error_rate"])


def test_bits_are_counted_by_hand(language: Language) -> None:
    """d = 64, hidden 96, heads of 16: 4 query heads, 2 for keys and values."""
    model = language.copy()
    plans = methods._sliced(language)
    heads = methods._sliced_heads(language, {})
    bits = methods.count(model, language.sites, plans, heads)
    high = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 96 * 64  # q, o, k, v, gate, up: 1/8 at 8 bits
    down = 64 * 96
    codes = (4.5 * high + 4 * down) / (high + down)
    assert bits.weight_codes == pytest.approx(codes)
    assert bits.activation_codes == pytest.approx(codes)
    rows = 2 * 64 + 2 * 32 + 2 * 96  # each has a float16 scale for either slice
    assert bits.weights == pytest.approx(codes + 16 * (2 * rows + 64) / (high + down))
    assert bits.kv_codes == 4.5
    assert bits.kv == pytest.approx(4.5 + (16 + 4 + 16 + 8) / 16)


def test_resq_is_booked_with_fewer_bits_than_it_is_quoted_with(language: Language) -> None:
    plans = methods._sliced(language)
    assert methods.count(language.copy(), language.sites, plans, {}).weight_codes < 4.5


def test_seeds_change_random_methods_only(language: Language) -> None:
    for name, method in methods.METHODS.items():
        first, second = (method.prepare(language, seed).model.state_dict() for seed in (0, 1))
        same = all(torch.equal(first[key], second[key]) for key in first)
        assert same != method.random, name


def test_resq_puts_the_most_energy_into_its_last_columns(language: Language) -> None:
    prepared = methods.METHODS["resq"].prepare(language, 0)
    assert prepared.hessian is not None
    moments = [prepared.hessian(site).diagonal() for site in language.sites if site.norm]
    energy = torch.stack(moments).mean(0)
    plain = torch.stack(
        [
            language.folded_statistics.inputs[site.name].second.diagonal()
            for site in language.sites
            if site.norm
        ]
    ).mean(0)
    high = 64 // methods.SHARE
    assert energy[-high:].sum() > plain.sort().values[-high:].sum()
    # The random mixing evens out each slice, and moves nothing between them.
    unmixed = rotations.ascending(
        rotations.stream_moment(language.sites, language.folded_statistics, "decoder")
    )
    total = rotations.stream_moment(language.sites, language.folded_statistics, "decoder")
    best = (unmixed.T @ total @ unmixed).diagonal()[-high:].sum()
    assert float(energy[-high:].sum()) == pytest.approx(float(best), rel=1e-3)


def test_coquant_adds_the_weights_energy_with_equal_share(language: Language) -> None:
    moment = rotations.stream_moment_with_weights(
        language.sites, language.folded_statistics, "decoder", language.folded
    )
    inputs = [site for site in language.sites if site.norm is not None]
    assert float(moment.trace()) == pytest.approx(2 * len(inputs), rel=1e-5)


def test_smoothing_moves_factors_and_nothing_else(language: Language) -> None:
    model = language.copy()
    for site in language.sites:
        if site.norm is not None:
            factor = methods._smooth(model, site, language, 0.6)
            assert bool((factor > 0).all())
            assert float(factor.max() / factor.min()) > 1.5
    with torch.no_grad():
        found = model(language.held_out).logits
        expected = language.original(language.held_out).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_the_random_bases_are_orthogonal_and_of_any_width() -> None:
    for basis in (
        rotations.random_orthogonal(12, generator()),
        rotations.random_hadamard(24, generator()),
        rotations.random_hadamard(22, generator()),
        rotations.mixing(24, 3, generator()),
    ):
        identity = torch.eye(len(basis), dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-12)
    mixed = rotations.mixing(24, 3, generator())
    assert not mixed[:21, 21:].any()
    assert not mixed[21:, :21].any()


def test_head_order_puts_every_heads_high_columns_last() -> None:
    order = head_order(3, 4, 1)
    assert order.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 3, 7, 11]


def test_only_a_decoders_keys_and_values_are_cached(whisper: Speech) -> None:
    found = {a.module for a in whisper.wiring.attentions if cached(whisper.wiring, a)}
    assert found == {
        f"model.decoder.layers.{index}.{kind}"
        for index in range(2)
        for kind in ("self_attn", "encoder_attn")
    }


def heads_of(seed: int, count: int) -> torch.Tensor:
    return torch.randn(2, count, 5, 16, generator=generator(seed))


def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT


def test_a_key_basis_changes_no_score_and_orders_put_numbers_back() -> None:
    query, key, value = heads_of(0, 4), heads_of(1, 2), heads_of(2, 2)
    exact = (Grid(16, 16),)
    basis = rotations.random_orthogonal(16, generator()).float()
    turned = rounded(query, key, value, HeadPlan(exact, exact, basis))
    torch.testing.assert_close(scores(*turned[:2]), scores(query, key), rtol=1e-4, atol=1e-4)
    order = torch.stack([torch.randperm(16, generator=generator(h)) for h in range(2)])
    kept = rounded(query, key, value, HeadPlan(exact, exact, None, order, order))
    assert all(torch.equal(*pair) for pair in zip(kept, (query, key, value), strict=True))


def test_ordered_slices_round_the_chosen_columns_finely() -> None:
    key = heads_of(1, 2)
    order = torch.stack([torch.randperm(16, generator=generator(h)) for h in range(2)])
    grids = (Grid(14, 4), Grid(2, 8))
    _, found, _ = rounded(heads_of(0, 4), key, key, HeadPlan(grids, grids, None, order, order))
    error = (found - key).abs().amax((0, 2))
    for head, columns in enumerate(order):
        assert float(error[head, columns[14:]].max()) < 0.1 * float(error[head, columns[:14]].max())


def inputs() -> Iterator[torch.Tensor]:
    yield torch.randn(2, 8, generator=generator(0))
    yield torch.randn(2, 8, generator=generator(1))


def test_readers_of_one_input_share_its_rounding_and_others_do_not() -> None:
    hook = RoundInput((Grid(8, 4),), None)
    first, second = inputs()
    module = torch.nn.Identity()
    once, twice = hook(module, (first,))[0], hook(module, (first,))[0]
    assert once is twice
    assert not torch.equal(hook(module, (second,))[0], once)
    assert torch.equal(hook(module, (first,))[0], once)
