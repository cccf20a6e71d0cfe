"""quantlib's method on a small Whisper in memory."""

import pytest
import torch

from quantlib.bench.w4a4 import ours, ours_speech
from quantlib.bench.w4a4.limits import Limits
from quantlib.bench.w4a4.sites import linear, weight
from quantlib.bench.w4a4.subjects import Speech
from quantlib.formats.scheme import Scheme
from quantlib.recipe import method_fields
from quantlib.transforms.attention import ATTRIBUTE

FINE = ("w8g64zs6a8g64h8/8",)


@pytest.fixture(scope="module")
def within_five_bits(whisper: Speech) -> ours_speech.Rounded:
    names = method_fields("resq", 4.0)["schemes"]
    return ours_speech.rounded(whisper, 0, names, Limits(5.2, 5.0, kv=6.0))


def test_bits_stay_within_what_is_allowed(
    whisper: Speech, within_five_bits: ours_speech.Rounded
) -> None:
    bits = ours.speech_bits(whisper, within_five_bits)
    assert 4.0 < bits.weights <= 5.2
    assert 4.0 < bits.activations <= 5.0
    assert 4.0 < bits.kv <= 6.0


def test_readers_of_one_input_share_a_scheme(
    whisper: Speech, within_five_bits: ours_speech.Rounded
) -> None:
    for site in whisper.sites:
        assert len({within_five_bits.schemes[reader.weight] for reader in site.readers}) == 1


def test_every_linear_reads_few_different_numbers(
    whisper: Speech, within_five_bits: ours_speech.Rounded
) -> None:
    seen: dict[str, torch.Tensor] = {}
    model = within_five_bits.model
    handles = [
        linear(model, site.readers[0]).register_forward_hook(
            lambda _, inputs, __, name=site.name: seen.update({name: inputs[0]})
        )
        for site in whisper.sites
    ]
    whisper.quick(model)
    for handle in handles:
        handle.remove()
    for site in whisper.sites:
        scheme = within_five_bits.schemes[site.readers[0].weight]
        tokens = seen[site.name].flatten(0, -2)
        levels = sum(
            min(1 << part.format.bits, part.length) for part in Scheme.parse(scheme).activations(64)
        )
        if site.width == 64 and levels < 64:
            assert max(len(token.unique()) for token in tokens) <= levels, site.name


def test_only_a_decoders_caches_are_rounded(
    whisper: Speech, within_five_bits: ours_speech.Rounded
) -> None:
    states = {
        a.module: within_five_bits.model.get_submodule(a.module).__dict__.get(ATTRIBUTE)
        for a in whisper.wiring.attentions
    }
    rounding = {name for name, state in states.items() if state is not None and state.kv}
    assert rounding == set(within_five_bits.caches) == {n for n in states if "decoder" in n}


def test_with_eight_bits_everywhere_hardly_anything_is_lost(whisper: Speech) -> None:
    fine = ours_speech.rounded(whisper, 0, FINE, Limits(9, 9, kv=8.5))
    coarse = ours_speech.rounded(whisper, 0, ("w3g64z4s4a3zg64h8/8",), Limits(9, 9, kv=8.5))
    # A step of 8 bits is a 37th of one of 3, and losses go by its square.
    assert whisper.quick(fine.model) < 0.02 * whisper.quick(coarse.model)


def test_means_are_in_biases_unless_said_otherwise(whisper: Speech) -> None:
    limits, found = Limits(9, 9, kv=8.5), {}
    for centred in (True, False):
        known = ours_speech.measured(whisper, 0, FINE, centred)
        assert bool(known.rotation.means) is centred
        model = ours_speech.rounded(whisper, 0, FINE, limits, centred).model
        bias = f"{whisper.wiring.streams[0].norms[0].name}.bias"
        found[centred] = model.get_parameter(bias)
    assert not found[False].any()
    assert found[True].abs().max() > 0.01


def test_the_original_stays_as_it_is(whisper: Speech) -> None:
    name = whisper.sites[0].readers[0]
    before = weight(whisper.original, name).clone()
    ours_speech.rounded(whisper, 1, FINE, Limits(9, 9, kv=8.5))
    assert torch.equal(weight(whisper.original, name), before)
    assert not any(p.grad is not None for p in whisper.original.parameters())


def test_gradients_leave_a_moment_of_every_input(whisper: Speech) -> None:
    statistics, terms = ours_speech.gradient_statistics(whisper.copy(), whisper)
    assert terms == sum(len(ids) for ids in whisper.clip_tokens) - len(whisper.clips)
    for site in whisper.sites:
        (matrix,) = statistics[site.name].matrices
        assert matrix.has_gradients
        assert set(matrix.fisher) == {reader.weight for reader in site.readers}
        assert bool(torch.linalg.eigvalsh(matrix.hessian).min() > -1e-4)
