"""Exact mode keeps float32 as it is, whatever the activations, and both modes for any length."""

import pytest
import torch

from quantlib.kernels import layouts

FORMATS = ["w4g128", "w3g32z", "w8", "fp8", "mxfp8e5m2", "mxfp6", "mxfp4", "nvfp4"]
FORMATS += ["fp5e2m2", "fp7e4m2", "fp8e3m4g32"]


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_what_is_not_finite_stays_in_its_token(library, draw, isa, scheme, tokens):
    """Infinity times a weight of zero is NaN, as IEEE has it; other tokens do not notice."""
    _, packed = draw(37, [(scheme, 100)], seed=tokens)
    tiled = layouts.tile(packed)
    x = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(0))
    clean = library.linear(tiled.description, x, None, "exact", isa=isa)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[tokens // 2, 57] = value
        found = library.linear(tiled.description, spoiled, None, "exact", isa=isa)
        others = torch.arange(tokens) != tokens // 2
        assert torch.equal(found[others].nan_to_num(), clean[others].nan_to_num())
        column = library.dequantize(tiled.description, isa=isa)[:, 57]
        assert not found[tokens // 2].isfinite().any()
        assert found[tokens // 2][column == 0].isnan().all()
        if value != value:
            assert found[tokens // 2].isnan().all()


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_a_long_prompt_is_its_tokens(library, draw, isa, mode):
    """More tokens than a kernel keeps totals for at once."""
    _, packed = draw(45, [("w4g64", 96), ("nvfp4", 60)])
    tiled = layouts.tile(packed)
    x = torch.randn(700, 156, generator=torch.Generator().manual_seed(0))
    found = library.linear(tiled.description, x, None, mode, isa=isa)
    pieces = [library.linear(tiled.description, part, None, mode, isa=isa) for part in x.split(31)]
    assert torch.equal(found, torch.cat(pieces))


@pytest.mark.parametrize("scheme", FORMATS)
def test_products_with_ones_are_the_dequantized_weight(library, draw, isa, scheme):
    """One activation of 1 at a time: no sum, so exact mode gives each weight itself."""
    _, packed = draw(37, [(scheme, 40)])
    tiled = layouts.tile(packed)
    found = library.linear(tiled.description, torch.eye(40), None, "exact", isa=isa)
    expected = library.dequantize(tiled.description, isa=isa).T
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
