"""Weights of which two of every four columns are zero: how they are packed for mma.sp, and kernel
(a) on them, the very source that GPUs get, on the emulator."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.formats import QuantizedWeight, Scheme
from quantlib.formats.sparse import AMONG, KEPT, compress, expand, kept_of
from quantlib.kernels.cuda import decode, fragments, sparse_layout
from quantlib.kernels.emulator import build
from quantlib.rounding.sparsegpt import round_sparse

from .emulated import assert_right, multiply

F16, BF16 = torch.float16, torch.bfloat16
# Scheme, tokens, rows, columns, blocks, stages, dtype: every way of scaling, every number of
# tokens, rows and columns that nothing divides (columns but by 4).
CASES = [
    ("w4", 1, 40, 72, 3, 3, F16),
    ("w4g128", 5, 33, 332, 2, 4, BF16),
    ("w4g128", 12, 300, 192, 3, 4, F16),
    ("w4g64s4", 20, 130, 260, 3, 3, F16),
    ("w4g32", 9, 97, 200, 3, 3, BF16),
    ("w4g256", 64, 257, 520, 3, 3, F16),
    ("w3g32", 40, 64, 136, 2, 3, F16),
    ("w2", 3, 31, 64, 1, 5, BF16),
]

pytestmark = pytest.mark.usefixtures("compiler")


def random_mask(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns // AMONG, AMONG, generator=generator).argsort(-1)[..., :KEPT]
    mask = torch.zeros(rows, columns // AMONG, AMONG, dtype=torch.bool)
    return mask.scatter_(2, kept, True).view(rows, columns)


def pruned(draw, scheme, rows, columns, seed=0):
    """A random weight with zeros in two of every four columns."""
    weight, _ = draw(rows, [(scheme, columns)], seed=seed)
    (part,) = weight.segments
    middle = torch.tensor(1 << part.segment.format.bits - 1, dtype=torch.uint8)
    codes = torch.where(random_mask(rows, columns, seed), part.codes, middle)
    return QuantizedWeight(weight.shape, (replace(part, codes=codes),))


def inputs_of(tokens, columns, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


# Those that no other test here has already: the rest are for `make test-kernels`.
QUICK = [CASES[2], CASES[5]]
MATRIX = [pytest.param(case, marks=() if case in QUICK else pytest.mark.kernels) for case in CASES]


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case[0]}-{case[1]}")
def test_a_sparse_product_is_that_of_the_dense_weight(draw, case):
    scheme, tokens, rows, columns, blocks, stages, dtype = case
    weight, inputs = pruned(draw, scheme, rows, columns), inputs_of(tokens, columns, dtype)
    assert decode.pack(weight).sparse
    bias = torch.linspace(-1, 1, rows).to(dtype)
    for seed, own in ((0, None), (1, bias)):
        output, counters = multiply(weight, inputs, own, blocks, seed, stages)
        assert_right(output, weight, inputs, own)
        assert counters.bank_conflicts == 0


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(9, 16),
    rows=st.integers(1, 300),
    fours=st.integers(1, 150),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_any_shape_any_number_of_blocks_any_schedule(draw, tokens, rows, fours, blocks, seed):
    weight = pruned(draw, "w4g128", rows, 4 * fours, seed)
    inputs = inputs_of(tokens, 4 * fours, F16, seed)
    output, _ = multiply(weight, inputs, None, blocks, seed)
    assert_right(output, weight, inputs)


def test_it_takes_half_of_the_products_and_three_quarters_of_the_codes_bytes(draw):
    weight, inputs = pruned(draw, "w4g128", 128, 512), inputs_of(16, 512, F16)
    dense, _ = draw(128, [("w4g128", 512)])
    _, sparse_count = multiply(weight, inputs, blocks=1)
    _, dense_count = multiply(dense, inputs, blocks=1)
    assert 2 * sparse_count.matrix_products == dense_count.matrix_products
    own, other = decode.pack(weight), decode.pack(dense)
    assert 4 * own.codes.nbytes == 3 * other.codes.nbytes
    assert torch.equal(own.meta, other.meta)


def test_what_sparsegpt_rounds_is_found_sparse():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator)
    x = torch.randn(400, 128, generator=generator)
    found = round_sparse(weight, x.T @ x, Scheme.parse("w4g64").segments(128))
    assert decode.pack(found.rounded).sparse
    inputs = inputs_of(7, 128, F16)
    output, _ = multiply(found.rounded, inputs)
    assert_right(output, found.rounded, inputs)


def test_what_is_not_kept_is_not_multiplied(draw):
    """An input that is not finite spoils those outputs alone whose rows have its column."""
    weight, inputs = pruned(draw, "w4g128", 64, 128), inputs_of(9, 128, F16)
    inputs[4, 7] = torch.nan
    output, _ = multiply(weight, inputs)
    mask = kept_of(weight.segments[0].codes, 8)
    _, kept = expand(mask, torch.tensor(8, dtype=torch.uint8))
    assert torch.equal(output[4].isnan(), kept[:, 7])
    assert output[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    fours=st.integers(1, 60),
    bits=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_packing_is_a_bijection(rows, fours, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 4 * fours), generator=generator).to(torch.uint8)
    sparse = compress(codes, random_mask(rows, 4 * fours, seed))
    memory = sparse_layout.pack_sparse(sparse, bits)
    assert memory.shape[-1] == 128 * (bits + 2)
    back = sparse_layout.unpack_sparse(memory, bits, (rows, 4 * fours))
    assert torch.equal(back.values, sparse.values)
    assert torch.equal(back.places, sparse.places)


def test_lanes_share_places_out_without_gap_or_overlap():
    owned = [
        fragments.place_element(lane, index)
        for lane in range(fragments.LANES)
        for index in range(fragments.PLACES)
    ]
    everywhere = {(p, r, c) for p in range(2) for r in range(16) for c in range(16)}
    assert len(owned) == len(set(owned))
    assert set(owned) == everywhere


def test_fours_with_fewer_others_are_filled_up_with_zeros():
    codes = torch.tensor([[8, 8, 8, 8, 8, 3, 8, 8, 1, 8, 8, 2]], dtype=torch.uint8)
    found = kept_of(codes, 8)
    assert found.values.tolist() == [[8, 8, 8, 3, 1, 2]]
    assert found.places.tolist() == [[0, 1, 0, 1, 0, 3]]
    assert kept_of(torch.tensor([[1, 2, 3, 8]], dtype=torch.uint8), 8) is None


@pytest.mark.parametrize("scheme", ["w4g16", "w4g64z", "w8g128", "w5"])
def test_what_mma_sp_does_not_take_stays_dense(draw, scheme):
    weight = pruned(draw, scheme, 40, 128)
    assert not decode.pack(weight).sparse
    inputs = inputs_of(3, 128, F16)
    output, _ = multiply(weight, inputs)
    assert_right(output, weight, inputs)


def test_the_schedule_does_not_change_a_bit(draw):
    weight, inputs = pruned(draw, "w4g128", 96, 2100), inputs_of(9, 2100, F16)
    first, _ = multiply(weight, inputs, blocks=4, seed=0)
    for seed in range(1, 4):
        again, _ = multiply(weight, inputs, blocks=4, seed=seed, launches=2)
        assert torch.equal(again.view(torch.int16), first.view(torch.int16))


def test_no_undefined_behaviour(draw, capfd):
    weight, inputs = pruned(draw, "w4g64s4", 130, 260), inputs_of(20, 260, F16)
    output, _ = multiply(weight, inputs, None, 3, 1, 3, flags=build.SANITIZE)
    assert_right(output, weight, inputs)
    assert "runtime error" not in capfd.readouterr().err


@pytest.mark.parametrize("architecture", decode.SHARED_KB)
@pytest.mark.parametrize("tiles", decode.TOKEN_TILES)
@pytest.mark.parametrize("period", [0, 1, 2, 4])
def test_every_case_fits_every_architecture(architecture, tiles, period):
    case = decode.DecodeCase(4, F16, tiles, period, False, sparse=True)
    planned = decode.plan(case, architecture)
    assert planned.shared_bytes <= (decode.SHARED_KB[architecture] - 1) * 1024
