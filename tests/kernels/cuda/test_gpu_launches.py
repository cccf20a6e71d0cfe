"""On a real GPU: sparse products, attention on a packed cache, and inputs rotated and rounded at
once are what the emulator makes of the same source. `pytest -m gpu`; elsewhere skipped, with a
reason."""

from dataclasses import replace

import pytest
import torch

from quantlib.formats.activation import ActivationSegment
from quantlib.kernels import kv_reference
from quantlib.kernels.cuda import attend, launch, loading, quantizer
from quantlib.kernels.kv_cache import KVCache

from .emulated import expected
from .emulated_segmented import linear
from .test_sparse import inputs_of, pruned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
F16, GPU = torch.float16, torch.device("cuda")


@pytest.fixture
def runner() -> launch.Runner:
    """The GPU's."""
    if reason := loading.why_not(GPU):
        pytest.skip(reason)
    return launch.runner(GPU, emulated=False)


@pytest.mark.parametrize("scheme", ["w4", "w4g128", "w4g64s4", "w4g32"])
@pytest.mark.parametrize("tokens", [1, 12, 64])
def test_sparse_products(draw, runner, scheme, tokens):
    weight, inputs = pruned(draw, scheme, 300, 1312), inputs_of(tokens, 1312, F16)
    own = launch.pack(weight)
    assert own.sparse
    moved = replace(
        own, codes=own.codes.to(GPU), meta=own.meta.to(GPU), row_factors=own.row_factors.to(GPU)
    )
    exact, bound = expected(weight, inputs)
    first = launch.decode_linear(runner, inputs.to(GPU), moved)
    assert ((first.cpu().double() - exact).abs() <= bound).all()
    for _ in range(20):
        assert torch.equal(launch.decode_linear(runner, inputs.to(GPU), moved), first)


@pytest.mark.parametrize("form", ["int8", "int4h16", "int4g32r"])
def test_attention_on_a_packed_cache(runner, form):
    here, there = (KVCache(1, 2, 64, 700, 2, form, device=device) for device in ("cpu", GPU))
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(2, 2, 650, 2, 64, generator=generator)
    for cache in (here, there):
        cache.append(0, new[0].to(cache.device), new[1].to(cache.device))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.stored, there.stored, strict=True))
    query = torch.randn(2, 8, 64, generator=generator).to(F16)
    keys, values = (side[0] for side in there.stored)
    given = (query.to(GPU), keys, values, there.form, [650, 650], 0.125)
    first = attend.attend(runner, *given)
    wanted = [
        kv_reference.attend(query[i][None].float(), *here.dequantize(0, i), 0.125) for i in (0, 1)
    ]
    assert ((first.cpu() - torch.cat(wanted)).abs() <= 4e-3).all()
    for _ in range(20):
        assert torch.equal(attend.attend(runner, *given), first)


@pytest.mark.parametrize("order", [512, 64])
def test_inputs_rotated_and_rounded_at_once(draw, runner, order):
    """Additions alone, so the emulator's codes to the last bit."""
    own = linear(draw, "w4a4zh8/8", 40, 512)
    x, turn = inputs_of(9, 512, F16), quantizer.hadamard(None, order)
    rounding: tuple[ActivationSegment, ...] = own.activations
    weight = launch.pack_segmented(own.weight, own.layout(runner.architecture))
    emulated = launch.EmulatedRunner()
    emulated.architecture = runner.architecture
    wanted = launch.segmented_linear(emulated, x, weight, rounding, None, turn)
    moved = replace(
        weight, codes=weight.codes.to(GPU), meta=weight.meta.to(GPU), units=weight.units.to(GPU)
    )
    found = launch.segmented_linear(runner, x.to(GPU), moved, rounding, None, turn)
    # Blocks that share a tile add its sums in another order: the emulator has other blocks.
    assert ((found.cpu().float() - wanted.float()).abs() <= 2e-3 * wanted.abs().amax()).all()
