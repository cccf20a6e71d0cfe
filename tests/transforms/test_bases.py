"""From moments of a folded model to rotations: what is averaged, priced, mixed and ordered how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from quantlib.calibration.statistics import GroupStatistics, MatrixStatistics
from quantlib.calibration.stream import BlockStream
from quantlib.errors import DataError, TransformError
from quantlib.formats.scheme import Scheme
from quantlib.models import skeleton
from quantlib.transforms.apply import RotatedSource
from quantlib.transforms.attention import attach_attention, attention_states
from quantlib.transforms.bases import (
    Source,
    head_blocks,
    hidden_orders,
    high_columns,
    resq_bases,
    value_terms,
    weighted_bases,
)
from quantlib.transforms.energies import fisher_of, input_energy, value_energy
from quantlib.transforms.fixed_point import objective, principal
from quantlib.transforms.mixing import (
    MIXERS,
    head_cuts,
    mixing,
    output_order,
    random_orthogonal,
    rotation_of,
)
from quantlib.transforms.moments import Moments, Second, merge, stream_moments
from quantlib.transforms.rotation import Rotation

from .small_models import HEAD_DIM, HEADS, KV_HEADS, WIDTH, Small, small_llama

EIGHTH = Fraction(1, 8)
SHARES = tuple(Fraction(*x) for x in ((0, 1), (1, 16), (1, 8), (3, 16), (1, 4), (1, 2), (1, 1)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return small_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folded(small: Small) -> RotatedSource:
    return RotatedSource.of(small.source, Rotation(fold_norms=True))


@pytest.fixture(scope="module")
def moments(small: Small, folded: RotatedSource) -> Moments:
    windows = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(7))
    weights = torch.rand(windows.numel(), generator=torch.Generator().manual_seed(8))
    stream = BlockStream(folded, small.model_map)
    return merge(
        stream_moments(stream, small.model_map, small.wiring, windows, lambda _: [weights])
    )


def fisher(name: str) -> Tensor:
    """Some price of the outputs of every weight here."""
    rows = WIDTH if name.endswith(("o_proj.weight", "down_proj.weight")) else HEADS * HEAD_DIM
    rows = KV_HEADS * HEAD_DIM if name.endswith(("k_proj.weight", "v_proj.weight")) else rows
    rows = 48 if name.endswith(("gate_proj.weight", "up_proj.weight")) else rows
    return torch.rand(rows, generator=torch.Generator().manual_seed(len(name)))


def source_of(moments: Moments, small: Small, folded: RotatedSource, **choices: object) -> Source:
    return Source(moments, small.wiring, folded.read, **choices)  # type: ignore[arg-type]


# --- energies ---


def test_the_energy_is_that_of_independent_output_gradients() -> None:
    """S = E[g g^T] for g = W^T g_y with independent g_y: to the error of 20,000 samples."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    price = torch.rand(6, generator=generator)
    gradients = torch.randn(20_000, 6, generator=generator) * price.sqrt() @ weight
    expected = gradients.T @ gradients / 20_000
    found = input_energy(["w"], lambda _: weight, lambda _: price)
    assert found.dtype == torch.float64
    assert float((found - expected).norm() / found.norm()) <= 0.05


def test_readers_of_one_input_add_and_experts_by_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = {"a": a, "b": b, "stack": torch.stack((a, b))}
    both = input_energy(["a", "b"], weights.__getitem__)
    assert torch.allclose(both, a.T @ a + b.T @ b, rtol=1e-12)
    assert torch.allclose(input_energy(["stack"], weights.__getitem__), both / 2, rtol=1e-12)
    experts = [MatrixStatistics(torch.eye(5), 30, 1.0, {"stack": torch.ones(6)})]
    experts += [MatrixStatistics(torch.empty(0, 0), 0, 0.0)]  # never chosen
    experts += [MatrixStatistics(torch.eye(5), 10, 1.0, {"stack": torch.full((6,), 2.0)})]
    price = fisher_of([GroupStatistics("g", experts)])("stack")
    assert torch.equal(price, torch.tensor([0.75, 0.0, 0.5])[:, None].expand(3, 6))
    with pytest.raises(DataError, match="no gradients for other"):
        fisher_of([])("other")


def test_value_energy_adds_the_query_heads_of_a_kv_head(small: Small) -> None:
    attention = small.wiring.attentions[0]
    weight = torch.randn(WIDTH, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(0))
    price = fisher(attention.output.weight)
    found = value_energy(attention, lambda _: weight, lambda _: price)
    whole = input_energy(["o"], lambda _: weight, lambda _: price)
    for head in range(KV_HEADS):
        slices = [slice(i * HEAD_DIM, (i + 1) * HEAD_DIM) for i in (2 * head, 2 * head + 1)]
        expected = sum(whole[s, s] for s in slices)
        assert torch.allclose(found[head], expected, rtol=1e-10)
    assert torch.allclose(head_blocks(whole, attention), found, rtol=1e-10)


# --- bases ---


def test_resq_averages_the_inputs_of_all_layers(small: Small, moments: Moments) -> None:
    bases = resq_bases(moments, small.wiring)
    names = [f"{b}.{x}" for b in small.wiring.blocks for x in ("self_attn.q_proj", "mlp.up_proj")]
    mean = sum(moments.inputs[f"{name}.weight"].second.plain for name in names) / len(names)
    assert torch.allclose(bases.residual["decoder"], principal(mean), atol=1e-9)
    for block in small.wiring.blocks:
        heads = moments.heads[block]
        first = [(bases.value[block], heads.value.plain)]
        first += [(bases.key[block], heads.key.plain.mean(0))]
        for vectors, second in first:
            energies = (vectors * (second @ vectors)).sum(-2)
            assert torch.equal(energies, energies.sort(-1, descending=True).values)  # high FIRST
        assert bases.key[block].shape == (HEAD_DIM, HEAD_DIM)


@pytest.mark.parametrize("priced", [False, True])
def test_weighted_bases_lose_less_than_pca_by_their_own_measure(
    small: Small, folded: RotatedSource, moments: Moments, priced: bool
) -> None:
    source = source_of(
        moments, small, folded, fisher=fisher if priced else None, weighted=0.5 * priced
    )
    weighted, plain = weighted_bases(source), resq_bases(moments, small.wiring)
    attention = small.wiring.attentions[0]
    terms = value_terms(source, attention)
    high = high_columns(HEAD_DIM, EIGHTH)
    losses = [objective(terms, b.value[attention.name].flip(-1), high) for b in (weighted, plain)]
    assert losses[0] < losses[1]
    assert weighted.key[attention.name].shape == (KV_HEADS, HEAD_DIM, HEAD_DIM)
    shared = weighted_bases(source, key_per_head=False)
    assert shared.key[attention.name].shape == (HEAD_DIM, HEAD_DIM)


def test_what_is_not_rounded_has_no_price(
    small: Small, folded: RotatedSource, moments: Moments
) -> None:
    """Only layer 1's MLP rounded: its one term decides, and the fixed point is that of it alone."""
    block = small.wiring.blocks[1]
    names = tuple(f"{block}.mlp.{x}_proj.weight" for x in ("gate", "up"))
    source = source_of(moments, small, folded, rounded=names)
    groups = list(source.groups(small.wiring.streams[0]))
    assert [found for _, found in groups] == [names]
    assert groups[0][0] is moments.inputs[names[0]]


def test_hidden_channels_that_stand_out_come_last(
    small: Small, folded: RotatedSource, moments: Moments
) -> None:
    """A channel with 100 times the activation energy is the last; and the order is no worse than
    that by activation or by weight alone."""
    name = f"{small.wiring.blocks[0]}.mlp.down_proj.weight"
    inputs = moments.inputs[name]
    second = inputs.second.plain.clone()
    second[17] *= 100 * second.max() / second[17]
    loud = replace(inputs, second=Second(second))
    source = source_of(replace(moments, inputs={**moments.inputs, name: loud}), small, folded)
    order = hidden_orders(source)[small.wiring.blocks[0]]
    assert torch.equal(order.sort().values, torch.arange(48))
    assert int(order[-1]) == 17
    price = source.energy((name,)).diagonal()

    def lost(order: Tensor) -> float:
        low = order[: 48 - high_columns(48, EIGHTH)]
        return float(second[low].sum() * price[low].sum())

    assert lost(order) <= min(lost(second.argsort()), lost(price.argsort()))


def test_bases_of_another_model_are_refused(small: Small, moments: Moments) -> None:
    with pytest.raises(TransformError, match="no moments of the decoder"):
        resq_bases(Moments({}, moments.heads), small.wiring)
    with pytest.raises(TransformError, match="of another model"):
        resq_bases(Moments(moments.inputs, {}), small.wiring)
    with pytest.raises(TransformError, match="cannot be wide"):
        high_columns(64, Fraction(5, 4))


# --- mixing ---


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_mixing_keeps_slices_apart_and_is_orthogonal(mixer: str) -> None:
    cuts = [24, 60, 56]
    made = [
        mixing(64, cuts, MIXERS[mixer], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    identity = made[0].T @ made[0]
    assert float((identity - torch.eye(64, dtype=torch.float64)).abs().max()) <= 1e-12
    piece = torch.bucketize(torch.arange(64), torch.tensor(sorted(cuts)), right=True)
    within = piece[:, None] == piece[None]
    assert bool((made[0][~within] == 0).all())
    assert bool((made[0][within] != 0).all())


def test_slices_must_lie_inside() -> None:
    with pytest.raises(TransformError, match="cannot begin"):
        mixing(8, [9], random_orthogonal, torch.Generator())


def test_random_bases_prefer_no_sign() -> None:
    """Without the sign fix of QR every diagonal entry of R is negative or positive at once, and the
    mean of Q's diagonal is far from zero: here 3 standard errors of 400 draws of variance 1/4."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([random_orthogonal(4, generator) for _ in range(400)]).mean(0)
    assert float(mean.abs().max()) <= 3.5 * 0.5 / 400**0.5


def flatness(x: Tensor) -> float:
    """Largest |x| of a row over its root mean square, averaged."""
    return float((x.abs().amax(1) / x.square().mean(1).sqrt()).mean())


def test_mixed_slices_have_no_outliers() -> None:
    """A token along one principal direction is spread over its slice."""
    directions = torch.eye(56, dtype=torch.float64)
    for mixer in MIXERS:
        mix = mixing(56, [], MIXERS[mixer], torch.Generator().manual_seed(0))
        assert flatness(directions) > 7
        assert flatness(directions @ mix) < 3.5


@pytest.mark.parametrize("which", ["resq", "weighted"])
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_rotation_of_these_bases_changes_no_logit(
    small: Small, folded: RotatedSource, moments: Moments, which: str, mixer: str
) -> None:
    """Keys online, the rest fused: rounding of float32 weights and sums, nothing more."""
    bases = (
        resq_bases(moments, small.wiring)
        if which == "resq"
        else weighted_bases(source_of(moments, small, folded, fisher=fisher, weighted=1.0))
    )
    rotation = rotation_of(bases, small.wiring, seed=1, shares=SHARES, mixer=mixer)
    rotated = RotatedSource.of(small.source, rotation)
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = small.model(input_ids=ids, use_cache=False).logits
        logits = whole(rotated, small, rotation)(input_ids=ids, use_cache=False).logits
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def whole(source: RotatedSource, small: Small, rotation: Rotation) -> torch.nn.Module:
    """The rotated model in memory."""
    model = skeleton.build(source)
    skeleton.materialize(model, "", source)
    attach_attention(model, attention_states(small.wiring, rotation))
    return model


def test_the_low_slice_of_a_rotation_is_that_of_the_bases(small: Small, moments: Moments) -> None:
    bases = resq_bases(moments, small.wiring)
    rotation = rotation_of(bases, small.wiring, seed=1)
    low = Scheme.parse("w4a4zh8/8").low_columns(WIDTH)
    for part in (slice(0, low), slice(low, None)):
        a, b = (x[:, part] for x in (bases.residual["decoder"], rotation.residual))
        assert torch.allclose(a @ a.T, b @ b.T, atol=1e-12)
    block = small.wiring.blocks[0]
    a, b = bases.value[block][..., :2], rotation.value[block][..., :2]  # wide ones come first
    assert torch.allclose(a @ a.mT, b @ b.mT, atol=1e-12)
    assert rotation.hidden == dict.fromkeys(small.wiring.blocks, 48)
    assert rotation_of(bases, small.wiring, seed=1).content_hash == rotation.content_hash
    assert rotation_of(bases, small.wiring, seed=2).content_hash != rotation.content_hash
    assert rotation_of(bases, small.wiring, seed=1, hidden=False).hidden == {}


def test_the_last_channels_of_an_order_are_left_out_of_hadamard_matrices(
    small: Small, folded: RotatedSource, moments: Moments
) -> None:
    source = source_of(moments, small, folded, fisher=fisher, weighted=1.0)
    orders = hidden_orders(source)
    high = dict.fromkeys(orders, high_columns(48, EIGHTH))
    rotation = rotation_of(
        weighted_bases(source), small.wiring, 1, hidden_order=orders, hidden_high=high
    )
    assert rotation.hidden == dict.fromkeys(small.wiring.blocks, 32)
    assert rotation.hidden_high == dict.fromkeys(small.wiring.blocks, 8)
    rotation.check(small.wiring)
    for name, order in orders.items():
        assert torch.equal(rotation.hidden_order[name], order)


# --- the order of an output projection's input ---


def test_the_output_projection_reads_low_columns_first_at_every_cut(small: Small) -> None:
    attention = small.wiring.attentions[0]
    cuts = head_cuts(HEAD_DIM, SHARES)
    assert cuts == [0, 1, 2, 3, 4, 8, 16]
    order = output_order(attention, cuts)
    assert torch.equal(order.sort().values, torch.arange(HEADS * HEAD_DIM))
    within = order % HEAD_DIM
    for wide in cuts:
        low = (HEAD_DIM - wide) * HEADS
        assert bool((within[:low] >= wide).all())
        assert bool((within[low:] < wide).all())


@pytest.mark.parametrize("share", [s for s in SHARES if 0 < s < 1])
def test_its_cuts_are_where_a_scheme_ends_its_low_segment(small: Small, share: Fraction) -> None:
    scheme = Scheme.parse(f"w4a4zh8x{share.numerator}/{share.denominator}")
    attention = small.wiring.attentions[0]
    order = output_order(attention, head_cuts(HEAD_DIM, SHARES))
    low = scheme.low_columns(HEADS * HEAD_DIM)
    wide = int(HEAD_DIM * share)
    assert low == HEADS * (HEAD_DIM - wide)
    assert bool((order[:low] % HEAD_DIM >= wide).all())


def test_shares_are_counted_as_schemes_count_them() -> None:
    counted: Mapping[Fraction, int] = {share: high_columns(576, share) for share in SHARES}
    assert list(counted.values()) == [0, 36, 72, 108, 144, 288, 576]
    assert Scheme.parse("w4a4zh8x3/16").low_columns(576) == 576 - counted[Fraction(3, 16)]


def test_with_a_block_directions_mix_with_their_neighbours_only(
    small: Small, moments: Moments
) -> None:
    bases, block = resq_bases(moments, small.wiring), 16
    rotation = rotation_of(bases, small.wiring, seed=1, mixer="hadamard", block=block)
    assert rotation.residual is not None
    mixed = bases.residual["decoder"].T @ rotation.residual
    for first in range(0, WIDTH, block):
        own = slice(first, first + block)
        identity = torch.eye(block, dtype=torch.float64)
        torch.testing.assert_close(mixed[own, own] @ mixed[own, own].T, identity)
    whole = rotation_of(bases, small.wiring, seed=1, mixer="hadamard").residual
    assert whole is not None
    assert not torch.allclose(whole, rotation.residual)
    assert set(rotation.hidden.values()) == {block}
