"""Random packed weights are what a checkpoint could hold."""

import pytest
import torch

from quantlib import formats
from quantlib.bench.random_weights import random_weight
from quantlib.formats.scheme import Scheme
from quantlib.formats.weight import packed_layout

SCHEMES = (
    "w2g128", "w3g128", "w5g64z", "w8", "w4t", "w2g64z4s4", "w4g32zs4", "w4g64z5s5", "fp8",
    "fp8e5m2g64", "fp6g64", "fp4g32", "mxfp8", "mxfp6", "mxfp4", "nvfp4",
)  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_random_weight_has_the_layout_and_numbers_of_its_scheme(scheme: str) -> None:
    weight = random_weight(48, 320, scheme, torch.Generator().manual_seed(1))
    expected = packed_layout((48, 320), Scheme.parse(scheme).segments(320))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in weight.tensors.items()} == expected
    values = formats.dequantize(weight.to_quantized())  # refuses inf, nan and damaged scales
    assert bool(values.isfinite().all())
    # Neither all alike nor larger than trained weights ever are.
    assert 1e-4 < float(values.std()) < 0.2


def test_the_seed_decides() -> None:
    first, same, other = (
        random_weight(32, 64, "w4g32z", torch.Generator().manual_seed(seed)).tensors["_packed"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
