"""Many tokens: what a tile of them multiplies in one go, in one segment or in several, changes no
bit of any output."""

import pytest
import torch

from quantlib.formats.activation import ActivationFormat
from quantlib.kernels import layouts, tile_reference
from quantlib.kernels.cpu.forms import form

from .test_bits import same_bits
from .test_forms import draw_tokens, follow

LOW, HIGH = ActivationFormat(4, False), ActivationFormat(8)

LAYERS = {
    "ResQ, in one panel": [("w4g64z5s5", 504, LOW), ("w8g64zs5", 72, HIGH)],
    "whole sums, folded and not": [("w2g64z4s4", 333, LOW), ("w4g64z5s5", 600, HIGH)],
    "longer than a panel": [("w4g64z5s5", 1790, LOW), ("w8g64zs5", 258, HIGH)],
    "the second alone is longer": [("w4g64", 100, LOW), ("w3g64z4s4", 2117, HIGH)],
    "every kind of term": [
        ("w4g64", 96, LOW),
        ("w4g32z", 45, HIGH),
        ("w4g64z5s5", 128, LOW),
    ],
    "activation groups": [
        ("w4g64", 190, ActivationFormat(4, False, group=32)),
        ("w5g64z", 83, ActivationFormat(8, group=64)),
    ],
    "more segments than are kept together": [
        ("w4g64z5s5", 70 + 3 * i, LOW if i % 2 else HIGH) for i in range(6)
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_segments_that_share_a_panel_give_the_bits_of_the_reference(library, draw, isa, name):
    """70 tokens make tiles of six and of five, and panels as long as they get."""
    parts = LAYERS[name]
    weight, packed = draw(33, [(scheme, length) for scheme, length, _ in parts], seed=3)
    x = draw_tokens(70, weight.shape[1], 4)
    bias = torch.randn(33, generator=torch.Generator().manual_seed(5))
    activations = follow([(length, how) for _, length, how in parts])
    shaped = form([part.segment for part in weight.segments], activations)
    expected = tile_reference.linear(x, weight, bias, activations=activations)
    tiled = layouts.tile(packed)
    for tokens in (70, 67, 20):  # 20: short panels
        found = library.linear(tiled.description, x[:tokens], bias, "exact", isa, form=shaped)
        assert same_bits(found, expected[:tokens]), tokens
